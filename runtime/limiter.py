"""How much of a worker's time may go to a change of layout while it serves. Times in seconds of one clock.

Two things take time from steps: a step that comes while background work runs waits for the end of that slice, and a worker
without idle time has none to give. So background work gets a *share* of the time that follows from how busy the worker
is: a fifth of the time that steps leave free, at least `MIN_SHARE` (or a saturated worker could never give
its layers away), and all of it when no step came for a while. After a slice that took t seconds the next may begin
t / share later. On top of that, `bytes_per_s` bounds what one change may put on the network.
"""

import math

MIN_SHARE = 0.02
SHARE_OF_FREE = 0.2
"""Measured: what keeps mean TPOT within some 3 % on two cores that the workers, the head and the client share."""
MEMORY_S = 0.5
"""Time constant of the average of how busy the worker is."""
IDLE_AFTER_S = 0.1


class Limiter:
    """One per worker. The loader's thread reads `share` while the compute thread writes; a torn value cannot be seen."""

    def __init__(self) -> None:
        self._busy = 0.0
        self._ended_s = -1e9

    def ran(self, begun_s: float, ended_s: float) -> None:
        """A step ran."""
        elapsed_s = max(ended_s - self._ended_s, 1e-9)
        keep = math.exp(-elapsed_s / MEMORY_S)
        self._busy = keep * self._busy + (1.0 - keep) * min(1.0, (ended_s - begun_s) / elapsed_s)
        self._ended_s = ended_s

    def is_idle(self, now_s: float) -> bool:
        """Whether no step came for a while."""
        return now_s - self._ended_s > IDLE_AFTER_S

    def share(self, now_s: float) -> float:
        """Of the time from now on that one kind of background work may take, in (0, 1]."""
        if self.is_idle(now_s):
            return 1.0
        return max(MIN_SHARE, SHARE_OF_FREE * (1.0 - self._busy))

    def rest_s(self, now_s: float, worked_s: float, num_bytes: int = 0, bytes_per_s: float = math.inf) -> float:
        """How long to rest after `worked_s` of background work that put `num_bytes` on the network."""
        if self.is_idle(now_s):
            return 0.0
        return max(worked_s * (1.0 / self.share(now_s) - 1.0), num_bytes / bytes_per_s - worked_s, 0.0)
