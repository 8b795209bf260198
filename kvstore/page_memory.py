"""Memory for pages that grows and shrinks at its end, while its address stays the same.

How it works: a range of addresses is reserved once, for the most that there may ever be. Its first `num_bytes` are to be
used; what lies beyond is given back to the system. On the host that is an anonymous mapping: the system commits what is
touched, and takes back what `madvise` says is not needed. A thread touches what will soon be needed, so that no step waits
for the system. Devices bring their own (`runtime.cuda.virtual`).

What is never true: the range moves; a byte below `num_bytes` is taken away.
"""

import _thread
import mmap
import threading
from typing import Protocol

import torch

from kvstore.hugepages import Range

LEAD_BYTES = 32 << 20
"""How much memory beyond what is used the host has at hand."""
PIECE_BYTES = 2 << 20
"""How much is asked for at once; where the system gives huge pages of its own accord, one of them."""


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

    def reach(self, num_bytes: int) -> None:
        """So many bytes are in use now, and what follows will be soon."""
        ...


class HostMemory:
    """`PageMemory` on the host. Not on huge pages: to find one takes a virtual machine's host milliseconds, and who serves beside waits for it.

    Raises:
        OSError, ValueError: the system does not reserve so much.
    """

    def __init__(self, capacity: int) -> None:
        self._range = Range.of(capacity, on_huge_pages=False)
        self.data = torch.frombuffer(self._range, dtype=torch.uint8, count=capacity, offset=self._range.begin)
        self.num_bytes = 0
        self._wanted = 0
        self._present = 0
        """Bytes that the thread has had so far."""
        self._is_running = False
        self._can_populate = True
        """False once the system has refused to: what was short may be short again."""
        self._state = threading.Lock()
        """Held for moments only, since who runs steps takes it too."""
        self._working = threading.Lock()
        """Held while the system looks for the memory of a piece, and while memory goes."""

    def resize(self, num_bytes: int) -> int:
        assert 0 <= num_bytes <= len(self.data), f"{num_bytes} bytes of a range of {len(self.data)}"
        start, stop = (_up(size, mmap.PAGESIZE) for size in (num_bytes, self.num_bytes))
        if start >= stop:
            self.num_bytes = num_bytes
            return num_bytes
        with self._state:
            self._wanted = 0  # the thread is to end now, not with what it was asked for
        with self._working:
            self.num_bytes = num_bytes
            self._present = min(self._present, start)
            self._range.give_back(start, _up(stop, PIECE_BYTES))  # the last byte may have brought all of its piece
        return num_bytes

    def reach(self, num_bytes: int) -> None:
        wanted = min(num_bytes + LEAD_BYTES, self.num_bytes)
        if wanted < self._present + LEAD_BYTES // 2 and wanted < self.num_bytes:
            return  # there is enough for a while
        with self._state:
            self._wanted = max(self._wanted, wanted)
            if self._is_running or not self._can_populate or self._next() > self._wanted:
                return
            self._is_running = True
        try:
            # `Thread.start` waits until it runs: for a turn of whoever computes
            _thread.start_new_thread(self._populate, ())
        except RuntimeError:  # no threads are left: then pages come when they are touched
            self._is_running = self._can_populate = False

    def _populate(self) -> None:
        while True:
            with self._working:
                stop = self._next()
                with self._state:
                    if stop > self._wanted or not self._can_populate:
                        self._is_running = False
                        return
                if self._range.populate(self._present, stop):
                    self._present = stop
                else:
                    self._can_populate = False

    def _next(self) -> int:
        """Where the next piece ends."""
        return (self._present + PIECE_BYTES) // PIECE_BYTES * PIECE_BYTES


def _up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple
