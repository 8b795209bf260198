"""The round of whole splits by the forecast's law, many splits at a time, and small improvements by it. Pure.

The search (`planning.search`) cuts layers so that the busiest stage has as little to do as can be in mean. The round is that of
`planning.convoy`, in which the sum of a slow step counts, too: then a layer may be better off on a device that is busier but faster with a
prompt. `Rounds.improve` moves single layers and exchanges devices while that shortens the round. What it tries is the same for all
splits of so many devices, so it is written once as tables of places: which device goes where, how many layers go with it.

Never true: the result is worse than the split it began with.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from scheduler.planning.convoy import round_seconds, slow_weight, weighted
from scheduler.planning.splits import Problem, Split, make_split

_EVERY_MOVE = 8
"""Up to so many stages every move of a layer and every exchange is tried, beyond that between the `_ENDS` most promising stages."""
_ENDS = 5
FEW = 6
_MOST_TRIES = 1000
"""An exchange and a move are tried together where that makes no more splits."""
_EVEN = 0.97
_ROUNDS = 12
_WORTH = 1e-7


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of R kinds of step on n devices: what any stage costs ``[R, n]``, each kind of layer ``[R, n, U]``, the LM head ``[R, n]``."""

    stage: np.ndarray
    layers: np.ndarray
    last: np.ndarray

    def __getitem__(self, rows: Any) -> "StepTimes":
        return StepTimes(self.stage[rows], self.layers[rows], self.last[rows])

    def weighted(self, share: np.ndarray, slow: "StepTimes") -> "StepTimes":
        """The mean of these and of `slow` steps, which are a ``share [R]``."""
        return StepTimes(
            weighted(share[:, None], self.stage, slow.stage),
            weighted(share[:, None, None], self.layers, slow.layers),
            weighted(share[:, None], self.last, slow.last),
        )


