"""A whole pipeline at once: the times of a step at every hop, in one loop. Pure.

Steps of one layout go through its hops in their order. With c[h] the time for which hop h computes and sends, f[h] when it is free, and d
the flight between two workers, a hop begins at ::

    begun[h] = max(begun[h - 1] + c[h - 1] + d,  f[h])          and f[h] becomes begun[h] + c[h]

as `SimWorker.step` finds it hop by hop. Hops of one device kind and as many layers take as long as each other, so of a step only that
loop is left for each hop, a dozen times shorter than a call of the worker.

Never true: a passage is open while one of its workers has a part in a transition, or holds two of its hops.
"""

from collections import deque
from collections.abc import Callable, Sequence

from runtime.limiter import MEMORY_S, Limiter
from runtime.messages import HopTiming
from scheduler.planning.cost import Facts, Work, hop_seconds
from scheduler.planning.devices import DeviceKind
from scheduler.simulation.stage_cost import StageCost

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
        self.free_s, self.idle_since_s = list(free_s), list(idle_since_s)
        self._facts, self._names, self._flight_s, self._noise = facts, names, flight_s, noise
        kinds: dict[object, int] = {}
        self._stages: list[tuple[StageCost, DeviceKind]] = []
        """One of each kind; with noise every stage is its own."""
        self._kinds: list[int] = []
        """By hop: which of these it is."""
        for hop, stage in enumerate(stages):
            like = hop if noise is not None else (id(stage.speed), tuple(stage.counts), stage.is_last)
            self._kinds.append(kinds.setdefault(like, len(kinds)))
            if len(kinds) > len(self._stages):
                self._stages.append((stage, stage.speed.kind))
        self._busy_s = [0.0] * len(self._stages)
        self._ran: deque[tuple[list[float], list[float]]] = deque()

    @property
    def busy_s(self) -> list[float]:
        """By hop, since the passage was opened."""
        return [self._busy_s[kind] for kind in self._kinds]

    def run(self, work: Work, arrived_s: float, timings: list[HopTiming] | None) -> float:
        """A step arrives at the first hop: when its result has left the last one. Its timings are added to `timings`."""
        known: dict[int, list[float]] = {}
        computed_s: list[float] = []
        took_s: list[float] = []
        sample_s = 0.0
        for stage, device in self._stages:
            factor = 1.0 if self._noise is None else self._noise()
            compute_s = stage.compute_s(work, known) * factor
            computed_s.append(compute_s)
            if stage.is_last:
                sample_s = stage.sample_s(work) * factor
                took_s.append(compute_s + sample_s + device.link_latency_s)
            else:
                took_s.append(compute_s + hop_seconds(self._facts, device, work.num_tokens))
        self._busy_s = [busy_s + taken_s for busy_s, taken_s in zip(self._busy_s, took_s, strict=True)]
        flight_s, at_s = self._flight_s, arrived_s
        begun_s: list[float] = []
        then_s: list[float] = []
        for kind, free_s in zip(self._kinds, self.free_s, strict=True):
            if free_s > at_s:
                at_s = free_s
            begun_s.append(at_s)
            at_s += took_s[kind]
            then_s.append(at_s)
            at_s += flight_s
        self.free_s = then_s
        self._remember(begun_s, computed_s, sample_s, arrived_s)
        if timings is not None:
            arrivals_s = [arrived_s, *(free_s + flight_s for free_s in self.free_s[:-1])]
            for hop, kind in enumerate(self._kinds):
                idle_s = max(0.0, arrivals_s[hop] - self.idle_since_s[hop])
                spent_s = idle_s, begun_s[hop] - arrivals_s[hop], computed_s[kind]
                sampled_s = sample_s if hop == len(self._kinds) - 1 else 0.0
                timings.append(HopTiming(self._names[hop], *(int(1e6 * s) for s in (*spent_s, sampled_s))))
        self.idle_since_s = self.free_s
        return self.free_s[-1]

    def remind(self, limiter: Limiter, hop: int) -> None:
        """Tell the limiter of the worker at `hop` of the steps that it would still remember."""
        kind = self._kinds[hop]
        for begun_s, spent_s in self._ran:
            limiter.ran(begun_s[hop], begun_s[hop] + spent_s[kind])

    def _remember(self, begun_s: list[float], computed_s: list[float], sample_s: float, arrived_s: float) -> None:
        """When it began at each hop, and how long it ran there by kind."""
        last = self._kinds[-1]
        spent_s = computed_s[:]
        spent_s[last] += sample_s
        ran = self._ran
        ran.append((begun_s, spent_s))
        while ran[0][0][0] < arrived_s - _REMEMBERED_S:
            ran.popleft()
