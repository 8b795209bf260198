"""What has arrived at a worker and was not done yet: steps wait until everything else is done.

A step takes milliseconds, the rest is short, and somebody waits for its answer: the phases of a change of layout would else each last as
long as the steps that happen to be queued. The protocol holds whatever order messages come in (`tests.sim`), so nothing is lost by it.
Within each of the two kinds the order of arrival stays.

`put` is called by any thread, the rest by the one that takes.
"""

import queue
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_WAITING = 65536


class Inbox(Generic[T]):
    """Two queues behind one door. Nothing is ever dropped: a sender that waits for nobody is a bug, and is told so."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[bool, T]] = queue.SimpleQueue()
        self._first: deque[T] = deque()
        self._steps: deque[T] = deque()

    def put(self, item: T, *, is_step: bool) -> None:
        assert self._arrived.qsize() < MAX_WAITING, "the inbox is full: the head sends more than it waits for"
        self._arrived.put((is_step, item))

    @property
    def is_empty(self) -> bool:
        """Whether `take` would wait."""
        return not self._first and not self._steps and self._arrived.empty()

    @property
    def next_step(self) -> T | None:
        """The step that `take` would give; None when it would give something else, or wait."""
        self._sort()
        return self._steps[0] if self._steps and not self._first else None

    def take_step(self) -> None:
        """Take what `next_step` gave, whatever has come since."""
        self._steps.popleft()

    def take(self, wait_s: float | None) -> T | None:
        """What goes first of all that is here; else what comes within `wait_s` seconds (None: for ever), or None."""
        self._sort()
        if not self._first and not self._steps:
            if wait_s is not None and wait_s <= 0.0:
                return None
            try:
                self._file(*self._arrived.get(timeout=wait_s))
            except queue.Empty:
                return None
            self._sort()
        return (self._first or self._steps).popleft()

    def _sort(self) -> None:
        while True:
            try:
                self._file(*self._arrived.get_nowait())
            except queue.Empty:
                return

    def _file(self, is_step: bool, item: T) -> None:
        (self._steps if is_step else self._first).append(item)
