"""On a CUDA device: libraries, kernels, graphs, and the whole server against what the CPU and `transformers` say.

Everything here is skipped without a device. `scripts/test -m cuda` runs it on one.
"""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime.batch import LayerKV, StepBatch
from runtime.cuda import fused
from runtime.cuda.attention import Rows, Shape, candidates, check, choose
from runtime.cuda.copies import Copies
from runtime.cuda.graphs import Graphs, capture_streams
from runtime.cuda.runner import Runner
from runtime.cuda.spans import Buckets
from runtime.messages import Sampling, StepPlan
from runtime.model.builder import UnitBuilder
from runtime.model.config import inspect_model
from runtime.model.lean import LeanEmbedding, LeanHead, LeanLayer
from runtime.sampling import SamplingRow, sample
from runtime.stage_state import StageState
from tests.integration.server import Server
from tests.integration.test_equality import generate, load_reference, make_prompts
from tests.integration.test_room import check_pages_follow
from tests.plan_harness import plans_of
from tests.tiny_models import write_tiny

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)
OPTIONS = ("--device", "cuda:0", "--dtype", "float32", "--kv-memory", "64M", "--step-tokens", "64")


# -- attention and small kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("softcap", "is_decode"), [(None, False), (None, True), (20.0, True)])
def test_what_is_chosen_attends_as_plain_torch(dtype, block_size, window, softcap, is_decode) -> None:
    """Prompts with a softcap are the last test of all: what attends to them may have to be compiled, for minutes."""
    shape = Shape(DEVICE, dtype, 32, 8, 128, block_size, 128**-0.5, window, softcap, is_decode)
    for must_capture in {False, is_decode}:
        chosen = choose(dataclasses.replace(shape, must_capture=must_capture))
        assert check(chosen, shape) == ""
        assert not must_capture or chosen.captures


def test_flash_attention_is_used_where_it_can_be() -> None:
    """Whatever this machine has, 16-bit prompts without a softcap must not go row by row."""
    shape = Shape(DEVICE, torch.bfloat16, 32, 8, 128, 256, 128**-0.5)
    assert not isinstance(choose(shape), Rows), {b.name: b.fits(shape) or check(b, shape) for b in candidates()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_operations_equal_torchs(dtype) -> None:
    kernels = fused._tried(DEVICE, dtype)
    if kernels is None:
        pytest.skip("no Triton here")
    assert fused.compare(kernels, DEVICE, dtype) == ""


def test_sampling_equals_the_hosts() -> None:
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)) * 3
    rows = [SamplingRow(Sampling(temperature=t, seed=i, top_k=k), i) for i, (t, k) in enumerate(8 * [(1.0, 40)])]
    rows[3] = SamplingRow(Sampling(temperature=0.0), 0)
    assert sample(logits.cuda(), rows).tokens == sample(logits, rows).tokens


# -- layers and graphs --------------------------------------------------------------------------------------


def lean_units(model: Any, device: torch.device, dtype: torch.dtype) -> tuple[dict[int, Any], Any]:
    states = enumerate(model.model.layers)
    layers = {i: LeanLayer(model.config, i, layer.state_dict(), device, dtype) for i, layer in states}
    return layers, LeanEmbedding(model.model.embed_tokens.weight, device, dtype)


