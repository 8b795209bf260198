"""Spans: what each thread of this process did, and when, for as long as somebody asks for it.

How it works: whoever does something worth knowing asks `is_on`, notes the time before and after (`time.perf_counter`),
and calls `span`. A span is written into a slot of a list that was made when the tracer was started; the number of the
slot is drawn in one step, so any thread may call, without a lock. Spans beyond the last slot are counted, not kept.

What is never true: something is recorded, or costs more than the look at `is_on`, while the tracer is off.
"""

import itertools
import time

from runtime.messages import Span

MAX_SPANS = 200_000


class Tracer:
    """The spans of one process. `start` and `stop` may be called in any thread, `span` in all of them."""

    __slots__ = ("_next", "_slots", "is_on")

    def __init__(self) -> None:
        self.is_on = False
        self._slots: list[Span | None] = []
        self._next = itertools.count()

    def start(self, max_spans: int = MAX_SPANS) -> None:
        """Record from now on; what was recorded before is forgotten."""
        slots: list[Span | None] = [None] * max_spans
        self._slots, self._next = slots, itertools.count()
        self.is_on = True

    def stop(self) -> tuple[list[Span], int]:
        """Record no more: the spans, in the order in which they ended, and how many there was no room for."""
        self.is_on = False
        slots, self._slots = self._slots, []
        num_lost = max(0, next(self._next) - len(slots))
        return [span for span in slots if span is not None], num_lost

    def cpu_ns(self) -> int:
        """Processor time of the calling thread; 0 while nothing is recorded."""
        return time.thread_time_ns() if self.is_on else 0

    def span(
        self,
        track: str,
        name: str,
        begin_s: float,
        end_s: float,
        step: tuple[int, int, int] = (-1, -1, -1),
        amounts: dict[str, int] | None = None,
    ) -> None:
        """What ran on `track` (a thread) from `begin_s` to `end_s`; `step` is the epoch, the ordinal and the hop."""
        slots, slot = self._slots, next(self._next)
        if slot < len(slots):
            slots[slot] = Span(track, name, begin_s, end_s, step, amounts or {})
