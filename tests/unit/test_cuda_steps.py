"""Steps of the device back end on the CPU: the runner eagerly, and padded through the inputs that graphs read, equal the kernels."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from api.config import ServeConfig
from kvstore.ids import LayerRange
from kvstore.page_memory import HostMemory
from kvstore.page_pool import PagePool
from runtime import attention
from runtime.cuda import graphs
from runtime.cuda.graphs import Graphs, StaticInputs
from runtime.cuda.runner import Runner
from runtime.cuda.spans import (
    LONGEST_SPAN,
    MAX_ROWS,
    PROMPT_CONTEXT,
    PROMPT_TOKENS,
    QUERIES,
    Bucket,
    Buckets,
    cover,
    make_buckets,
    num_blocks,
    spans_of,
    static_bytes,
)
from runtime.cuda.step import HostStep, host_step, pad_decode, query_blocks
from runtime.layout import Layout, Segment
from runtime.messages import AHEAD, Row, Sampling, SequenceStart, StepPlan
from runtime.model import lean
from runtime.model.lean import LeanEmbedding, LeanHead, LeanLayer
from runtime.sampling import sample_queued
from runtime.stage import Stage, Units, make_batch
from runtime.stage_state import StageState

CPU = torch.device("cpu")
SHAPE = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
    max_position_embeddings=256,
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=11),
}
BLOCK_SIZE = 8


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).float().eval()


class Side:
    """A stage of all layers: its own pages, its own memory of the sequences, and one way to run a plan."""

    def __init__(self, model, monkeypatch, *, plain):
        with monkeypatch.context() as patch:
            if plain:
                for module in (attention, lean):
                    patch.setattr(module, "has_kernels", lambda device, dtype: False)
            states = enumerate(model.model.layers)
            self.layers = {i: LeanLayer(model.config, i, x.state_dict(), "cpu", torch.float32) for i, x in states}
        self.embedding = LeanEmbedding(model.model.embed_tokens.weight, "cpu", torch.float32)
        self.pool = PagePool(200, BLOCK_SIZE, 2, 16, torch.float32, "cpu")
        self.pool.data.fill_(torch.nan)
        self.pool.hold(self.layers)
        self.state = StageState(BLOCK_SIZE, 1)
        self.inputs = {}

    def plan(self, plan):
        planned = self.state.plan_batch(plan)
        self.pool.ensure(planned.new_blocks)
        return planned

    def by_kernels(self, plan):
        from runtime.batch import LayerKV

        planned = self.plan(plan)
        batch = make_batch(planned, CPU)
        hidden = self.embedding(torch.from_numpy(planned.tokens))
        for index, layer in self.layers.items():
            hidden = layer(hidden, batch, LayerKV(index, self.pool.data, self.pool.page_of(index)))
        return hidden

    def by_runner(self, plan):
        """Two hops of the same worker, the hidden state handed from one to the other."""
        planned, runner = self.plan(plan), Runner(CPU)
        first = runner.finish(runner.run(LayerRange(0, 1), self.layers, planned, self.pool, None, self.embedding))
        return runner.run(LayerRange(1, 3), self.layers, planned, self.pool, first, None)

    def by_inputs(self, plan, bucket):
        """What a graph of this bucket would hold, for two spans, with the numbers of the steps before still in the inputs."""
        planned = self.plan(plan)
        if bucket not in self.inputs:
            self.inputs[bucket] = StaticInputs(bucket, 3, 48, BLOCK_SIZE, torch.float32, CPU)
        inputs = self.inputs[bucket]
        host = host_step(make_batch(planned, CPU), planned.positions, self.pool, (0, 1, 2))
        inputs.fill(LayerRange(0, 3), host, planned.tokens)
        inputs.run_shared([self.layers[0].prepare])
        inputs.hidden.copy_(self.embedding(inputs.tokens))
        inputs.run([(0, self.layers[0])], self.pool.data)
        inputs.run([(1, self.layers[1]), (2, self.layers[2])], self.pool.data)
        return inputs.hidden[: len(planned.positions)].clone()


def make_plans(sample=False):
    """Prompts of three sequences in chunks, mixed with decode rows, then decode steps alone."""
    rng = np.random.default_rng(4)
    lengths, blocks, used = {}, iter(rng.permutation(60).tolist()), {}
    schedule = [[(1, 19)], [(1, 1), (2, 30)], [(2, 1), (3, 5), (1, 1)], *([[(1, 1), (2, 1), (3, 1)]] * 6), [(2, 1)]]
    for ordinal, step in enumerate(schedule):
        rows = []
        for sequence, count in step:
            start = lengths.get(sequence, 0)
            lengths[sequence] = start + count
            needed = -(-lengths[sequence] // BLOCK_SIZE) - used.get(sequence, 0)
            used[sequence] = used.get(sequence, 0) + needed
            new = [int(next(blocks)) for _ in range(needed)]
            tokens = rng.integers(0, 97, count).tolist()
            begin = None if start else SequenceStart(count, Sampling(seed=sequence), new, [])
            rows.append(Row(sequence, start, tokens, new if start else [], sample and count == 1, begin))
        yield StepPlan(1, ordinal, 0, rows, [])


def test_the_runner_equals_the_kernels(model, monkeypatch):
    kernels, plain = Side(model, monkeypatch, plain=False), Side(model, monkeypatch, plain=True)
    for plan in make_plans():
        torch.testing.assert_close(plain.by_runner(plan), kernels.by_kernels(plan), atol=2e-5, rtol=1e-5)


class Arriving(torch.Tensor):
    """As what the door brings from another device: there on some stream, when an event says so."""

    arrived = "event"

    def record_stream(self, stream):
        stream.told.append("recorded")


@pytest.mark.parametrize("num_layers", [0, 1])
def test_what_is_still_arriving_is_waited_for(model, num_layers, monkeypatch):
    """An end of the model without layers reads it, too."""
    side, told = Side(model, monkeypatch, plain=True), []
    stream = SimpleNamespace(told=told, wait_event=told.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    planned = side.plan(next(make_plans()))
    hidden = torch.zeros(len(planned.positions), 48).as_subclass(Arriving)
    Runner(CPU).run(LayerRange(0, num_layers), side.layers, planned, side.pool, hidden, None)
    assert told == ["event", "recorded"]


@pytest.mark.parametrize("rows", [3, 4, 8])
def test_padding_to_a_bucket_changes_no_row_and_no_page(model, rows, monkeypatch):
    exact, padded = Side(model, monkeypatch, plain=True), Side(model, monkeypatch, plain=True)
    for plan in make_plans():
        expected = exact.by_runner(plan)
        is_decode = all(len(row.tokens) == 1 for row in plan.rows)
        found = padded.by_inputs(plan, Bucket(rows, 64)) if is_decode else padded.by_runner(plan)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.pool.data, exact.pool.data, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_step_with_prompts_is_padded_with_what_has_no_place(model, monkeypatch):
    """Triton's kernels alone know of that: on a device, or ``TRITON_INTERPRET=1``."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton interprets its kernels when TRITON_INTERPRET=1")
    from runtime.cuda import attention as device_attention
    from runtime.cuda import fused, kernels

    exact, padded = Side(model, monkeypatch, plain=True), Side(model, monkeypatch, plain=True)
    expected = [exact.by_runner(plan) for plan in make_plans()]
    monkeypatch.setattr(fused, "_kernels", lambda x: kernels)
    monkeypatch.setattr(device_attention, "candidates", lambda: (device_attention.TritonRows(interpreted=True),))
    device_attention.find.cache_clear()
    for plan, wanted in zip(make_plans(), expected, strict=True):
        found = padded.by_inputs(plan, Bucket(4, 64, 32))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    device_attention.find.cache_clear()
    torch.testing.assert_close(padded.pool.data, exact.pool.data, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("counts", [(3,), (1, 2), (0, 3)])
def test_a_stage_with_a_runner_says_what_one_without_says(model, counts, monkeypatch):
    """Two workers in a chain, sampling included; the first may hold the embedding alone."""
    stops = np.cumsum(counts).tolist()
    pieces = zip([0, *stops], stops, strict=False)
    segments = tuple(Segment(f"w{i}", LayerRange(start, stop)) for i, (start, stop) in enumerate(pieces))
    layout = Layout(1, 3, segments)
    answers = []
    for plain in (False, True):
        side = Side(model, monkeypatch, plain=plain)
        head = LeanHead(model.model.norm.weight, model.lm_head.weight, model.config.rms_norm_eps, "cpu", torch.float32)
        units = Units(side.layers, side.embedding, head, Runner(CPU) if plain else None)
        stages = []
        for segment in segments:
            pool = PagePool(200, BLOCK_SIZE, 2, 16, torch.float32, "cpu")
            pool.hold(segment.layers)
            stages.append(Stage(layout, segment.worker, units, pool, CPU))
        tokens = []
        with torch.inference_mode():
            for plan in make_plans(sample=True):
                hidden = None
                for hop, stage in enumerate(stages):
                    hidden = stage.run(plan, hop, hidden)
                tokens.append(stages[-1].sample(hidden).tokens)
                assert stages[-1].computed_s(1.0, 2.0) == 2.0
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens in answers[0]] == [0, 1, 2, *[3] * 6, 1]


