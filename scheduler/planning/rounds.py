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

import numpy as np

from scheduler.planning import compiled
from scheduler.planning.splits import Problem, Split, make_split

_EVERY_MOVE = 8
"""Up to so many stages every move of a layer and every exchange is tried, beyond that between the `_ENDS` most promising stages."""
_ENDS = 5
FEW = 6
_MOST_TRIES = 1000
"""An exchange and a move are tried together where that makes no more splits."""
_ROUNDS = 12
_WORTH = 1e-7


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of R kinds of step on n devices: what any stage costs ``[R, n]``, each kind of layer ``[R, n, U]``, the LM head ``[R, n]``."""

    stage: np.ndarray
    layers: np.ndarray
    last: np.ndarray


class Rounds:
    """Steps of two kinds on n devices, a share of them slow.

    `times` has two rows: the fast step and the slow one. `kind_of_layer` ``[L]`` says which layer is of which kind;
    `problem` is that of the mean step.
    """

    def __init__(self, problem: Problem, times: StepTimes, kind_of_layer: np.ndarray, share: float) -> None:
        self.problem, self._times, self._kind_of_layer, self._share = problem, times, kind_of_layer, share
        self._stage, self._last = times.stage.copy(), times.last.copy()

    @cached_property
    def _until(self) -> np.ndarray:
        """``[2, n, L + 1]``: the layers before each."""
        layers = self._times.layers[:, :, self._kind_of_layer]
        until = np.zeros((*layers.shape[:2], layers.shape[2] + 1))
        layers.cumsum(axis=2, out=until[:, :, 1:])
        return until

    @cached_property
    def _need_until(self) -> np.ndarray:
        """``[L + 1]``: the bytes of the layers before each."""
        return np.concatenate(([0.0], np.cumsum(self.problem.layer_bytes)))

    def _shortest(self, orders: np.ndarray, counts: np.ndarray) -> tuple[float, int, float]:
        """Of C splits, whose devices are ``[k, C]`` or ``[k, 1]`` and numbers of layers ``[k, C]``: the round of the first one, which of those that fit
        has the shortest round, and that."""
        problem = self.problem
        return compiled.convoys.shortest_of(
            self._share, problem.in_flight, self._until, self._stage, self._last, self._need_until, problem.room,
            problem.first_bytes, problem.last_bytes, orders, counts,
        )  # fmt: skip

    def of(self, split: Split) -> float:
        """The round in seconds."""
        return self._shortest(np.array(split.order)[:, None], np.array(split.counts)[:, None])[0]

    def improve(self, split: Split, *, keep_order: bool = False) -> tuple[Split, float]:
        """The split or one near it with a shorter round, and that in seconds. With `keep_order` devices stay where they are."""
        order, counts = np.array(split.order), np.array(split.counts)
        best, turns, thorough = np.inf, 0, self.problem.num_devices <= FEW
        while turns < _ROUNDS:
            orders, moved = self._neighbours(order, counts, exchange=not keep_order, both=thorough)
            best, at, seconds = self._shortest(orders, moved)
            if seconds < best * (1.0 - _WORTH):
                order, counts, best = orders[:, at if orders.shape[1] > 1 else 0], moved[:, at], seconds
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
        stops = counts.cumsum()
        busy = self._until[0, order, stops] - self._until[0, order, stops - counts]
        sources = {*np.argsort(-per_layer)[:_ENDS].tolist(), *np.argsort(-busy)[:_ENDS].tolist()}
        targets = {*np.argsort(per_layer)[:_ENDS].tolist(), *np.argsort(busy)[:_ENDS].tolist()}
        return _moves_between(len(order), sources, targets)


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
