"""What has arrived at a worker and was not done yet: steps wait until all that is short is done, and for one piece of KV at most.

A step takes milliseconds, most else is short, and somebody waits for its answer: the phases of a change of layout would else each last as
long as the steps that happen to be queued. *Pieces* of a snapshot are not short, and come as fast as their sender gives them away: while steps
are here, one goes between two of them. The protocol holds whatever order messages come in (`tests.sim`), so nothing is lost by it.
Within each kind the order of arrival stays.

`put` is called by any thread, the rest by the one that takes.
"""

import queue
from collections import deque
from typing import Generic, Literal, TypeAlias, TypeVar

T = TypeVar("T")
Kind: TypeAlias = Literal["short", "step", "piece"]

MAX_WAITING = 65536


class Inbox(Generic[T]):
    """Three queues behind one door. Nothing is ever dropped: a sender that waits for nobody is a bug, and is told so."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[Kind, T]] = queue.SimpleQueue()
        self._short: deque[T] = deque()
        self._steps: deque[T] = deque()
        self._pieces: deque[T] = deque()
        self._was_step = False
        """Whether a step was taken after the last piece."""

    def put(self, item: T, kind: Kind) -> None:
        assert self._arrived.qsize() < MAX_WAITING, "the inbox is full: the head sends more than it waits for"
        self._arrived.put((kind, item))

    def take(self, wait_s: float | None) -> T | None:
        """What goes first of all that is here; else what comes within `wait_s` seconds (None: for ever), or None."""
        self._sort()
        if not (self._short or self._steps or self._pieces):
            if wait_s is not None and wait_s <= 0.0:
                return None
            try:
                self._file(*self._arrived.get(timeout=wait_s))
            except queue.Empty:
                return None
            self._sort()
        if self._short:
            return self._short.popleft()
        self._was_step = bool(self._steps) and not (self._pieces and self._was_step)
        return (self._steps if self._was_step else self._pieces).popleft()

    def _sort(self) -> None:
        while True:
            try:
                self._file(*self._arrived.get_nowait())
            except queue.Empty:
                return

    def _file(self, kind: Kind, item: T) -> None:
        match kind:
            case "short":
                self._short.append(item)
            case "step":
                self._steps.append(item)
            case "piece":
                self._pieces.append(item)