@pytest.mark.parametrize(("early", "moves"), [(False, False), (False, True), (True, False)])
def test_a_step_that_is_planned_while_another_is_waited_for(model, early, moves, monkeypatch):
    """Whatever happens to the pages before it runs. Sampling is that of devices, which are waited for; `early`: as where the same worker's first
    hop has the next step before its last hop samples this one."""
    monkeypatch.setattr("runtime.stage.sample", sample_queued)
    layout, answers = Layout(1, 3, (Segment("w0", LayerRange(0, 3)),)), []
    for ahead in (False, True):
        side = Side(model, monkeypatch, plain=True)
        head = LeanHead(model.model.norm.weight, model.lm_head.weight, model.config.rms_norm_eps, "cpu", torch.float32)
        pool = PagePool(200, BLOCK_SIZE, 2, 16, torch.float32, "cpu", HostMemory(200 * 2 * BLOCK_SIZE * 2 * 16 * 4))
        pool.hold([*range(3), 9])
        pool.ensure(range(100), [9])
        runner = Inputs(CPU)
        stage = Stage(layout, "w0", Units(side.layers, side.embedding, head, runner), pool, CPU)
        plans, tokens = list(make_plans(sample=True)), []
        with torch.inference_mode():
            for at, plan in enumerate(plans):
                hidden = stage.run(plan, 0, None)
                following = plans[at + 1 : at + 2] if ahead else []
                stage.meanwhile = functools.partial(plan_all, stage, following)
                if early:
                    stage.meanwhile()
                tokens.append(stage.sample(hidden).tokens)
                if moves and at == 4:
                    pool.drop([9])
                    pool.resize(100)
        assert runner.num_prepared == (len(plans) - 1 if ahead else 0)
        assert bool(pool.num_moves) == moves
        answers.append(tokens)
    assert answers[0] == answers[1]


