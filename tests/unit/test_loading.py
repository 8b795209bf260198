"""The page pool beside the weights: what the units of a layout leave of a worker's memory."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvstore.ids import LayerRange
from kvstore.page_memory import HostMemory
from kvstore.page_pool import PagePool, PoolExhausted
from runtime.cuda.runner import Runner
from runtime.layout import Layout, Segment
from runtime.loading import Loader
from runtime.member import Pace, unit_keys
from runtime.messages import MIN_FREE_BYTES, Load
from runtime.model import checkpoint
from runtime.model.config import inspect_model
from runtime.profile import SHAPES
from tests.tiny_models import NUM_LAYERS, write_tiny

BUDGET = 96 << 20
BLOCK_SIZE = 256
"""Large pages, so that few of them fill the budget; a layer's weights are about two and a half."""


@dataclass
class Host:
    """A device with as much memory as the test says."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_threads: int = 1
    emulation: None = None
    free: int = BUDGET + MIN_FREE_BYTES

    def memory(self) -> tuple[int, int]:
        return self.free, self.free


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def split(*numbers: int) -> Layout:
    stops = np.cumsum(numbers).tolist()
    ranges = zip([0, *stops], stops, strict=False)
    segments = tuple(Segment(f"w{i}", LayerRange(start, stop)) for i, (start, stop) in enumerate(ranges))
    return Layout(1, NUM_LAYERS, segments)


def load_message(folder: Path, layout: Layout, kv_bytes: int = 0, share: float = 1.0) -> Load:
    return Load(layout, str(folder), "safetensors", "float32", BLOCK_SIZE, kv_bytes, int(share * BUDGET), 0)


def loader_of(worker: str = "w0") -> Loader:
    loader = Loader(Host())  # type: ignore[arg-type]
    loader.importer.name = worker
    return loader


def load(loader: Loader, message: Load) -> PagePool:
    keys = unit_keys(message.layout, loader.importer.name)
    return loader.load(message, keys, len(message.layout.layers_of(loader.importer.name)), lambda count, phase: None)


def test_pages_have_what_the_weights_leave(tiny: Path) -> None:
    loader, spec = loader_of(), inspect_model(str(tiny), dtype="float32")
    narrow, wide = split(2, 2), split(3, 1)
    pool = load(loader, load_message(tiny, narrow))
    assert pool.num_pages == BUDGET // pool.page_bytes
    weights = spec.weight_bytes((0, 1), embedding=True, lm_head=False)
    assert loader.room_bytes == pool.num_pages * pool.page_bytes + weights
    pointer = pool.data.data_ptr()
    loader.fit_pool(pool, unit_keys(wide, "w0"))
    left = loader.room_bytes - weights - spec.layer_bytes[2]
    assert pool.num_pages == left // pool.page_bytes < BUDGET // pool.page_bytes
    loader.fit_pool(pool, [0])
    assert pool.num_pages == (loader.room_bytes - spec.layer_bytes[0]) // pool.page_bytes > BUDGET // pool.page_bytes
    loader.fit_pool(pool, unit_keys(narrow, "w0"))
    assert pool.num_pages == BUDGET // pool.page_bytes, "there and back is where it began"
    assert pool.data.data_ptr() == pointer
    pool.check_integrity()


def test_pages_that_were_asked_for_are_fixed(tiny: Path) -> None:
    loader = loader_of()
    pool = load(loader, load_message(tiny, split(2, 2), kv_bytes=8 << 20))
    assert pool.num_pages == (8 << 20) // pool.page_bytes
    assert loader.room_bytes == 0
    loader.fit_pool(pool, range(NUM_LAYERS))
    assert pool.num_pages == (8 << 20) // pool.page_bytes


def test_pages_that_were_asked_for_must_be_there(tiny: Path) -> None:
    """All of them before the first is touched: the system promises more than it has."""
    loader, spec = loader_of(), inspect_model(str(tiny), dtype="float32")
    with pytest.raises(
        MemoryError,
        match=r"--kv-memory 4,096 MiB does not fit: 96 MiB are free beside the weights\. Start again with a smaller",
    ):
        load(loader, load_message(tiny, split(2, 2), kv_bytes=4 << 30))
    pool = load(loader, load_message(tiny, split(2, 2), kv_bytes=300 << 20))
    assert pool.num_pages == (300 << 20) // pool.page_bytes, "small pools may have what is kept beside large ones"
    joining, weights = loader_of("w1"), spec.weight_bytes((1, 2, 3), embedding=False, lm_head=True)
    joining._device.free = (200 << 20) + weights  # type: ignore[misc]
    assert joining.make_pool(load_message(tiny, split(1, 3), kv_bytes=100 << 20), 3).num_pages
    with pytest.raises(MemoryError, match="99 MiB are free beside"):
        joining.make_pool(load_message(tiny, split(1, 3), kv_bytes=(100 << 20) + weights // 4), 3)
    joining.importer.lenders = {"w0"}
    assert joining.make_pool(load_message(tiny, split(1, 3), kv_bytes=(100 << 20) + weights // 4), 3), (
        "the weights are there"
    )


def test_a_worker_that_joins_leaves_room_for_its_weights(tiny: Path) -> None:
    loader, spec = loader_of("w1"), inspect_model(str(tiny), dtype="float32")
    message = load_message(tiny, split(1, 3))
    pool = loader.make_pool(message, 3)
    weights = spec.weight_bytes((1, 2, 3), embedding=False, lm_head=True)
    assert pool.num_pages == (BUDGET - weights) // pool.page_bytes
    assert BUDGET - pool.page_bytes < loader.room_bytes <= BUDGET
    loader.fit_pool(pool, unit_keys(message.layout, "w1"))
    assert pool.num_pages == (BUDGET - weights) // pool.page_bytes


def test_a_worker_that_comes_back_has_the_room_that_it_had(tiny: Path) -> None:
    loader, host = loader_of("w1"), loader_of()._device
    loader._device = host
    assert isinstance(host, Host)
    at_first = load(loader, load_message(tiny, split(1, 3), share=0.5)).num_pages
    room = loader.room_bytes
    for counts in ((3, 1), (2, 2), (1, 3)) * 3:
        loader.retain(())
        message = msgspec.structs.replace(load_message(tiny, split(*counts), share=0.2), room_bytes=room)
        pool = loader.make_pool(message, counts[1])
        assert loader.room_bytes == room
        loader.fit_pool(pool, unit_keys(message.layout, "w1"))
        assert loader.room_bytes == room
    assert pool.num_pages == at_first, "however many workers there are by now"
    loader.retain(())
    host.free = BUDGET // 4 + MIN_FREE_BYTES
    assert loader.make_pool(message, 3).num_pages < at_first
    assert loader.room_bytes <= BUDGET // 4, "but no more than there is"


def test_too_much_in_use_is_refused_and_changes_nothing(tiny: Path) -> None:
    loader = loader_of()
    pool = load(loader, load_message(tiny, split(2, 2)))
    pool.hold([0])
    pool.ensure(range(pool.num_pages))
    before = pool.num_pages
    with pytest.raises(PoolExhausted):
        loader.fit_pool(pool, range(NUM_LAYERS))
    assert pool.num_pages == pool.num_used == before
    pool.check_integrity()


def test_a_machine_without_such_memory_has_a_fixed_pool(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(capacity: int) -> None:
        raise OSError("no addresses left")

    monkeypatch.setattr("runtime.loading.HostMemory", refuse)
    loader = loader_of()
    pool = load(loader, load_message(tiny, split(2, 2)))
    loader.fit_pool(pool, range(NUM_LAYERS))
    assert (loader.room_bytes, pool.num_pages) == (0, BUDGET // pool.page_bytes)


class Idle:
    """The device's side of a loader that has nothing to do."""

    runner = None

    def loading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, *what: Any) -> None: ...

    def retain(self, *what: Any) -> None: ...


