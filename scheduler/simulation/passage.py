"""A whole pipeline at once: the times of a step at every hop, as arrays. Pure.

Steps of one layout go through its hops in their order. With c[h] the time for which hop h computes and sends, f[h] when it is free, and d
the flight between two workers, a hop begins at ::

    begun[h] = max(begun[h - 1] + c[h - 1] + d,  f[h])          and f[h] becomes begun[h] + c[h]

which, with P[h] the sum of c + d over the hops before h, is ``P + maximum.accumulate(f - P)``: the times that `SimWorker.step` finds
hop by hop, up to rounding, in a dozen array operations instead of some microseconds a hop.

Never true: a passage is open while one of its workers has a part in a transition, or holds two of its hops.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from runtime.limiter import MEMORY_S, Limiter
from runtime.messages import HopTiming
from scheduler.planning.cost import Facts, Work
from scheduler.simulation.stage_cost import StageCost

MIN_HOPS = 5
"""Fewer are faster one by one."""
_REMEMBERED_S = 20 * MEMORY_S
"""A limiter has forgotten what was before that, all but e^-20 of it."""


class Passage:
    """A pipeline of `stages`, each on another worker.

    `names` are these workers, `free_s` when they are free, `idle_since_s` since when they have nothing to do, all by hop; the truth
    about all of them is here as long as the passage is open. `noise` gives the factor on the next stage time, if there is any.
    """

    def __init__(
        self,
        facts: Facts,
        names: Sequence[str],
        stages: Sequence[StageCost],
        flight_s: float,
        noise: Callable[[], float] | None,
        free_s: Sequence[float],
        idle_since_s: Sequence[float],
    ) -> None:
        self.free_s, self.idle_since_s = np.array(free_s), np.array(idle_since_s)
        self.busy_s = np.zeros(len(stages))
        """Since the passage was opened."""
        self._names, self._last, self._flight_s, self._noise = names, stages[-1], flight_s, noise
        kinds = [stage.speed.kind for stage in stages]
        self._latency_s = np.array([kind.link_latency_s for kind in kinds])
        self._row_s = np.array([facts.hidden_bytes / kind.link_bytes_per_s for kind in kinds])
        self._row_s[-1] = 0.0
        self._step_s = np.array([stage.step_s for stage in stages])
        speeds = {id(stage.speed): stage for stage in stages}
        self._speeds = tuple(speeds.values())
        """One stage of each speed that there is: it tells what a layer costs there."""
        counts = np.zeros((len(stages), len(speeds), len(stages[0].counts)))
        for hop, stage in enumerate(stages):
            counts[hop, list(speeds).index(id(stage.speed))] = stage.counts
        self._counts = counts.reshape(len(stages), -1)
        self._ran: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def run(self, work: Work, arrived_s: float, timings: list[HopTiming] | None) -> float:
        """A step arrives at the first hop: when its result has left the last one. Its timings are added to `timings`."""
        layers_s = [seconds for stage in self._speeds for seconds in stage.layers_s(work)]
        compute_s = self._counts @ np.array(layers_s) + self._step_s
        sample_s = self._last.sample_s(work)
        if self._noise is not None:
            factors = np.array([self._noise() for _ in self._names])
            compute_s, sample_s = compute_s * factors, sample_s * float(factors[-1])
        taken_s = compute_s + (self._latency_s + work.num_tokens * self._row_s)
        taken_s[-1] += sample_s
        before_s = (taken_s + self._flight_s).cumsum()
        before_s[1:] = before_s[:-1]
        before_s[0] = 0.0
        free_s = self.free_s.copy()
        free_s[0] = max(free_s[0], arrived_s)
        begun_s = np.maximum.accumulate(free_s - before_s) + before_s
        ended_s = begun_s + compute_s
        ended_s[-1] += sample_s
        self._ran.append((begun_s, ended_s))
        while self._ran[0][1][0] < arrived_s - _REMEMBERED_S:
            self._ran.popleft()
        self.free_s = begun_s + taken_s
        self.busy_s += taken_s
        if timings is not None:
            arrivals_s = np.concatenate(([arrived_s], self.free_s[:-1] + self._flight_s))
            spent_s = (arrivals_s - self.idle_since_s, begun_s - arrivals_s, compute_s, np.zeros(len(compute_s)))
            spent_s[-1][-1] = sample_s
            spent_us = np.maximum(1e6 * np.array(spent_s).T, 0.0).astype(int).tolist()
            timings.extend(HopTiming(name, *us) for name, us in zip(self._names, spent_us, strict=True))
        self.idle_since_s = self.free_s
        return float(self.free_s[-1])

    def remind(self, limiter: Limiter, hop: int) -> None:
        """Tell the limiter of the worker at `hop` of the steps that it would still remember."""
        for begun_s, ended_s in self._ran:
            limiter.ran(float(begun_s[hop]), float(ended_s[hop]))
