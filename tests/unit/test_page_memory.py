"""Memory for pages: what is given back is gone from the process, what stays is as it was, and nothing moves."""

import threading
import time
from pathlib import Path

import pytest
import torch

from kvstore.page_memory import LEAD_BYTES, HostMemory
from kvstore.page_pool import PagePool

MIB = 1 << 20
NOISE = 14 * MIB
"""What torch and Python may take meanwhile."""


def resident() -> int:
    """Bytes of this process that are in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10


def test_a_range_is_no_memory_until_it_is_touched() -> None:
    before = resident()
    memory = HostMemory(1 << 36)
    assert memory.resize(1 << 35) == memory.num_bytes == 1 << 35
    assert resident() - before < NOISE


def test_what_is_given_back_is_gone_and_what_stays_is_as_it_was() -> None:
    before = resident()
    memory = HostMemory(256 * MIB)
    pointer = memory.data.data_ptr()
    memory.resize(192 * MIB)
    memory.data[: 192 * MIB].fill_(7)
    assert resident() - before > 192 * MIB - NOISE
    memory.resize(64 * MIB + 100)
    assert abs(resident() - before - 64 * MIB) < NOISE
    assert bool((memory.data[: 64 * MIB + 100] == 7).all())
    memory.resize(256 * MIB)
    assert abs(resident() - before - 64 * MIB) < NOISE, "what is new is committed when it is touched"
    memory.data[64 * MIB + 100 :].fill_(9)
    assert bool((memory.data[: 64 * MIB + 100] == 7).all())
    assert memory.data.data_ptr() == pointer
    memory.resize(0)
    assert resident() - before < NOISE


def test_pages_move_out_of_the_end_and_its_memory_is_the_systems_again() -> None:
    before = resident()
    pool = PagePool(1536, 64, 4, 64, torch.bfloat16, "cpu", HostMemory(128 * MIB))
    pool.hold([0])
    pool.ensure(range(1536))
    assert resident() - before > 96 * MIB - NOISE
    pool.release_blocks(range(0, 1536, 2))
    for block in range(1, 1536, 2):
        pool.read_page(0, block).fill_(block % 100)
    assert pool.resize(800) == 800
    assert abs(resident() - before - 50 * MIB) < NOISE
    assert all(bool((pool.read_page(0, block) == block % 100).all()) for block in range(1, 1536, 2))
    pool.check_integrity()
    del pool
    assert resident() - before < NOISE


def test_tensors_keep_the_range_alive() -> None:
    memory = HostMemory(MIB)
    memory.resize(MIB)
    view = memory.data[:100].view(torch.bfloat16)
    view.fill_(1.5)
    del memory
    assert bool((view == 1.5).all())


def test_a_range_that_the_system_refuses_is_an_error() -> None:
    with pytest.raises((OSError, ValueError, OverflowError)):
        HostMemory(1 << 62)
    with pytest.raises(AssertionError, match="of a range of"):
        HostMemory(MIB).resize(MIB + 1)


def wait_until(is_so) -> None:
    limit_s = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < limit_s
        time.sleep(0.01)


def test_what_is_used_soon_is_there_before_and_as_it_was() -> None:
    before = resident()
    memory = HostMemory(256 * MIB)
    if not memory._range.populate(0, 2 * MIB):
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    memory.resize(200 * MIB + 5)
    memory.data[: 3 * MIB] = 5
    memory.reach(10 * MIB)
    wait_until(lambda: resident() - before > 10 * MIB + LEAD_BYTES - NOISE)
    assert resident() - before < 10 * MIB + LEAD_BYTES + NOISE
    assert bool((memory.data[: 3 * MIB] == 5).all())
    for used in range(10, 200):
        memory.reach(used * MIB)
    wait_until(lambda: resident() - before > 200 * MIB - NOISE)
    memory.resize(20 * MIB)
    assert resident() - before < 20 * MIB + NOISE
    memory.reach(20 * MIB)
    memory.resize(150 * MIB)
    memory.reach(100 * MIB)
    wait_until(lambda: resident() - before > 100 * MIB + LEAD_BYTES - NOISE)
    assert resident() - before < 100 * MIB + LEAD_BYTES + NOISE
    assert bool((memory.data[: 3 * MIB] == 5).all())


def test_who_uses_it_never_waits_for_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(64 * MIB)
    asked, let_go = threading.Event(), threading.Event()

    def slow(start: int, stop: int) -> bool:
        asked.set()
        return let_go.wait(10.0)

    monkeypatch.setattr(memory._range, "populate", slow)
    memory.resize(64 * MIB)
    memory.reach(0)
    assert asked.wait(10.0)
    memory.reach(40 * MIB)
    assert not let_go.is_set(), "it has returned while the system was still busy"
    let_go.set()


def test_where_memory_cannot_be_had_beforehand_it_comes_when_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(64 * MIB)
    calls = []
    monkeypatch.setattr(memory._range, "populate", lambda start, stop: calls.append(start) or False)
    memory.resize(64 * MIB)
    for used in range(64):
        memory.reach(used * MIB)
        time.sleep(0.001)
    assert len(calls) == 1
    memory.data.fill_(1)
    memory.resize(5 * MIB)
    memory.resize(64 * MIB)
    assert int(memory.data[:10].sum()) == 10


def test_where_no_thread_can_be_started_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(2000, 64, 4, 64, torch.bfloat16, "cpu", HostMemory(128 * MIB))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool.hold([0])
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        assert pool.ensure(range(1000)) == 1000
        assert pool.ensure(range(1500)) == 500
    pool.check_integrity()


def test_no_huge_page_is_left_behind_an_end_that_moves() -> None:
    memory = HostMemory(256 * MIB)
    memory.resize(256 * MIB)
    before = resident()
    for i in range(20):
        end = (40 + 2 * (i % 19)) * MIB + 4096 * (i + 1)
        memory.resize(end)
        memory.data[:end][-4096:].fill_(1)
        memory.resize(MIB)
    assert resident() - before < NOISE


def test_a_pool_says_how_far_it_is_used() -> None:
    reached = []

    class Telling(HostMemory):
        def reach(self, num_bytes: int) -> None:
            reached.append(num_bytes)

    pool = PagePool(100, 4, 2, 8, torch.float32, "cpu", Telling(MIB))
    pool.hold([0, 1])
    pool.ensure(range(10))
    pool.ensure(range(5))
    pool.release_blocks(range(10))
    pool.ensure(range(10))
    assert reached == [0, 20 * pool.page_bytes], "again only when it is more than before"
    pool.release_blocks(range(10))
    pool.resize(10)
    pool.resize(100)
    pool.ensure(range(7))
    assert reached[2:] == [14 * pool.page_bytes], "what was given back must come again"
