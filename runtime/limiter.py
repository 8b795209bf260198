"""How much of a worker's time may go to a change of layout while it serves. Times in seconds of one clock.

Two things take time from steps: a step that comes while background work runs waits for the end of that slice, and a worker
without idle time has none to give. So background work gets a *share* of the time that follows from how busy the worker
is: a fifth of the time that steps leave free, at least `MIN_SHARE` (or a saturated worker could never give
its layers away), and all of it when no step came for a while. After a slice that took t seconds from steps the next may begin
t / share later. On top of that, `bytes_per_s` bounds what a source may put on the network while steps run there. What an operator
bounds is bounded whether idle or not, and is not the limiter's: `runtime.handover`.

What a slice takes from steps depends on where they run. On a processor that computes steps itself it is all of the slice's time. On an
accelerator bytes move by copy engines and on streams of their own; steps lose what the host needs to queue the slice, and the
bandwidth of the memory that the bytes pass through, `PASSES` times. That is a percent or two of what the link takes to bring them, so
there it is mostly the link that sets the pace: (share * memory bandwidth / `PASSES`) bytes/s at most.

A slice that had to wait for a long step is not followed by a full rest: what it is late by is made up for, up to `CREDIT_S` or
`ACCELERATOR_CREDIT_S`: else a worker whose steps take a third of a second would do three slices a second.

What a loader's thread itself takes from an accelerator's steps is the interpreter, while it works: `ACCELERATOR_SHARE` of the time at least, for a step there
is mostly waited for. Assumed, not measured: that, and that steps are bound by memory bandwidth, and that it is divided fairly.
"""

import math
from dataclasses import dataclass

MIN_SHARE = 0.02
ACCELERATOR_SHARE = 0.1
"""Of a loader's thread beside an accelerator: while a step runs there the processor waits, most of the time."""
SHARE_OF_FREE = 0.2
"""Measured: what keeps mean TPOT within some 3 % on two cores that the workers, the head and the client share."""
LOADING = 0.5
"""Of a processor's share, what loading weights may take. Nothing waits for them, whereas the longer KV is copied, the more of it is
copied twice: what arrives meanwhile is mirrored."""
MEMORY_S = 0.5
"""Time constant of the average of how busy the worker is."""
IDLE_AFTER_S = 0.1
CREDIT_S, ACCELERATOR_CREDIT_S = 0.1, 0.25
"""On a processor a step waits for what is made up for; on an accelerator it runs beside."""
PASSES = 3
"""How often a byte passes through an accelerator's memory: gathered from pages (read, written), then sent (read); or the same the
other way round. Weights pass it once, or thrice when they are put into another form."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Bytes/s of a device's memory, and of the link by which bytes get there from the host."""

    memory_bytes_per_s: float
    link_bytes_per_s: float


class Limiter:
    """One per worker. The loader's thread reads `loading_share` while the compute thread writes; a torn value cannot be seen.

    `accelerator` is None for a processor that steps and background work share.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self._busy = 0.0
        self._ended_s = -1e9
        self._is_running = False

    def begins(self) -> None:
        """A step runs from now on; it may last longer than nothing has to come for a worker to be idle."""
        self._is_running = True

    def ran(self, begun_s: float, ended_s: float) -> None:
        """A step ran."""
        elapsed_s = max(ended_s - self._ended_s, 1e-9)
        keep = math.exp(-elapsed_s / MEMORY_S)
        self._busy = keep * self._busy + (1.0 - keep) * min(1.0, (ended_s - begun_s) / elapsed_s)
        self._ended_s = ended_s
        self._is_running = False

    def is_idle(self, now_s: float) -> bool:
        """Whether no step runs, and none came for a while."""
        return not self._is_running and now_s - self._ended_s > IDLE_AFTER_S

    def share(self, now_s: float) -> float:
        """Of the steps' time from now on, what one kind of background work may take, in (0, 1]."""
        if self.is_idle(now_s):
            return 1.0
        return max(MIN_SHARE, SHARE_OF_FREE * (1.0 - self._busy))

    def working_share(self, now_s: float) -> float:
        """Of its own time from now on, what a loader may compute and queue, in (0, 1]."""
        return self.share(now_s) if self._accelerator is None else max(self.share(now_s), ACCELERATOR_SHARE)

    def loading_share(self, now_s: float) -> float:
        """Of its own time from now on, what a loader may work, in (0, 1]; a second of it brings no more than the link does."""
        share, there = self.share(now_s), self._accelerator
        if there is None:
            return share if self.is_idle(now_s) else max(MIN_SHARE, LOADING * share)
        return min(1.0, share * there.memory_bytes_per_s / (PASSES * there.link_bytes_per_s))

    def taken_s(self, worked_s: float, num_bytes: int) -> float:
        """What a slice takes from steps that kept this thread for `worked_s` and moved `num_bytes`."""
        if self._accelerator is None:
            return worked_s
        return worked_s + PASSES * num_bytes / self._accelerator.memory_bytes_per_s

    def rest_s(self, now_s: float, worked_s: float, num_bytes: int = 0, bytes_per_s: float = math.inf) -> float:
        """How long to rest after `worked_s` of background work that put `num_bytes` on the network."""
        if self.is_idle(now_s):
            return 0.0
        taken_s = self.taken_s(worked_s, num_bytes)
        return max(taken_s * (1.0 / self.share(now_s) - 1.0), num_bytes / bytes_per_s - worked_s, 0.0)

    def due_s(
        self, now_s: float, was_due_s: float, worked_s: float, num_bytes: int = 0, bytes_per_s: float = math.inf
    ) -> float:
        """When the next slice may begin, after one that was due at `was_due_s` and ended now."""
        rest_s = self.rest_s(now_s, worked_s, num_bytes, bytes_per_s)
        credit_s = CREDIT_S if self._accelerator is None else ACCELERATOR_CREDIT_S
        return max(was_due_s, now_s - worked_s - credit_s) + worked_s + rest_s
