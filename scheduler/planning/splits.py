"""The problem that the planner solves: cut a chain of layers into stages on devices. Pure.

A *split* is an order of k of the n devices and how many layers each takes. The first stage holds the embedding (memory
only), the last one the LM head. Inner stages hold at least one layer; the ends may hold none. What is minimised is the
*cycle*, the time in which `in_flight` steps go once around the pipeline,

    cycle = max(sum of stages, in_flight * largest stage)

With at least as many steps in flight as stages that is the bottleneck alone, with one step in flight the sum alone.
A stage's time includes its hop: sending a hidden state occupies the sender, and with as many steps in flight as stages
nothing would hide it anyway.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLACK = 1e-9
"""Relative: values closer than this are equal."""


@dataclass(frozen=True, slots=True)
class Problem:
    """n devices, L layers. Seconds per mean step; bytes, KV included.

    `stage` ``[n]`` is what any stage costs (hop included), `layers` ``[n, L]`` its layers, `last` ``[n]`` the LM head.
    `room` ``[n]`` is each device's memory, `layer_bytes` ``[L]`` what a layer needs with the KV of the load.
    """

    stage: np.ndarray
    layers: np.ndarray
    last: np.ndarray
    room: np.ndarray
    layer_bytes: np.ndarray
    first_bytes: float
    last_bytes: float
    in_flight: float

    @property
    def num_devices(self) -> int:
        return len(self.stage)

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are alike on every device."""
        alike = self.layers == self.layers[:, :1]
        return bool(alike.all() and (self.layer_bytes == self.layer_bytes[0]).all())


@dataclass(frozen=True, slots=True)
class Split:
    """``counts[i]`` layers on device ``order[i]``. `largest` and `total` are seconds over its stages."""

    order: tuple[int, ...]
    counts: tuple[int, ...]
    largest: float
    total: float

    def cycle_s(self, problem: Problem) -> float:
        return max(self.total, problem.in_flight * self.largest)


def stage_times(problem: Problem, order: Sequence[int], counts: Sequence[int]) -> list[float]:
    """Seconds of each stage."""
    chosen, stops = np.asarray(order), np.cumsum(counts)
    until = np.zeros((len(chosen), problem.num_layers + 1))
    np.cumsum(problem.layers[chosen], axis=1, out=until[:, 1:])
    places = np.arange(len(chosen))
    times = problem.stage[chosen] + until[places, stops] - until[places, stops - np.asarray(counts)]
    times[-1] += problem.last[chosen[-1]]
    return times.tolist()


def make_split(problem: Problem, order: Sequence[int], counts: Sequence[int]) -> Split:
    times = stage_times(problem, order, counts)
    return Split(tuple(int(d) for d in order), tuple(int(c) for c in counts), max(times), sum(times))


def fits(problem: Problem, order: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether every stage has room for its weights and KV."""
    start = 0
    for position, (device, count) in enumerate(zip(order, counts, strict=True)):
        need = problem.layer_bytes[start : start + count].sum()
        need += problem.first_bytes * (position == 0) + problem.last_bytes * (position == len(order) - 1)
        if need > problem.room[device]:
            return False
        start += count
    return True


def stage_matrix(
    problem: Problem, device: int, *, first: bool, last: bool, bound: float = np.inf, empty_ends: bool = True
) -> np.ndarray:
    """``[L + 1, L + 1]``: what a stage on `device` costs that holds layers ``[row, column)``; inf where it may not be.

    It may not when it is too large for the device, costs more than `bound`, or holds no layer, unless it is an end and
    `empty_ends` allows it.
    """
    size = problem.num_layers + 1
    times = np.concatenate(([0.0], np.cumsum(problem.layers[device])))
    need = np.concatenate(([0.0], np.cumsum(problem.layer_bytes)))
    cost = times[None, :] - times[:, None] + problem.stage[device] + (problem.last[device] if last else 0.0)
    fixed_bytes = problem.first_bytes * first + problem.last_bytes * last
    cost[need[None, :] - need[:, None] + fixed_bytes > problem.room[device]] = np.inf
    cost[cost > bound * (1 + SLACK)] = np.inf
    cost[np.tri(size, k=-1 if empty_ends and (first or last) else 0, dtype=bool)] = np.inf
    return cost


def split_order(
    problem: Problem, order: Sequence[int], bound: float = np.inf, *, by_sum: bool = False, empty_ends: bool = True
) -> Split | None:
    """The best split for one order of devices, exact: dynamic programming over (stage, layers covered).

    Minimises the largest stage, or with `by_sum` the sum of stages none of which exceeds `bound`. None when nothing fits.
    """
    combine = np.add if by_sum else np.maximum
    best: np.ndarray | None = None
    cuts: list[np.ndarray] = []
    for i, device in enumerate(order):
        first, last = i == 0, i == len(order) - 1
        cost = stage_matrix(problem, device, first=first, last=last, bound=bound, empty_ends=empty_ends)
        if best is None:
            best = cost[0]
            continue
        table = combine(best[:, None], cost)
        cuts.append(table.argmin(axis=0))
        best = table.min(axis=0)
    assert best is not None, "an order of no devices"
    if not np.isfinite(best[-1]):
        return None
    stop, counts = problem.num_layers, []
    for cut in reversed(cuts):
        counts.append(stop - int(cut[stop]))
        stop = int(cut[stop])
    counts.append(stop)
    return make_split(problem, order, counts[::-1])


def split_near(
    problem: Problem, order: Sequence[int], bound: float, wanted: Sequence[float], *, empty_ends: bool = True
) -> Split | None:
    """A split for one order whose stages all stay within `bound`, with its boundaries as near to `wanted` as that allows.

    `wanted` are k - 1 layers at which to cut. None when the order cannot keep the bound.
    """
    num_layers, k = problem.num_layers, len(order)
    allowed = [
        np.isfinite(stage_matrix(problem, device, first=i == 0, last=i == k - 1, bound=bound, empty_ends=empty_ends))
        for i, device in enumerate(order)
    ]
    good = np.zeros(num_layers + 1, dtype=bool)
    good[num_layers] = True
    completable: list[np.ndarray] = [good]  # where a stage may end so that the stages after it can cover the rest
    for table in reversed(allowed[1:]):
        completable.append(np.any(table & completable[-1][None, :], axis=1))
    completable.reverse()
    cuts = [0]
    for i, table in enumerate(allowed):
        possible = np.flatnonzero(table[cuts[-1]] & completable[i])
        if not len(possible):
            return None
        aim = wanted[i] if i < k - 1 else num_layers
        cuts.append(int(possible[np.abs(possible - aim).argmin()]))
    return make_split(problem, order, [stop - start for start, stop in itertools.pairwise(cuts)])
