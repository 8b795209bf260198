"""The heap on huge pages: the kernel says so, and what was written stays."""

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from runtime.hugepages import HUGE_PAGE_BYTES, gather_heap

SIZE = 4 * HUGE_PAGE_BYTES


def huge_bytes_at(address: int) -> int:
    """Of the mapping that holds `address`, what the kernel has on huge pages."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("there is no such mapping")


def kernel_collapses() -> bool:
    """Whether this kernel does it at all, asked of a region of our own."""
    with mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        region[:] = b"x" * len(region)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        aligned = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        return advise(aligned, HUGE_PAGE_BYTES, 25) == 0


@pytest.fixture
def region():
    if not Path("/proc/self/smaps").exists() or not kernel_collapses():
        pytest.skip("this kernel has no MADV_COLLAPSE")
    region = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_NOHUGEPAGE)  # so that it is a mapping of its own, of small pages
    region[:] = bytes(range(256)) * (SIZE // 256)
    return region


def test_what_is_there_is_gathered_and_unchanged(region):
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert huge_bytes_at(address) == 0
    region.madvise(mmap.MADV_HUGEPAGE)  # from here the kernel may gather some of its own accord, too
    assert gather_heap() >= SIZE - HUGE_PAGE_BYTES
    assert huge_bytes_at(address) >= SIZE - HUGE_PAGE_BYTES
    assert bytes(region) == bytes(range(256)) * (SIZE // 256)
