"""CUDA graphs of decode steps: static inputs, capture beside a serving thread, and replay.

How it works: the graphs of one bucket share `StaticInputs`: the hidden state (each graph reads it and writes it back, so
graphs of consecutive spans chain by themselves), positions, page tables and slots. A step is padded to its bucket,
copied into them on the compute stream, and then its spans are replayed there one after the other.

Capturing happens in the loader's thread, on a stream of its own that runs nothing else, in mode `thread_local`, which
leaves the serving thread free to allocate and to launch. It does not go through `torch.cuda.graph`, which waits for the
whole device and empties the allocator's cache. Before it, the span runs once for real on another stream with inputs and
pages of its own, so that every kernel is loaded and every workspace exists; layers that are not our own run once more, to see that nothing in
them depends on values that only the device knows (`runtime.cuda.guard`). All graphs share one memory pool: nothing in it
outlives a replay, and replays never overlap.

What is never true: a graph outlives its layers' weights or its pool (it holds both); warming up or capturing writes to an
input or a page that serves; who drops graphs waits for more than the one that is being captured.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvstore.ids import LayerRange
from runtime.batch import LayerKV, StepBatch
from runtime.cuda.guard import StaticOnly
from runtime.cuda.spans import Bucket, Buckets, cover
from runtime.cuda.step import HostStep, PagedStep, Upload, pad_decode

log = logging.getLogger("midflight.worker")

_NO_PAGES = np.empty(0, np.int32)
_failed: list[Any] = []
"""Graphs whose capture failed. Torch's allocator of pinned memory goes on asking them which stream they were captured on."""


