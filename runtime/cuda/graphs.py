"""CUDA graphs of steps: static inputs, capture beside a serving thread, and replay.

How it works: the graphs of one bucket share `StaticInputs`: the hidden state (each graph reads it and writes it back, so
graphs of consecutive spans chain by themselves), positions, page tables and slots. A step is padded to its bucket,
copied into them on the compute stream, and then its spans are replayed there one after the other, after a graph of what all of
them share (what the positions are turned by). The LM head, with the choice of the likeliest token, has graphs of its own, one for each
number of rows.

Capturing happens in the loader's thread, on a stream of its own that runs nothing else, in mode `thread_local`, which
leaves the serving thread free to allocate and to launch. It does not go through `torch.cuda.graph`, which waits for the
whole device and empties the allocator's cache. Before it, the span runs once for real on another stream with inputs and
pages of its own, so that every kernel is loaded and every workspace exists; layers that are not our own run once more, to see that nothing in
them depends on values that only the device knows (`runtime.cuda.guard`). All graphs share one memory pool: replays never
overlap, and what they leave is read before the next one, but for what the spans of a step share, which is kept.

What is never true: a graph outlives its layers' weights or its pool (it holds both); warming up or capturing writes to an
input or a page that serves; who drops graphs waits for more than the one that is being captured.
"""

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvstore.ids import LayerRange
from runtime.batch import LayerKV, StepBatch, run_layers
from runtime.cuda.guard import StaticOnly
from runtime.cuda.spans import Bucket, Buckets, cover, num_blocks
from runtime.cuda.step import HostStep, PagedStep, Twins, pad_decode, query_blocks, upload
from runtime.sampling import likeliest

log = logging.getLogger("midflight.worker")

MOST_TWINNED = 1 << 18
"""Entries of page tables that are copied as a whole, whatever a step needs of them: a MiB takes 40 us at 25 GB/s. Of more only what is needed
is, in another launch."""
_NO_PAGES = np.empty(0, np.int32)
_failed: list[Any] = []
"""Graphs whose capture failed. Torch's allocator of pinned memory goes on asking them which stream they were captured on."""