class Side:
    """A stage of four layers on one device, lean ones if no others are given."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        graphs: bool,
        units: Any = None,
        tokens: tuple[int, ...] = (),
    ) -> None:
        config, self.device = model.config, device
        self.layers, self.embedding = units or lean_units(model, device, dtype)
        self.pool = PagePool(400, 16, config.num_key_value_heads, config.head_dim, dtype, device)
        self.pool.hold(self.layers)
        self.state = StageState(16, 1)
        self.runner = Runner(device)
        if graphs:
            sizes = (len(self.layers), config.hidden_size, 16, dtype, device)
            page_shape = tuple(self.pool.data.shape[1:])
            buckets = Buckets((2, 4), (256,), tokens=tokens)
            self.runner.graphs = Graphs(buckets, *sizes, page_shape, capture_streams(device))

    def run(self, plan: StepPlan) -> torch.Tensor:
        planned = self.state.plan_batch(plan)
        self.pool.ensure(planned.new_blocks)
        with torch.inference_mode():
            if self.device.type == "cuda":
                layers = LayerRange(0, len(self.layers))
                return self.runner.run(layers, self.layers, planned, self.pool, None, self.embedding).cpu().clone()
            batch = StepBatch(
                torch.from_numpy(planned.positions), planned.query_starts, planned.context_lens, planned.block_tables
            )
            hidden = self.embedding(torch.from_numpy(planned.tokens))
            for index, layer in self.layers.items():
                hidden = layer(hidden, batch, LayerKV(index, self.pool.data, self.pool.page_of(index)))
            return hidden


def make_plans(num_decodes: int = 12) -> list[StepPlan]:
    rng = np.random.default_rng(1)
    schedule = [[(1, 40)], [(2, 21), (1, 1)], [(3, 9), (1, 1), (2, 1)], *([[(1, 1), (2, 1), (3, 1)]] * num_decodes)]
    return plans_of(schedule, 10, lambda count: rng.integers(0, 300, count).tolist())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def test_lean_layers_equal_the_cpus(tiny: Path) -> None:
    model = load_reference(tiny)
    ours, theirs = (Side(model, device, torch.float32, False) for device in (DEVICE, torch.device("cpu")))
    for plan in make_plans():
        torch.testing.assert_close(ours.run(plan), theirs.run(plan), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [(), (32, 64)], ids=["decode", "prompts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_say_what_eager_steps_say(tiny: Path, dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    if tokens and not fused.has_kernels(DEVICE, dtype):
        pytest.skip("steps with prompts are captured where Triton is")
    model = load_reference(tiny)
    eager, graphed = (Side(model, DEVICE, dtype, graphs, tokens=tokens) for graphs in (False, True))
    graphs = graphed.runner.graphs
    assert graphs is not None
    assert graphs.capture(graphed.layers, [LayerRange(0, 4)], graphed.pool.data) > 0, graphs.why_not
    tolerance = (
        1e-4 if dtype is torch.float32 else 5e-2
    )  # padded products are another kernel's, which sums in another order
    for plan in make_plans():
        torch.testing.assert_close(graphed.run(plan), eager.run(plan), atol=tolerance, rtol=tolerance)
    assert graphed.runner.num_replayed == (15 if tokens else 12)


def test_the_graph_of_the_head_says_what_the_head_says(tiny: Path) -> None:
    model = load_reference(tiny)
    side = Side(model, DEVICE, torch.float32, True)
    weights = model.model.norm.weight, model.lm_head.weight
    head = LeanHead(*weights, model.config.rms_norm_eps, DEVICE, torch.float32)
    assert side.runner.graphs is not None
    assert side.runner.graphs.capture({}, [], side.pool.data, lm_head=head) == 2, side.runner.graphs.why_not
    with torch.inference_mode():
        for rows in (1, 3):
            hidden = torch.randn(rows, model.config.hidden_size, device=DEVICE)
            found, expected = side.runner.read(head, hidden), head(hidden)
            assert found is not None
            torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(found[1][0, :rows], expected.argmax(1))
        assert side.runner.read(head, torch.zeros(5, model.config.hidden_size, device=DEVICE)) is None
    side.runner.graphs.retain((0, 1))
    assert side.runner.read(head, hidden) is None


@pytest.mark.parametrize("kind", ["llama", "mistral_sliding", "gemma2", "gemma3", "qwen3_moe", "mixtral"])
def test_graphs_of_generic_layers_say_what_eager_steps_say(kind: str, tmp_path: Path) -> None:
    """Where the architecture's code cannot be captured, as that of experts in float32, steps stay eager and the reason is told."""
    folder = write_tiny(kind, tmp_path / kind)
    spec, model = inspect_model(str(folder), dtype="float32"), load_reference(folder)
    builder = UnitBuilder(spec, device=str(DEVICE), implementation="transformers")
    layers = {index: builder.layer(index) for index in range(spec.num_layers)}
    units = layers, builder.embedding()
    eager, graphed = (Side(model, DEVICE, torch.float32, graphs, units) for graphs in (False, True))
    graphs = graphed.runner.graphs
    assert graphs is not None
    graphs.capture(layers, [LayerRange(0, 4)], graphed.pool.data)
    assert len(graphs) or (("moe" in kind or kind == "mixtral") and graphs.why_not), graphs.why_not
    for plan in make_plans():
        torch.testing.assert_close(graphed.run(plan), eager.run(plan), atol=1e-4, rtol=1e-4)
    assert graphed.runner.num_replayed == (12 if len(graphs) else 0)


