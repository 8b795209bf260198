"""The best split over all orders of the devices, for a given number of stages. Pure.

Layers that are alike are left to `planning.uniform`. Where layers differ the order matters everywhere, and the search is
dynamic programming over (set of devices used, layers covered), after Held and Karp: exact. Devices that are alike are
interchangeable, so a "set" is how many of each class are used; four of each of two kinds make 25 sets, not 256. Beyond
`MAX_SETS` sets the order is taken from the same problem with averaged layers, split exactly, and improved by
exchanging devices while that helps (bounded, not exact).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np

from scheduler.planning.splits import SLACK, Problem, Split, make_split, split_near, split_order, stage_matrix
from scheduler.planning.uniform import Uniform, exchanges

MAX_SETS = 300
_ROUNDS = 4
_TRIES = 40

_Used: TypeAlias = tuple[int, ...]
"""How many devices of each class are used."""


class _Reached(NamedTuple):
    """For each number of layers covered: the cost, the class of the last device, and where its stage begins (None: at 0)."""

    cost: np.ndarray
    via: np.ndarray
    cuts: np.ndarray | None


class Solver:
    """One problem, for k stages."""

    def __init__(self, problem: Problem, k: int, memory: np.ndarray | None = None) -> None:
        """`memory` as in `Uniform`, where layers are known to be alike."""
        self._problem, self._k = problem, k
        is_uniform = memory is not None or problem.is_uniform
        self._uniform = Uniform(problem, k, memory) if is_uniform else None

    def best(self, wanted: Sequence[int] = (), cuts: Sequence[int] = ()) -> Split | None:
        """The split with the shortest cycle, ``max(sum, in_flight * largest)``; None when nothing fits the memory.

        With a step in flight for every stage that is the least largest stage. With fewer, the least sum under some bound on
        the largest stage, found by binary search: a looser bound lowers the sum, a tighter one the largest stage. `wanted` are
        the devices of the present layout and `cuts` its boundaries: among equal splits one near it is given.
        """
        problem = self._problem
        best = self._least_bottleneck(wanted, cuts)
        if best is None or problem.in_flight >= self._k:
            return best
        start, values = best, self._stage_values(best.largest)
        left, right, middle = 0, len(values) - 1, len(values) - 1
        while left <= right:
            found = self._least_sum(values[middle], start)
            if found is not None and found.cycle_s(problem) < best.cycle_s(problem) * (1 - SLACK):
                best = found
            if found is None or found.total >= problem.in_flight * found.largest:
                left = middle + 1  # the sum decides, and only a looser bound could lower it
            else:
                right = (
                    min(middle, bisect_left(values, found.largest * (1 - SLACK))) - 1
                )  # only a tighter bound could help
            middle = (left + right) // 2
        return best

    def _stage_values(self, low: float) -> list[float]:
        """Everything from `low` on that a stage can cost, ascending: the bounds that can make a difference."""
        if self._uniform is not None:
            return self._uniform.stage_values(low)
        problem = self._problem
        sums = np.concatenate([np.zeros((problem.num_devices, 1)), np.cumsum(problem.layers, axis=1)], axis=1)
        rows, columns = np.triu_indices(problem.num_layers + 1)
        inner = sums[:, columns] - sums[:, rows] + problem.stage[:, None]
        values = np.unique(np.stack([inner, inner + problem.last[:, None]]))
        return values[values >= low * (1 - SLACK)].tolist()

    def _least_bottleneck(self, wanted: Sequence[int], cuts: Sequence[int]) -> Split | None:
        if self._uniform is not None:
            return self._uniform.choose(wanted, cuts)
        best = search_orders(self._problem, self._k)
        if best is not None and len(wanted) == self._k and len(cuts) == self._k - 1:
            return split_near(self._problem, wanted, best.largest, cuts) or best
        return best

    def _least_sum(self, bound: float, start: Split) -> Split | None:
        if self._uniform is not None:
            return self._uniform.least_sum(bound, start)
        return search_orders(self._problem, self._k, bound, by_sum=True)


def search_orders(problem: Problem, k: int, bound: float = np.inf, *, by_sum: bool = False) -> Split | None:
    """The best split over every order of k devices: the least largest stage, or the least sum under `bound`."""
    classes = _classes(problem)
    if np.prod([len(members) + 1.0 for members in classes]) <= MAX_SETS:
        return _best_order(problem, classes, k, bound, by_sum)
    return _improve(problem, k, bound, by_sum)


def _classes(problem: Problem) -> list[list[int]]:
    """Devices that are alike in everything."""
    groups: dict[bytes, list[int]] = {}
    for device in range(problem.num_devices):
        alone = np.concatenate(
            ([problem.stage[device], problem.last[device], problem.room[device]], problem.layers[device])
        )
        groups.setdefault(alone.tobytes(), []).append(device)
    return list(groups.values())


def _best_order(problem: Problem, classes: Sequence[Sequence[int]], k: int, bound: float, by_sum: bool) -> Split | None:
    """An optimal split: dynamic programming over how many of each class are used and how many layers they cover."""
    heads = [members[0] for members in classes]
    if k == 1:
        costs = [stage_matrix(problem, d, first=True, last=True, bound=bound)[0, -1] for d in heads]
        best = int(np.argmin(costs))
        return make_split(problem, [heads[best]], [problem.num_layers]) if np.isfinite(costs[best]) else None
    combine: Callable[..., np.ndarray] = np.add if by_sum else np.maximum
    inner = [stage_matrix(problem, d, first=False, last=False, bound=bound) for d in heads]
    last = [stage_matrix(problem, d, first=False, last=True, bound=bound)[:, -1] for d in heads]
    level: dict[_Used, _Reached] = {}
    for c, d in enumerate(heads):
        covered = stage_matrix(problem, d, first=True, last=False, bound=bound)[0]
        level[tuple(int(c == other) for other in range(len(heads)))] = _Reached(covered, np.full(len(covered), c), None)
    reached = dict(level)
    for _ in range(k - 2):
        level = _extend(level, classes, inner, combine)
        reached |= level
    best, ending = np.inf, None
    for used, (covered, _, _) in level.items():
        for c, members in enumerate(classes):
            if used[c] < len(members):
                value = combine(covered, last[c])
                cut = int(value.argmin())
                if value[cut] < best:
                    best, ending = value[cut], (used, c, cut)
    return None if ending is None else _trace(problem, classes, reached, *ending)


def _extend(
    level: dict[_Used, _Reached],
    classes: Sequence[Sequence[int]],
    inner: Sequence[np.ndarray],
    combine: Callable[..., np.ndarray],
) -> dict[_Used, _Reached]:
    """Every set with one device more, with the best way to cover each number of layers."""
    longer: dict[_Used, _Reached] = {}
    for used, (covered, _, _) in level.items():
        for c, members in enumerate(classes):
            if used[c] == len(members):
                continue
            table = combine(covered[:, None], inner[c])
            cuts = table.argmin(axis=0)
            values = table[cuts, np.arange(len(cuts))]
            now = tuple(count + (c == other) for other, count in enumerate(used))
            if now in longer:
                known = longer[now]
                better = values < known.cost
                assert known.cuts is not None
                longer[now] = _Reached(
                    np.where(better, values, known.cost),
                    np.where(better, c, known.via),
                    np.where(better, cuts, known.cuts),
                )
            else:
                longer[now] = _Reached(values, np.full(len(values), c), cuts)
    return longer


def _trace(
    problem: Problem, classes: Sequence[Sequence[int]], reached: dict[_Used, _Reached], used: _Used, c: int, cut: int
) -> Split:
    """The split whose last stage is of class `c` and begins at `cut`, after the devices in `used`."""
    chain, counts = [c], [problem.num_layers - cut]
    while True:
        found = reached[used]
        c = int(found.via[cut])
        chain.append(c)
        if found.cuts is None:
            counts.append(cut)
            break
        counts.append(cut - int(found.cuts[cut]))
        cut = int(found.cuts[cut])
        used = tuple(count - (c == other) for other, count in enumerate(used))
    unused = [list(members) for members in classes]
    return make_split(problem, [unused[c].pop(0) for c in reversed(chain)], counts[::-1])


def _improve(problem: Problem, k: int, bound: float, by_sum: bool) -> Split | None:
    """Not exact: the order that averaged layers would want, split exactly, then devices exchanged while that helps."""
    average = replace(
        problem,
        layers=np.repeat(problem.layers.mean(axis=1, keepdims=True), problem.num_layers, axis=1),
        layer_bytes=np.full(problem.num_layers, problem.layer_bytes.mean()),
    )
    uniform = Uniform(average, k)
    start = uniform.choose()
    if start is not None and by_sum:
        start = uniform.least_sum(bound, start) or start
    if start is None:
        return None
    best = split_order(problem, start.order, bound, by_sum=by_sum)
    order = np.array(start.order)
    for _ in range(_ROUNDS):
        improved = False
        for other in exchanges(order, problem.num_devices)[1 : 1 + _TRIES]:
            found = split_order(problem, other, bound, by_sum=by_sum)
            if found is not None and (best is None or _value(found, by_sum) < _value(best, by_sum) * (1 - SLACK)):
                best, order, improved = found, other, True
                break
        if not improved:
            break
    return best


def _value(split: Split, by_sum: bool) -> float:
    return split.total if by_sum else split.largest
