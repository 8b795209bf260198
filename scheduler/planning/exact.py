"""Of few devices and equal layers: the split with the shortest round, convoy and all, exactly. Pure.

With as many steps in flight as stages, M >= k, the weight w of slow steps in a convoy is a constant (`planning.convoy`), and the round is

    max( M * busiest mean stage , w * sum of slow stages + (1 - w) * M * busiest fast stage )

An *arrangement* says which k devices serve, which of them is first and which is last; the order of the others makes no difference.
Below a limit on the round, and with no fast stage above a value F, each device may hold so many layers, and the sum of slow stages is
least when layers go where a slow step is cheapest, up to that. So all values that F can take, one after another, give the shortest
round of an arrangement; the limit then is what was found, until nothing is shorter. Most arrangements fall out before that by bounds:
the least sum of slow stages without F, and the least busiest fast stage if layers could be cut anywhere. The two narrow each other: the
sum leaves F no more than so much, which leaves devices fewer layers, which makes the sum larger.

Never true: fewer steps in flight than stages, or layers that differ; for these there are `planning.search` and `rounds.Rounds.improve`.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from scheduler.planning.convoy import slow_weight, weighted
from scheduler.planning.rounds import StepTimes
from scheduler.planning.splits import SLACK

MOST_DEVICES = 8
_AT_ONCE = 60_000
"""So many numbers of layers are weighed in one go."""
_FIRST_FEW = 16
"""So many arrangements are tried first, since what they give may rule out the others."""
_TIGHTER, _ENOUGH = 2, 16
"""Bounds are narrowed so often, or until no more arrangements than that are left."""
_INNER, _FIRST, _LAST, _ONLY = range(4)
_FAST, _SLOW, _MEAN = range(3)


@dataclass(frozen=True, slots=True)
class Shortest:
    """``counts[i]`` layers on device ``order[i]``, and the round in seconds."""

    order: tuple[int, ...]
    counts: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Left:
    """C arrangements that are not ruled out, the most promising first."""

    places: np.ndarray
    """``[C, k]``: device d in role r is ``r n + d``."""
    fixed: np.ndarray
    """``[3, C, k]``: what a fast, a slow and a mean step cost each stage before its layers."""
    layer: np.ndarray
    """``[3, C, k]``: what they cost for each layer."""
    caps: np.ndarray
    """``[C, k]``: the most layers."""
    fast: np.ndarray
    """``[C]``: no busiest fast stage is below."""
    counts: np.ndarray
    """``[C, k]``: the layers with the least sum of slow stages."""
    slow_sums: np.ndarray
    """``[C]``: that sum."""
    bounds: np.ndarray
    """``[C]``: no round is below."""

    def __len__(self) -> int:
        return len(self.places)

    def at(self, rows: np.ndarray | slice) -> "_Left":
        return _Left(
            self.places[rows], self.fixed[:, rows], self.layer[:, rows], self.caps[rows], self.fast[rows],
            self.counts[rows], self.slow_sums[rows], self.bounds[rows],
        )  # fmt: skip


class FewDevices:
    """k stages on n devices: `times` has two rows, a step that only decodes and one that also prefills, which are a `share`.

    `memory` ``[4, n]`` is how many layers each device has memory for as an inner, first, last or only stage, below 0 if it cannot be that.
    `in_flight` must be k at least.
    """

    def __init__(
        self, times: StepTimes, share: float, in_flight: float, k: int, num_layers: int, memory: np.ndarray
    ) -> None:
        assert in_flight >= k, "the weight of slow steps would not be a constant"
        self._k, self._num_layers, self._in_flight = k, num_layers, in_flight
        self._weight = float(slow_weight(share, in_flight))
        self._of_fast = max((1.0 - self._weight) * in_flight, 1e-300)
        layer, stage, last = times.layers[:, :, 0], times.stage, times.last
        self._devices = by_cost = np.argsort(
            layer[1], kind="stable"
        )  # from here on the cheapest of a slow step are first
        kinds = np.empty((3, 3, len(by_cost)))
        kinds[0, :2], kinds[1, :2], kinds[2, :2] = layer[:, by_cost], stage[:, by_cost], last[:, by_cost]
        kinds[:, _MEAN] = weighted(share, kinds[:, _FAST], kinds[:, _SLOW])
        layer, stage, last = kinds
        self._layer, ending = np.concatenate([layer] * 4, axis=1), stage + last
        self._fixed = np.concatenate([stage, stage, ending, ending], axis=1)
        self._head = last[_SLOW]
        memory = np.minimum(memory[:, by_cost], num_layers)
        columns = np.concatenate([kinds.reshape(-1, len(by_cost)), memory])
        self._like_before = (columns[:, 1:] == columns[:, :-1]).all(axis=0)
        self._memory = memory.reshape(-1)
        self._least = np.zeros(self._memory.shape)
        self._least[: len(by_cost)] = 1.0

    def best(self, below: float = math.inf) -> Shortest | None:
        """The split with the shortest round, of less than `below` seconds; None if there is none, or none for which memory suffices."""
        best, limit = None, below * (1.0 - SLACK)
        places = self._promising(limit)
        while len(places):
            left = self._left(limit, places)
            found = self._shortest(left, left.counts[None], limit)
            if found:
                best, limit = found, found.seconds * (1.0 - SLACK)
                left = left.at(slice(int(np.searchsorted(left.bounds, limit))))
                places = left.places
                if len(left) <= _ENOUGH:
                    continue  # bounding them again takes less than scanning them
            for _ in range(_TIGHTER):
                if len(left) <= _ENOUGH:
                    break
                left = self._narrowed(left, limit)
            places = left.places
            better = self._scan(left, limit)
            if better:
                best, limit = better, better.seconds * (1.0 - SLACK)
            elif not found:
                break
        return best

    @cached_property
    def has_room(self) -> bool:
        """Whether the memory allows any split."""
        places = _arrangements(len(self._devices), self._k)[1].reshape(-1, self._k)
        return bool(self._filled(self._memory[places], places)[1].any())

    # -- bounds -------------------------------------------------------------------------------------------------

    def _caps(self, limit: float) -> np.ndarray:
        """``[4 n]``: what each device may hold in each role where the busiest mean stage is within a round of `limit`."""
        within = np.floor((limit / self._in_flight - self._fixed[_MEAN]) / self._layer[_MEAN] + SLACK)
        return np.minimum(within, self._memory)

    def _round(self, slow_sum: np.ndarray, fast_busiest: np.ndarray) -> np.ndarray:
        return self._weight * slow_sum + (1.0 - self._weight) * self._in_flight * fast_busiest

    def _promising(self, limit: float) -> np.ndarray:
        """``[C, k]``: the arrangements of those choices of devices that a bound which knows no ends does not rule out."""
        chosen, arrangements, is_in = _arrangements(len(self._devices), self._k)
        caps = np.maximum(self._caps(limit)[chosen], 0.0)
        fixed, layer = self._fixed[:_MEAN, chosen], self._layer[:_MEAN, chosen]
        room = caps.cumsum(axis=1)
        counts = np.minimum(np.maximum(self._num_layers - (room - caps), 0.0), caps)
        slow = (fixed[_SLOW] + counts * layer[_SLOW]).sum(axis=1) + self._head[chosen].min(axis=1)
        # of devices that are alike the first ones will do
        skips = (is_in[:, 1:] & ~is_in[:, :-1] & self._like_before).any(axis=1)
        good = (
            ~skips
            & (self._round(slow, _evenly(fixed, layer, self._num_layers)) < limit)
            & (room[:, -1] >= self._num_layers)
        )
        return arrangements[good].reshape(-1, self._k)

    def _left(self, limit: float, places: np.ndarray) -> _Left:
        """Those of the arrangements that bounds do not rule out."""
        fixed, layer, caps = self._fixed[:, places], self._layer[:, places], self._caps(limit)[places]
        return self._bounded(places, fixed, layer, caps, _evenly(fixed, layer, self._num_layers), limit)

    def _narrowed(self, left: _Left, limit: float) -> _Left:
        """With fewer layers on devices whose fast stages would leave too little for the sum, and more time for those of the others."""
        high = (limit - self._weight * left.slow_sums) / self._of_fast
        share, idle = 1.0 / left.layer[_FAST], left.fixed[_FAST] / left.layer[_FAST]
        caps = np.minimum(left.caps, np.floor(high[:, None] * share - idle + SLACK))
        is_full = caps <= left.fast[:, None] * share - idle
        rates = np.where(is_full, 0.0, share).sum(axis=1)
        held = np.where(is_full, caps, -idle).sum(axis=1)
        fast = np.where(rates > 0.0, (self._num_layers - held) / np.maximum(rates, 1e-300), 0.0)
        return self._bounded(left.places, left.fixed, left.layer, caps, np.maximum(fast, left.fast), limit)

    def _bounded(
        self, places: np.ndarray, fixed: np.ndarray, layer: np.ndarray, caps: np.ndarray, fast: np.ndarray, limit: float
    ) -> _Left:
        counts, possible = self._filled(caps, places)
        slow_sums = (fixed[_SLOW] + counts * layer[_SLOW]).sum(axis=1)
        bounds = np.where(possible, self._round(slow_sums, fast), np.inf)
        rows = np.argsort(bounds, kind="stable")[: np.count_nonzero(bounds < limit)]
        return _Left(places, fixed, layer, caps, fast, counts, slow_sums, bounds).at(rows)

    # -- the search ---------------------------------------------------------------------------------------------

    def _scan(self, left: _Left, limit: float) -> Shortest | None:
        """The best of these arrangements over all values of the busiest fast stage; None: none has a round below `limit`."""
        best, start, at_once = None, 0, _FIRST_FEW
        while start < len(left):
            stop = min(start + at_once, int(np.searchsorted(left.bounds, limit)))
            if stop <= start:
                break
            part = left.at(slice(start, stop))
            values = self._fast_values(part, limit)
            within = np.floor((values[:, None, None] - part.fixed[_FAST]) / part.layer[_FAST] + SLACK)
            counts, possible = self._filled(np.minimum(within, part.caps), part.places)
            better = self._shortest(part, counts, limit, possible) if len(values) else None
            if better:
                best, limit = better, better.seconds * (1.0 - SLACK)
            start, at_once = stop, max(1, min(4 * at_once, _AT_ONCE // (self._k * max(1, len(values)))))
        return best

    def _fast_values(self, left: _Left, limit: float) -> np.ndarray:
        """``[V]``: what the busiest fast stage can be."""
        low, high = left.fast.min(), (limit - self._weight * left.slow_sums.min()) / self._of_fast
        units = np.flatnonzero(np.bincount(left.places.ravel()))
        caps = self._caps(limit)[units]
        fixed, layer = self._fixed[_FAST, units], self._layer[_FAST, units]
        start = np.maximum(np.ceil((low - fixed) / layer - SLACK), 0.0)
        stop = np.minimum(np.floor((high - fixed) / layer), caps)
        counts = start[:, None] + np.arange(int(max(0.0, (stop - start).max() + 1.0)))
        return np.sort((fixed[:, None] + counts * layer[:, None])[counts <= stop[:, None]])

    def _filled(self, caps: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[..., k]`` layers where a slow step is cheapest first, up to ``caps [..., k]``; and whether there is room for all of them."""
        least = self._least[places]
        spare = caps - least
        room = spare.cumsum(axis=-1)
        todo = self._num_layers - least.sum(axis=-1, keepdims=True)
        possible = (spare.min(axis=-1) >= 0.0) & (room[..., -1] >= todo[:, 0]) & (todo[:, 0] >= 0.0)
        return np.minimum(np.maximum(todo - (room - spare), 0.0), spare) + least, possible

    def _shortest(
        self, left: _Left, counts: np.ndarray, limit: float, possible: np.ndarray | None = None
    ) -> Shortest | None:
        """The best of the splits ``counts [V, C, k]`` into these arrangements that are ``possible [V, C]``, if its round is below `limit`."""
        if not len(left):
            return None
        fast, slow, mean = left.fixed[:, None] + counts * left.layer[:, None]
        seconds = np.maximum(self._in_flight * mean.max(axis=2), self._round(slow.sum(axis=2), fast.max(axis=2)))
        seconds = seconds if possible is None else np.where(possible, seconds, np.inf)
        row, column = divmod(int(seconds.argmin()), seconds.shape[1])
        if not seconds[row, column] < limit:
            return None
        roles, devices = np.divmod(left.places[column], len(self._devices))
        order = np.argsort(np.array([1, 0, 2, 2])[roles], kind="stable")  # the first stage is first
        chosen = self._devices[devices[order]]
        return Shortest(
            tuple(chosen.tolist()), tuple(counts[row, column][order].astype(int).tolist()), float(seconds[row, column])
        )


def _evenly(fixed: np.ndarray, layer: np.ndarray, num_layers: int) -> np.ndarray:
    """``[C]``: no busiest fast stage is below; it is if layers could be cut anywhere, and memory did not matter."""
    share = 1.0 / layer[_FAST]
    return ((fixed[_FAST] * share).sum(axis=1) + num_layers) / share.sum(axis=1)


@lru_cache(maxsize=64)
def _arrangements(n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``[S, k]``: every choice of k of n devices, ascending; ``[S, E, k]``: these with every first and every last of them, where device d
    in role r is ``r n + d``; ``[S, n]``: which devices are in each choice."""
    chosen = np.array(list(itertools.combinations(range(n), k)))
    is_in = (chosen[:, :, None] == np.arange(n)).any(axis=1)
    if k == 1:
        return chosen, _ONLY * n + chosen[:, None], is_in
    ends = np.array(list(itertools.permutations(range(k), 2)))
    roles, rows = np.full((len(ends), k), _INNER), np.arange(len(ends))
    roles[rows, ends[:, 0]], roles[rows, ends[:, 1]] = _FIRST, _LAST
    return chosen, chosen[:, None] + n * roles, is_in
