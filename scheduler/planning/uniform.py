"""The best split when all layers are alike: then the order matters only at the two ends. Pure.

*Bottleneck.* Under a bound B a device holds at most ``floor((B - stage) / layer)`` layers, fewer as the first or the last
stage and where memory is short. k devices can keep B exactly when, for some first and some last, these two and the
largest k - 2 of the others hold all layers: a count and a sum, for any number of devices. The least B is one of the values at which some
device can take one more layer, and is found by halving (`compiled.bottlenecks`). Exact.

*Sum.* With the devices, the first and the last given, layers go to the device on which one costs least, up to its cap under
B; all choices are tried where there are few devices, otherwise a set is improved by exchanging devices (then bounded).

Never true: this is called for layers that differ.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from scheduler.planning import compiled
from scheduler.planning.splits import SLACK, Problem, Split

_EXACT_DEVICES = 8


class Uniform:
    """A problem with equal layers, for k stages. Seconds and bytes are those of `Problem`."""

    def __init__(self, problem: Problem, k: int, memory: np.ndarray | None = None) -> None:
        """`memory` ``[4, n]``: for how many layers devices have memory in each role (`compiled.bottlenecks`), where that is known already."""
        self._problem, self._k = problem, k
        self._stage, self._last = problem.stage.copy(), problem.last.copy()
        self._layer = problem.layers[:, 0].copy()
        self._memory = memory_of(problem) if memory is None else memory

    def caps(self, bound: float) -> np.ndarray:
        """``[4, n]``: the layers that each device may hold in each role with no stage above `bound`."""
        return compiled.bottlenecks.caps_within(bound, self._stage, self._layer, self._last, self._memory)

    def choose(self, wanted: Sequence[int] = (), cuts: Sequence[int] = ()) -> Split | None:
        """A split with the least bottleneck, among equals one near the present: devices `wanted`, boundaries `cuts`. None: nothing fits."""
        order, counts = np.empty(self._k, dtype=np.int64), np.empty(self._k, dtype=np.int64)
        bound = compiled.bottlenecks.least_bottleneck(
            self._stage, self._layer, self._last, self._memory, self._k, self._problem.num_layers,
            np.array(wanted, dtype=np.int64), np.array(cuts, dtype=np.int64), order, counts,
        )  # fmt: skip
        return None if bound == math.inf else self._split(order, counts)

    def least_sum(self, bound: float, start: Split | None) -> Split | None:
        """The split with the least sum of stages none of which exceeds `bound`."""
        problem, k = self._problem, self._k
        caps = self.caps(bound)
        if problem.num_devices <= _EXACT_DEVICES:
            return self._least_of(caps, _arrangements(problem.num_devices, k))
        best = start
        for _ in range(4 * k if best is not None else 0):
            assert best is not None
            found = self._least_of(caps, exchanges(np.array(best.order), problem.num_devices))
            if found is None or (found.total >= best.total * (1 - SLACK) and best is not start):
                break
            best = found
        return best

    def _least_of(self, caps: np.ndarray, orders: np.ndarray) -> Split | None:
        """The least sum within ``caps [4, n]`` of the orders ``[C, k]``; None when none of them has room."""
        counts = np.empty(self._k, dtype=np.int64)
        best = compiled.bottlenecks.least_sum(
            self._stage, self._layer, self._last, caps, self._problem.num_layers, orders, counts
        )
        return None if best < 0 else self._split(orders[best], counts)

    def _split(self, order: np.ndarray, counts: np.ndarray) -> Split:
        times = self._stage[order] + counts * self._layer[order]
        times[-1] += self._last[order[-1]]
        seconds = times.tolist()
        return Split(tuple(order.tolist()), tuple(counts.tolist()), max(seconds), sum(seconds))

    def stage_values(self, low: float) -> list[float]:
        """Everything from `low` on that a stage can cost, ascending."""
        counts, fixed = np.arange(self._problem.num_layers + 1), np.stack([self._stage, self._stage + self._last])
        values = np.unique(fixed[:, :, None] + counts * self._layer[:, None])
        return values[values >= low * (1 - SLACK)].tolist()


def memory_of(problem: Problem) -> np.ndarray:
    """``[4, n]``: for how many layers each device has memory in each role."""
    return compiled.bottlenecks.memory_caps(
        problem.room, problem.first_bytes, problem.last_bytes, float(problem.layer_bytes[0]), problem.num_layers
    )


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
