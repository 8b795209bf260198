"""Memory that was freed goes back to the system, but not while steps run."""

import platform
import threading

import psutil
import pytest
import torch

from runtime import heap, loading
from runtime.device import DeviceInfo
from runtime.loading import Loader


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_was_freed_goes_back() -> None:
    process = psutil.Process()
    blocks = [torch.zeros(20_000, dtype=torch.uint8) for _ in range(5000)]
    last = torch.zeros(20_000, dtype=torch.uint8)
    del blocks
    kept = process.memory_info().rss
    heap.give_back()
    assert process.memory_info().rss < kept - 50_000_000
    assert not last.any()


def test_it_waits_for_the_steps_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    given, asked, idle = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(heap, "give_back", given.release)
    monkeypatch.setattr(loading, "GIVE_BACK_AFTER_S", 0.001)
    loader = Loader(DeviceInfo(torch.device("cpu"), 1))

    def is_idle() -> bool:
        asked.release()
        return idle.is_set()

    loader.give_back(is_idle)
    for _ in range(3):
        assert asked.acquire(timeout=30.0)
    assert not given.acquire(blocking=False), "steps run"
    idle.set()
    assert given.acquire(timeout=30.0)
    loader.give_back(is_idle)
    assert given.acquire(timeout=30.0), "and again, the next time"