def plan_all(stage, plans):
    for plan in plans:
        stage.plan_ahead(plan, 0)


class Inputs(Runner):
    """Runs every step as graphs would: out of their inputs, by the numbers that were found ahead if there are any."""

    num_prepared = 0

    def _eager(self, layers, units, step, planned, pool, hidden, embedding):
        self.num_prepared += planned.numbers is not None
        numbers = self._numbers(layers, planned, pool)
        expected = host_step(step, planned.positions, pool, tuple(layers))
        for field in dataclasses.fields(expected):
            assert np.array_equal(getattr(numbers, field.name), getattr(expected, field.name))
        return super()._eager(layers, units, step, planned, pool, hidden, embedding)


def test_what_a_later_hop_has_for_tokens_never_meets_the_embedding():
    """Of a step that was formed ahead only the first hop is told the tokens; the inputs stay when it becomes the first."""
    inputs = StaticInputs(Bucket(4, 64, 32), 1, 48, BLOCK_SIZE, torch.float32, CPU)

    def fill(count, token):
        tables = np.zeros((1, 1, 1), np.int32)
        starts, lens = np.array([0, count], np.int32), np.array([count], np.int32)
        step = HostStep(np.arange(count), starts, lens, tables, np.arange(count)[None])
        inputs.fill(LayerRange(0, 1), step, np.full(count, token))

    fill(20, AHEAD)
    fill(5, 7)
    assert inputs.tokens.tolist() == [7] * 5 + [0] * 27


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("most", [0, 1 << 18])
def test_tables_that_are_too_large_to_be_copied_whole(fills, most, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TWINNED", most)
    inputs = StaticInputs(Bucket(4, 64), 3, 48, BLOCK_SIZE, torch.float32, CPU, fills)
    tables = np.arange(2 * 2 * 3, dtype=np.int32).reshape(2, 2, 3) + 1
    lens = np.array([17, 20], np.int32)
    inputs.fill(
        LayerRange(1, 3), HostStep(lens - 1, np.arange(3), lens, tables, np.zeros((2, 2), np.int64)), np.zeros(2)
    )
    found = inputs.batch().paged.tables.numpy()
    assert not found[0].any()
    assert (found[1:, :, :3] == tables[:, [0, 1, 0, 0]]).all()
    assert (found[1:, :, 3:] == (tables[:, [0, 1, 0, 0], :1] if fills else 0)).all()


def test_padding_repeats_the_row_that_costs_the_least(model, monkeypatch):
    side = Side(model, monkeypatch, plain=True)
    planned = [side.plan(plan) for plan in make_plans()][4]
    host = host_step(make_batch(planned, CPU), planned.positions, side.pool, (0, 2))
    shortest = int(host.context_lens.argmin())
    assert pad_decode(host, 8).tolist() == [0, 1, 2, *[shortest] * 5]


# -- which graphs there are ---------------------------------------------------------------------------------


@given(st.integers(0, 90), st.integers(0, 90), st.sampled_from([1, 2, 4, 8]))
def test_spans_cover_a_segment_once_on_the_grid(start, length, longest):
    layers = LayerRange(start, start + length)
    spans = spans_of(layers, longest)
    assert [layer for span in spans for layer in span] == list(layers)
    assert all(span.start % len(span) == 0 and longest % len(span) == 0 for span in spans)
    assert all(len(a) < longest or len(b) < longest or a.stop % longest == 0 for a, b in pairwise(spans))


BOUNDS = st.lists(st.integers(0, 48), min_size=4, max_size=4).map(sorted)


@given(BOUNDS, st.sampled_from([1, 2, 4, 8]))
def test_layers_that_stay_keep_their_spans_where_others_arrive(bounds, longest):
    """A worker has [b, c) and gets [a, d)."""
    a, b, c, d = bounds
    held = spans_of(LayerRange(b, c), longest)
    pieces = cover(LayerRange(a, d), held, longest)
    assert [layer for span in pieces for layer in span] == list(range(a, d))
    new = [layer for span in pieces if span not in held for layer in span]
    assert sorted([*new, *range(b, c)]) == list(range(a, d)), "what stays is captured again, or what arrives is not"


@given(BOUNDS, st.sampled_from([1, 2, 4, 8]))
def test_where_layers_leave_only_a_cut_span_is_captured_again(bounds, longest):
    """A worker has [a, c) and gets [b, d)."""
    a, b, c, d = bounds
    held = spans_of(LayerRange(a, c), longest)
    pieces = cover(LayerRange(b, d), held, longest)
    assert [layer for span in pieces for layer in span] == list(range(b, d))
    again = [layer for span in pieces if span not in held for layer in span if layer < c]
    cut = [layer for span in held if span.start < b < span.stop for layer in span if layer >= b]
    assert again == cut
    assert len(again) < longest


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), min_size=1, max_size=12))
def test_however_often_it_changes_there_are_few_pieces(segments):
    held: set[LayerRange] = set()
    for start, stop in segments:
        layers = LayerRange(start, stop)
        held = {span for span in held if start <= span.start and span.stop <= stop}
        pieces = cover(layers, held)
        assert [layer for span in pieces for layer in span] == list(layers)
        assert len(pieces) <= len(spans_of(layers)) + LONGEST_SPAN
        assert all(len(span) <= LONGEST_SPAN and span.start % len(span) == 0 for span in pieces)
        held |= set(pieces)


