"""The best split when all layers are alike: then the order matters only at the two ends. Pure.

*Bottleneck.* Under a bound B a device holds at most ``floor((B - stage) / layer)`` layers, fewer as the first or the last
stage and where memory is short. k devices can keep B exactly when, for some first and some last, these two and the
largest k - 2 of the others hold all layers: a sort and a sum, for any number of devices. B is one of the values at which some
device can take one more layer, and lies within about k layers shared by k devices of the bound that layers cut in pieces would
give (`relaxed_bottlenecks`). Among the few values there it is found, for all problems at once, as if the first stage were one
like the others (`most_layers_of_any_first`). Where that can be kept it is exact; it can unless the embedding leaves the first stage
short of memory, and then a search over all values from there on is.

*Sum.* With the devices, the first and the last given, layers go to the device on which one costs least, up to its cap under
B; all choices are tried where there are few devices, otherwise a set is improved by exchanging devices (then bounded).

Never true: this is called for layers that differ.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from scheduler.planning.splits import SLACK, Problem, Split, make_split

_EXACT_DEVICES = 8
_NEVER = -1e9
"""The cap of a device that cannot hold its role at all: it spoils any sum, and unlike -inf it can be subtracted again."""
_OF_ROLE = np.array([0, 0, 1, 1])
"""Whether an inner, a first, a last and an only stage has the LM head."""
_NARROW = 1 / 15
_PROBES = np.linspace(0.0, 1.0, 12)


class Relaxed(NamedTuple):
    """``[R]`` each: the largest stage if layers could be cut anywhere, and how many more layers the devices hold per second above it."""

    bounds: np.ndarray
    rates: np.ndarray


def relaxed_bottlenecks(
    stage: np.ndarray, layer: np.ndarray, last: np.ndarray, num_layers: int, ks: np.ndarray
) -> Relaxed:
    """The largest stage if layers could be cut anywhere and memory did not matter: no split has a smaller one.

    Of R problems with n devices, ``[R, n]`` each, and ``ks [R]`` stages. The share that k devices hold under a bound is
    a convex, piecewise linear function of it, so Newton's method finds the bound in a few steps, and exactly.
    """
    rate = 1.0 / layer
    idle = stage * rate
    wanted = num_layers + (last * rate).min(axis=1)
    rows, ends = np.arange(len(ks)), ks - 1
    bounds, order = np.full(len(ks), np.inf), np.argsort(layer, axis=1)
    held = wanted
    for _ in range(20):
        held, lost = (part[rows[:, None], order].cumsum(axis=1)[rows, ends] for part in (rate, idle))
        following = np.minimum(bounds, (wanted + lost) / held)
        if not (following < bounds * (1 - SLACK)).any():
            break
        bounds = following
        order = np.argsort(idle - bounds[:, None] * rate, axis=1)
    return Relaxed(bounds, held)


def memory_caps(
    room: np.ndarray, first_bytes: float, last_bytes: float, layer_bytes: np.ndarray, num_layers: int
) -> np.ndarray:
    """``[4, n, ...]``: the layers of ``layer_bytes [...]`` for which devices with ``room [n]`` have memory, as an inner, a first, a last and
    an only stage, or `_NEVER`."""
    ends = np.array([0.0, first_bytes, last_bytes, first_bytes + last_bytes])
    left = (room - ends[:, None]).reshape(4, len(room), *[1] * layer_bytes.ndim)
    return _or_never(_whole(np.minimum(left / layer_bytes, num_layers)))


class Uniform:
    """R problems with equal layers on the same devices, each for its own number of stages ``ks [R]``.

    ``stage``, ``layer`` and ``last`` ``[R, n]`` are seconds, ``layer_bytes [R]`` what a layer needs; all else is as in `Problem`.
    """

    def __init__(
        self, stage: np.ndarray, layer: np.ndarray, last: np.ndarray, layer_bytes: np.ndarray, ks: np.ndarray,
        *, num_layers: int, room: np.ndarray, first_bytes: float, last_bytes: float,
    ) -> None:  # fmt: skip
        self.ks, self._num_layers = ks, num_layers
        self._stage, self._layer, self._last = stage, layer, last
        self._room, self._ends, self._layer_bytes = room, (first_bytes, last_bytes), layer_bytes
        self._floors = np.full(len(ks), np.nan)

    @classmethod
    def of(cls, problems: Sequence[Problem], ks: Sequence[int]) -> "Uniform":
        """Of problems that differ in their steps only."""
        one = problems[0]
        return cls(
            np.array([problem.stage for problem in problems]),
            np.array([problem.layers[:, 0] for problem in problems]),
            np.array([problem.last for problem in problems]),
            np.array([problem.layer_bytes[0] for problem in problems]),
            np.array(ks),
            num_layers=one.num_layers,
            room=one.room,
            first_bytes=one.first_bytes,
            last_bytes=one.last_bytes,
        )

    def caps(self, bounds: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """``[4, n, R, V]``: the layers that each device may hold under ``bounds [R, V]`` as an inner, first, last and only stage, or
        `_NEVER`. With `rows` only of those problems."""
        stage, layer, last = (part[rows].T[:, :, None] for part in (self._stage, self._layer, self._last))
        room = np.minimum(bounds, 2 * self._most[rows, None]) - stage
        free, ending = _whole(room / layer), _whole((room - last) / layer)
        return _or_never(np.minimum(np.stack([free, ending])[_OF_ROLE], self._memory[:, :, rows, None]))

    @cached_property
    def _memory(self) -> np.ndarray:
        """``[4, n, R]``"""
        return memory_caps(self._room, *self._ends, self._layer_bytes, self._num_layers)

    @cached_property
    def _most(self) -> np.ndarray:
        """``[R]``: no stage costs more."""
        return (self._stage + self._layer * self._num_layers + self._last).max(axis=1)

    def memory_caps(self, row: int) -> np.ndarray:
        """``[4, n]``: the layers that each device has memory for as an inner, first, last and only stage, or `_NEVER`."""
        return self._memory[:, :, row]

    @cached_property
    def relaxed(self) -> Relaxed:
        return relaxed_bottlenecks(self._stage, self._layer, self._last, self._num_layers, self.ks)

    def floors(self, rows: np.ndarray) -> np.ndarray:
        """Of ``rows [R']``: no split has a smaller largest stage; nearly always the least possible one (`bottleneck`). inf: nothing fits
        the memory."""
        new = rows[np.isnan(self._floors[rows])]
        if len(new):
            self._floors[new] = self._lowest(new)
        return self._floors[rows]

    def floor(self, row: int) -> float:
        return float(self.floors(np.array([row]))[0])

    def _lowest(self, rows: np.ndarray) -> np.ndarray:
        low, high = self._brackets(rows)
        values = self._values_between(low, np.where(high < np.inf, high, low), rows)
        each, left = np.arange(len(rows)), np.zeros(len(rows), dtype=np.intp)
        right = (values < values[:, -1:]).sum(axis=1)
        while (left < right).any():
            probes = left[:, None] + ((right - left)[:, None] * _PROBES).astype(np.intp)
            held = self._may_hold(values[each[:, None], probes], rows)
            held[:, -1] = True
            first = held.argmax(axis=1)
            left = np.where(first > 0, probes[each, first - 1] + 1, left)
            right = probes[each, first]
        return np.where(high < np.inf, values[each, right], np.inf)

    def _brackets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ``rows [R']`` each: a bound that cannot be kept, or only just, and one that may be; inf where none may."""
        low, width = self.relaxed.bounds[rows], (self.ks[rows] + 1) / self.relaxed.rates[rows]
        high = low + width  # each of k devices, and the last one again for the LM head, lacks less than a layer
        (short,) = np.nonzero(~self._may_hold(high[:, None], rows)[:, 0])
        if len(short):
            low[short], high[short] = self._brackets_above(rows[short], high[short], width[short])
        return low, high

    def _brackets_above(self, rows: np.ndarray, low: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of these rows, which cannot keep `low`."""
        high, each = self._most[rows], np.arange(len(rows))
        while True:
            bounds = low[:, None] + (high - low)[:, None] * _PROBES
            held = self._may_hold(bounds, rows)
            fits, first = held[:, -1], held.argmax(axis=1)
            low, high = np.where(first > 0, bounds[each, first - 1], low), bounds[each, first]
            if not (fits & (high - low > width)).any():
                return low, np.where(fits, high, np.inf)

    def _may_hold(self, bounds: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """``[R, V]``: whether the devices may be able to hold all layers with no stage above ``bounds [R, V]``; False: they cannot.
        Of ``rows [R]``."""
        stage, layer, last = self._stage[rows, None], self._layer[rows, None], self._last[rows, None]
        room = bounds[:, :, None] - stage
        caps = np.stack([_whole(room / layer), _whole((room - last) / layer)])[_OF_ROLE]
        caps = np.minimum(caps, self._memory[:, :, rows, None].transpose(0, 2, 3, 1))
        caps[caps < 0.0] = _NEVER
        return most_layers_bound(caps, self.ks[rows]) >= self._num_layers

    def bottleneck(self, row: int) -> float:
        """The least possible largest stage; inf where nothing fits the memory."""
        bound = self.floor(row)
        if bound == math.inf or self._holds(row, np.array([[bound * (1 + SLACK)]]))[0]:
            return bound
        return self._bottleneck_above(row, bound)

    def _holds(self, row: int, bounds: np.ndarray) -> np.ndarray:
        """``[V]``: whether the devices can hold all layers with no stage above ``bounds [1, V]``."""
        return most_layers(self.caps(bounds, [row]), self.ks[[row]])[0] >= self._num_layers

    def _bottleneck_above(self, row: int, low: float) -> float:
        """The least possible largest stage, which is more than `low`."""
        narrow, most = float(self._layer[row].max()) * _NARROW, float(self._most[row])
        high = min(most, low + float((self.ks[row] + 1) / self.relaxed.rates[row]))
        while True:
            bounds = np.minimum(low + (high - low) * _PROBES[1:], high)
            held = self._holds(row, bounds[None])
            if not held[-1]:
                if high == most:
                    return math.inf
                low, high = high, most
                continue
            first = int(held.argmax())
            low, high = float(bounds[first - 1]) if first else low, float(bounds[first])
            if high - low <= narrow:
                break
        values = self._values_between(np.array([low]), np.array([high]), [row])
        return float(values[0, self._holds(row, values).argmax()])

    def choose(self, problem: Problem, row: int, wanted: Sequence[int], cuts: Sequence[int]) -> Split | None:
        """A split with the least bottleneck, among equals one near the present: devices `wanted`, boundaries `cuts`.

        `problem` is the one in this row.
        """
        bound = self.floor(row)
        if bound == math.inf:
            return None
        split = self._choose_under(bound, problem, row, wanted, cuts)
        if split is None:
            bound = self._bottleneck_above(row, bound)
            split = self._choose_under(bound, problem, row, wanted, cuts) if bound < math.inf else None
        return split

    def _choose_under(
        self, bound: float, problem: Problem, row: int, wanted: Sequence[int], cuts: Sequence[int]
    ) -> Split | None:
        caps = self.caps(np.array([[bound * (1 + SLACK)]]), [row])[..., 0, 0]
        if len(wanted) == self.ks[row]:
            split = self._within(problem, caps, wanted, cuts)
            if split is not None:
                return split
        order = self._some_order(row, caps, wanted)
        return None if order is None else self._within(problem, caps, order, ())

    def least_sum(self, problem: Problem, row: int, bound: float, start: Split | None) -> Split | None:
        """The split with the least sum of stages none of which exceeds `bound`; `problem` is the one in this row."""
        k = int(self.ks[row])
        caps = self.caps(np.array([[bound * (1 + SLACK)]]), [row])[..., 0, 0]
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

    def stage_values(self, row: int, low: float) -> list[float]:
        """Everything from `low` on that a stage can cost, ascending."""
        values = self._values_between(np.array([low]), self._most[[row]], [row])[0]
        return values[np.append(True, values[1:] > values[:-1])].tolist()

    def _values_between(self, low: np.ndarray, high: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """``[R, V]``: what stages with a whole number of layers can cost from ``low [R]`` to `high`, ascending; `high` itself ends it."""
        stage, layer, last = self._stage[rows], self._layer[rows], self._last[rows]
        fixed, layer = np.concatenate([stage, stage + last], axis=1), np.concatenate([layer, layer], axis=1)
        low, high = low[:, None] * (1 - SLACK), high[:, None]
        start = np.maximum(0.0, np.ceil((low - fixed) / layer))
        num_values = int(max(0.0, ((high - fixed) / layer - start).max())) + 2
        values = fixed[:, :, None] + (start[:, :, None] + np.arange(num_values)) * layer[:, :, None]
        values = values.reshape(len(layer), -1)
        values = np.where((values >= low) & (values < high), values, high)
        return np.sort(np.concatenate([values, high], axis=1), axis=1)

    def _some_order(self, row: int, caps: np.ndarray, wanted: Sequence[int]) -> list[int] | None:
        """Devices that together hold all layers; `wanted` ones, and in their order, where that makes no difference."""
        inner, first, last, only = caps
        n, k, num_layers = len(inner), int(self.ks[row]), self._num_layers
        place = {device: position for position, device in enumerate(wanted)}
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

    def _within(self, problem: Problem, caps: np.ndarray, order: Sequence[int], cuts: Sequence[int]) -> Split | None:
        """Counts for one order within the caps, boundaries as near to `cuts` as that allows; without cuts, even shares."""
        k, num_layers = len(order), self._num_layers
        inner, first, last, only = caps[:, order].astype(int).tolist()
        room = [first[0], *inner[1:-1], last[-1]] if k > 1 else only
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
        return make_split(problem, order, counts)


def _whole(layers: np.ndarray) -> np.ndarray:
    return np.floor(layers * (1 + SLACK / 4) + SLACK / 4)


def _or_never(caps: np.ndarray) -> np.ndarray:
    """An inner stage holds a layer at least, the ends may hold none."""
    caps[0][caps[0] < 1.0] = _NEVER
    caps[caps < 0.0] = _NEVER
    return caps


def most_layers(caps: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """``[R, V]``: the most layers that exactly ``ks [R]`` of n devices can hold, under ``caps [4, n, R, V]``.

    The q = k - 2 devices that hold most as inner stages do so, unless they are the first or the last. One of them that is
    makes room for the next one, so that it costs what it holds more than that; if both ends are among the first q + 1, the second
    makes room for the one after next.
    """
    inner, first, last, only = caps
    rows, q = np.arange(len(ks)), ks - 2
    ranked = np.sort(-inner.transpose(1, 2, 0), axis=2)
    sums = ranked.cumsum(axis=2)[rows, :, q] - ranked[rows, :, q]
    following = -ranked[rows, :, q]
    further = following + ranked[rows, :, q + 1]  # how much less the one after next holds
    lost = np.maximum(inner - following, 0.0)
    first, last, is_among = first - lost, last - lost, inner >= following
    first_among, last_among = np.where(is_among, first, _NEVER), np.where(is_among, last, _NEVER)
    first_beyond, last_beyond = np.where(is_among, _NEVER, first), np.where(is_among, _NEVER, last)
    one = np.maximum(
        first_among.max(axis=0) + last_beyond.max(axis=0), last_among.max(axis=0) + first_beyond.max(axis=0)
    )
    both, neither = _best_pair(first_among, last_among) - further, _best_pair(first_beyond, last_beyond)
    most = np.maximum(np.maximum(one, both), neither) - sums
    return np.where(ks[:, None] == 1, only.max(axis=0), most)


def most_layers_bound(caps: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """``[R, V]``: k = ``ks [R]`` of n devices hold no more, under ``caps [4, R, V, n]``; nearly always it is `most_layers`, for less work.

    The k devices that hold most as inner stages hold what they do. A device that is the first or the last stage is one of them or
    takes the place of the least, and costs what it holds less. Each end takes the device for which that is least, maybe the same.
    """
    inner, rows, ends = np.maximum(caps[0], 0.0), np.arange(len(ks)), ks - 1
    ranked = -np.sort(-inner, axis=2)
    least, sums = ranked[rows, :, ends], ranked.cumsum(axis=2)[rows, :, ends]
    first, last = (caps[1:3] - np.maximum(inner, least[:, :, None])).max(axis=3)
    return np.where(ks[:, None] == 1, caps[3].max(axis=2), sums + first + last)


def _best_pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``max(a[i] + b[j])`` over i != j along the first axis, which has at least two entries unless it does not matter."""
    if len(b) < 2:
        return a[0]
    second, best = np.partition(b, -2, axis=0)[-2:]
    is_best = np.arange(len(b))[:, None, None] == b.argmax(axis=0)
    return (a + np.where(is_best, second, best)).max(axis=0)


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
    k, outside = len(order), np.setdiff1d(np.arange(n), order)
    replaced = np.repeat(order[None], k * len(outside), axis=0)
    replaced[np.arange(len(replaced)), np.repeat(np.arange(k), len(outside))] = np.tile(outside, k)
    ends = [(place, end) for place in range(k - 1) for end in {0, k - 1} - {place}]
    swapped = np.repeat(order[None], len(ends), axis=0)
    if ends:
        (places, others), rows = np.array(ends).T, np.arange(len(ends))
        swapped[rows, places], swapped[rows, others] = order[others], order[places]
    return np.concatenate([order[None], replaced, swapped])
