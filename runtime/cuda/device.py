"""What a loader does besides on CUDA: streams for its thread, graphs for the pool it made, memory left free.

One `Queued` per worker. The loader calls it where something is loaded, made or dropped; on the CPU there is none.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from kvstore.ids import LayerRange
from kvstore.page_memory import PageMemory
from kvstore.page_pool import PagePool
from runtime.cuda import fused
from runtime.cuda.attention import Shape, choose, find
from runtime.cuda.copies import Copies
from runtime.cuda.graphs import Graphs, capture_streams
from runtime.cuda.memory import kv_budget, reserve_for
from runtime.cuda.runner import Runner
from runtime.cuda.spans import MAX_ROWS, Buckets, make_buckets
from runtime.cuda.virtual import DeviceMemory
from runtime.model.spec import ModelSpec
from runtime.stage import Units

log = logging.getLogger("midflight.worker")

GATHER_BYTES = 256 << 20
"""The copy of keys and values that one layer of a captured step may make, where attention needs one."""


class Queued:
    """The device's side of one worker's loader."""

    def __init__(self, device: torch.device) -> None:
        self.runner = Runner(device)
        self.copies = Copies(device)
        self._capture_streams = capture_streams(device)
        self._device = device
        self._pool: PagePool | None = None
        self._side: Any = None
        self._compute: Any = None

    def settle_thread(self) -> None:
        """The calling thread computes: what it queues goes before what others queue."""
        torch.cuda.set_device(self._device)
        if self._compute is None:  # one for all heads that this process ever serves
            self._compute = torch.cuda.Stream(self._device, priority=-1)
        torch.cuda.set_stream(self._compute)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What runs within is a loader's thread's: beside the steps, and done when this ends."""
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            try:
                yield
            finally:
                self._side.synchronize()

    def budget(self, spec: ModelSpec, block_size: int, implementation: str) -> int:
        """Bytes for a page pool at most, the weights being loaded."""
        buckets = self._buckets(spec, block_size, implementation)
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        reserve = reserve_for(spec, buckets, block_size)
        log.info("left free of the KV pages: %d MiB", reserve.total >> 20)
        return kv_budget(free + cached, reserve)

    def memory(self, capacity: int) -> PageMemory:
        """Memory for up to `capacity` bytes of pages.

        Raises:
            DriverError: the device cannot grow and shrink it.
        """
        return DeviceMemory(self._device, capacity)

    def drop_pool(self) -> None:
        """Let go of the pool, so that its memory is free for another. What was queued for it is waited for."""
        torch.cuda.current_stream(self._device).synchronize()
        graphs = self.runner.graphs
        with graphs.lock if graphs is not None else nullcontext():
            if graphs is not None:
                graphs.clear()
            self.runner.graphs, self._pool = None, None
            torch.cuda.empty_cache()

    def pool_made(self, pool: PagePool, spec: ModelSpec, implementation: str) -> None:
        """Graphs from now on are over `pool`, the one before having been dropped."""
        assert self._pool is None, "a worker has one pool"
        self._pool = pool
        buckets = self._buckets(spec, pool.block_size, implementation)
        sizes = (spec.num_layers, spec.hidden_size, pool.block_size, pool.data.dtype, self._device)
        page_shape = tuple(pool.data.shape[1:])
        self.runner.graphs = Graphs(buckets, *sizes, page_shape=page_shape, streams=self._capture_streams)

    def capture(
        self,
        units: Units,
        segments: Sequence[LayerRange],
        rest: Callable[[], None] = lambda: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Capture what steps over `segments`, and the LM head that is held, will replay and is not there yet."""
        graphs, pool = self.runner.graphs, self._pool
        if graphs is None or pool is None:
            return
        torch.cuda.current_stream(self._device).synchronize()  # the weights are there, for whatever stream reads them
        count = graphs.capture(units.layers, segments, pool.data, rest, is_cancelled, units.lm_head)
        log.info("%d graphs captured, %d in all", count, len(graphs))

    def retain(self, layers: Iterable[int], lm_head: Any) -> None:
        """Only the graphs of these layers and this LM head stay, and no pool without any layer; what was dropped is given back, for who shares the device."""
        kept = set(layers)
        if not kept:
            self.drop_pool()
            return
        graphs = self.runner.graphs
        with graphs.lock if graphs is not None else nullcontext():
            if graphs is not None:
                graphs.retain(kept, lm_head)
            torch.cuda.empty_cache()  # not beside a capture, which would keep what is dropped

    def _buckets(self, spec: ModelSpec, block_size: int, implementation: str) -> Buckets:
        dtype = getattr(torch, spec.dtype)
        windows = set(spec.layer_windows) or {spec.sliding_window}
        shapes = [
            Shape(
                device=self._device,
                dtype=dtype,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                block_size=block_size,
                scale=spec.head_dim**-0.5,
                sliding_window=window,
                is_decode=True,
                must_capture=True,
            )
            for window in windows
        ]
        backends = [choose(shape) for shape in shapes]
        most = None
        # Generic layers may attend with a softcap or a scale of their own, for which another back end may be chosen.
        if implementation != "lean" or any(backend.reads_all for backend in backends):
            most = GATHER_BYTES // spec.kv_bytes_per_token_layer()
        # What lean layers pad their steps with has no place among the pages; that is the kernels' (`runtime.cuda.fused`).
        prompts = implementation == "lean" and fused.has_kernels(self._device, dtype)
        prompts = prompts and all(find(dataclasses.replace(shape, is_decode=False)) is not None for shape in shapes)
        return make_buckets(MAX_ROWS, spec.max_context, block_size, most, prompts=prompts)
