"""What the head's mind is told, and what it wants done: the events and effects of `scheduler.state`, as values."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from kvstore.ids import SequenceId, WorkerName
from runtime.messages import StepPlan, ToHead, ToWorker
from scheduler.course import Change
from scheduler.planning.autopilot import Mode
from scheduler.planning.look import Answer, Question
from scheduler.request import FinishReason, Request, TokenOutput

# -- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    sequence: SequenceId
    request: Request
    now_s: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client went away (`abort`) or a stop string was found (`stop`)."""

    sequence: SequenceId
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class FromWorker:
    message: ToHead
    now_s: float


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A connection ended, a call timed out, or a local process exited."""

    worker: WorkerName
    reason: str
    now_s: float


@dataclass(frozen=True, slots=True)
class NotComing:
    """A lost worker is known not to be started again: nobody needs to wait for it."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    now_s: float


@dataclass(frozen=True, slots=True)
class Wake:
    """The time has come that the batcher named (`Batcher.wake_s`)."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new; let what runs end."""


@dataclass(frozen=True, slots=True)
class ChangeLayout:
    """Go from the present layout to this one. The epoch of `change.layout` is not looked at."""

    change: Change
    queue: bool
    now_s: float


@dataclass(frozen=True, slots=True)
class AbortChange:
    change: int
    now_s: float


@dataclass(frozen=True, slots=True)
class Resume:
    """A drained worker may get layers again."""

    worker: WorkerName
    now_s: float


@dataclass(frozen=True, slots=True)
class SetAutopilot:
    mode: Mode
    now_s: float


@dataclass(frozen=True, slots=True)
class Looked:
    """The autopilot's question has been answered."""

    question: Question
    answer: Answer
    now_s: float


Event: TypeAlias = (
    Looked
    | Submit
    | Cancel
    | FromWorker
    | PeerDown
    | NotComing
    | Tick
    | Wake
    | Drain
    | ChangeLayout
    | AbortChange
    | Resume
    | SetAutopilot
)

# -- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendStep:
    worker: WorkerName
    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Send:
    """Any message but a step."""

    worker: WorkerName
    message: ToWorker


class Emit(msgspec.Struct, frozen=True):
    """Hand `output` to whoever asked for `sequence`. There is one for every token, so it is made to be made fast."""

    sequence: SequenceId
    output: TokenOutput


@dataclass(frozen=True, slots=True)
class EvictWorker:
    """Remove a lost worker from the RPC group, so that others can join."""

    worker: WorkerName
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """A line for the operator."""

    level: Literal["info", "warning", "error"]
    text: str


@dataclass(frozen=True, slots=True)
class Look:
    """Have this question answered (`planning.look.answer`), in another thread since it takes a while; then `Looked`."""

    question: Question


Effect: TypeAlias = SendStep | Send | Emit | EvictWorker | Report | Look