@given(st.integers(1, 300), st.integers(1, 9000), st.sampled_from([16, 256]), st.sampled_from([None, 1 << 16]))
def test_every_decode_step_that_may_come_fits_in_a_bucket(rows, context, block_size, most):
    buckets = make_buckets(64, 8192, block_size, most, prompts=True)
    bucket = buckets.fit(rows, context, rows)
    if most is None or rows * context <= most // 8:  # a bucket is less than twice the rows, and four times the context
        assert (bucket is None) == (rows > 64 or context > 8192)
    if bucket is not None:
        assert most is None or bucket.rows * bucket.context <= most
        assert bucket in buckets.all()
        assert bucket.rows >= rows
        assert bucket.context >= context
        assert bucket.context % block_size == 0
        assert bucket.rows <= 2 * rows


@given(st.integers(1, 90), st.integers(1, 600), st.integers(1, 40000), st.sampled_from([4096, 32768]))
def test_steps_with_prompts_have_buckets_of_their_own(rows, more, context, max_context):
    buckets = make_buckets(64, max_context, 16, prompts=True)
    tokens = rows + more
    bucket = buckets.fit(rows, context, tokens)
    assert (bucket is None) == (rows > 64 or tokens > PROMPT_TOKENS[-1] or context > min(max_context, PROMPT_CONTEXT))
    if bucket is not None:
        assert bucket in buckets.all()
        assert bucket.rows >= rows
        assert bucket.context >= context
        assert bucket.tokens == min(size for size in PROMPT_TOKENS if size >= tokens)
        assert bucket.rows <= bucket.tokens, "every row has a token"
    assert make_buckets(64, max_context, 16).fit(rows, 1, tokens) is None


