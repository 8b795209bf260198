"""A simulated worker's part in a transition: `runtime.handover` without tensors. Pure.

What is copied is counted in blocks and bytes instead; which step of the old epoch has been mirrored is known exactly.
"""

from collections import deque
from dataclasses import dataclass, field

from kvstore.ids import Epoch, SequenceId
from runtime.layout import Layout, Move
from runtime.messages import StepPlan


@dataclass(slots=True)
class Source:
    """One move away from a worker; it mirrors the steps of hop `hop` from `start` on."""

    index: int
    move: Move
    hop: int
    start: int


@dataclass(slots=True)
class Incoming:
    """One move to a worker: through which step its mirror is complete, and how much has come."""

    through: int | None = None
    row_bytes: int = 0
    page_bytes: int = 0

    def begin(self, start: int) -> None:
        if self.through is None:
            self.through = start - 1

    def is_complete_through(self, ordinal: int) -> bool:
        return self.through is not None and ordinal <= self.through


@dataclass(slots=True)
class CopyJob:
    """The snapshot that remains to be sent for one move, in blocks."""

    source: Source
    num_blocks: int
    sent: int = 0


@dataclass(slots=True)
class SimHandover:
    """The state of one transition on one worker."""

    transition: int
    source_epoch: Epoch
    layout: Layout
    leaving: list[tuple[int, Move]] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    incoming: dict[int, Incoming] = field(default_factory=dict)
    jobs: deque[CopyJob] = field(default_factory=deque)
    bytes_per_s: float = 0.0
    is_bound: bool = False
    is_open: bool = False
    copy_began_s: float = 0.0
    due_s: float = 0.0
    """When the next slice of the snapshot may be sent."""
    copy_s: float = 0.0
    fence_waits: int = 0
    fence_wait_s: float = 0.0
    blocked_since_s: float | None = None
    pauses_s: list[float] = field(default_factory=list)
    _ended_s: dict[SequenceId, float] = field(default_factory=dict)

    def open(self, starts: list[int]) -> None:
        for index, incoming in self.incoming.items():
            incoming.begin(starts[index])
        self.is_open = True

    def is_complete_through(self, ordinal: int) -> bool:
        """Whether steps may run that depend on the old epoch's steps up to `ordinal`."""
        return self.is_open and all(incoming.is_complete_through(ordinal) for incoming in self.incoming.values())

    def ran(self, plan: StepPlan, begun_s: float, ended_s: float) -> None:
        """Note when sequences ran here, and how long those paused that went over."""
        if plan.epoch == self.source_epoch:
            for row in plan.rows:
                self._ended_s[row.sequence] = ended_s
            return
        for row in plan.rows:
            if row.begin is not None and row.sequence in self._ended_s:
                self.pauses_s.append(begun_s - self._ended_s.pop(row.sequence))

    def unblocked(self, begun_s: float) -> None:
        """A step of the next epoch runs at last."""
        if self.blocked_since_s is not None:
            self.fence_waits += 1
            self.fence_wait_s += begun_s - self.blocked_since_s
            self.blocked_since_s = None
