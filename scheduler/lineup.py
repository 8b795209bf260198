"""Which workers a layout comes up over, when none serves: at the start, and when one that served is lost. Pure.

At the start it is as many as were asked for. After a loss it is worth waiting a while for the lost one to start again, then whoever
is there serves. Those that an operator has drained, and those that just could not load their part, are taken last; and what has been
tried and did not fit is not tried again, so every recovery ends: in a layout, or in a wait for a worker that is not there yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.ids import WorkerName
from scheduler.membership import Membership


@dataclass(slots=True)
class Lineup:
    """The choice, and what came of the earlier ones since the last layout that served."""

    tried: set[tuple[WorkerName, ...]] = field(default_factory=set)
    """What could not be loaded."""
    unfit: set[WorkerName] = field(default_factory=set)
    """Workers that could not load their part of it."""

    def choose(self, members: Membership, num_stages: int) -> tuple[list[WorkerName], bool]:
        """The workers for `num_stages` stages, or as many as there are, in their order; and whether they are all that could be wished
        for. Nobody when there is nothing left that has not been tried."""
        drained, in_order = members.drained(), members.in_order()
        able = [name for name in in_order if name not in drained]
        for candidates in ([name for name in able if name not in self.unfit], able, in_order):
            names = candidates[: max(1, num_stages)]
            if names and tuple(names) not in self.tried:
                return names, len(names) >= num_stages and not (drained | self.unfit).intersection(names)
        return [], False

    def could_not_load(self, names: Sequence[WorkerName], worker: WorkerName) -> None:
        """`worker` has no room for its part of a layout over `names`, or could not read it."""
        self.tried.add(tuple(names))
        self.unfit.add(worker)

    def served(self) -> None:
        """A layout serves: the next recovery may try anything."""
        self.tried.clear()
        self.unfit.clear()