class StaticInputs:
    """The tensors that graphs of one bucket read, for all layers of a model. Their addresses never change.

    `fills`: page tables are filled up to their ends, for attention that reads all of them; else what lies beyond a row's pages is left from
    steps before. As it is made it holds a decode step of one position a row, all at the first place of the first page, or one token with no
    place for its keys and values.
    """

    def __init__(
        self,
        bucket: Bucket,
        num_layers: int,
        hidden_size: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        fills: bool = True,
    ) -> None:
        rows, tokens, width = bucket.rows, bucket.num_tokens, -(-bucket.context // block_size)
        self.bucket = bucket
        self.hidden = torch.zeros(tokens, hidden_size, dtype=dtype, device=device)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "positions": ((tokens,), np.int64),
            "tokens": ((tokens,), np.int64),
            "slots": ((num_layers, tokens), np.int64),
            "context_lens": ((rows,), np.int32),
            "query_starts": ((rows + 1,), np.int32),
        }
        if bucket.tokens:
            arrays["blocks"] = ((2, num_blocks(bucket)), np.int32)
        self._numbers = Twins(arrays, device)
        shape = (num_layers, rows, width)
        self._twin = Twins({"pages": (shape, np.int32)}, device) if math.prod(shape) <= MOST_TWINNED else None
        self._tables = self._twin.there["pages"] if self._twin else torch.zeros(shape, dtype=torch.int32, device=device)
        here = self._numbers.here
        here["context_lens"].fill(1)
        here["query_starts"][:] = np.minimum(np.arange(rows + 1), tokens if not bucket.tokens else 1)
        if bucket.tokens:
            here["slots"].fill(-1)
            here["blocks"][0, 1:] = -1
        self._numbers.send()
        self._rows = dict(enumerate(range(num_layers)))
        self._fills = fills
        self._shared: dict[Any, Any] = {}
        """What every batch has in its memo from the start: of `run_shared`."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 ``[T]``: those of the step."""
        return self._numbers.there["tokens"]

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.hidden.nbytes + self._numbers.nbytes + self._tables.nbytes

    def fill(self, layers: LayerRange, step: HostStep, tokens: np.ndarray) -> np.ndarray | None:
        """Put a step over the pages of `layers` in, with its `tokens`; of a decode step, which row of the step each row now is. Nothing is
        waited for, but what was put in before must have been used."""
        here, slots = self._numbers.here, self._numbers.here["slots"][layers.start : layers.stop]
        rows, count, source = len(step.context_lens), len(step.positions), None
        if self.bucket.tokens:
            blocks = query_blocks(step.query_starts)
            here["positions"][:count], here["tokens"][:count] = step.positions, tokens
            here["tokens"][count:] = 0  # a later hop's may be `AHEAD`, which must not stay for the embedding
            here["context_lens"][:rows] = step.context_lens
            here["query_starts"][: rows + 1] = step.query_starts
            here["query_starts"][rows + 1 :] = count
            here["blocks"][:, : blocks.shape[1]] = blocks
            here["blocks"][0, blocks.shape[1] :] = -1
            slots[:, :count] = step.slots
            slots[:, count:] = -1
            self._fill_tables(layers, step.tables)
        else:
            source = pad_decode(step, self.bucket.rows)
            here["positions"][:], here["tokens"][:] = step.positions[source], tokens[source]
            here["context_lens"][:] = step.context_lens[source]
            slots[:] = step.slots[:, source]
            self._fill_tables(layers, step.tables[:, source])
        self._numbers.send()
        return source

    def _fill_tables(self, layers: LayerRange, pages: np.ndarray) -> None:
        """Put ``[num_layers, R, B]`` in: small tables as a whole, by their twin; of large ones what there is."""
        part = slice(layers.start, layers.stop)
        rows, width = pages.shape[1:]
        if self._twin is not None:
            here = self._twin.here["pages"][part]
            here[:, :rows, :width] = pages
            if self._fills:
                here[:, :rows, width:] = pages[:, :, :1]
            self._twin.send_part("pages", part)
            return
        there, sent = self._tables[part, :rows], upload(pages, self._tables.device)
        there[:, :, :width].copy_(sent)
        if self._fills and width < there.shape[2]:
            there[:, :, width:].copy_(sent[:, :, :1].expand(-1, -1, there.shape[2] - width))

    def batch(self) -> StepBatch:
        """The step as layers want it. Fresh each time: what one graph derives must not be another's input."""
        rows, there = self.bucket.rows, self._numbers.there
        paged = PagedStep(
            query_starts=there["query_starts"],
            context_lens=there["context_lens"],
            tables=self._tables,
            slots=there["slots"],
            row_of_layer=self._rows,
            max_query=self.bucket.tokens or 1,
            max_context=self.bucket.context,
            blocks=there.get("blocks"),
        )
        return StepBatch(
            positions=there["positions"],
            query_starts=np.arange(rows + 1, dtype=np.int32),
            context_lens=np.full(rows, self.bucket.context, np.int32),
            block_tables=np.zeros((rows, 1), np.int32),
            memo=dict(self._shared),
            paged=paged,
        )

    def run_shared(self, prepares: Iterable[Callable[[StepBatch], object]]) -> None:
        """Do once for a step what layers would else do at the first of each span, for batches from now on. A graph holds this, too."""
        self._shared = {}
        batch = self.batch()
        for prepare in prepares:
            prepare(batch)
        self._shared = dict(batch.memo)

    def run(self, layers: Sequence[tuple[int, Any]], data: torch.Tensor) -> None:
        """Send the hidden state through (index, layer) pairs, over the pages in `data`. This is what a graph holds."""
        kvs = [LayerKV(index, data, _NO_PAGES) for index, _ in layers]
        self.hidden.copy_(run_layers([layer for _, layer in layers], self.hidden, self.batch(), kvs))


