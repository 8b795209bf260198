"""The reconfiguration against a dumb model, whatever order its events come in.

The state is the head's real one, and nothing else is: workers are a few lines that answer each message as the protocol has it, and
hypothesis decides what is answered when, twice or not yet, what fails, who is lost, and when somebody asks, aborts or looks at the
clock. There are no steps but those of one-token requests; what these compute is the simulation's business (`tests/sim`).
"""

import math
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.layout import Layout, Segment, layout_from_owners
from runtime.messages import (
    Cancel,
    Copied,
    Copy,
    HopTiming,
    Join,
    Load,
    Loaded,
    Mirroring,
    Open,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Sampling,
    ShadowReady,
    StartMirror,
    StepPlan,
    StepResult,
    ToHead,
    ToWorker,
    TransitionFailed,
)
from scheduler.batching import BatchingConfig
from scheduler.course import Change
from scheduler.events import AbortChange, ChangeLayout, Emit, Event, FromWorker, PeerDown, Send, SendStep, Submit, Tick
from scheduler.request import AdmissionError, Request
from scheduler.state import ClusterConfig, SchedulerState
from scheduler.transition import ABORTABLE, STRATEGIES, Refused, Strategy, describe
from tests.sim.cluster import NUM_LAYERS, make_spec

NUM_PAGES = 60
BLOCK_SIZE = 4
WANTED = ("w0", "w1", "w2", "w3")