def test_as_many_rows_as_the_server_takes_have_buckets():
    buckets = make_buckets(MAX_ROWS, 8192, 256, prompts=True)
    limit = ServeConfig(model="", home=Path()).max_running
    assert buckets.fit(limit, 8192, limit) is not None
    assert buckets.fit(limit - 1, 8192, limit + 200) is not None
    assert buckets.of_head()[-1] < limit, "logits of so many rows are not kept"


@given(st.lists(st.integers(1, 70), min_size=1, max_size=20))
def test_blocks_of_queries_hold_every_token_once(counts):
    starts = np.cumsum([0, *counts]).astype(np.int32)
    rows, firsts = query_blocks(starts)
    found = [
        (row, token)
        for row, first in zip(rows, firsts, strict=True)
        for token in range(first, min(first + QUERIES, starts[row + 1]))
    ]
    assert found == [(row, token) for row in range(len(counts)) for token in range(starts[row], starts[row + 1])]
    assert len(rows) <= num_blocks(Bucket(len(counts), 64, sum(counts)))


def test_the_bytes_of_the_inputs_are_what_they_take():
    buckets = Buckets((1, 4), (64, 256), tokens=(32,))
    total = static_bytes(buckets, 5, 48 * 4, 16)
    held = sum(StaticInputs(bucket, 5, 48, 16, torch.float32, CPU).nbytes for bucket in buckets.all())
    assert abs(total - held) <= 16 * 7 * len(buckets.all()), "up to the rounding of seven arrays"


def test_without_a_capture_nothing_is_replayed(model, monkeypatch):
    side = Side(model, monkeypatch, plain=True)
    unused = Graphs(
        Buckets((4,), (64,)), 3, 48, BLOCK_SIZE, torch.float32, CPU, tuple(side.pool.data.shape[1:]), (None, None)
    )
    runner = Runner(CPU, unused)
    for plan in make_plans():
        runner.run(LayerRange(0, 3), side.layers, side.plan(plan), side.pool, None, side.embedding)
    assert (runner.num_replayed, runner.num_eager) == (0, 10)
    with pytest.raises(AssertionError, match="only CUDA"):
        unused.capture(side.layers, [LayerRange(0, 3)], side.pool.data)


class Book:
    """Graphs whose captures are only written down: (span, bucket) in the order in which they were made."""

    def __init__(self, monkeypatch):
        self.captured = []
        sizes = (16, 8, BLOCK_SIZE, torch.float32, torch.device("cuda", 0), (2, BLOCK_SIZE, 1, 8))
        self.graphs = Graphs(Buckets((2, 4), (64,)), *sizes, (None, None))
        self.units = {index: SimpleNamespace(captures=True) for index in range(16)}
        self.data = torch.empty(0)
        self.replayed = []
        monkeypatch.setattr(self.graphs, "_capture", self._capture)

    def _capture(self, span, bucket, layers, data):
        self.captured.append((span, bucket.rows))
        graph = SimpleNamespace(replay=lambda: self.replayed.append(span))
        self.graphs._captured[span, bucket] = graphs._Captured(graph, tuple(layers), data)
        self.graphs._inputs[bucket] = SimpleNamespace(hidden=None)

    def capture(self, *segments, is_cancelled=lambda: False):
        self.captured.clear()
        self.graphs.capture(self.units, segments, self.data, is_cancelled=is_cancelled)
        return {layer for span, _ in self.captured for layer in span}

    def find(self, layers):
        return self.graphs.find(layers, 3, 10, 3, self.units, self.data)


