"""Memory for pages that grows and shrinks at its end, while its address stays the same.

How it works: a range of addresses is reserved once, for the most that there may ever be. Its first `num_bytes` are to be
used; what lies beyond is given back to the system. On the host that is an anonymous mapping: the system commits what is
touched, and takes back what `madvise` says is not needed. Devices bring their own (`runtime.cuda.virtual`).

What is never true: the range moves; a byte below `num_bytes` is taken away.
"""

import mmap
import sys
from typing import Protocol

import torch

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
if sys.platform == "linux":
    _FLAGS |= 0x4000  # MAP_NORESERVE, which Python does not name: what is only reserved counts for nothing


class PageMemory(Protocol):
    """Where the pages of a pool are."""

    data: torch.Tensor
    """uint8 ``[capacity]``. Only the first `num_bytes` may be read or written."""
    num_bytes: int

    def resize(self, num_bytes: int) -> int:
        """Have `num_bytes`, at most the capacity, or as many as the system has; how many there are.

        Fewer than asked for only when growing. What is new holds anything at all. Nothing that was queued before, on a
        device whose work is queued, still reads or writes what is given back.
        """
        ...


class HostMemory:
    """`PageMemory` on the host.

    Raises:
        OSError, ValueError: the system does not reserve so much.
    """

    def __init__(self, capacity: int) -> None:
        self._map = mmap.mmap(-1, capacity, flags=_FLAGS)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)
        self.num_bytes = 0

    def resize(self, num_bytes: int) -> int:
        assert 0 <= num_bytes <= len(self.data), f"{num_bytes} bytes of a range of {len(self.data)}"
        start, stop = (-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in (num_bytes, self.num_bytes))
        if start < stop:
            self._map.madvise(mmap.MADV_DONTNEED, start, min(stop, len(self.data)) - start)
        self.num_bytes = num_bytes
        return num_bytes