@dataclass
class DumbWorker:
    """What one worker has been told; it believes all of it."""

    num_pages: int = NUM_PAGES
    epochs: set[int] = field(default_factory=set)
    prepared: Prepare | None = None
    opened: set[int] = field(default_factory=set)

    def answers(self, name: str, message: ToWorker) -> list[ToHead]:
        match message:
            case Load():
                self.prepared, self.epochs = None, {message.layout.epoch} if name in message.layout.workers else set()
                loaded = Loaded(name, message.layout.epoch, 0, self.num_pages, 32, 0.0, "dumb")
                return [loaded] if self.epochs else []
            case Prepare():
                self.prepared, number = message, message.transition
                if name in message.load.layout.workers:
                    self.epochs.add(number)
                return [Prepared(name, number, self.num_pages, 32), ShadowReady(name, number, 0, 0.0)]
            case StartMirror():
                assert self.prepared is not None
                starts = [(i, 0) for i, move in enumerate(self.prepared.moves) if move.source == name]
                return [Mirroring(name, message.transition, starts)]
            case Copy():
                assert self.prepared is not None
                count = len(message.blocks)
                moves = [(i, move) for i, move in enumerate(self.prepared.moves) if move.source == name]
                # What the targets say, who get it from here.
                return [Copied(m.target, message.transition, i, c, 0) for i, m in moves for c in (count // 2, count)]
            case Open():
                self.opened.add(message.transition)
                return []
            case Retire() | Cancel():
                if self.prepared is None or self.prepared.transition != message.transition:
                    return []
                gone = self.prepared.source_epoch if isinstance(message, Retire) else message.transition
                self.prepared = None
                self.epochs.discard(gone)
                return [Retired(name, message.transition, 0, 0, 0, 0, [])]
            case _:
                raise AssertionError(f"a worker got {message}")


@dataclass
class Asked:
    """What the model knows of a change."""

    layout: Layout
    deadline_s: float
    began_s: float = -1.0
    aborted: bool = False
    """An operator's abort that came in time."""


class ReconfigurationMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        batching = BatchingConfig(num_microbatches=2, block_size=BLOCK_SIZE, max_queue=8)
        cluster = ClusterConfig(make_spec(NUM_LAYERS), num_stages=2, rejoin_timeout_s=1.0, heartbeat_timeout_s=1e9)
        self.head = SchedulerState(cluster, batching)
        self.now_s = 0.0
        self.workers: dict[str, DumbWorker] = {}
        self.to_workers: list[tuple[str, ToWorker | StepPlan]] = []
        self.to_head: list[ToHead] = []
        self.asked: dict[int, Asked] = {}
        self.ended: dict[int, str] = {}
        self.chains: dict[int, tuple[Segment, ...]] = {}
        """By epoch, the workers that its steps visit."""
        self.flipped: set[int] = set()
        """Changes of which something has flipped."""
        self.last_epoch = 0
        self.num_submitted = self.num_finished = self.num_joined = 0
        self.num_pages: dict[str, int] = {}
        """Of every worker that has ever joined."""

    @initialize()
    def begin(self) -> None:
        for name in WANTED:
            self.join(name)
        while self.to_workers or self.to_head:
            self.settle()

    # -- the world --------------------------------------------------------------------------------------------

    def join(self, name: str, num_pages: int = NUM_PAGES) -> None:
        self.workers[name] = DumbWorker(num_pages)
        self.num_pages[name] = num_pages
        self.handle(FromWorker(Join(name, "host", 1, "cpu", "dumb", 1, 1, 1, {}), self.now_s))

    def handle(self, event: Event) -> None:
        before = self.change_now()
        for effect in self.head.step(event):
            match effect:
                case Send():
                    self.to_workers.append((effect.worker, effect.message))
                    if isinstance(effect.message, Open) and self.head.reconfiguration.view() is not None:
                        change = self.change_now()
                        self.flipped.add(before if change is None else change)
                case SendStep():
                    self.to_workers.append((effect.worker, effect.plan))
                    self.chains[effect.plan.epoch] = self.head.layouts[effect.plan.epoch].segments
                case Emit():
                    self.num_finished += effect.output.finish_reason is not None
                case _:
                    pass
        self.head.check_integrity()
        lets_pass = self.phase is None and self.head.reconfiguration.last_wanted is not None  # who waited for the end
        if (
            self.head.status == "serving" and self.phase != "flip" and not lets_pass
        ):  # whose last step may just have been formed
            went_to = self.head.reconfiguration.view()
            self.head.reconfiguration.advance()
            assert self.head.reconfiguration.view() == went_to, "it could have gone on at once"
        change = self.change_now()
        if change is not None and self.asked[change].began_s < 0.0:
            self.asked[change].began_s = self.now_s

    def change_now(self) -> int | None:
        view = self.head.reconfiguration.view()
        return None if view is None else int(str(view["id"]))

    @property
    def phase(self) -> str | None:
        view = self.head.reconfiguration.view()
        return None if view is None else str(view["phase"])

    @property
    def can_leave_no_trace(self) -> bool:
        view = self.head.reconfiguration.view()
        return view is not None and view["hop"] == 1 and view["phase"] in ABORTABLE

    @property
    def can_be_aborted(self) -> bool:
        """Before this hop flips, or in time for the hops after it."""
        view = self.head.reconfiguration.view()
        if view is None or view["phase"] == "abort":
            return False
        return view["phase"] in ABORTABLE or int(str(view["hop"])) < int(str(view["num_hops"]))

    def settle(self) -> None:
        """Everything that is on its way arrives, in order."""
        while self.to_workers:
            self.take(0)
        if self.to_head:
            self.handle(FromWorker(self.to_head.pop(0), self.now_s))

    def take(self, index: int) -> None:
        name, message = self.to_workers.pop(index)
        if name not in self.workers:
            return
        if isinstance(message, StepPlan):
            assert message.epoch in self.workers[name].epochs, f"{name} gets a step of epoch {message.epoch}"
            tokens = [7 for row in message.rows if row.sample]
            timings = [HopTiming(segment.worker, 0, 0, 1, 0) for segment in self.chains[message.epoch]]
            self.to_head.append(StepResult(message.epoch, message.ordinal, message.microbatch, tokens, [], [], timings))
        else:
            self.to_head += self.workers[name].answers(name, message)

    # -- the rules --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.to_workers)
    @rule()
    def a_worker_acts(self) -> None:
        self.take(0)

    @precondition(lambda self: self.to_head)
    @rule(data=st.data(), twice=st.booleans())
    def an_answer_arrives(self, data: st.DataObject, twice: bool) -> None:
        index = data.draw(st.integers(0, len(self.to_head) - 1))
        message = self.to_head.pop(index)
        for _ in range(1 + twice):
            self.handle(FromWorker(message, self.now_s))

    @precondition(lambda self: self.to_workers or self.to_head)
    @rule(count=st.integers(1, 30))
    def much_arrives(self, count: int) -> None:
        for _ in range(count):
            self.settle()

    @precondition(lambda self: self.head.status == "serving")
    @rule(
        data=st.data(),
        strategy=st.sampled_from(("live", "live", "live", *STRATEGIES)),
        queue=st.booleans(),
        deadline_s=st.sampled_from((1e9, 1e9, 1.0)),
    )
    def ask(self, data: st.DataObject, strategy: Strategy, queue: bool, deadline_s: float) -> None:
        names = self.head.members.in_order()
        owners = data.draw(st.lists(st.sampled_from(names), min_size=NUM_LAYERS, max_size=NUM_LAYERS))
        self.start(layout_from_owners(0, owners), strategy, queue=queue, deadline_s=deadline_s)

    def start(self, layout: Layout, strategy: Strategy, *, queue: bool, deadline_s: float) -> None:
        change = Change(len(self.asked) + 1, layout, strategy, deadline_s, 1 << 30)
        is_busy, before = self.head.reconfiguration.is_active, self.head.layout
        self.asked[change.id] = Asked(change.layout, deadline_s)
        try:
            self.handle(ChangeLayout(change, queue, self.now_s))
        except Refused:
            assert change.id not in self.head.reconfiguration.reports, "nothing has changed"
            assert self.head.layout == before
        else:
            assert queue or not is_busy, "one at a time"

    @precondition(lambda self: self.head.reconfiguration.reports)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        change = data.draw(st.sampled_from(sorted(self.head.reconfiguration.reports)))
        report = self.head.reconfiguration.reports[change]
        was_queued = report.outcome == "queued"
        in_time = was_queued or (self.change_now() == change and self.can_be_aborted)
        flips = self.phase != "abort"
        before = self.head.reconfiguration.num_aborts_asked
        self.handle(AbortChange(change, self.now_s))
        if in_time:
            self.asked[change].aborted = True
            assert self.head.reconfiguration.num_aborts_asked == before + 1
            assert not was_queued or report.outcome == "aborted"
        elif self.change_now() == change and flips:
            assert self.head.reconfiguration.num_aborts_asked == before, "the last of it flips: it goes forward"

    @rule(seconds=st.sampled_from((0.1, 2.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        change, could = self.change_now(), self.can_leave_no_trace
        self.handle(Tick(self.now_s))
        if could and change is not None and self.now_s - self.asked[change].began_s > self.asked[change].deadline_s:
            report = self.head.reconfiguration.reports[change]
            assert self.phase == "abort" or report.outcome == "aborted" or self.change_now() != change
            if report.outcome == "aborted" and not self.asked[change].aborted:
                assert "deadline" in report.why

    @precondition(lambda self: self.phase not in (None, "reserve"))
    @rule(data=st.data())
    def a_part_fails(self, data: st.DataObject) -> None:
        """A load, or a piece of the snapshot: before the flip nothing of it remains, then the worker is given up."""
        target = self.head.reconfiguration.target
        assert target is not None
        name = data.draw(st.sampled_from(sorted(set(target.workers) & set(self.head.members.workers)) or ["w0"]))
        before, could = self.phase, self.phase in ABORTABLE
        self.handle(FromWorker(TransitionFailed(name, target.epoch, "no luck"), self.now_s))
        if could:
            assert self.head.status == "serving"
            assert name in self.head.members.workers
        elif before in ("flip", "retire"):
            assert name not in self.head.members.workers
            del self.workers[name]

    @precondition(lambda self: len(self.workers) > 2)
    @rule(data=st.data())
    def a_worker_is_lost(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        serves = self.head.layout is not None and name in self.head.layout.workers
        target, phase = self.head.reconfiguration.target, self.phase
        del self.workers[name]
        was_serving = self.head.status == "serving"
        self.handle(PeerDown(name, "killed", self.now_s))
        assert name not in self.head.members.workers
        if was_serving and phase in (None, *ABORTABLE, "abort") and not serves:
            assert self.head.status == "serving", "the old layout has never stopped serving"
        if was_serving and (serves or (phase == "flip" and target is not None and name in target.workers)):
            assert not self.head.reconfiguration.is_active, "the pipeline is broken, and the transition with it"

    @precondition(lambda self: len(self.workers) < 4)
    @rule(num_pages=st.sampled_from((NUM_PAGES, NUM_PAGES // 2)))
    def a_worker_joins(self, num_pages: int) -> None:
        """Its pool is thought to be like the others', until it says what it has."""
        self.num_joined += 1
        self.join(f"w{3 + self.num_joined}", num_pages)

    @precondition(lambda self: self.head.served_once)
    @rule(num_prompt=st.integers(1, 24), num_tokens=st.integers(1, 12))
    def submit(self, num_prompt: int, num_tokens: int) -> None:
        request = Request("r", list(range(num_prompt)), Sampling(temperature=0.0), max_tokens=num_tokens)
        self.num_submitted += 1
        try:
            self.handle(Submit(self.num_submitted, request, self.now_s))
        except AdmissionError:
            self.num_finished += 1

    @precondition(lambda self: self.head.status == "serving")
    @rule(num_tokens=st.integers(1, 12), spare=st.integers(0, 8))
    def submit_as_large_as_may_be(self, num_tokens: int, spare: int) -> None:
        self.submit(max(1, self.head.batcher.max_context - num_tokens - spare), num_tokens)

    @precondition(lambda self: self.head.status == "serving" and not self.head.reconfiguration.is_active)
    @rule(num_moved=st.integers(1, 2))
    def ask_where_there_is_little_room(self, num_moved: int) -> None:
        """Two workers with two layers and more blocks than they have pages for with three: they change places in several hops."""
        names = self.head.members.in_order()[:3]
        if len(names) < 3:
            return
        one, two, three = names
        self.ask_and_wait(layout_from_owners(0, [one, one, two, two, three]))
        for _ in range(3):
            self.submit(24, 12)
        for _ in range(8):
            self.settle()
        target = [two, two, one, one, three] if num_moved == 2 else [one, two, two, one, three]
        self.start(layout_from_owners(0, target), "live", queue=True, deadline_s=1e9)

    def ask_and_wait(self, layout: Layout) -> None:
        self.start(layout, "live", queue=True, deadline_s=1e9)
        while self.to_workers or self.to_head:
            self.settle()

    # -- what must always hold --------------------------------------------------------------------------------

    @invariant()
    def epochs_grow_and_are_owned(self) -> None:
        head = self.head
        assert head.epoch >= self.last_epoch
        self.last_epoch = head.epoch
        if head.status != "serving" or head.layout is None:
            assert not head.directory.epochs
            assert not head.reconfiguration.is_active, "whatever was under way is over"
            return
        target = head.reconfiguration.target
        expected = (head.epoch, target.epoch) if target is not None and self.phase == "flip" else (head.epoch,)
        assert head.directory.epochs == expected
        assert target is None or target.epoch >= head.epoch

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        """From the first message on that lets KV of the new layout arrive, blocks are counted against both layouts."""
        head, target = self.head, self.head.reconfiguration.target
        if head.status != "serving" or head.layout is None:
            return
        both = (
            [head.layout, target] if target is not None and self.phase in ("copy", "flip", "retire") else [head.layout]
        )
        for name in {name for layout in both for name in layout.workers}:
            num_layers = len({layer for layout in both for layer in layout.layers_of(name)})
            assert head.pool.num_blocks * num_layers <= self.num_pages[name], f"{name} holds {num_layers} layers"

    @invariant()
    def what_was_accepted_will_fit(self) -> None:
        """Into the layout that serves, and into the one that a change leads to; what may be asked for follows neither's hops."""
        head = self.head
        if head.status != "serving" or head.layout is None:
            return
        layouts = [head.layout]
        change = self.change_now()
        if change is not None and self.phase in ("shadow", "copy", "flip", "retire"):  # every pool's size is known
            layouts.append(self.asked[change].layout)
        least = min(self.holds(layout) for layout in layouts) * BLOCK_SIZE
        assert head.batcher.longest_request() <= least
        assert head.batcher.max_context <= least
        if change is None:
            assert head.batcher.max_context == min(least, head.spec.max_context)

    def holds(self, layout: Layout) -> int:
        counts = {name: len(layout.layers_of(name)) for name in layout.workers}
        return min(self.num_pages[name] // count for name, count in counts.items() if count)

    @invariant()
    def reports_say_what_is(self) -> None:
        head = self.head
        for change, report in head.reconfiguration.reports.items():
            if report.outcome in ("running", "queued"):
                assert change not in self.ended
                assert (report.outcome == "running") == (change == self.change_now()), "one is under way, or they wait"
                continue
            end = f"{report.outcome} {report.why} {report.reached}"
            assert self.ended.setdefault(change, end) == end, "an end is an end"
            assert math.isclose(sum(report.phases_s.values()), report.total_s, abs_tol=1e-6), "its phases are all of it"
            if report.outcome == "committed":
                assert report.reached == report.target == describe(self.asked[change].layout)
            else:
                assert report.why, "why it is not there"
            if self.asked[change].aborted:
                assert report.outcome in ("aborted", "refused")
            if report.outcome == "aborted" and change not in self.flipped and report.source:
                assert report.reached in (report.source, []), "it has left no trace, or the pipeline broke"

    @invariant()
    def at_rest_nothing_is_held(self) -> None:
        head, batcher = self.head, self.head.batcher
        if head.reconfiguration.is_active or head.status != "serving" or head.layout is None:
            return
        assert (batcher.is_held, batcher.admits, batcher.is_squeezed, batcher.flip_due_s) == (
            False,
            True,
            False,
            math.inf,
        )
        assert head.pool.target == head.num_blocks == self.holds(head.layout), (
            "the pool is as large as the layout allows"
        )

    def teardown(self) -> None:
        """All that is on its way arrives: then everything has ended, and every worker has what the layout gives it."""
        for _ in range(4):
            for _ in range(20_000):
                if not (self.to_workers or self.to_head):
                    break
                self.settle()
            self.now_s += 2.0
            self.handle(Tick(self.now_s))
        assert not self.head.reconfiguration.is_active, f"it hangs in phase {self.phase}"
        for change, report in self.head.reconfiguration.reports.items():
            assert report.outcome in ("committed", "aborted", "refused"), f"change {change} is {report.outcome}"
        self.reports_say_what_is()
        self.at_rest_nothing_is_held()
        assert self.head.status == "serving", self.head.detail
        assert self.head.layout is not None
        assert self.num_finished == self.num_submitted, "every request ends"
        for name, worker in self.workers.items():
            assert worker.prepared is None, f"{name} was never told how transition {worker.prepared} ended"
            assert worker.epochs == ({self.head.epoch} if name in self.head.layout.workers else set())


TestReconfiguration = ReconfigurationMachine.TestCase
TestReconfiguration.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, report_multiple_bugs=False
)


def test_a_change_begun_anew_is_one_change() -> None:
    """The pool of a worker that joins is smaller than was thought: the report, and the deadline, are of both tries."""
    machine = ReconfigurationMachine()
    machine.begin()
    machine.join("w4", NUM_PAGES // 3)
    machine.start(layout_from_owners(0, ["w0", "w4", "w4", "w4", "w4"]), "live", queue=False, deadline_s=1e9)
    phases = []
    while machine.change_now() is not None:
        phases.append(machine.phase)
        machine.now_s += 0.25
        machine.settle()
    report = machine.head.reconfiguration.reports[1]
    assert "prepare" in phases[phases.index("abort") :], phases
    assert report.outcome == "committed"
    assert report.total_s == machine.now_s, "from the first try on"
    machine.reports_say_what_is()
