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

from scheduler.planning import compiled
from scheduler.planning.rounds import StepTimes

MOST_DEVICES = 8


@dataclass(frozen=True, slots=True)
class Shortest:
    """``counts[i]`` layers on device ``order[i]``, and the round in seconds."""

    order: tuple[int, ...]
    counts: tuple[int, ...]
    seconds: float


class FewDevices:
    """k stages on n devices: `times` has two rows, a step that only decodes and one that also prefills, which are a `share`.

    `memory` ``[4, n]`` is how many layers each device has memory for as an inner, first, last or only stage, below 0 if it cannot be that.
    `in_flight` must be k at least.
    """

    def __init__(
        self, times: StepTimes, share: float, in_flight: float, k: int, num_layers: int, memory: np.ndarray
    ) -> None:
        assert in_flight >= k, "the weight of slow steps would not be a constant"
        self._k, self._num_layers, self._in_flight, self._share = k, num_layers, in_flight, share
        self._stage, self._layer, self._last = times.stage.copy(), times.layers[:, :, 0].copy(), times.last.copy()
        self._memory = memory

    def best(self, below: float = math.inf) -> Shortest | None:
        """The split with the shortest round, of less than `below` seconds; None if there is none, or none for which memory suffices."""
        order, counts = np.empty(self._k, dtype=np.int64), np.empty(self._k)
        seconds = compiled.convoys.shortest_round(
            self._share, self._in_flight, self._stage, self._layer, self._last, self._memory, self._num_layers, below,
            _choices(len(self._stage[0]), self._k), order, counts,
        )  # fmt: skip
        if seconds == math.inf:
            return None
        return Shortest(tuple(order.tolist()), tuple(int(count) for count in counts.tolist()), seconds)

    @cached_property
    def has_room(self) -> bool:
        """Whether the memory allows any split."""
        return compiled.bottlenecks.can_hold(self._memory, self._k, self._num_layers)


@lru_cache(maxsize=64)
def _choices(n: int, k: int) -> np.ndarray:
    """``[S, k]``: every choice of k of n devices, ascending."""
    return np.array(list(itertools.combinations(range(n), k)), dtype=np.int64)
