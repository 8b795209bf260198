"""A change of layout as values: what was asked, how it goes over its hops, and one hop with what the workers have said of it. Pure.

`scheduler.reconfiguration` decides; here is what it decides from. A worker's word is taken once, and only in the phase that waits for
it: late ones, and those that come twice, change nothing.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from kvstore.ids import WorkerName
from runtime.layout import Layout, Move
from runtime.messages import Copied, Mirroring, Prepared, Retired, ShadowProgress, ShadowReady
from scheduler.hops import NO_LIMIT
from scheduler.lanes import Opening
from scheduler.membership import Worker
from scheduler.transition import ABORTABLE, NEXT_PHASES, Phase, Report, Snapshot, Strategy
from scheduler.wishes import Wish

ToTransition: TypeAlias = Prepared | Mirroring | ShadowProgress | ShadowReady | Copied | Retired
"""What workers say of one."""


@dataclass(frozen=True, slots=True)
class Change:
    """What was asked for."""

    id: int
    layout: Layout
    strategy: Strategy
    deadline_s: float
    """Seconds from its start after which it is aborted, if nothing has flipped by then. Later hops have at least as long each."""
    bytes_per_s: int
    """Of the KV snapshot; `is_bound` says what it means."""
    wish: Wish | None = None
    """What `layout` is resolved from, again when the change begins: those before it may not have led where they were to."""
    is_bound: bool = False
    """An operator said it: never more than `bytes_per_s`, over all sources. Else it is for each of them, and only while steps run there."""


@dataclass(slots=True)
class Pauses:
    """What the workers saw of the flips, over all hops of a change: `runtime.messages.Retired`."""

    pauses_us: list[int] = field(default_factory=list)
    excesses_us: list[int] = field(default_factory=list)
    ordinary_us: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Course:
    """A change under way, over all its hops."""

    change: Change
    report: Report
    began_s: float
    first: Layout
    """The layout that it began with."""
    later: deque[Layout]
    """The layouts of the hops after the present one."""
    hop: int = 0
    """The present hop, from 1; from the second on, something has flipped."""
    num_retries: int = 0
    stopped: str = ""
    """Why it cannot go on as planned once the present hop is over."""
    given_up: str = ""
    """Why it ends once the present hop is over, wherever that leads: somebody wants it so, or its time is up."""
    turned_back: str = ""
    """Why it leads back to `first`: it was to end on the way, and a running request may need more than the layout there holds."""
    pauses: Pauses = field(default_factory=Pauses)

    @property
    def target(self) -> Layout:
        return self.first if self.turned_back else self.change.layout


@dataclass(slots=True)
class Transition:
    """One hop of a change."""

    course: Course
    old: Layout
    new: Layout
    moves: tuple[Move, ...]
    phase: Phase
    entered_s: float
    workers: tuple[WorkerName, ...]
    began_s: float
    fly_through: int = -1
    awaiting: set[WorkerName] = field(default_factory=set)
    not_warm: set[WorkerName] = field(default_factory=set)
    loaded: dict[WorkerName, ShadowProgress] = field(default_factory=dict)
    """By worker that has units to load, how far it is."""
    starts: dict[int, int] = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    snapshot: Snapshot | None = None
    num_needed: int = 0
    """Blocks of the snapshot, from the first on, without which nothing flips."""
    opening: Opening | None = None
    why: str = ""
    again: bool = False
    """Once aborted, begin the change anew."""
    weights_before: dict[WorkerName, int] = field(default_factory=dict)
    load_s: float = 0.0
    copy_s: float = 0.0
    """The longest that a worker loaded, and that one copied: one after the other."""

    def flips_within_s(self, now_s: float) -> float:
        """When what the flip waits for will have been copied if it goes on as it did; infinite while nothing has arrived."""
        arrived = self.snapshot.num_arrived if self.snapshot is not None else 0
        return (now_s - self.entered_s) * (self.num_needed / arrived - 1.0) if arrived else math.inf

    def rates(self) -> list[tuple[WorkerName, int]]:
        """What each source may send of the snapshot in a second. A bound is divided by what they send, so that all end together."""
        layers: Counter[WorkerName] = Counter()
        for move in self.moves:
            layers[move.source] += len(move.layers)
        change, names = self.change, sorted(layers)
        if change.is_bound:
            return [(name, max(1, change.bytes_per_s * layers[name] // layers.total())) for name in names]
        return [(name, NO_LIMIT if change.strategy == "stop-copy" else change.bytes_per_s) for name in names]

    @property
    def change(self) -> Change:
        return self.course.change

    @property
    def report(self) -> Report:
        return self.course.report

    @property
    def can_leave_no_trace(self) -> bool:
        """Whether nothing has flipped yet, in this hop or an earlier one."""
        return self.course.hop == 1 and self.phase in ABORTABLE

    @property
    def can_be_aborted(self) -> bool:
        """Whether this hop can be called off, or is not the last."""
        return self.phase in ABORTABLE or (self.phase != "abort" and bool(self.course.later))

    @property
    def copies(self) -> bool:
        return self.change.strategy in ("live", "stop-copy")

    def enter(self, phase: Phase, now_s: float) -> None:
        assert phase in NEXT_PHASES[self.phase], f"transition {self.change.id} cannot go from {self.phase} to {phase}"
        self.leave(now_s)
        self.phase, self.entered_s = phase, now_s

    def leave(self, now_s: float) -> None:
        """The present phase has lasted until now."""
        spent = self.report.phases_s
        spent[self.phase] = spent.get(self.phase, 0.0) + now_s - self.entered_s

    def view(self, now_s: float, num_left: int | None) -> dict[str, Any]:
        """For ``GET /admin/layout``; `num_left` sequences have yet to flip."""
        snapshot, opening = self.snapshot, self.opening
        return {
            "id": self.change.id,
            "strategy": self.change.strategy,
            "phase": self.phase,
            "target": self.report.target,
            "hop": self.course.hop,
            "num_hops": self.report.num_hops,
            "loading": sorted(self.not_warm),
            "weights": [_shown(self.loaded[name]) for name in sorted(self.loaded)],
            "snapshot_blocks": snapshot.num_blocks if snapshot else 0,
            "snapshot_blocks_arrived": snapshot.num_arrived if snapshot else 0,
            "sequences_flipped": self.report.sequences_flipped + (opening.num_flipped if opening else 0),
            "sequences_left": num_left,
            "elapsed_s": round(now_s - self.course.began_s, 3),
        }

    # -- what the workers say -------------------------------------------------------------------------------

    def said(self, message: ToTransition, worker: Worker | None) -> None:
        """A worker's word on this transition; `worker` is it, if it is still there."""
        match message:
            case Prepared():
                self._prepared(message)
            case Mirroring():
                self._mirroring(message)
            case ShadowProgress():
                if message.worker in self.not_warm:
                    self.loaded[message.worker] = message
            case ShadowReady():
                self._shadow_ready(message, worker)
            case Copied():
                if self.snapshot is not None:
                    self.snapshot.advance(message.move, message.count)
            case Retired():
                self._retired(message, worker)
            case _:
                assert_never(message)

    def _prepared(self, message: Prepared) -> None:
        if message.worker in self.awaiting and self.phase == "prepare":
            self.awaiting.discard(message.worker)
            self.prepared.append(message)

    def _mirroring(self, message: Mirroring) -> None:
        if self.phase == "copy" and message.worker in self.awaiting:
            self.awaiting.discard(message.worker)
            self.starts.update(message.starts)

    def _shadow_ready(self, message: ShadowReady, worker: Worker | None) -> None:
        if message.worker not in self.not_warm:
            return
        self.not_warm.discard(message.worker)
        self.report.weight_bytes += max(0, message.weight_bytes - self.weights_before.get(message.worker, 0))
        self.report.peer_weight_bytes += message.peer_bytes
        self.load_s = max(self.load_s, message.seconds)
        if worker is not None:
            worker.weight_bytes = message.weight_bytes
            worker.implementation = message.implementation or worker.implementation

    def _retired(self, message: Retired, worker: Worker | None) -> None:
        if self.phase not in ("retire", "abort"):
            return
        self.awaiting.discard(message.worker)
        if worker is not None and message.weight_bytes >= 0:
            worker.weight_bytes = message.weight_bytes
        if worker is not None and message.num_pages:
            worker.num_pages, worker.room_bytes = message.num_pages, message.room_bytes
        report, pauses = self.report, self.course.pauses
        report.mirror_bytes += message.row_bytes
        report.snapshot_bytes += message.page_bytes
        self.copy_s = max(self.copy_s, message.copy_us / 1e6)
        report.fence_waits += message.fence_waits
        report.fence_wait_ms += message.fence_wait_us / 1e3
        pauses.pauses_us += message.pauses_us
        pauses.excesses_us += message.excesses_us
        pauses.ordinary_us += message.ordinary_us


def _shown(progress: ShadowProgress) -> dict[str, object]:
    return {
        "worker": progress.worker,
        "units_loaded": progress.units_loaded,
        "units_total": progress.units_total,
        "bytes_loaded": progress.bytes_loaded,
        "bytes_total": progress.bytes_total,
    }
