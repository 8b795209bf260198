"""The heap and files on huge pages: the kernel says so, and what was written stays."""

import ctypes
import mmap
import os
import random
import re
from pathlib import Path

import pytest

from kvstore import hugepages
from kvstore.hugepages import HUGE_PAGE_BYTES, MappedFile, gather_heap

SIZE = 4 * HUGE_PAGE_BYTES


def huge_bytes_at(address: int, kind: str = "AnonHugePages:") -> int:
    """Of the mapping that holds `address`, what the kernel has on huge pages."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith(kind):
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


def test_a_file_is_settled_before_it_is_written_to_and_others_see_it():
    if not kernel_collapses():
        pytest.skip("this kernel has no MADV_COLLAPSE")
    size = 2 * HUGE_PAGE_BYTES + 5000
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, size)
    mapped = MappedFile.of(descriptor, size, is_writable=True)
    rests = []
    settled = mapped.take_huge_pages(lambda: rests.append(1))
    if not settled:
        pytest.skip("this kernel has no huge pages for files in memory")
    assert settled == 2 * HUGE_PAGE_BYTES
    assert len(rests) == 2
    content = random.Random(1).randbytes(size)
    mapped[mapped.begin : mapped.begin + size] = content
    other = MappedFile.of(descriptor, size, is_writable=False)
    assert other[other.begin : other.begin + size] == content
    for mapping in (mapped, other):
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping, mapping.begin))
        assert huge_bytes_at(address, "ShmemPmdMapped:") == 2 * HUGE_PAGE_BYTES
    os.close(descriptor)


def test_a_small_file_and_one_that_cannot_be_settled_are_mapped_all_the_same(monkeypatch):
    for size in (5000, HUGE_PAGE_BYTES + 1):
        descriptor = os.memfd_create("test")
        os.ftruncate(descriptor, size)
        monkeypatch.setattr(hugepages, "_collapse", lambda address: False)
        mapped = MappedFile.of(descriptor, size, is_writable=True)
        assert mapped.take_huge_pages() == 0
        mapped[mapped.begin + size - 1] = 7
        os.lseek(descriptor, size - 1, os.SEEK_SET)
        assert os.read(descriptor, 10) == b"\x07"
        os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        MappedFile.of(descriptor, HUGE_PAGE_BYTES, is_writable=True)
