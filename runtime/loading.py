"""A worker's units in memory: read what is missing, drop what is not needed, size the page pool, warm up.

Units are loaded one at a time, so the peak is the worker's units plus the one being read. A *shadow* is loaded by a
thread of its own while steps run, from the checkpoint or from the peer that holds the unit (`runtime.exchange`), with rests
between pieces of the work that the worker's limiter sets, and warmed up on pages that nobody else uses. (Not at a lower
priority, unless the worker serves nothing yet: a thread that the system starves while it holds the interpreter's lock starves the steps with it.)
Its units stand beside the others as soon as they are built; nothing runs on them before the flip. Only one thread builds at a time.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from kvstore.ids import LayerRange, WorkerName
from kvstore.page_memory import HostMemory, PageMemory
from kvstore.page_pool import PagePool
from runtime import attention, heap, profile, sampling
from runtime.batch import LayerKV, StepBatch
from runtime.cuda.device import Queued
from runtime.cuda.step import attach
from runtime.device import DeviceInfo
from runtime.exchange import FetchFailed, Importer, Sources
from runtime.kernels import team
from runtime.member import Pace, UnitKey, unit_keys
from runtime.messages import MIN_FREE_BYTES, READING, Load, ProfilePoint
from runtime.model.builder import UnitBuilder
from runtime.model.config import inspect_model
from runtime.model.spec import ModelSpec
from runtime.priority import thread_gives_way
from runtime.stage import Units
from runtime.trace import Tracer

log = logging.getLogger("midflight.worker")

SHADOW_ENDS_WITHIN_S = 20.0
"""How long a cancelled shadow may go on with the piece of work that it does before what waits for it fails, a load or the next shadow."""
_WARM_UP_ROWS = (1, 2, 3, 4, 8, 16)
_WARM_UP_CHUNK = 64
WARM_UP_BLOCK_SIZE = 16
GIVE_BACK_AFTER_S = 0.5
"""How long after units were dropped their memory is given back, and how often it is asked whether no step runs then."""
PIECE_S = 0.001
"""A loader that rests does so after this much work."""
ASK_AGAIN_AFTER_S = 0.1
"""A rest that is longer asks again how long it should be: nothing is gained by resting on where no step runs any more."""

OnShadow = Callable[[int, float, int, Exception | None], None]
"""Called with the transition, seconds, bytes that came from peers, and what went wrong."""
OnProgress = Callable[[int, int, int, int, int], None]
"""Called with the transition, the units of it that are loaded and that arrive, and the bytes of both."""


class _CalledOff(Exception):
    """The shadow that is loaded was cancelled. It never leaves the shadow's thread."""


@dataclass(frozen=True, slots=True)
class _Shadow:
    """What a shadow's thread was asked for."""

    load: Load
    keys: Sequence[UnitKey]
    transition: int
    pace: Pace
    called_off: threading.Event
    """Set when it is cancelled."""

    def rests(self, *shares: Callable[[], float]) -> list[Callable[[], None]]:
        return _rests(self.called_off, *shares)


def _tell_nobody(*what: object) -> None:
    pass