class StaticHead:
    """The input and the results of a graph of the LM head, for up to a number of rows."""

    def __init__(self, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.hidden = torch.zeros(rows, hidden_size, dtype=dtype, device=device)
        self.logits: torch.Tensor | None = None
        """float32 ``[rows, vocab_size]``."""
        self.likeliest: torch.Tensor | None = None
        """As `runtime.sampling.likeliest` gives it."""

    def run(self, lm_head: Any) -> None:
        """This is what a graph holds."""
        self.logits = logits = lm_head(self.hidden)
        self.likeliest = likeliest(logits)


@dataclass(frozen=True, slots=True)
class _CapturedHead:
    graph: Any
    lm_head: Any
    static: StaticHead


@dataclass(frozen=True, slots=True)
class _CapturedShared:
    """`prepares` are held for what they read; not the layers that they came from."""

    graph: Any
    prepares: tuple[Callable[[StepBatch], object], ...]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Any
    layers: tuple[Any, ...]
    data: torch.Tensor


def capture_streams(device: torch.device) -> tuple[Any, Any]:
    """The streams to warm up and to capture on: two, because a graph keeps the cuBLAS workspace of the one it was captured on.

    Captured kernels keep the priority of their stream too, which is that of steps. Make them once in a process: a
    workspace is never given back.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)


class Graphs:
    """All graphs of one worker, for one page pool at a time. The loader's thread captures, the compute thread replays.

    Args:
        buckets: what to capture for.
        page_shape: that of one page of the pool; the warm-up has a page of its own.
        streams: of `capture_streams`; nothing else may run on them.
    """

    def __init__(
        self,
        buckets: Buckets,
        num_layers: int,
        hidden_size: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        page_shape: tuple[int, ...],
        streams: tuple[Any, Any],
    ) -> None:
        self.buckets = buckets
        self._sizes = (num_layers, hidden_size, block_size, dtype, device)
        self._device = device
        self._page_shape = page_shape
        self._inputs: dict[Bucket, StaticInputs] = {}
        self._captured: dict[tuple[LayerRange, Bucket], _Captured] = {}
        self._heads: dict[int, _CapturedHead] = {}
        self._shared: dict[Bucket, _CapturedShared] = {}
        self._covers: dict[LayerRange, list[LayerRange]] = {}
        self._broken: str = ""
        self._pool: Any = None
        self._streams = streams
        self.lock = threading.RLock()
        """Held while one graph is captured, and by who drops graphs."""

    def __len__(self) -> int:
        return len(self._captured) + len(self._heads)

    @property
    def why_not(self) -> str:
        """Why graphs are not used any more; empty while they are."""
        return self._broken

    # -- the compute thread ---------------------------------------------------------------------------------

    def find(
        self, layers: LayerRange, rows: int, context: int, tokens: int, units: Mapping[int, Any], data: torch.Tensor
    ) -> Bucket | None:
        """The bucket in which such a step can be replayed over these layers and pages now; else None."""
        bucket, spans = self.buckets.fit(rows, context, tokens), self._covers.get(layers)
        if bucket is None or spans is None:
            return None
        for span in spans:
            found = self._captured.get((span, bucket))
            if found is None or found.data is not data:
                return None
            if any(units.get(index) is not layer for index, layer in zip(span, found.layers, strict=True)):
                return None
        return bucket

    def read(self, lm_head: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits ``[N, vocab_size]`` of hidden states ``[N, hidden]``, and `runtime.sampling.likeliest` of N rows or more, until the next
        replay; None where no graph does it."""
        rows = next((rows for rows in self.buckets.of_head() if rows >= len(hidden)), 0)
        found = self._heads.get(rows)
        if found is None or found.lm_head is not lm_head:
            return None
        static = found.static
        static.hidden[: len(hidden)].copy_(hidden)  # what lies beyond is some row or other
        found.graph.replay()
        assert static.logits is not None, "it was captured"
        assert static.likeliest is not None, "it was captured"
        return static.logits[: len(hidden)], static.likeliest

    def inputs(self, bucket: Bucket) -> StaticInputs:
        """Where a step of this bucket is to be put before `replay`."""
        return self._inputs[bucket]

    def replay(self, layers: LayerRange, bucket: Bucket) -> torch.Tensor:
        """Run what was put into the inputs of `bucket`; its hidden state, ``[bucket.num_tokens, hidden]``, until the next step."""
        if (shared := self._shared.get(bucket)) is not None:
            shared.graph.replay()
        for span in self._covers[layers]:
            self._captured[span, bucket].graph.replay()
        return self._inputs[bucket].hidden

    def retain(self, layers: Iterable[int], lm_head: Any = None) -> None:
        """Drop the graphs that hold any other layer, or another LM head. Nothing of them may still be running."""
        keep = set(layers)
        with self.lock:
            self._heads = {rows: head for rows, head in self._heads.items() if head.lm_head is lm_head}
            for key in [key for key in self._captured if not keep.issuperset(key[0])]:
                del self._captured[key]
            self._covers = {layers: spans for layers, spans in self._covers.items() if keep.issuperset(layers)}
            if not len(self):
                self._inputs.clear()
                self._shared.clear()
                self._pool = None  # the allocator takes no more captures into a pool that no graph uses

    def clear(self) -> None:
        """Drop all graphs: the pool is about to be another."""
        self.retain(())

    # -- the loader's thread --------------------------------------------------------------------------------

    def capture(
        self,
        units: Mapping[int, Any],
        segments: Sequence[LayerRange],
        data: torch.Tensor,
        rest: Callable[[], None] = lambda: None,
        is_cancelled: Callable[[], bool] = lambda: False,
        lm_head: Any = None,
    ) -> int:
        """Capture what `segments`, and `lm_head` if there is one, need and is missing; how many graphs. `rest` is called after each.

        Once `is_cancelled` says so nothing more is captured, nor kept: who cancels and then drops graphs waits for one at most. A
        capture that fails ends the use of graphs on this worker: the reason is logged, and steps run eagerly.
        """
        assert self._device.type == "cuda", "only CUDA has graphs"
        num_captured, buckets = 0, self.buckets.all()
        with self.lock:
            held = {span for span, _ in self._captured}
            held = {span for span in held if all((span, bucket) in self._captured for bucket in buckets)}
        covers = {segment: cover(segment, held) for segment in segments}
        wanted = dict.fromkeys(span for spans in covers.values() for span in spans)
        jobs: list[tuple[str, Callable[[], bool], Callable[[], None]]] = []
        for bucket in buckets:
            for span in wanted:
                layers = [units.get(index) for index in span]
                if all(getattr(layer, "captures", False) for layer in layers):
                    is_there = functools.partial(self._captured.__contains__, (span, bucket))
                    jobs.append(
                        (f"layers {span}", is_there, functools.partial(self._capture, span, bucket, layers, data))
                    )
        if getattr(lm_head, "captures", False):
            for rows in reversed(self.buckets.of_head()):
                is_there = functools.partial(self._has_head, rows, lm_head)
                jobs.append(("the LM head", is_there, functools.partial(self._capture_head, rows, lm_head)))
        for what, is_there, make in jobs:
            with self.lock:
                if is_there():
                    continue
                if self._broken or is_cancelled():
                    return num_captured
                try:
                    make()
                except Exception as error:  # whatever a driver or a library raises
                    self._broken = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                    log.warning("no CUDA graphs: capturing %s failed: %s", what, self._broken)
                    return num_captured
            num_captured += 1
            rest()
        with self.lock:
            if not is_cancelled():
                self._covers |= covers
        return num_captured

    def _has_head(self, rows: int, lm_head: Any) -> bool:
        return rows in self._heads and self._heads[rows].lm_head is lm_head

    def _capture(self, span: LayerRange, bucket: Bucket, layers: Sequence[Any], data: torch.Tensor) -> None:
        pairs = list(zip(span, layers, strict=True))
        make = functools.partial(StaticInputs, bucket, *self._sizes, self.buckets.most_positions is not None)
        inputs: Any = self._inputs.get(bucket)
        prepares = tuple(layer.prepare for layer in layers if hasattr(layer, "prepare"))

        def warm_up_shared() -> None:
            nonlocal inputs
            inputs = make()
            make().run_shared(prepares)

        def warm_up() -> None:
            nonlocal inputs
            if inputs is None:
                inputs = make()
            trial = make()
            # Of one position each, at the first place of the one page, if anywhere.
            page = torch.zeros((1, *self._page_shape), dtype=data.dtype, device=self._device)
            trial.run(pairs, page)
            is_foreign = any(getattr(layer, "is_foreign", False) for layer in layers)
            if is_foreign and not any(held == span for held, _ in self._captured):
                with StaticOnly():
                    trial.run(pairs, page)

        if inputs is None and prepares:
            shared = self._record(warm_up_shared, lambda: inputs.run_shared(prepares))
            self._shared[bucket] = _CapturedShared(shared, prepares)
        graph = self._record(warm_up, lambda: inputs.run(pairs, data))
        assert inputs is not None, "warmed up"
        self._inputs[bucket] = inputs
        self._captured[span, bucket] = _Captured(graph, tuple(layers), data)

    def _capture_head(self, rows: int, lm_head: Any) -> None:
        _, hidden_size, _, dtype, device = self._sizes
        made: list[StaticHead] = []

        def warm_up() -> None:
            made.append(StaticHead(rows, hidden_size, dtype, device))
            StaticHead(rows, hidden_size, dtype, device).run(lm_head)

        graph = self._record(warm_up, lambda: made[0].run(lm_head))
        self._heads[rows] = _CapturedHead(graph, lm_head, made[0])

    def _record(self, warm_up: Callable[[], None], run: Callable[[], None]) -> Any:
        """A graph of what `run` queues, after `warm_up`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        warm, capturing = self._streams
        with torch.inference_mode(), torch.cuda.stream(warm):
            warm_up()
            warm.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.stream(capturing):
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                run()
                graph.capture_end()
            except BaseException:
                self._end_failed(graph)
                raise
        return graph

    def _end_failed(self, graph: Any) -> None:
        """After a capture that failed somewhere. The first error is the one to tell; ending what is invalid raises others.

        Torch ends a capture for its allocator only when the driver did: else that would believe for ever that one is under way, and
        neither take back what several streams used nor give anything back to the device.
        """
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):  # it has been ended
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        _failed.append(graph)