class Beside(Idle):
    """A device's side on the host: steps go through a runner, nothing is captured."""

    def __init__(self) -> None:
        self.runner: Any = Runner(torch.device("cpu"))
        self.copies = None
        self.captured: list[LayerRange] = []

    def budget(self, *what: Any) -> int:
        return BUDGET

    def memory(self, capacity: int) -> HostMemory:
        return HostMemory(capacity)

    def drop_pool(self) -> None: ...

    def pool_made(self, *what: Any) -> None: ...

    def capture(self, units: Any, segments: list[LayerRange], *what: Any) -> None:
        self.captured += segments


def test_where_work_is_queued_the_profile_is_of_what_steps_will_run(tiny: Path) -> None:
    loader, layout = loader_of(), split(3, 1)
    loader.queued = beside = Beside()  # type: ignore[assignment]
    loader.units.runner = beside.runner
    pool = load(loader, load_message(tiny, layout))
    assert beside.captured == [LayerRange(0, 3)]
    assert beside.runner.num_eager == 2 * len(SHAPES)
    assert [(p.decode_rows, p.decode_context, p.prefill_tokens) for p in loader.profile] == [
        (1, 16, 0), (8, 256, 0), (32, 64, 0), (0, 0, 16), (0, 0, 128),
    ]  # fmt: skip
    assert all(point.layers == LayerRange(0, 3) and point.seconds > 0.0 for point in loader.profile)
    assert pool.num_used == 0
    pool.check_integrity()
    loader.profile = []
    load(loader, load_message(tiny, layout))
    assert not loader.profile, "once for a model"


