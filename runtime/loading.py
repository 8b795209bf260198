"""Bringing a layout's units into memory: reuse what is held, read what is missing, size the page pool, warm up.

Units are loaded one at a time, so the peak is the worker's units plus the one being read. What the new layout does not
need is dropped before anything is read.
"""

import logging
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch

from kvstore.ids import WorkerName
from kvstore.page_pool import PagePool
from runtime.batch import LayerKV, StepBatch
from runtime.device import DeviceInfo
from runtime.messages import Load
from runtime.model.builder import UnitBuilder
from runtime.model.config import inspect_model
from runtime.model.spec import ModelSpec
from runtime.stage import Units

log = logging.getLogger("midflight.worker")

UnitKey: TypeAlias = int | Literal["embedding", "lm_head"]
Progress: TypeAlias = Callable[[int, int, str], None]

MIN_FREE_BYTES = 512 << 20
"""Left alone when the pool follows the memory that is free."""
_WARM_UP_ROWS = (1, 2, 3, 4, 8, 16)
_WARM_UP_CHUNK = 64


class Loader:
    """Keeps the units of one worker between layouts (and between heads)."""

    def __init__(self, device: DeviceInfo) -> None:
        self._device = device
        self._builder: UnitBuilder | None = None
        self._source: tuple[str, str, str, str] | None = None
        self._units: dict[UnitKey, object] = {}
        self._pool: PagePool | None = None
        self.implementation = ""
        self.weight_bytes = 0

    def load(self, load: Load, worker: WorkerName, progress: Progress) -> tuple[Units, PagePool]:
        """Hold exactly the units that `load.layout` gives to `worker`, with an empty page pool.

        Raises:
            ModelError: when the model cannot be read.
            MemoryError, RuntimeError: when it does not fit.
        """
        layout = load.layout
        wanted: list[UnitKey] = list(layout.layers_of(worker))
        if layout.embedding_worker == worker:
            wanted.insert(0, "embedding")
        if layout.lm_head_worker == worker:
            wanted.append("lm_head")
        self._pool = None  # before the weights: the old pages are of no use to anybody
        spec = inspect_model(
            load.model, dtype=load.dtype, load_format=load.load_format, max_context=load.max_context or None
        )
        self._prepare(load, spec, set(wanted))
        builder = self._builder
        assert builder is not None
        for count, key in enumerate(wanted):
            if key not in self._units:
                self._units[key] = _build(builder, key)
            progress(count + 1, len(wanted), "reading weights")
        self.weight_bytes = sum(getattr(unit, "nbytes", 0) for unit in self._units.values())
        progress(len(wanted), len(wanted), "warming up")
        pool = self._make_pool(load, spec, layout.layers_of(worker))
        units = Units(
            layers={key: self._units[key] for key in wanted if isinstance(key, int)},  # type: ignore[misc]
            embedding=self._units.get("embedding"),  # type: ignore[arg-type]
            lm_head=self._units.get("lm_head"),  # type: ignore[arg-type]
        )
        warm_up(units, pool, spec, self._device.device)
        self._pool = pool
        return units, pool

    def _prepare(self, load: Load, spec: ModelSpec, wanted: set[UnitKey]) -> None:
        source = (load.model, load.load_format, spec.dtype, load.implementation)
        if source != self._source:
            self._units.clear()
            self._builder = UnitBuilder(spec, device=str(self._device.device), implementation=load.implementation)
            self._source = source
            self.implementation = self._builder.implementation
        for key in [key for key in self._units if key not in wanted]:
            del self._units[key]

    def _make_pool(self, load: Load, spec: ModelSpec, layers: tuple[int, ...]) -> PagePool:
        dtype = getattr(torch, spec.dtype)
        page_bytes = load.block_size * spec.kv_bytes_per_token_layer()
        budget = load.kv_bytes
        if not budget:
            _, free = self._device.memory()
            budget = int((free - MIN_FREE_BYTES) * load.memory_share)
        num_pages = budget // page_bytes if layers else 1
        if num_pages < max(1, len(layers)):
            raise MemoryError(
                f"{budget:,} bytes of KV memory hold {max(0, num_pages)} pages of {page_bytes:,} bytes; one block of "
                f"{len(layers)} layers needs {len(layers)}. Raise --kv-memory or free memory on this host."
            )
        pool = PagePool(
            num_pages, load.block_size, spec.num_kv_heads, spec.head_dim, dtype=dtype, device=self._device.device
        )
        pool.hold(layers)
        return pool


def warm_up(units: Units, pool: PagePool, spec: ModelSpec, device: torch.device) -> None:
    """Run every unit on a few shapes, so that no kernel is compiled or planned inside a request.

    The pages that this takes are given back. A pool too small for a shape skips it.
    """
    dtype = getattr(torch, spec.dtype)
    layers = sorted(units.layers)
    for rows, length in [*((rows, 1) for rows in _WARM_UP_ROWS), (1, _WARM_UP_CHUNK)]:
        blocks_per_row = -(-length // pool.block_size)
        if rows * blocks_per_row * max(1, len(layers)) > pool.num_pages:
            continue
        tables = np.arange(rows * blocks_per_row, dtype=np.int32).reshape(rows, blocks_per_row)
        batch = StepBatch(
            positions=torch.arange(length, device=device).repeat(rows),
            query_starts=np.arange(rows + 1, dtype=np.int32) * length,
            context_lens=np.full(rows, length, dtype=np.int32),
            block_tables=tables,
        )
        with torch.inference_mode():
            hidden = torch.zeros(rows * length, spec.hidden_size, dtype=dtype, device=device)
            if units.embedding is not None:
                hidden = units.embedding(torch.zeros(rows * length, dtype=torch.int64, device=device))
            if layers:
                pool.ensure(tables.ravel())
            for layer in layers:
                hidden = units.layers[layer](hidden, batch, LayerKV(layer, pool.data, pool.page_of(layer)))
            if units.lm_head is not None:
                units.lm_head(hidden[:rows])
    if layers:
        pool.retain_only(np.empty(0, dtype=np.int32))


def _build(builder: UnitBuilder, key: UnitKey) -> object:
    if key == "embedding":
        return builder.embedding()
    if key == "lm_head":
        return builder.lm_head()
    return builder.layer(key)