class StaticInputs:
    """The tensors that graphs of one bucket read, for all layers of a model. Their addresses never change."""

    def __init__(
        self,
        bucket: Bucket,
        num_layers: int,
        hidden_size: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows, width = bucket.rows, -(-bucket.context // block_size)
        self.bucket = bucket
        self.hidden = torch.zeros(rows, hidden_size, dtype=dtype, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(num_layers, rows, dtype=torch.int64, device=device)
        self.tables = torch.zeros(num_layers, rows, width, dtype=torch.int32, device=device)
        self.context_lens = torch.ones(rows, dtype=torch.int32, device=device)
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._rows = dict(enumerate(range(num_layers)))
        self._device = device

    def fill(self, layers: LayerRange, step: HostStep) -> np.ndarray:
        """Put a decode step over the pages of `layers` in; which row of the step each row now is. Nothing is waited for."""
        padded, source = pad_decode(step, self.bucket.rows)
        upload = Upload(self._device)
        arrays = (padded.positions, padded.slots, padded.context_lens, padded.tables)
        places = [upload.add(array) for array in arrays]
        upload.send()
        positions, slots, contexts, tables = (upload.tensor(place) for place in places)
        self.positions.copy_(positions)
        self.slots[layers.start : layers.stop].copy_(slots)
        self.context_lens.copy_(contexts)
        mine, width = self.tables[layers.start : layers.stop], tables.shape[2]
        mine[:, :, :width].copy_(tables)
        if width < mine.shape[2]:
            mine[:, :, width:].copy_(tables[:, :, :1].expand(-1, -1, mine.shape[2] - width))
        return source

    def batch(self) -> StepBatch:
        """The step as layers want it. Fresh each time: what one graph derives must not be another's input."""
        rows = self.bucket.rows
        paged = PagedStep(
            query_starts=self.query_starts,
            context_lens=self.context_lens,
            tables=self.tables,
            slots=self.slots,
            row_of_layer=self._rows,
            max_query=1,
            max_context=self.bucket.context,
        )
        return StepBatch(
            positions=self.positions,
            query_starts=np.arange(rows + 1, dtype=np.int32),
            context_lens=np.full(rows, self.bucket.context, np.int32),
            block_tables=np.zeros((rows, 1), np.int32),
            paged=paged,
        )

    def run(self, layers: Sequence[tuple[int, Any]], data: torch.Tensor) -> None:
        """Send the hidden state through (index, layer) pairs, over the pages in `data`. This is what a graph holds."""
        batch, hidden = self.batch(), self.hidden
        for index, layer in layers:
            hidden = layer(hidden, batch, LayerKV(index, data, _NO_PAGES))
        self.hidden.copy_(hidden)


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
        self._covers: dict[LayerRange, list[LayerRange]] = {}
        self._broken: str = ""
        self._pool: Any = None
        self._streams = streams
        self.lock = threading.RLock()
        """Held while one graph is captured, and by who drops graphs."""

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def why_not(self) -> str:
        """Why graphs are not used any more; empty while they are."""
        return self._broken

    # -- the compute thread ---------------------------------------------------------------------------------

    def find(
        self, layers: LayerRange, rows: int, context: int, units: Mapping[int, Any], data: torch.Tensor
    ) -> Bucket | None:
        """The bucket in which such a decode step can be replayed over these layers and pages now; else None."""
        bucket, spans = self.buckets.fit(rows, context), self._covers.get(layers)
        if bucket is None or spans is None:
            return None
        for span in spans:
            found = self._captured.get((span, bucket))
            if found is None or found.data is not data:
                return None
            if any(units.get(index) is not layer for index, layer in zip(span, found.layers, strict=True)):
                return None
        return bucket

    def inputs(self, bucket: Bucket) -> StaticInputs:
        """Where a step of this bucket is to be put before `replay`."""
        return self._inputs[bucket]

    def replay(self, layers: LayerRange, bucket: Bucket) -> torch.Tensor:
        """Run what was put into the inputs of `bucket`; its hidden state, ``[bucket.rows, hidden]``, until the next step."""
        for span in self._covers[layers]:
            self._captured[span, bucket].graph.replay()
        return self._inputs[bucket].hidden

    def retain(self, layers: Iterable[int]) -> None:
        """Drop the graphs that hold any other layer. Nothing of them may still be running."""
        keep = set(layers)
        with self.lock:
            for key in [key for key in self._captured if not keep.issuperset(key[0])]:
                del self._captured[key]
            self._covers = {layers: spans for layers, spans in self._covers.items() if keep.issuperset(layers)}
            if not self._captured:
                self._inputs.clear()
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
    ) -> int:
        """Capture what `segments` need and is missing; how many graphs. `rest` is called after each.

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
        for bucket in buckets:
            for span in wanted:
                with self.lock:
                    if (span, bucket) in self._captured:
                        continue
                    if self._broken or is_cancelled():
                        return num_captured
                    layers = [units.get(index) for index in span]
                    if any(layer is None or not getattr(layer, "captures", False) for layer in layers):
                        continue
                    try:
                        self._capture(span, bucket, layers, data)
                    except Exception as error:  # whatever a driver or a library raises
                        self._broken = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                        log.warning("no CUDA graphs: capturing layers %s failed: %s", span, self._broken)
                        return num_captured
                num_captured += 1
                rest()
        with self.lock:
            if not is_cancelled():
                self._covers |= covers
        return num_captured

    def _capture(self, span: LayerRange, bucket: Bucket, layers: Sequence[Any], data: torch.Tensor) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        warm, capturing = self._streams
        pairs = list(zip(span, layers, strict=True))
        with torch.inference_mode(), torch.cuda.stream(warm):
            inputs = self._inputs.get(bucket)
            if inputs is None:
                inputs = StaticInputs(bucket, *self._sizes)
            trial = StaticInputs(bucket, *self._sizes)
            # Of one position each, at the first place of the one page.
            page = torch.zeros((1, *self._page_shape), dtype=data.dtype, device=self._device)
            trial.run(pairs, page)
            is_foreign = any(getattr(layer, "is_foreign", False) for layer in layers)
            if is_foreign and not any(held == span for held, _ in self._captured):
                with StaticOnly():
                    trial.run(pairs, page)
            warm.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.stream(capturing):
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                inputs.run(pairs, data)
                graph.capture_end()
            except BaseException:
                self._end_failed(graph)
                raise
        self._inputs[bucket] = inputs
        self._captured[span, bucket] = _Captured(graph, tuple(layers), data)

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
