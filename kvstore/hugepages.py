"""Memory on huge pages: this process's heap, and files in memory that several processes map; and ranges of addresses.

The table of translated addresses (TLB) of a core is small, and in a virtual machine a translation that is missing is looked up through
two page tables. A huge page of 2 MiB needs one entry for what took 512. That matters to two kinds of memory:

- weights, which every step reads from front to back: an entry for each 4 KiB, used once;
- the heap of a head that runs briefly and often beside workers: between two steps it sleeps, the workers' weights go through the caches
  and the table of the core that it wakes on, and what it then touches is spread over some hundred pages.

The kernel does that on request, in place, while the process runs (``MADV_COLLAPSE``, Linux 6.1), whatever the system's setting for huge
pages is. Only memory that is there at the time is gathered, so the heap's turn is when everything is loaded; of a file, a
byte in each huge page will do. What comes when it is touched (`Range`) is better filled beforehand (`Range.populate`), by a thread that may wait.

Never true: anything but speed depends on it. Where it cannot be had, nothing happens.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

HUGE_PAGE_BYTES = 2 << 20

_MADV_COLLAPSE, _MADV_POPULATE_WRITE = 25, 23
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""What is only reserved counts for nothing. Linux' names and numbers; Python has none of them."""
_MAX_MAPPING_BYTES = 256 << 20
"""What is larger is no heap, and not worth the copying."""
_MAPS = Path("/proc/self/maps")
_HEAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(?:\[heap\])?", re.ASCII)
"""A private mapping without a file, writable: the heap proper, and what allocators map beside it."""


def gather_heap() -> int:
    """Put what this process has allocated so far on huge pages; the bytes that now are. Takes about a millisecond for each page."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:  # not Linux
        return 0
    num_gathered = 0
    for found in filter(None, map(_HEAP.fullmatch, lines)):
        begin, end = (int(address, 16) for address in found.groups())
        if end - begin > _MAX_MAPPING_BYTES:
            continue
        first = -(-begin // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        for address in range(first, end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
            num_gathered += _collapse(address)  # fails where nothing is there yet
    return num_gathered * HUGE_PAGE_BYTES


class _Aligned(mmap.mmap):
    """A mapping in which byte `begin` is at a multiple of a huge page."""

    begin: int

    @classmethod
    def reserve(cls, num_bytes: int) -> Self:
        """Addresses for `num_bytes` from there on: a range that is larger by a huge page has such a multiple in it."""
        reserved = cls(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        reserved.begin = -reserved._address() % HUGE_PAGE_BYTES
        return reserved

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class MappedFile(_Aligned):
    """A file as memory that other processes map, too, at an address at which its huge pages can be used; it begins at byte `begin` of the mapping."""

    num_bytes: int

    @classmethod
    def of(cls, descriptor: int, num_bytes: int, *, is_writable: bool) -> Self:
        """The first `num_bytes` of a file.

        Raises:
            OSError, ValueError: it cannot be mapped.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        libc = _libc()
        if libc is None:
            mapped = cls(descriptor, num_bytes, flags=mmap.MAP_SHARED, prot=protection)
            mapped.begin, mapped.num_bytes = 0, num_bytes
            return mapped
        mapped = cls.reserve(num_bytes)  # what unmaps the range unmaps the file in it
        mapped.num_bytes = num_bytes
        address = mapped._address() + mapped.begin
        if libc.mmap(address, num_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return mapped

    def take_huge_pages(self, rest: Callable[[], None] = lambda: None) -> int:
        """Put the file, which is empty, on huge pages; the bytes that now are. What is left at its end stays as it is.

        `rest` is called after each of them: a page that the system had not used yet takes some milliseconds.
        """
        num_settled = 0
        address = self._address() + self.begin
        while address % HUGE_PAGE_BYTES == 0 and num_settled + HUGE_PAGE_BYTES <= self.num_bytes:
            self[self.begin + num_settled] = 0
            if not _collapse(address + num_settled):
                break
            num_settled += HUGE_PAGE_BYTES
            rest()
        return num_settled


class Range(_Aligned):
    """Addresses from byte `begin` of the mapping on, for memory that comes when it is touched."""

    @classmethod
    def of(cls, num_bytes: int, *, on_huge_pages: bool) -> Self:
        """A range of `num_bytes`, on huge pages or on what the system gives.

        Raises:
            OSError, ValueError: the system does not reserve so much.
        """
        reserved = cls.reserve(num_bytes)
        if on_huge_pages and (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
            with contextlib.suppress(OSError):  # a kernel without them
                reserved.madvise(advice)
        return reserved

    def populate(self, start: int, stop: int) -> bool:
        """Have the memory of these bytes after `begin`, multiples of a page, now; what is in it stays. False where that cannot be done."""
        libc = _libc()
        return (
            libc is not None
            and libc.madvise(self._address() + self.begin + start, stop - start, _MADV_POPULATE_WRITE) == 0
        )

    def give_back(self, start: int, stop: int) -> None:
        """The memory of these bytes after `begin`, as far as the range goes, `start` a multiple of a page, is the system's again."""
        self.madvise(mmap.MADV_DONTNEED, self.begin + start, min(stop, len(self) - self.begin) - start)


def _collapse(address: int) -> bool:
    """Have one huge page at this address, if there is memory."""
    libc = _libc()
    return libc is not None and libc.madvise(address, HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0


@functools.cache
def _libc() -> Any:
    """The C library, None where it knows nothing of this."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
        libc.mmap.restype = ctypes.c_void_p
    except (OSError, AttributeError):
        return None
    return libc if sys.platform == "linux" else None
