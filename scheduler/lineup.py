"""Which workers a layout comes up over, when none serves: at the start, and when one that served is lost. Pure.

At the start it is as many as were asked for, after a loss as many as served. It is worth waiting a while for the lost one to start
again, then whoever is there serves; those that served before are taken first. Those that just could not load their part are taken last, and before them those that an operator has drained; what has been
tried and did not fit is not tried again until everything has been and some time has passed.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import combinations, islice

from kvstore.ids import WorkerName
from scheduler.membership import Membership

MOST_TRIED = 64
"""Ways to choose workers out of those of a kind."""


@dataclass(slots=True)
class Lineup:
    """The choice, and what came of the earlier ones since the last layout that served."""

    tried: set[frozenset[WorkerName]] = field(default_factory=set)
    """What could not be loaded."""
    unfit: set[WorkerName] = field(default_factory=set)
    """Workers that could not load their part of it."""
    failed_s: float = 0.0
    """When that was seen last."""

    def choose(
        self, members: Membership, num_stages: int, served: Collection[WorkerName] = ()
    ) -> tuple[list[WorkerName], bool]:
        """The workers for `num_stages` stages, or as many as there are, in their order, with as many as can be of those that `served`; and
        whether they are all that could be wished for. Nobody when there is nothing left that has not been tried."""
        drained, place = members.drained(), {name: at for at, name in enumerate(members.in_order())}
        in_order = sorted(place, key=lambda name: (name not in served, place[name]))
        fit = [name for name in in_order if name not in self.unfit]
        for candidates in (
            [name for name in fit if name not in drained],
            fit,
            [name for name in in_order if name not in drained],
            in_order,
        ):
            size = min(max(1, num_stages), len(candidates))
            for names in islice(combinations(candidates, size), MOST_TRIED if size else 0):
                if frozenset(names) not in self.tried:
                    return sorted(names, key=place.__getitem__), size >= num_stages and not (
                        drained | self.unfit
                    ).intersection(names)
        return [], False

    def could_not_load(self, names: Iterable[WorkerName], worker: WorkerName, now_s: float) -> None:
        """`worker` has no room for its part of a layout over `names`, or could not read it."""
        self.tried.add(frozenset(names))
        self.unfit.add(worker)
        self.failed_s = now_s

    def forget(self) -> None:
        """A layout serves, or what stood in the way may have passed: anything may be tried."""
        self.tried.clear()
        self.unfit.clear()
