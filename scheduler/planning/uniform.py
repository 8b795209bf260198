"""The best split when all layers are alike: then the order matters only at the two ends. Pure.

*Bottleneck.* Under a bound B a device holds at most ``floor((B - stage) / layer)`` layers, fewer as the first or the last
stage and where memory is short. k devices can keep B exactly when, for some first and some last, these two and the
largest k - 2 of the others hold all layers. That test is a sort and a sum, for any number of devices and for many k and B
at once, so B is found by dividing an interval in 24 parts until it is as narrow as floating point allows to matter.

*Sum.* With the devices, the first and the last given, layers go to the device on which one costs least, up to its cap under
B; all choices are tried where there are few devices, otherwise a set is improved by exchanging devices (then bounded).

Never true: this is called for layers that differ.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from scheduler.planning.splits import SLACK, Problem, Split, make_split

_PARTS = 24
_EXACT_DEVICES = 8
_NONE = -1e6
"""The cap of a device that cannot hold its role at all; it spoils any sum, and unlike -inf it can be subtracted again."""
_NEVER = 1e4 * _NONE


class Uniform:
    """Problems over the same devices, one for each number of stages, stacked: ``[K, n]``."""

    def __init__(self, problems: Sequence[Problem], num_stages: Sequence[int]) -> None:
        self.problems = problems
        self.k = np.array(num_stages)
        self.num_layers = problems[0].num_layers
        self.stage = np.stack([p.stage for p in problems])
        self.layer = np.stack([p.layers[:, 0] for p in problems])
        self.last = np.stack([p.last for p in problems])
        room = np.stack([p.room for p in problems])
        layer_bytes = np.array([p.layer_bytes[0] for p in problems])[:, None]
        first_bytes = np.array([p.first_bytes for p in problems])[:, None]
        last_bytes = np.array([p.last_bytes for p in problems])[:, None]
        self.memory = np.stack(
            [
                _whole(b / layer_bytes)
                for b in (room, room - first_bytes, room - last_bytes, room - first_bytes - last_bytes)
            ]
        )
        """``[4, K, n]``: layers that memory allows an inner, a first, a last and an only stage."""

    def caps(self, bound: np.ndarray) -> np.ndarray:
        """``[4, K, G, n]``: the layers that each device may hold in each role under ``bound [K, G]``, or `_NONE`."""
        time = bound[:, :, None] - self.stage[:, None, :]
        layer = self.layer[:, None, :]
        free, ending = _whole(time / layer), _whole((time - self.last[:, None, :]) / layer)
        caps = np.minimum(np.stack((free, free, ending, ending)), self.memory[:, :, None, :])
        lowest = np.array([1.0, 0.0, 0.0, 0.0])[:, None, None, None]
        return np.where(caps < lowest, _NONE, np.minimum(caps, self.num_layers))

    def coverage(self, caps: np.ndarray) -> np.ndarray:
        """``[K, G]``: the most layers that exactly k devices can hold.

        With the devices by what they hold as inner stages, largest first, and q = k - 2: either both ends come from beyond
        the first q, or one of them is among the first q + 1 and those lend one more, or both are among the first q + 2.
        """
        inner, first, last, only = caps
        order = np.argsort(-inner, axis=-1)
        inner, first, last = (np.take_along_axis(x, order, -1) for x in (inner, first, last))
        sums = np.concatenate([np.zeros((*inner.shape[:-1], 1)), np.cumsum(inner, axis=-1)], axis=-1)
        q = np.maximum(self.k - 2, 0)[:, None]
        rank = np.arange(inner.shape[-1])
        beyond, among, outside, both = (
            np.where(keep, 0.0, _NEVER)[:, None, :] for keep in (rank >= q, rank <= q, rank > q, rank <= q + 1)
        )

        def top(extra: int) -> np.ndarray:
            index = np.minimum(self.k - 2 + extra, inner.shape[-1])[:, None, None]
            return np.take_along_axis(sums, np.broadcast_to(np.maximum(index, 0), (*sums.shape[:-1], 1)), -1)[..., 0]

        swapped_first, swapped_last = first - inner, last - inner
        most = np.maximum.reduce([
            top(0) + _best_pair(first + beyond, last + beyond),
            top(1) + (swapped_first + among).max(-1) + (last + outside).max(-1),
            top(1) + (first + outside).max(-1) + (swapped_last + among).max(-1),
            top(2) + _best_pair(swapped_first + both, swapped_last + both),
        ])  # fmt: skip
        return np.where((self.k == 1)[:, None], only.max(axis=-1), most)

    def bottlenecks(self) -> np.ndarray:
        """``[K]``: the least possible largest stage; inf where nothing fits."""
        high = (self.stage + self.layer * self.num_layers + self.last).max(axis=1)
        possible = self.coverage(self.caps(high[:, None]))[:, 0] >= self.num_layers
        low = np.zeros_like(high)
        num_parts = min(_PARTS, max(2, _PARTS * 50 // self.stage.size))
        parts = np.arange(1, num_parts + 1) / num_parts
        rows = np.arange(len(high))
        while True:
            width = np.where(possible, high - low, 0.0)
            if (width <= SLACK / 4 * high).all():
                return np.where(possible, high, np.inf)
            grid = low[:, None] + width[:, None] * parts
            good = self.coverage(self.caps(grid)) >= self.num_layers
            good[:, -1] = True
            index = good.argmax(axis=1)
            high, low = grid[rows, index], np.where(index > 0, grid[rows, index - 1], low)

    def choose(self, row: int, bound: float, wanted: Sequence[int], cuts: Sequence[int]) -> Split | None:
        """A split of problem `row` within `bound`, among equals one near the present: devices `wanted`, boundaries `cuts`."""
        k, problem = int(self.k[row]), self.problems[row]
        caps = self._row(row).caps(np.array([[bound * (1 + SLACK)]]))[:, 0, 0]
        if len(wanted) == k:
            split = self._within(problem, caps, wanted, cuts)
            if split is not None:
                return split
        order = self._some_order(caps, k, wanted)
        return None if order is None else self._within(problem, caps, order, cuts if len(wanted) == k else ())

    def _some_order(self, caps: np.ndarray, k: int, wanted: Sequence[int]) -> list[int] | None:
        """Devices that together hold all layers, `wanted` ones and those in their order where that makes no difference."""
        inner, first, last, only = caps
        n = len(inner)
        place = np.full(n, n)
        place[list(wanted)] = np.arange(len(wanted))
        if k == 1:
            good = np.flatnonzero(only >= self.num_layers)
            return [int(good[place[good].argmin()])] if len(good) else None
        ranked = np.lexsort((place, -inner))
        pairs = _without(inner[ranked], k) + first[ranked][:, None] + last[ranked]
        np.fill_diagonal(pairs, _NONE)
        merit = 2.0 * (place[ranked] == 0)[:, None] + 2.0 * (bool(wanted) & (place[ranked] == len(wanted) - 1))
        merit += (place[ranked] < n)[:, None] / 2 + (place[ranked] < n) / 2
        merit[pairs < self.num_layers] = -1.0
        i, j = (int(ranked[at]) for at in np.unravel_index(int(merit.argmax()), merit.shape))
        if merit.max() < 0:
            return None
        rest = [int(d) for d in ranked if d not in (i, j)][: k - 2]
        return [i, *sorted(rest, key=lambda d: (place[d], d)), j]

    def _within(self, problem: Problem, caps: np.ndarray, order: Sequence[int], cuts: Sequence[int]) -> Split | None:
        """Counts for one order within the caps, boundaries as near to `cuts` as that allows; without cuts, even shares."""
        inner, first, last, only = caps
        k = len(order)
        room = inner[list(order)]
        if k == 1:
            room = only[list(order)]
        else:
            room[0], room[-1] = first[order[0]], last[order[-1]]
        least = np.ones(k)
        least[0] = least[-1] = 0.0
        if (room < least).any() or room.sum() < self.num_layers or least.sum() > self.num_layers:
            return None
        if len(cuts) != k - 1:
            cuts = (np.cumsum(room) * self.num_layers / room.sum())[:-1]
        rest, need = room.sum() - np.cumsum(room), least.sum() - np.cumsum(least)
        counts, start = [], 0.0
        for i in range(k):
            aim = cuts[i] if i < k - 1 else self.num_layers
            low = max(start + least[i], self.num_layers - rest[i])
            stop = min(max(np.floor(aim + 0.5), low), start + room[i], self.num_layers - need[i])
            counts.append(int(stop - start))
            start = stop
        return make_split(problem, order, counts)

    def least_sum(self, row: int, bound: float, start: Split | None) -> Split | None:
        """The split of problem `row` with the least sum of stages none of which exceeds `bound`."""
        k, problem = int(self.k[row]), self.problems[row]
        caps = self._row(row).caps(np.array([[bound * (1 + SLACK)]]))[:, 0, 0]
        if problem.num_devices <= _EXACT_DEVICES:
            return _fill(problem, caps, _arrangements(problem.num_devices, k))
        if start is None:
            return None
        best = start
        for _ in range(4 * k):
            found = _fill(problem, caps, exchanges(np.array(best.order), problem.num_devices))
            if found is None or found.total >= best.total * (1 - SLACK):
                break
            best = found
        return best

    def _row(self, row: int) -> "Uniform":
        return Uniform([self.problems[row]], [int(self.k[row])])


def _whole(layers: np.ndarray) -> np.ndarray:
    return np.floor(layers * (1 + SLACK / 4) + SLACK / 4)


def _best_pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``max(a[i] + b[j])`` over i != j, along the last axis."""
    if a.shape[-1] == 1:
        return np.full(a.shape[:-1], _NEVER)
    at = a.argmax(-1)[..., None]
    best_a = np.take_along_axis(a, at, -1)[..., 0]
    others = b.copy()
    np.put_along_axis(others, at, 4 * _NEVER, -1)
    second_a = a.copy()
    np.put_along_axis(second_a, at, 4 * _NEVER, -1)
    return np.maximum(best_a + others.max(-1), second_a.max(-1) + np.take_along_axis(b, at, -1)[..., 0])