def test_a_small_pool_is_profiled_with_what_fits(tiny: Path) -> None:
    loader, layout = loader_of(), split(NUM_LAYERS)
    loader.queued = beside = Beside()  # type: ignore[assignment]
    loader.units.runner = beside.runner
    page_bytes = BLOCK_SIZE * inspect_model(str(tiny), dtype="float32").kv_bytes_per_token_layer()
    load(loader, load_message(tiny, layout, kv_bytes=12 * NUM_LAYERS * page_bytes))
    assert [p.decode_rows for p in loader.profile if not p.samples] == [1, 8, 0, 0], "32 rows do not"
    assert [p.samples for p in loader.profile if p.samples] == [1, 8, 32]


@pytest.mark.parametrize("is_queued", [False, True])
def test_a_disk_that_hangs_holds_up_neither_the_cancel_nor_what_is_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, is_queued: bool
) -> None:
    loader, narrow, wide = loader_of(), split(2, 2), split(3, 1)
    load(loader, load_message(tiny, narrow))
    if is_queued:
        loader.queued = Idle()  # type: ignore[assignment]
    hangs, goes_on = threading.Event(), threading.Event()
    read_into = checkpoint._read_into

    def hang(*arguments: Any) -> None:
        hangs.set()
        assert goes_on.wait(60.0)
        read_into(*arguments)

    ready: queue.SimpleQueue[tuple[int, Exception | None]] = queue.SimpleQueue()
    loader.on_shadow = lambda transition, seconds, peer_bytes, error: ready.put((transition, error))
    pace = Pace(share=lambda: 1.0, loading_share=lambda: 1.0, is_idle=False, holders={})
    monkeypatch.setattr(checkpoint, "_read_into", hang)
    loader.shadow(load_message(tiny, wide), unit_keys(wide, "w0"), 1, pace)
    assert hangs.wait(60.0)
    loader.cancel_shadow()
    loader.retain(unit_keys(narrow, "w0"))
    assert sorted(loader.units.layers) == [0, 1]
    monkeypatch.setattr(checkpoint, "_read_into", read_into)
    monkeypatch.setattr("runtime.loading.SHADOW_ENDS_WITHIN_S", 0.05)
    hangs_still = r"still hangs after 0.05 s; look at the disk"
    for change in (2, 3):
        loader.shadow(load_message(tiny, wide), unit_keys(wide, "w0"), change, pace)
        told, error = ready.get(timeout=60.0)
        assert told == change
        with pytest.raises(RuntimeError, match=hangs_still):
            raise error or AssertionError("one builds at a time, and the first still does")
        assert sorted(loader.units.layers) == [0, 1]
    with pytest.raises(RuntimeError, match=hangs_still):
        load(loader, load_message(tiny, narrow))
    monkeypatch.setattr("runtime.loading.SHADOW_ENDS_WITHIN_S", 60.0)
    loader.shadow(load_message(tiny, wide), unit_keys(wide, "w0"), 4, pace)
    goes_on.set()
    assert ready.get(timeout=60.0) == (4, None)
    assert ready.empty(), "nobody hears of what was cancelled"
    assert sorted(loader.units.layers) == [0, 1, 2]


@pytest.fixture
def rests_for_ages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """A loader that serves two layers, and whose next shadow rests for hours after the first piece of work, if it has the share to."""
    monkeypatch.setattr("runtime.loading.PIECE_S", 0.0)
    loader = loader_of()
    load(loader, load_message(tiny, split(2, 2)))
    yield loader
    loader.cancel_shadow()


def test_a_shadow_that_rests_ends_at_once_when_it_is_cancelled(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, rests_for_ages: Loader
) -> None:
    loader, rests, said = rests_for_ages, threading.Event(), []
    loader.on_shadow = lambda *what: said.append(what)

    def share() -> float:
        rests.set()
        return 1e-9

    wide, narrow = split(3, 1), split(2, 2)
    loader.shadow(load_message(tiny, wide), unit_keys(wide, "w0"), 1, Pace(share, share, is_idle=False, holders={}))
    assert rests.wait(60.0)
    loader.cancel_shadow()
    monkeypatch.setattr("runtime.loading.SHADOW_ENDS_WITHIN_S", 10.0)
    load(loader, load_message(tiny, narrow))
    assert sorted(loader.units.layers) == [0, 1]
    assert not said, "nobody hears of what was cancelled"


def test_a_shadow_that_rests_goes_on_when_nothing_runs_any_more(tiny: Path, rests_for_ages: Loader) -> None:
    loader, wide, asked = rests_for_ages, split(3, 1), []
    ready: queue.SimpleQueue[tuple[int, Exception | None]] = queue.SimpleQueue()
    loader.on_shadow = lambda transition, seconds, peer_bytes, error: ready.put((transition, error))

    def share() -> float:
        asked.append(None)
        return 1e-9 if len(asked) == 1 else 1.0

    loader.shadow(load_message(tiny, wide), unit_keys(wide, "w0"), 1, Pace(share, share, is_idle=False, holders={}))
    assert ready.get(timeout=20.0) == (1, None)
    assert sorted(loader.units.layers) == [0, 1, 2]