def test_a_change_of_layout_captures_only_what_arrives(monkeypatch):
    book = Book(monkeypatch)
    before, after = LayerRange(3, 9), LayerRange(1, 14)
    assert book.capture(before) == set(before)
    assert len(book.captured) == 2 * len(spans_of(before))
    assert book.capture(after) == set(after) - set(before)
    assert book.find(before) == book.find(after) == Bucket(4, 64), "both layouts serve while it changes"
    book.graphs.replay(after, Bucket(4, 64))
    assert [layer for span in book.replayed for layer in span] == list(after)
    assert book.capture(before, after) == set()
    left = LayerRange(6, 14)
    assert book.capture(left) == {6, 7}, "of the span that is cut, what stays"
    book.graphs.retain(left)
    assert book.find(left) == Bucket(4, 64)
    assert book.find(before) is book.find(after) is None
    assert book.capture(left) == set()


def test_a_cancelled_capture_is_begun_again(monkeypatch):
    book, layers = Book(monkeypatch), LayerRange(0, 10)
    book.capture(layers, is_cancelled=lambda: len(book.captured) == 4)
    assert book.find(layers) is None
    assert [*book.captured] == [
        (LayerRange(0, 4), 4),
        (LayerRange(4, 8), 4),
        (LayerRange(8, 10), 4),
        (LayerRange(0, 4), 2),
    ]
    book.capture(layers)
    assert [*book.captured] == [(LayerRange(4, 8), 2), (LayerRange(8, 10), 2)]
    assert book.find(layers) == Bucket(4, 64)
    book.units[5] = SimpleNamespace(captures=True)
    assert book.find(layers) is None, "another layer of that number has come"


def test_who_drops_graphs_waits_for_one_capture_at_most(monkeypatch):
    book, begun, goes_on, cancelled = Book(monkeypatch), threading.Event(), threading.Event(), threading.Event()
    capture = book._capture

    def slow(*what):
        begun.set()
        assert goes_on.wait(60.0)
        capture(*what)

    monkeypatch.setattr(book.graphs, "_capture", slow)
    loader = threading.Thread(target=book.capture, args=(LayerRange(0, 8),), kwargs={"is_cancelled": cancelled.is_set})
    loader.start()
    assert begun.wait(60.0)
    cancelled.set()
    dropped = threading.Thread(target=book.graphs.clear)
    dropped.start()
    dropped.join(0.05)
    assert dropped.is_alive(), "what is being captured is not dropped under its capture"
    goes_on.set()
    for thread in (loader, dropped):
        thread.join(60.0)
    assert book.captured == [(LayerRange(0, 4), 4)]
    assert not len(book.graphs)
    assert book.find(LayerRange(0, 8)) is None


@pytest.mark.parametrize("fails_in", ["capture_begin", "run", "capture_end"])
def test_torchs_allocator_hears_of_the_end_of_a_capture_that_failed(fails_in, monkeypatch):
    """As torch does it: the driver's refusal to end a capture comes before the allocator is told."""
    recording = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            recording.append(pool)
            self.call("capture_begin")

        def capture_end(self):
            if fails_in != "run":
                raise RuntimeError("no capture is under way")
            recording.remove("pool")

        def call(self, name):
            if name == fails_in:
                raise RuntimeError(f"{name} is not permitted")

    def end(device, pool):
        if pool not in recording:
            raise RuntimeError("not currently recording to mempool_id")
        recording.remove(pool)

    def layer(hidden, batch, kv):
        if fails_in == "run" and recording:
            raise RuntimeError("run is not permitted")
        return hidden

    sizes = (3, 48, BLOCK_SIZE, torch.float32, CPU, (2, BLOCK_SIZE, 2, 16))
    stream = SimpleNamespace(synchronize=lambda: None)
    found = Graphs(Buckets((2,), (64,)), *sizes, (stream, stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    with pytest.raises(RuntimeError, match="not permitted" if fails_in != "capture_end" else "under way"):
        found._capture(LayerRange(0, 1), Bucket(2, 64), [layer], torch.zeros(1))
    assert not recording
    assert not len(found)
