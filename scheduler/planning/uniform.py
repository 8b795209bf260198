"""The best split when all layers are alike: then the order matters only at the two ends. Pure.

*Bottleneck.* Under a bound B a device holds at most ``floor((B - stage) / layer)`` layers, fewer as the first or the last
stage and where memory is short. k devices can keep B exactly when, for some first and some last, these two and the
largest k - 2 of the others hold all layers: a sort and a sum, for any number of devices. B lies less than one layer above
the bound that layers cut in pieces would give (`relaxed_bottleneck`), and only at values where some device can
take one more layer; a binary search among those is exact.

*Sum.* With the devices, the first and the last given, layers go to the device on which one costs least, up to its cap under
B; all choices are tried where there are few devices, otherwise a set is improved by exchanging devices (then bounded).

Never true: this is called for layers that differ.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

from scheduler.planning.splits import SLACK, Problem, Split, make_split

_EXACT_DEVICES = 8
_MANY = 16
"""From so many devices on arrays beat a loop."""
_NEVER = -(10**9)
"""The cap of a device that cannot hold its role at all: it spoils any sum, and unlike -inf it can be subtracted again."""


def relaxed_bottleneck(problem: Problem, k: int) -> float:
    """The largest stage if layers could be cut anywhere and memory did not matter: no split has a smaller one.

    The share that k devices hold under a bound is a convex, piecewise linear function of it, so Newton's method finds
    the bound in a few steps, and exactly.
    """
    layer = problem.layers[:, 0]
    rate = 1.0 / layer
    idle = problem.stage * rate
    wanted = problem.num_layers + float((problem.last * rate).min())
    bound = math.inf
    chosen = np.argsort(-rate)[:k]
    for _ in range(20):
        following = (wanted + float(idle[chosen].sum())) / float(rate[chosen].sum())
        if not following < bound * (1 - SLACK):
            break
        bound = following
        chosen = np.argsort(idle - bound * rate)[:k]
    return min(bound, following)


class Uniform:
    """One problem with equal layers, for k stages."""

    def __init__(self, problem: Problem, k: int) -> None:
        self.problem, self.k = problem, k
        size = float(problem.layer_bytes[0])
        ends = (0.0, problem.first_bytes, problem.last_bytes, problem.first_bytes + problem.last_bytes)
        n = problem.num_layers
        self._stage = [float(x) for x in problem.stage]
        self._layer = [float(x) for x in problem.layers[:, 0]]
        self._last = [float(x) for x in problem.last]
        self._memory = [
            tuple(_whole(min((room - end) / size, n)) if room >= end else _NEVER for end in ends)
            for room in map(float, problem.room)
        ]
        """Per device: the layers that memory allows an inner, a first, a last and an only stage."""
        self._most = max(s + c * n + e for s, c, e in zip(self._stage, self._layer, self._last, strict=True))

    def caps(self, bound: float) -> list[tuple[int, int, int, int]]:
        """Per device: the layers that it may hold under `bound` as an inner, first, last and only stage, or `_NEVER`."""
        bound = min(bound, 2 * self._most)
        found = []
        for stage, layer, last, (inner, first, final, only) in zip(
            self._stage, self._layer, self._last, self._memory, strict=True
        ):
            room = bound - stage
            free, ending = _whole_of(room, layer), _whole_of(room - last, layer)
            inner = free if free < inner else inner
            found.append((
                inner if inner >= 1 else _NEVER,
                _at_least_none(free if free < first else first),
                _at_least_none(ending if ending < final else final),
                _at_least_none(ending if ending < only else only),
            ))  # fmt: skip
        return found

    def holds(self, bound: float) -> bool:
        """Whether k devices can hold all layers with no stage above `bound`."""
        if len(self._stage) >= _MANY and self.k > 1:
            return _coverage_of_many(*self._caps_of_many(bound), self.k) >= self.problem.num_layers
        return _coverage(self.caps(bound), self.k) >= self.problem.num_layers

    def _caps_of_many(self, bound: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`caps` of an inner, a first and a last stage, in arrays: for many devices that is faster."""
        problem, (inner, first, final) = self.problem, self._memory_of_many
        room = min(bound, 2 * self._most) - problem.stage
        layer = problem.layers[:, 0]
        free, ending = _whole_of_many(room, layer), _whole_of_many(room - problem.last, layer)
        held = np.minimum(free, inner)
        return (
            np.where(held >= 1, held, _NEVER),
            np.maximum(np.minimum(free, first), _NEVER),
            np.maximum(np.minimum(ending, final), _NEVER),
        )

    @cached_property
    def _memory_of_many(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inner, first, final, _ = np.array(self._memory).T
        return inner, first, final

    def bottleneck(self) -> float:
        """The least possible largest stage; inf where nothing fits the memory."""
        if not self.holds(self._most):
            return math.inf
        low = relaxed_bottleneck(self.problem, self.k)
        width = max(self._layer)
        high = low + width  # enough, unless memory is short somewhere
        while not self.holds(high):
            width *= 2
            low, high = high, min(high + width, self._most)
        values = self._values_between(low, high)
        left, right = 0, len(values) - 1
        while left < right:
            middle = (left + right) // 2
            if self.holds(values[middle]):
                right = middle
            else:
                left = middle + 1
        return values[left]

    def choose(self, bound: float, wanted: Sequence[int], cuts: Sequence[int]) -> Split | None:
        """A split within `bound`, among equals one near the present: devices `wanted`, boundaries `cuts`."""
        caps = self.caps(bound * (1 + SLACK))
        if len(wanted) == self.k:
            split = self._within(caps, wanted, cuts)
            if split is not None:
                return split
        order = self._some_order(caps, wanted)
        return None if order is None else self._within(caps, order, ())

    def least_sum(self, bound: float, start: Split | None) -> Split | None:
        """The split with the least sum of stages none of which exceeds `bound`."""
        problem, k = self.problem, self.k
        caps = np.array(self.caps(bound * (1 + SLACK)), dtype=float).T
        if problem.num_devices <= _EXACT_DEVICES:
            return _fill(problem, caps, _arrangements(problem.num_devices, k))
        best = start
        for _ in range(4 * k if best is not None else 0):
            assert best is not None
            found = _fill(problem, caps, exchanges(np.array(best.order), problem.num_devices))
            if found is None or (found.total >= best.total * (1 - SLACK) and best is not start):
                break
            best = found
        return best

    def stage_values(self, low: float) -> list[float]:
        """Everything from `low` on that a stage can cost, ascending."""
        return self._values_between(low, self._most)

    def _values_between(self, low: float, high: float) -> list[float]:
        """What stages with a whole number of layers can cost, from `low` to `high`, ascending; the last is `high`."""
        values = {high}
        if len(self._stage) >= _MANY:
            return self._many_values_between(low, high)
        for stage, layer, last in zip(self._stage, self._layer, self._last, strict=True):
            for fixed in (stage, stage + last):
                count = max(0, math.ceil((low * (1 - SLACK) - fixed) / layer))
                while (value := fixed + count * layer) < high:
                    if value >= low * (1 - SLACK):
                        values.add(value)
                    count += 1
        return sorted(values)

    def _many_values_between(self, low: float, high: float) -> list[float]:
        problem = self.problem
        layer = np.tile(problem.layers[:, 0], 2)
        fixed = np.concatenate([problem.stage, problem.stage + problem.last])
        start = np.maximum(0, np.ceil((low * (1 - SLACK) - fixed) / layer))
        most = int(max(0.0, float(((high - fixed) / layer - start).max()))) + 2
        values = fixed[:, None] + (start[:, None] + np.arange(most)) * layer[:, None]
        inside = values[(values >= low * (1 - SLACK)) & (values < high)]
        return [*np.unique(inside).tolist(), high]

    def _some_order(self, caps: Sequence[tuple[int, int, int, int]], wanted: Sequence[int]) -> list[int] | None:
        """Devices that together hold all layers; `wanted` ones, and in their order, where that makes no difference."""
        n, k, num_layers = len(caps), self.k, self.problem.num_layers
        place = {device: position for position, device in enumerate(wanted)}
        inner, first, last, only = np.array(caps, dtype=float).T
        rank = np.array([place.get(d, n) for d in range(n)])
        if k == 1:
            good = np.flatnonzero(only >= num_layers)
            return [int(good[rank[good].argmin()])] if len(good) else None
        sorted_ = np.lexsort((rank, -inner))
        pairs = _without(inner[sorted_], k) + first[sorted_][:, None] + last[sorted_]
        np.fill_diagonal(pairs, _NEVER)
        known = (rank[sorted_] < n) / 2
        merit = known[:, None] + known
        if wanted:
            merit += 2.0 * (rank[sorted_] == 0)[:, None] + 2.0 * (rank[sorted_] == len(wanted) - 1)
        merit[pairs < num_layers] = -1.0
        best = int(merit.argmax())
        if merit.flat[best] < 0:
            return None
        i, j = int(sorted_[best // n]), int(sorted_[best % n])
        rest = [int(d) for d in sorted_ if d not in (i, j)][: k - 2]
        return [i, *sorted(rest, key=lambda d: (place.get(d, n), d)), j]

    def _within(
        self, caps: Sequence[tuple[int, int, int, int]], order: Sequence[int], cuts: Sequence[int]
    ) -> Split | None:
        """Counts for one order within the caps, boundaries as near to `cuts` as that allows; without cuts, even shares."""
        k, num_layers = len(order), self.problem.num_layers
        room = [caps[device][0] for device in order]
        if k == 1:
            room = [caps[order[0]][3]]
        else:
            room[0], room[-1] = caps[order[0]][1], caps[order[-1]][2]
        total, least = sum(room), max(0, k - 2)
        if min(room) < 0 or total < num_layers or least > num_layers:
            return None
        counts: list[int] = []
        start, before = 0, 0
        for i, most in enumerate(room):
            before += most
            mine = 1 if 0 < i < k - 1 else 0
            least -= mine
            aim = round(before * num_layers / total) if len(cuts) != k - 1 or i == k - 1 else cuts[i]
            stop = min(max(aim, start + mine, num_layers - (total - before)), start + most, num_layers - least)
            counts.append(stop - start)
            start = stop
        return make_split(self.problem, order, counts)


def _whole_of_many(room: np.ndarray, layer: np.ndarray) -> np.ndarray:
    whole = ((room / layer) * (1 + SLACK / 4) + SLACK / 4).astype(np.int64)
    return np.where(room >= 0, whole, np.where(room < -SLACK * layer, _NEVER, 0))


def _coverage_of_many(inner: np.ndarray, first: np.ndarray, last: np.ndarray, k: int) -> int:
    """`_coverage` for k > 1, in arrays."""
    q = k - 2
    order = np.argsort(-inner, kind="stable")
    inner, first, last = inner[order], first[order], last[order]
    base = int(inner[:q].sum())
    one_more = base + int(inner[q])
    two_more = one_more + int(inner[q + 1])
    best = base + _best_pair_of_many(first[q:], last[q:])
    best = max(best, two_more + _best_pair_of_many((first - inner)[: q + 2], (last - inner)[: q + 2]))
    first_in, last_in = int((first - inner)[: q + 1].max()), int((last - inner)[: q + 1].max())
    return max(best, one_more + first_in + int(last[q + 1 :].max()), one_more + last_in + int(first[q + 1 :].max()))


def _best_pair_of_many(a: np.ndarray, b: np.ndarray) -> int:
    """``max(a[i] + b[j])`` over i != j."""
    i, j = int(a.argmax()), int(b.argmax())
    if i != j:
        return int(a[i] + b[j])
    others = np.arange(len(a)) != i
    return max(int(a[i]) + int(b[others].max()), int(a[others].max()) + int(b[j]))


def _whole(layers: float) -> int:
    return int(layers * (1 + SLACK / 4) + SLACK / 4)


def _whole_of(room: float, layer: float) -> int:
    return _whole(room / layer) if room >= 0 else int(room < -SLACK * layer) * _NEVER


def _at_least_none(layers: int) -> int:
    return layers if layers >= 0 else _NEVER


def _coverage(caps: Sequence[tuple[int, int, int, int]], k: int) -> int:
    """The most layers that exactly k of the devices can hold.

    With the devices by what they hold as inner stages, largest first, and q = k - 2: either both ends come from beyond
    the first q, or one of them is among the first q + 1 and those lend one more, or both are among the first q + 2.
    """
    if k == 1:
        return max(only for _, _, _, only in caps)
    q = k - 2
    ranked = sorted(caps, reverse=True)
    base = sum(cap[0] for cap in ranked[:q])
    one_more = base + ranked[q][0]
    two_more = one_more + ranked[q + 1][0]
    best = base + _best_pair([(cap[1], cap[2]) for cap in ranked[q:]])
    swaps = [(cap[1] - cap[0], cap[2] - cap[0]) for cap in ranked[: q + 2]]
    best = max(best, two_more + _best_pair(swaps))
    beyond = ranked[q + 1 :]
    first_in, last_in = max(s[0] for s in swaps[: q + 1]), max(s[1] for s in swaps[: q + 1])
    return max(
        best, one_more + first_in + max(cap[2] for cap in beyond), one_more + last_in + max(cap[1] for cap in beyond)
    )


def _best_pair(pairs: Sequence[tuple[int, int]]) -> int:
    """``max(pairs[i][0] + pairs[j][1])`` over i != j; `pairs` has at least two entries."""
    first = second = last = runner_up = 4 * _NEVER
    first_at = last_at = -1
    for index, (a, b) in enumerate(pairs):
        if a > first:
            first, second, first_at = a, first, index
        elif a > second:
            second = a
        if b > last:
            last, runner_up, last_at = b, last, index
        elif b > runner_up:
            runner_up = b
    return first + last if first_at != last_at else max(first + runner_up, second + last)


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
