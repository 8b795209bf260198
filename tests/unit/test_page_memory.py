"""Memory for pages: what is given back is gone from the process, what stays is as it was, and nothing moves."""

from pathlib import Path

import pytest
import torch

from kvstore.page_memory import HostMemory
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
