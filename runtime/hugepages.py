"""This process's heap on huge pages, for one that runs briefly and often beside others that fill the caches.

Between two steps the head sleeps, and the workers' weights go through the caches and the table of translated addresses (TLB) of the
core that it wakes on. What it then touches is spread over some hundred pages of 4 KiB, and in a virtual machine a translation
that is missing is looked up through two page tables. A huge page of 2 MiB needs one entry for what took 512.

The kernel does that on request, in place, while the process runs (``MADV_COLLAPSE``, Linux 6.1). Only memory that is there at the time
is gathered, so call it when everything is loaded.

Never true: anything but speed depends on it. Where it cannot be had, nothing happens.
"""

import ctypes
import re
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20

_MADV_COLLAPSE = 25
_MAX_MAPPING_BYTES = 256 << 20
"""What is larger is no heap, and not worth the copying."""
_MAPS = Path("/proc/self/maps")
_HEAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(?:\[heap\])?", re.ASCII)
"""A private mapping without a file, writable: the heap proper, and what allocators map beside it."""


def gather_heap() -> int:
    """Put what this process has allocated so far on huge pages; the bytes that now are. Takes about a millisecond for each page."""
    try:
        lines = _MAPS.read_text().splitlines()
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):  # not Linux
        return 0
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    num_gathered = 0
    for found in filter(None, map(_HEAP.fullmatch, lines)):
        begin, end = (int(address, 16) for address in found.groups())
        if end - begin > _MAX_MAPPING_BYTES:
            continue
        first = -(-begin // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        for address in range(first, end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
            num_gathered += advise(address, HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0  # fails where nothing is there yet
    return num_gathered * HUGE_PAGE_BYTES