def round_bounds(
    mean: StepTimes, slow: StepTimes, busiest: np.ndarray, fastest: np.ndarray, share: np.ndarray, in_flight: np.ndarray,
    ks: np.ndarray, num_layers: int, limits: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """``[R]``: no split over ``ks [R]`` devices has a round that is shorter than this and than its ``limits [R]``, for equal layers.

    No busiest stage is below ``busiest [R]`` in mean and ``fastest [R]`` in a fast step; and of a slow step no device holds more layers
    than the mean step allows within the limit.
    """
    layer = slow.layers[:, :, 0]
    order = np.argsort(layer, axis=1)
    caps = ((limits / in_flight)[:, None] - mean.stage) / mean.layers[:, :, 0]
    rows, caps = np.arange(len(ks))[:, None], np.minimum(np.maximum(caps, 0.0), num_layers)
    caps = caps[rows, order]
    held = caps.cumsum(axis=1)
    layers = np.minimum(np.maximum(num_layers - (held - caps), 0.0), caps) * layer[rows, order]
    stages = np.sort(slow.stage, axis=1).cumsum(axis=1)[rows[:, 0], ks - 1]
    is_full = in_flight >= ks  # then no stage is less busy than it would be in mean
    weight = slow_weight(share, in_flight, is_full)
    along = np.where(is_full, (1.0 - weight) * in_flight * fastest, 0.0)
    return np.maximum(in_flight * busiest, weight * (stages + layers.sum(axis=1) + slow.last.min(axis=1)) + along)


def even_rounds(busiest: np.ndarray, evenly: np.ndarray, in_flight: np.ndarray) -> np.ndarray:
    """``[R]``: rounds that no split is expected to go below: what even stages would take, less a little (what uneven ones may gain;
    planning with no such bound gave the same plans). ``evenly [R]`` is the least busiest stage of `even_steps`."""
    return in_flight * np.maximum(busiest, _EVEN * evenly)


def even_steps(fast: StepTimes, slow: StepTimes, share: np.ndarray, in_flight: np.ndarray, ks: np.ndarray) -> StepTimes:
    """Steps whose busiest stage, times the steps in flight, is the convoy's round if stages are even."""
    return fast.weighted(slow_weight(share, in_flight, np.minimum(1.0, in_flight / ks)), slow)


class Rounds:
    """Steps of two kinds on n devices, a share of them slow.

    `times` has two rows: the fast step and the slow one. `kind_of_layer` ``[L]`` says which layer is of which kind;
    `problem` is that of the mean step.
    """

    def __init__(self, problem: Problem, times: StepTimes, kind_of_layer: np.ndarray, share: float) -> None:
        self.problem, self._times, self._kind_of_layer, self._share = problem, times, kind_of_layer, share
        self._is_uniform = times.layers.shape[2] == 1

    @cached_property
    def _until(self) -> np.ndarray:
        """``[2, n, L + 1]``: the layers before each."""
        layers = self._times.layers[:, :, self._kind_of_layer]
        return np.concatenate([np.zeros((*layers.shape[:2], 1)), layers.cumsum(axis=2)], axis=2)

    def _layers(self, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``[2, k, C]``: what the layers of every stage cost."""
        if self._is_uniform:
            return self._times.layers[:, :, 0][:, orders] * counts
        starts, stops = _spans(counts, len(self._kind_of_layer))
        return self._until[:, orders, stops] - self._until[:, orders, starts]

    def seconds(self, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``[C]``: the round of C splits, whose devices and numbers of layers are ``[k, C]``."""
        stages = self._times.stage[:, orders] + self._layers(orders, counts)
        stages[:, -1] += self._times.last[:, orders[-1]]
        fast, slow = stages
        fast_sum, slow_sum = stages.sum(axis=1)
        return round_seconds(
            self._share,
            self.problem.in_flight,
            mean_sum=weighted(self._share, fast_sum, slow_sum),
            mean_busiest=weighted(self._share, fast, slow).max(axis=0),
            slow_sum=slow_sum,
            fast_sum=fast_sum,
            fast_busiest=fast.max(axis=0),
        )

    def of(self, split: Split) -> float:
        return float(self.seconds(np.array(split.order)[:, None], np.array(split.counts)[:, None])[0])

    def improve(self, split: Split, *, keep_order: bool = False) -> tuple[Split, float]:
        """The split or one near it with a shorter round, and that in seconds. With `keep_order` devices stay where they are."""
        order, counts = np.array(split.order), np.array(split.counts)
        best, at, turns, thorough = np.inf, 0, 0, self.problem.num_devices <= FEW
        while turns < _ROUNDS:
            orders, moved = self._neighbours(order, counts, exchange=not keep_order, both=thorough)
            seconds = self.seconds(orders, moved)
            seconds[1:][~self._fit(orders[:, min(1, orders.shape[1] - 1) :], moved[:, 1:])] = np.inf
            at, best = int(seconds.argmin()), float(seconds[0])
            if seconds[at] < best * (1.0 - _WORTH):
                order, counts, best = orders[:, at if orders.shape[1] > 1 else 0], moved[:, at], float(seconds[at])
                turns += 1
            elif thorough or keep_order:
                break
            else:
                thorough = True
        return (make_split(self.problem, order.tolist(), counts.tolist()) if turns else split), best

    def _neighbours(
        self, order: np.ndarray, counts: np.ndarray, *, exchange: bool, both: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """``[k, C]`` each, or ``[k, 1]`` where the order stays: the split itself, then splits with a layer moved from one stage to another,
        two devices exchanged, or (of `FEW` devices) both at once."""
        k, n = len(order), self.problem.num_devices
        if k > _EVERY_MOVE:
            return order[:, None], counts[:, None] + self._moves(order, counts)
        if not exchange or n > _EVERY_MOVE:
            return order[:, None], counts[:, None] + _all_moves(k)
        devices, places, shifts = _exchanges_and_moves(k, n, both)
        is_free = np.ones(n, dtype=bool)
        is_free[order] = False
        return np.concatenate([order, np.flatnonzero(is_free)])[devices], counts[places] + shifts

    def _moves(self, order: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``[k, C]``: one layer less on a stage and one more on another, of the slowest and the busiest to the others."""
        per_layer = self._times.layers[1, order] @ np.bincount(self._kind_of_layer)
        busy = self._layers(order[:, None], counts[:, None])[0, :, 0]
        sources = {*np.argsort(-per_layer)[:_ENDS].tolist(), *np.argsort(-busy)[:_ENDS].tolist()}
        targets = {*np.argsort(per_layer)[:_ENDS].tolist(), *np.argsort(busy)[:_ENDS].tolist()}
        return _moves_between(len(order), sources, targets)

    def _fit(self, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``[C]``: which of the splits have room on every device, and a layer on every inner stage."""
        problem = self.problem
        if self._is_uniform:
            need = counts * problem.layer_bytes[0]
        else:
            until = np.concatenate(([0.0], np.cumsum(problem.layer_bytes)))
            starts, stops = _spans(counts, problem.num_layers)
            need = until[stops] - until[starts]
        need[0] += problem.first_bytes
        need[-1] += problem.last_bytes
        fits = (need <= problem.room[orders]).all(axis=0)
        return fits & (counts[1:-1] > 0).all(axis=0) & (np.minimum(counts[0], counts[-1]) >= 0)


def _spans(counts: np.ndarray, num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Where stages of so many layers begin and end; within the layers there are, even if a count is negative (`Rounds._fit`)."""
    stops = counts.cumsum(axis=0)
    return (stops - counts).clip(0, num_layers), stops.clip(0, num_layers)


@lru_cache(maxsize=64)
def _exchanges_and_moves(k: int, n: int, both: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is tried of k stages on n devices, ``[k, C]`` each: which of the devices in use and then of the others serves each stage,
    whose number of layers it takes over, and how many more these are.

    Another device for a stage, two stages' devices exchanged, and two stages exchanged with their layers.
    """
    stay, moves = np.arange(k), _all_moves(k).T  # the first moves nothing
    replaced = [np.where(stay == place, other, stay) for place in range(k) for other in range(k, n)]
    swapped = [_swapped(k, i, j) for i, j in itertools.combinations(range(k), 2)]
    exchanges = [(order, stay) for order in (*replaced, *swapped)] + [(order, order) for order in swapped]
    rows = [(stay, stay, move) for move in moves]
    if not both or len(moves) * (1 + len(exchanges)) > _MOST_TRIES:
        moves = moves[:1]
    for order, places in exchanges:
        rows += [(order, places, move) for move in moves]
    devices, places, shifts = zip(*rows, strict=True)
    return np.array(devices).T.copy(), np.array(places).T.copy(), np.array(shifts).T.copy()


def _swapped(k: int, i: int, j: int) -> np.ndarray:
    places = np.arange(k)
    places[[i, j]] = j, i
    return places


@lru_cache(maxsize=_EVERY_MOVE)
def _all_moves(k: int) -> np.ndarray:
    """``[k, 1 + k (k - 1)]``: zeros, then -1 and 1 for every pair of different stages."""
    return _moves_between(k, range(k), range(k))


def _moves_between(k: int, sources: Iterable[int], targets: Iterable[int]) -> np.ndarray:
    pairs = np.array([(i, j) for i in sources for j in targets if i != j], dtype=np.intp).reshape(-1, 2)
    moves, columns = np.zeros((k, 1 + len(pairs)), dtype=np.int64), 1 + np.arange(len(pairs))
    moves[pairs[:, 0], columns], moves[pairs[:, 1], columns] = -1, 1
    return moves