class Loader:
    """The units of one worker (`runtime.member.UnitStore`). `on_shadow` and `on_progress` are called in the shadow's thread."""

    def __init__(self, device: DeviceInfo) -> None:
        if device.device.type == "cpu":
            team.set_num_threads(device.num_threads)
        self.queued = Queued(device.device) if device.device.type == "cuda" else None
        """The device's own part of loading, where its work is queued."""
        self.units = Units({}, runner=self.queued.runner if self.queued is not None else None)
        self.weight_bytes = 0
        self.room_bytes = 0
        self.implementation = ""
        self.tracer = Tracer()
        self.profile: list[ProfilePoint] = []
        self._is_profiled = False
        self.on_shadow: OnShadow = _tell_nobody
        self.on_progress: OnProgress = _tell_nobody
        self.importer = Importer()
        self._most_bytes = 0
        self._device = device
        self._builder: UnitBuilder | None = None
        self._source: tuple[str, str, str, str, str] | None = None
        self._spec: ModelSpec | None = None
        self._lock = threading.Lock()
        self._building = threading.Lock()
        """A shadow's thread has it while it builds."""
        self._called_off = threading.Event()
        """Of the last shadow: set when it is cancelled."""
        self._sources = Sources()
        self._form: str | None = None
        self._process = psutil.Process()
        self._giver: threading.Thread | None = None
        self._dropped = threading.Event()
        self._is_idle: Callable[[], bool] = lambda: True

    # -- at once --------------------------------------------------------------------------------------------

    def load(
        self, load: Load, keys: Sequence[UnitKey], num_layers: int, progress: Callable[[int, str], None]
    ) -> PagePool:
        """Hold exactly `keys`, and make an empty pool.

        Raises:
            ModelError: when the model cannot be read.
            MemoryError, RuntimeError: when it does not fit, or a shadow that was cancelled still hangs.
        """
        with self._alone():
            pass  # no shadow builds any more: those that there were are cancelled
        progress(0, READING)
        spec = self._open(load)
        assert self._builder is not None
        self._builder.rest = lambda: None
        self.retain(keys)
        for count, key in enumerate(keys):
            if self._get(key) is None:
                began_s = time.perf_counter()
                unit = self._build(key)
                self._put(key, unit)
                self._sources.measured(None, unit.nbytes, time.perf_counter() - began_s)
            progress(count + 1, READING)
        self._count_bytes()
        progress(len(keys), "warming up")
        self._own_form()
        self._compile(spec)
        warm_up(self.units, keys, spec, self._device.device, block_size=self._warm_up_block_size(load))
        points: list[ProfilePoint] = []
        if self.queued is None and not self._is_profiled:
            points = profile.measure(self.units, spec, self._device.device)
        pool = self.make_pool(load, num_layers)
        if self.queued is not None:
            progress(len(keys), "capturing graphs")
            segments = self._segments(load)
            self.queued.capture(self.units, segments)
            if not self._is_profiled:
                points = profile.measure_queued(
                    self.units, spec, self._device.device, self.queued.runner, segments, pool
                )
        if not self._is_profiled:
            self._is_profiled = True
            emulation = self._device.emulation
            self.profile = points if emulation is None else [emulation.point(point) for point in points]
        return pool

    def make_pool(self, load: Load, num_layers: int) -> PagePool:
        """A pool as large as was asked for, or as this worker's room or its share of the free memory allows beside the weights
        that are yet to come.

        What was asked for is fixed. What the memory allows, pages and weights share from then on (`fit_pool`).

        Raises:
            MemoryError: when not even one block of `num_layers` layers fits, or what was asked for is not there.
        """
        spec = self._open(load)
        if self.queued is not None:
            self.queued.drop_pool()
        page_bytes = load.block_size * spec.kv_bytes_per_token_layer()
        keys = unit_keys(load.layout, self.importer.name)
        weights = _weight_bytes(spec, keys)
        budget, room = load.kv_bytes, load.room_bytes
        if not budget:
            free = self._free_for_pages(load, spec)
            free -= sum(_unit_bytes(spec, key) for key in keys if self._get(key) is None)
            if room and free < room - weights:
                log.warning(
                    "of the %d MiB for weights and KV that there were, %d are free", room >> 20, (free + weights) >> 20
                )
                room = 0
            budget = room - weights if room else min(free, load.memory_bytes)
        else:
            self._check_pool(load, spec, keys)
        num_pages = budget // page_bytes

        def check(num_pages: int) -> None:
            if num_pages < max(1, num_layers):
                raise MemoryError(
                    f"{budget:,} bytes of KV memory hold {max(0, num_pages)} pages of {page_bytes:,} bytes; one block of "
                    f"{num_layers} layers needs {num_layers}. {'Raise' if load.kv_bytes else 'Set'} --kv-memory or free memory on this host."
                )

        check(num_pages)
        room = room or num_pages * page_bytes + weights
        memory = None if load.kv_bytes else self._memory(room)
        pool = PagePool(
            num_pages,
            load.block_size,
            spec.num_kv_heads,
            spec.head_dim,
            getattr(torch, spec.dtype),
            self._device.device,
            memory,
        )
        check(pool.num_pages)  # the system may have had less after all
        if pool.num_pages < num_pages:
            room = pool.num_pages * page_bytes + weights
        self._most_bytes = self.room_bytes = room if memory is not None else 0
        if self.queued is not None:
            assert self._builder is not None
            self.queued.pool_made(pool, spec, self._builder.implementation)
        return pool

    def fit_pool(self, pool: PagePool, keys: Iterable[UnitKey], *, in_pieces: bool = False) -> bool:
        """Give `pool` the pages that the units `keys` leave of the room that there was at first, or what the system has.

        Raises:
            PoolExhausted: more are in use; nothing has changed.
        """
        if not self._most_bytes:
            return True
        assert self._spec is not None, "a pool is made for a model"
        weights = _weight_bytes(self._spec, keys)
        wanted = max(0, self._most_bytes - weights) // pool.page_bytes
        before = pool.num_pages
        self.room_bytes = self._most_bytes
        if pool.resize(wanted, in_pieces=in_pieces) < wanted:
            log.warning(
                "only %d of %d KV pages are there: memory that weights left is not free", pool.num_pages, wanted
            )
            self.room_bytes = pool.num_pages * pool.page_bytes + weights
        if pool.num_pages != before:
            log.debug("%d KV pages beside %d MiB of weights, %d before", pool.num_pages, weights >> 20, before)
        return pool.num_pages <= wanted

    def retain(self, keys: Iterable[UnitKey]) -> None:
        keep = set(keys)
        with self._lock:
            for key in [key for key in self.units.layers if key not in keep]:
                del self.units.layers[key]
            if "embedding" not in keep:
                self.units.embedding = None
            if "lm_head" not in keep:
                self.units.lm_head = None
        if self.queued is not None:
            self.queued.retain((key for key in keep if isinstance(key, int)), self.units.lm_head)
        self._count_bytes()

    def give_back(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._dropped.set()
        if self._giver is None:
            self._giver = threading.Thread(target=self._give_back, name="heap", daemon=True)
            self._giver.start()

    def _give_back(self) -> None:
        while self._dropped.wait():
            self._dropped.clear()
            time.sleep(GIVE_BACK_AFTER_S)
            while not self._is_idle():
                time.sleep(GIVE_BACK_AFTER_S)
            heap.give_back()

    def release(self) -> None:
        """Hold no pool, and nothing of the worker that this loaded for, whose life is over. The units stay, for the next one."""
        self.on_shadow = self.on_progress = self.importer.send = _tell_nobody
        if self.queued is not None:
            self.queued.drop_pool()

    def rss(self) -> int:
        return self._process.memory_info().rss

    def _free_for_pages(self, load: Load, spec: ModelSpec) -> int:
        """Bytes, if no weights were yet to come."""
        if self.queued is None:
            _, free = self._device.memory()
            return free - MIN_FREE_BYTES
        assert self._builder is not None
        return self.queued.budget(spec, load.block_size, self._builder.implementation)

    def _check_pool(self, load: Load, spec: ModelSpec, keys: Sequence[UnitKey]) -> None:
        """A pool of a fixed size takes its memory page by page: what is not there must be missed now. (The head has looked at all
        workers of a host together, but by what was free when they joined.)"""
        if self.queued is not None:
            return  # there it takes all at once
        is_lent = bool(self.importer.lenders)  # what a peer on this host lends is there already
        missing = 0 if is_lent else sum(_unit_bytes(spec, key) for key in keys if self._get(key) is None)
        free = self._device.memory()[1] - missing - min(MIN_FREE_BYTES, load.kv_bytes)
        if load.kv_bytes > free:
            raise MemoryError(
                f"--kv-memory {load.kv_bytes >> 20:,} MiB does not fit: {max(0, free) >> 20:,} MiB are free beside the weights. Start again with a "
                f"smaller --kv-memory or without it, or free memory on this host"
            )

    def _memory(self, capacity: int) -> PageMemory | None:
        """Memory for up to `capacity` bytes of pages; None when this machine has none that grows and shrinks."""
        try:
            return HostMemory(capacity) if self.queued is None else self.queued.memory(capacity)
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("the number of KV pages is fixed: %s", error)
            return None

    # -- in the background ----------------------------------------------------------------------------------

    def parts(self, key: UnitKey, form: str) -> Mapping[str, torch.Tensor] | None:
        """The tensors of a unit that is here, if its form is `form`."""
        unit = self._get(key)
        return unit.parts if unit is not None and form == self._own_form() else None

    def shadow(self, load: Load, keys: Sequence[UnitKey], transition: int, pace: Pace) -> None:
        self.cancel_shadow()
        self._called_off = threading.Event()
        asked = _Shadow(load, keys, transition, pace, self._called_off)
        threading.Thread(target=self._load_shadow, args=(asked,), name="shadow", daemon=True).start()

    def cancel_shadow(self) -> None:
        """Nothing more of a shadow arrives. A rest ends at once, and the unit that is being built is dropped after the present piece of
        work; nobody waits for that here, as a disk that hangs must not hold up steps, but whoever builds next does. (A graph that is being
        captured is waited for by who drops graphs.)"""
        with self._lock:
            self._called_off.set()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing is built meanwhile but by the caller. Raises RuntimeError when what was cancelled does not end."""
        limit_s = SHADOW_ENDS_WITHIN_S
        if not self._building.acquire(timeout=limit_s):
            raise RuntimeError(
                f"reading weights for a change that was called off still hangs after {limit_s:g} s; look at the disk of the model"
            )
        try:
            yield
        finally:
            self._building.release()

    def _load_shadow(self, asked: _Shadow) -> None:
        started_s = time.perf_counter()
        team.work_alone()
        if asked.pace.is_idle:
            thread_gives_way()
        error: Exception | None = None
        peer_bytes = 0
        try:
            with self._alone(), self.queued.loading() if self.queued is not None else contextlib.nullcontext():
                peer_bytes = self._load_units(asked)
        except _CalledOff:
            return
        except Exception as problem:
            if not asked.called_off.is_set():
                log.exception("loading the shadow of transition %d failed", asked.transition)
            error = problem
        if not asked.called_off.is_set():
            self.on_shadow(asked.transition, time.perf_counter() - started_s, peer_bytes, error)

    def _load_units(self, asked: _Shadow) -> int:
        """Bytes that came from peers. Raises `_CalledOff` when the shadow was cancelled meanwhile."""
        if asked.called_off.is_set():
            raise _CalledOff
        load, pace, on_progress = asked.load, asked.pace, functools.partial(self.on_progress, asked.transition)
        spec, peer_bytes = self._open(load), 0
        missing = [key for key in asked.keys if self._get(key) is None]
        self._check_room(load, spec, [key for key in missing if pace.holders.get(key) not in self.importer.lenders])
        sizes = [_unit_bytes(spec, key) for key in missing]
        for count, key in enumerate(missing):
            on_progress(count, len(sizes), sum(sizes[:count]), sum(sizes))
            peer_bytes += self._add_to_shadow(key, asked, spec)
        if missing:
            on_progress(len(sizes), len(sizes), sum(sizes), sum(sizes))
        self._count_bytes()
        if pace.is_idle:
            self._compile(spec)
            self._warm_shadow(load, asked.keys, spec, _WARM_UP_ROWS, asked.rests(pace.share)[0])
        if self.queued is not None:
            segments, (rest,) = self._segments(load), asked.rests(pace.share)
            self.queued.capture(self.units, segments, rest, asked.called_off.is_set)
        return peer_bytes

    def _add_to_shadow(self, key: UnitKey, asked: _Shadow, spec: ModelSpec) -> int:
        """Bytes of the unit that came from a peer. Raises `_CalledOff` when the shadow was cancelled meanwhile."""
        assert self._builder is not None
        pace = asked.pace
        self._builder.rest, rest = asked.rests(pace.loading_share, pace.share)
        began_s = time.perf_counter()
        holder = pace.holders.get(key)
        unit = self._import(key, holder, asked.called_off)
        if unit is None:
            holder, unit = None, self._build(key)
        if self.tracer.is_on:
            way = "load" if holder is None else "fetch"
            self.tracer.span("shadow", f"{way} {key}", began_s, time.perf_counter())
        with self._lock:
            if asked.called_off.is_set():
                raise _CalledOff
            self._set(key, unit)
        self._sources.measured(holder, unit.nbytes, time.perf_counter() - began_s)
        if not pace.is_idle:
            self._warm_shadow(asked.load, [key], spec, (1, 4), rest)
        return unit.nbytes if holder is not None else 0

    def _warm_shadow(
        self, load: Load, keys: Sequence[UnitKey], spec: ModelSpec, rows: Sequence[int], rest: Callable[[], None]
    ) -> None:
        """Run arriving units once. Our own kernels plan nothing per shape, so two small steps are enough for those."""
        assert self._builder is not None
        chunk = _WARM_UP_CHUNK
        if self.queued is None and self._builder.implementation == "lean":
            rows, chunk = (1,), 4
        size = self._warm_up_block_size(load)
        warm_up(self.units, keys, spec, self._device.device, rows, chunk, rest, size)

    def _segments(self, load: Load) -> list[LayerRange]:
        """What the layout gives to this worker, a range for each hop."""
        return [segment.layers for segment in load.layout.segments if segment.worker == self.importer.name]

    def _warm_up_block_size(self, load: Load) -> int:
        """Libraries for attention care for the size of a page; our own kernels do not, and a small one is cheaper."""
        return load.block_size if self.queued is not None else WARM_UP_BLOCK_SIZE

    def _import(self, key: UnitKey, holder: WorkerName | None, called_off: threading.Event) -> Any:
        """The unit from the peer that holds it, when that is the faster way; else None."""
        builder = self._builder
        assert builder is not None
        if holder is None or holder == self.importer.name or builder.has_tied(key):
            return None
        if holder not in self.importer.lenders and not self._sources.prefers(holder):
            return None
        try:
            parts = self.importer.fetch(holder, key, self._own_form(), called_off.is_set, builder.rest)
        except FetchFailed as error:
            log.info("%s: %s; it comes from the checkpoint", key, error)
            self._sources.failed(holder)
            return None
        return self._build(key, parts)

    def _check_room(self, load: Load, spec: ModelSpec, missing: Sequence[UnitKey]) -> None:
        needed = sum(_unit_bytes(spec, key) for key in missing)
        _, free = self._device.memory()
        if needed + MIN_FREE_BYTES > free:
            raise MemoryError(
                f"{len(missing)} arriving units need {needed:,} bytes, {max(0, free - MIN_FREE_BYTES):,} are free "
                f"(and {MIN_FREE_BYTES:,} are kept); move fewer layers, or restart with a smaller "
                f"{'--kv-memory' if load.kv_bytes else '--memory-fraction'}"
            )

    # -- units ----------------------------------------------------------------------------------------------

    def _open(self, load: Load) -> ModelSpec:
        """The spec of the model, and a builder for it; units of another model are dropped."""
        source = (load.model, load.load_format, load.dtype, load.implementation, load.quantize)
        if source != self._source or self._spec is None:
            with self._lock:
                self.units.layers.clear()
                self.units.embedding = self.units.lm_head = None
            self._spec = inspect_model(
                load.model,
                dtype=load.dtype,
                load_format=load.load_format,
                max_context=load.max_context or None,
                quantize=load.quantize,
            )
            device = str(self._device.device)
            self._builder = UnitBuilder(self._spec, device=device, implementation=load.implementation)  # type: ignore[arg-type]
            self.implementation = f"{self._builder.implementation} {load.quantize}".strip()
            self._source, self._form = source, None
            self._is_profiled = False
        return self._spec

    def _own_form(self) -> str:
        if self._form is None:
            assert self._builder is not None
            self._form = self._builder.form()
        return self._form

    def _build(self, key: UnitKey, parts: Mapping[str, torch.Tensor] | None = None) -> Any:
        assert self._builder is not None
        if key == "embedding":
            return self._builder.embedding(parts)
        if key == "lm_head":
            return self._builder.lm_head(parts)
        assert isinstance(key, int)
        return self._builder.layer(key, parts)

    def _compile(self, spec: ModelSpec) -> None:
        """Every kernel that a step may need: from the cache on disk, or anew the first time on a machine."""
        dtype = getattr(torch, spec.dtype)
        if self._builder is not None and self._builder.implementation == "lean":
            from runtime.model import lean

            lean.warm_up(self._device.device, dtype, spec.quantize)
            return
        attention.warm_up(self._device.device, dtype)
        if self._builder is not None and self._builder.packs:
            from runtime.model import packed_linear

            packed_linear.warm_up(dtype)

    def _get(self, key: UnitKey) -> Any:
        if isinstance(key, int):
            return self.units.layers.get(key)
        return getattr(self.units, key)

    def _put(self, key: UnitKey, unit: Any) -> None:
        with self._lock:
            self._set(key, unit)

    def _set(self, key: UnitKey, unit: Any) -> None:
        if isinstance(key, int):
            self.units.layers[key] = unit
        else:
            setattr(self.units, key, unit)

    def _count_bytes(self) -> None:
        with self._lock:
            held = [*self.units.layers.values(), self.units.embedding, self.units.lm_head]
        self.weight_bytes = sum(getattr(unit, "nbytes", 0) for unit in held if unit is not None)


def warm_up(
    units: Units,
    keys: Sequence[UnitKey],
    spec: ModelSpec,
    device: torch.device,
    rows: Sequence[int] = _WARM_UP_ROWS,
    chunk: int = _WARM_UP_CHUNK,
    rest: Callable[[], None] = lambda: None,
    block_size: int = WARM_UP_BLOCK_SIZE,
) -> None:
    """Run the units `keys` on a few shapes, so that no kernel is compiled or planned inside a request.

    `rest` is called after each of them on each unit. It has pages of its own, so it may run beside a stage that serves.
    """
    if "lm_head" in keys:
        sampling.warm_up()
    dtype = getattr(torch, spec.dtype)
    layers = [key for key in keys if isinstance(key, int)]
    num_blocks = max(*rows, -(-chunk // block_size))
    pool = PagePool(num_blocks, block_size, spec.num_kv_heads, spec.head_dim, dtype, device)
    for count, length in [*((count, 1) for count in rows), (1, chunk)]:
        tables = np.arange(count * -(-length // block_size), dtype=np.int32).reshape(count, -1)
        batch = StepBatch(
            positions=torch.arange(length, device=device).repeat(count),
            query_starts=np.arange(count + 1, dtype=np.int32) * length,
            context_lens=np.full(count, length, dtype=np.int32),
            block_tables=tables,
        )
        with torch.inference_mode():
            hidden = torch.zeros(count * length, spec.hidden_size, dtype=dtype, device=device)
            if "embedding" in keys and units.embedding is not None:
                hidden = units.embedding(torch.zeros(count * length, dtype=torch.int64, device=device))
            for layer in layers:
                pool.hold([layer])
                pool.ensure(tables.ravel())
                if units.runner is not None:
                    attach(batch, pool, (layer,), device)
                hidden = units.layers[layer](hidden, batch, LayerKV(layer, pool.data, pool.page_of(layer)))
                pool.drop([layer])
                rest()
            if "lm_head" in keys and units.lm_head is not None:
                units.lm_head(hidden[:count])
                rest()


def _rests(called_off: threading.Event, *shares: Callable[[], float]) -> list[Callable[[], None]]:
    """To be called between pieces of work on this thread, one for each kind of work: each rests for what was done since any of
    them did, as long as its share of the time wants it, and no longer when that share grows meanwhile.

    They raise `_CalledOff` when `called_off` is set, then or during the rest.
    """
    mark_s = time.thread_time()

    def rest(share: Callable[[], float]) -> None:
        nonlocal mark_s
        worked_s, rested_s = time.thread_time() - mark_s, 0.0
        while worked_s >= PIECE_S and not called_off.is_set():
            left_s = worked_s * (1.0 / share() - 1.0) - rested_s
            if left_s <= 0.0:
                mark_s = time.thread_time()
                break
            began_s = time.perf_counter()
            called_off.wait(min(left_s, ASK_AGAIN_AFTER_S))
            rested_s += time.perf_counter() - began_s
        if called_off.is_set():
            raise _CalledOff

    return [functools.partial(rest, share) for share in shares]


def _weight_bytes(spec: ModelSpec, keys: Iterable[UnitKey]) -> int:
    held = set(keys)
    layers = [key for key in held if isinstance(key, int)]
    return spec.weight_bytes(layers, embedding="embedding" in held, lm_head="lm_head" in held)


def _unit_bytes(spec: ModelSpec, key: UnitKey) -> int:
    if isinstance(key, int):
        return spec.layer_bytes[key]
    return spec.embedding_bytes if key == "embedding" else spec.lm_head_bytes
