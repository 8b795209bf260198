"""The round of whole splits by the forecast's law, many splits at a time, and small improvements by it. Pure.

The search (`planning.search`) cuts layers so that the busiest stage has as little to do as can be in mean. The round is that of
`planning.convoy`, in which the sum of a slow step counts, too: then a layer may be better off on a device that is busier but faster with a
prompt. `Rounds.improve` moves single layers and exchanges devices while that shortens the round.

Never true: the result is worse than the split it began with.
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np

from scheduler.planning.convoy import round_seconds, slow_weight
from scheduler.planning.splits import Problem, Split, make_split
from scheduler.planning.uniform import relaxed_bottleneck

_EVERY_MOVE = 8
"""Up to so many stages every move of a layer and every exchange is tried, beyond that between the `_ENDS` most promising stages."""
_ENDS = 5
FEW = 4
"""Among so few devices an exchange and a move are tried together."""
_EVEN = 0.97
_ROUNDS = 8
_WORTH = 1e-7


class Rounds:
    """Steps of two kinds on n devices, a share of them slow; seconds.

    `stage` and `last` are as in `Problem`, ``[2, n]``, the fast kind in row 0; `kinds` ``[2, n, U]`` is what each kind of layer costs, and
    `kind_of_layer` ``[L]`` says which is of which.
    """

    def __init__(
        self,
        stage: np.ndarray,
        kinds: np.ndarray,
        last: np.ndarray,
        kind_of_layer: np.ndarray,
        share: float,
        in_flight: float,
    ) -> None:
        self._stage, self._kinds, self._last, self._kind_of_layer = stage, kinds, last, kind_of_layer
        self._share, self._in_flight = share, in_flight

    @cached_property
    def _until(self) -> np.ndarray:
        """``[2, n, L + 1]``: the layers before each."""
        layers = self._kinds[:, :, self._kind_of_layer]
        return np.concatenate([np.zeros((*layers.shape[:2], 1)), layers.cumsum(axis=2)], axis=2)

    def seconds(self, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``[C]``: the round of C splits, whose devices and numbers of layers are ``[C, k]``."""
        stops = counts.cumsum(axis=1)
        fast, slow = (
            stage[orders] + until[orders, stops] - until[orders, stops - counts]
            for stage, until in zip(self._stage, self._until, strict=True)
        )
        fast[:, -1] += self._last[0][orders[:, -1]]
        slow[:, -1] += self._last[1][orders[:, -1]]
        mean = (1.0 - self._share) * fast + self._share * slow
        return round_seconds(
            np.full(len(orders), self._share),
            self._in_flight,
            mean_sum=mean.sum(axis=1),
            mean_busiest=mean.max(axis=1),
            slow_sum=slow.sum(axis=1),
            fast_sum=fast.sum(axis=1),
            fast_busiest=fast.max(axis=1),
        )

    def of(self, split: Split) -> float:
        return float(self.seconds(np.array([split.order]), np.array([split.counts]))[0])

    def bound_s(self, problem: Problem, k: int) -> float:
        """A round that no split over k devices is expected to go below, `problem` being that of mean steps; 0 where nothing cheap is known.

        Of `FEW` devices none does: neither the busiest stage nor the sum of a slow step can be less. Of more, it is what even stages
        would take, less a little (what single exchanges may gain; planning with no such bound gave the same plans).
        """
        if self._kinds.shape[2] > 1:
            return 0.0
        bound = self._in_flight * relaxed_bottleneck(problem, k)
        if problem.num_devices > FEW:
            weight = float(slow_weight(self._share, self._in_flight, min(1.0, self._in_flight / k)))
            even = [(1.0 - weight) * part[0] + weight * part[1] for part in (self._stage, self._kinds, self._last)]
            evenly = replace(problem, stage=even[0], layers=even[1], last=even[2])
            return max(bound, _EVEN * self._in_flight * relaxed_bottleneck(evenly, k))
        stage, layer, last = self._stage[1], float(self._kinds[1].min()), float(self._last[1].min())
        slow_sum = float(np.sort(stage)[:k].sum()) + problem.num_layers * layer + last
        return max(bound, float(slow_weight(self._share, self._in_flight, 0.0)) * slow_sum)

    def improve(self, problem: Problem, split: Split, *, keep_order: bool = False) -> tuple[Split, float]:
        """The split or one near it with a shorter round, and that in seconds. With `keep_order` devices stay where they are."""
        order, counts = np.array(split.order), np.array(split.counts)
        best = self.of(split)
        begun = best
        for _ in range(_ROUNDS):
            orders, moved = self._neighbours(order, counts, exchange=not keep_order, num_devices=problem.num_devices)
            fit = _fit(problem, orders, moved)
            if not fit.any():
                break
            orders, moved = orders[fit], moved[fit]
            seconds = self.seconds(orders, moved)
            at = int(seconds.argmin())
            if not seconds[at] < best * (1.0 - _WORTH):
                break
            order, counts, best = orders[at], moved[at], float(seconds[at])
        if best == begun:
            return split, best
        return make_split(problem, order.tolist(), counts.tolist()), best

    def _neighbours(
        self, order: np.ndarray, counts: np.ndarray, *, exchange: bool, num_devices: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Splits with a layer moved from one stage to another, two devices exchanged, or (of `FEW` devices) both at once."""
        moves = self._moves(order, counts)
        shifts = np.concatenate([np.zeros((1, len(order)), dtype=counts.dtype), moves])
        orders, moved = np.repeat(order[None], len(shifts), axis=0), counts[None] + shifts
        if exchange and num_devices <= _EVERY_MOVE:
            swapped, kept = _exchanges(order, counts, num_devices)
            if num_devices <= FEW:
                orders = np.concatenate([orders, np.repeat(swapped, len(shifts), axis=0)])
                moved = np.concatenate([moved, (kept[:, None] + shifts[None]).reshape(-1, len(order))])
            else:
                orders, moved = np.concatenate([orders, swapped]), np.concatenate([moved, kept])
        allowed = (moved >= 0).all(axis=1) & (moved[:, 1:-1] > 0).all(axis=1)
        return orders[allowed], moved[allowed]

    def _moves(self, order: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``[C, k]``: one layer less on a stage and one more on another."""
        k = len(order)
        if k <= _EVERY_MOVE:
            return _all_moves(k)
        per_layer = self._until[1, order, -1]
        stops = counts.cumsum()
        busy = self._until[0, order, stops] - self._until[0, order, stops - counts]
        sources = {*np.argsort(-per_layer)[:_ENDS].tolist(), *np.argsort(-busy)[:_ENDS].tolist()}
        targets = {*np.argsort(per_layer)[:_ENDS].tolist(), *np.argsort(busy)[:_ENDS].tolist()}
        return _moves_between(k, sources, targets)


def _exchanges(order: np.ndarray, counts: np.ndarray, num_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Another device for a stage, two stages' devices exchanged, and two stages exchanged with their layers."""
    k, swaps = len(order), _swaps(len(order))
    is_free = np.ones(num_devices, dtype=bool)
    is_free[order] = False
    others = np.flatnonzero(is_free)
    replaced = np.repeat(order[None], k * len(others), axis=0)
    replaced[np.arange(len(replaced)), np.repeat(np.arange(k), len(others))] = np.tile(others, k)
    swapped = order[swaps]
    orders = np.concatenate([replaced, swapped, swapped])
    kept = np.concatenate([np.repeat(counts[None], len(replaced) + len(swaps), axis=0), counts[swaps]])
    return orders, kept


@lru_cache(maxsize=_EVERY_MOVE)
def _swaps(k: int) -> np.ndarray:
    """``[k (k - 1) / 2, k]``: the stages with two of them exchanged."""
    pairs = np.array(list(itertools.combinations(range(k), 2)), dtype=np.intp).reshape(-1, 2)
    swaps, rows = np.repeat(np.arange(k)[None], len(pairs), axis=0), np.arange(len(pairs))
    swaps[rows, pairs[:, 0]], swaps[rows, pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return swaps


@lru_cache(maxsize=_EVERY_MOVE)
def _all_moves(k: int) -> np.ndarray:
    """``[k (k - 1), k]``: -1 and 1 for every pair of different stages."""
    return _moves_between(k, range(k), range(k))


def _moves_between(k: int, sources: Iterable[int], targets: Iterable[int]) -> np.ndarray:
    pairs = np.array([(i, j) for i in sources for j in targets if i != j], dtype=np.intp).reshape(-1, 2)
    moves, rows = np.zeros((len(pairs), k), dtype=np.int64), np.arange(len(pairs))
    moves[rows, pairs[:, 0]], moves[rows, pairs[:, 1]] = -1, 1
    return moves


def _fit(problem: Problem, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[C]``: which of the splits have room on every device."""
    until = np.concatenate(([0.0], np.cumsum(problem.layer_bytes)))
    stops = counts.cumsum(axis=1)
    need = until[stops] - until[stops - counts]
    need[:, 0] += problem.first_bytes
    need[:, -1] += problem.last_bytes
    return np.all(need <= problem.room[orders], axis=1)