def _without(inner: np.ndarray, k: int) -> np.ndarray:
    """``[n, n]``: the sum of the largest k - 2 of ``inner [n]`` (descending) that are neither entry i nor entry j."""
    sums = np.concatenate([[0.0], np.cumsum(inner)])
    ranks, q = np.arange(len(inner)), k - 2
    low, high = np.minimum(ranks[:, None], ranks), np.maximum(ranks[:, None], ranks)
    one = sums[q + 1] - inner[low]
    two = sums[q + 2] - inner[low] - inner[high]
    return np.where(low >= q, sums[q], np.where(high >= q + 1, one, two))


def _fill(problem: Problem, caps: np.ndarray, orders: np.ndarray) -> Split | None:
    """The least sum over ``orders [C, k]`` when layers go where one costs least; None when no order can hold them."""
    inner, first, last, only = caps
    k = orders.shape[1]
    room, least = inner[orders], np.ones(orders.shape)
    if k == 1:
        room = only[orders]
    else:
        room[:, 0], room[:, -1] = first[orders[:, 0]], last[orders[:, -1]]
    least[:, 0] = least[:, -1] = 0.0
    layer = problem.layers[:, 0][orders]
    by_cost = np.argsort(layer, axis=1, kind="stable")
    spare = np.take_along_axis(room - least, by_cost, 1)
    before = np.cumsum(spare, axis=1) - spare
    todo = problem.num_layers - least.sum(axis=1)
    taken = np.clip(todo[:, None] - before, 0.0, np.maximum(spare, 0.0))
    possible = (room >= least).all(axis=1) & (room.sum(axis=1) >= problem.num_layers) & (todo >= 0)
    if not possible.any():
        return None
    counts = np.zeros(orders.shape)
    np.put_along_axis(counts, by_cost, taken, 1)
    counts += least
    total = problem.stage[orders].sum(axis=1) + (counts * layer).sum(axis=1) + problem.last[orders[:, -1]]
    best = int(np.where(possible, total, np.inf).argmin())
    return make_split(problem, orders[best], counts[best].astype(int))


@lru_cache(maxsize=64)
def _arrangements(n: int, k: int) -> np.ndarray:
    """Every choice of k of n devices with every first and every last of them, ``[C, k]``."""
    if k == 1:
        return np.arange(n)[:, None]
    return np.array([
        [i, *(d for d in chosen if d not in (i, j)), j]
        for chosen in itertools.combinations(range(n), k)
        for i, j in itertools.permutations(chosen, 2)
    ])  # fmt: skip


def exchanges(order: np.ndarray, n: int) -> np.ndarray:
    """`order` with one device exchanged for one that is not in it, or with two places exchanged."""
    k = len(order)
    outside = np.setdiff1d(np.arange(n), order)
    rows = [order]
    for position in range(k):
        for device in outside:
            rows.append(order.copy())
            rows[-1][position] = device
    for position in range(k - 1):
        for end in {0, k - 1} - {position}:
            rows.append(order.copy())
            rows[-1][[position, end]] = rows[-1][[end, position]]
    return np.array(rows)