def test_capturing_in_another_thread_disturbs_no_step(tiny: Path) -> None:
    """A change of layout: spans are captured in a thread while the compute thread replays others and allocates."""
    import threading

    model = load_reference(tiny)
    alone, busy = (Side(model, DEVICE, torch.float32, True) for _ in range(2))
    for side in (alone, busy):
        assert side.runner.graphs is not None
        side.runner.graphs.capture(side.layers, [LayerRange(0, 4)], side.pool.data)
    graphs = busy.runner.graphs
    assert graphs is not None
    before, errors = len(graphs), []

    def capture() -> None:
        try:
            graphs.capture(busy.layers, [LayerRange(0, 3), LayerRange(1, 4)], busy.pool.data)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=capture)
    plans = make_plans(num_decodes=60)
    expected = [alone.run(plan) for plan in plans]
    for index, plan in enumerate(plans):
        if index == 5:
            thread.start()
        torch.testing.assert_close(busy.run(plan), expected[index], atol=1e-6, rtol=0)
        torch.empty(1 << 22, device=DEVICE)
    thread.join()
    assert not errors
    assert not graphs.why_not
    assert len(graphs) > before
    graphs.retain((0, 1, 2))
    assert graphs.find(LayerRange(0, 4), 2, 10, 2, busy.layers, busy.pool.data) is None


def test_copies_are_whole_and_in_order() -> None:
    copies, found = Copies(DEVICE), []
    for value in range(20):
        copies.to_host(torch.full((1 << 18,), value, device=DEVICE), found.append)
    there = copies.to_device(torch.arange(1000))
    assert torch.equal(there.cpu(), torch.arange(1000))
    for _ in range(500):
        if len(found) == 20:
            break
        torch.cuda.synchronize()
        import time

        time.sleep(0.01)
    assert [int(tensor[0]) for tensor in found] == list(range(20))
    assert all(tensor.is_cpu and bool((tensor == tensor[0]).all()) for tensor in found)
    rates = copies.measure()
    assert 1e9 < rates.link_bytes_per_s < rates.memory_bytes_per_s < 20e12


# -- the server -----------------------------------------------------------------------------------------------


def bodies_for(prompts: list[list[int]], num_tokens: int = 24) -> list[dict[str, Any]]:
    common = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return [{"prompt": prompt, **common} for prompt in prompts]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral_sliding", "gemma2", "mixtral"])
async def test_two_workers_on_one_device_say_what_transformers_says(kind: str, tmp_path: Path) -> None:
    folder = write_tiny(kind, tmp_path / kind)
    prompts = make_prompts(1)
    with Server(folder, "--stages", "2", *OPTIONS, log=tmp_path / "log") as server:
        answers = await server.post_all("/v1/completions", bodies_for(prompts))
        assert server.audit()["problems"] == []
    model = load_reference(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == generate(model, prompt)


@pytest.mark.parametrize("extra", [(), ("--device-tensors",)])
async def test_a_change_under_load_changes_no_token(extra: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    prompts = make_prompts(5)
    options = ("--layers", "2,2", "--local-workers", "3", *OPTIONS, *extra)
    with Server(tiny, *options, log=tmp_path / "log") as server:
        expected = await server.post_all("/v1/completions", bodies_for(prompts, 200))
        load = asyncio.ensure_future(server.post_all("/v1/completions", bodies_for(prompts, 200)))
        await asyncio.sleep(0.3)
        for stages in (
            [("w0", 0, 1), ("w2", 1, 4)],
            [("w1", 0, 3), ("w2", 3, 4)],
        ):
            wish = {"stages": [{"worker": name, "layers": [start, stop]} for name, start, stop in stages]}
            status, report = await asyncio.to_thread(server.post, "/admin/layout?wait=true", wish)
            assert (status, report["outcome"]) == (200, "committed"), report
        answers = await load
        again = await server.post_all("/v1/completions", bodies_for(prompts, 200))
        assert server.audit()["problems"] == []
    for found in (answers, again):
        assert [a["choices"][0]["token_ids"] for a in found] == [a["choices"][0]["token_ids"] for a in expected]


async def test_pages_go_where_weights_leave(tiny: Path, tmp_path: Path) -> None:
    """Without a size for the pool; the layers are tiny, so that the number of pages tells it, not the device's memory."""
    options = ("--layers", "2,2", "--local-workers", "3", "--device", "cuda:0", "--dtype", "float32")
    with Server(tiny, *options, log=tmp_path / "log") as server:
        await check_pages_follow(server)
        assert "the number of KV pages is fixed" not in server.log_text()


@pytest.mark.parametrize("window", [None, 40])
def test_prompts_with_a_softcap_attend_as_plain_torch(window) -> None:
    shape = Shape(DEVICE, torch.bfloat16, 32, 8, 128, 256, 128**-0.5, window, 20.0)
    assert check(choose(shape), shape) == ""
