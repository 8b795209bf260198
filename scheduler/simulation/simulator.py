"""The head over simulated workers: the real `SchedulerState`, driven through a trace in simulated time. Pure.

The head is one process, so what comes to it waits for its turn (`Rates.head_s`, `head_token_s`). Requests carry token ids
that mean nothing and have just the trace's lengths, so nothing is found in the prefix cache; a request that the server would
refuse is refused. Time 0 is when the first layout serves and the trace begins.

Never true: a request of the trace is lost. Every one of them ends, is refused, or is among `Outcome.unfinished`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.layout import Layout
from runtime.messages import Sampling, StepResult, ToHead
from runtime.model.spec import ModelSpec
from scheduler.batching import BatchingConfig
from scheduler.course import Change
from scheduler.events import (
    ChangeLayout,
    Emit,
    Event,
    EvictWorker,
    FromWorker,
    Look,
    Looked,
    Report,
    Send,
    SendStep,
    Submit,
    Tick,
    Wake,
)
from scheduler.planning.autopilot import Mode, Settings
from scheduler.planning.cost import Facts
from scheduler.planning.look import answer
from scheduler.request import AdmissionError, Request, TokenOutput
from scheduler.simulation.batcher import CohortBatcher
from scheduler.simulation.policies import Policy
from scheduler.simulation.trace import Trace
from scheduler.simulation.worker import Flight, SimWorker
from scheduler.simulation.world import Rates, SimDevice, World
from scheduler.state import ClusterConfig, SchedulerState
from scheduler.transition import Refused
from scheduler.transition import Report as ChangeReport

TICK_S = 0.5
"""As the driver's."""
PILOTING = Settings()
_GREEDY = Sampling(temperature=0.0)


class SimulationError(ValueError):
    """The cluster cannot serve the model; the message says what is missing."""


@dataclass(slots=True)
class Record:
    """One request of the trace. Seconds of the trace's clock; -1 for what never happened."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_s: float = -1.0
    last_s: float = -1.0
    num_tokens: int = 0
    outcome: str = "unfinished"
    """"length" when it was served, "rejected" when it was not taken, "error"."""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Of its tokens after the first; 0 for a request of one token."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


@dataclass(slots=True)
class Outcome:
    """What came of it. ``layouts`` are (from when, layout, workers in use), the last one until `end_s`."""

    records: list[Record]
    changes: list[ChangeReport] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    layouts: list[tuple[float, Layout, tuple[str, ...]]] = field(default_factory=list)
    end_s: float = 0.0
    steps: int = 0
    events: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    busy_s: dict[str, float] = field(default_factory=dict)

    @property
    def unfinished(self) -> list[Record]:
        return [record for record in self.records if record.outcome == "unfinished"]


class Simulation:
    """One run. `layout` is the first layout: layers per stage over the first workers of `devices`.

    With `concurrency` the trace's arrival times are not looked at: so many clients send its requests one after the other,
    each when its last one has ended. With `autopilot` the head itself watches, learns and decides, as a real one does. Outputs end
    at their limits, which a trace's clients did not know: `limits` says whether the autopilot may see them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        devices: Sequence[SimDevice],
        layout: Sequence[int],
        policy: Policy,
        *,
        batching: BatchingConfig,
        rates: Rates,
        seed: int = 0,
        kv_bytes: int = 0,
        memory_fraction: float = 0.5,
        concurrency: int = 0,
        autopilot: Mode = "off",
        piloting: Settings = PILOTING,
        limits: bool = False,
    ) -> None:
        self.devices, self.policy = list(devices), policy
        self.world = World(rates)
        cluster = ClusterConfig(
            spec, len(layout), tuple(layout), kv_bytes, memory_fraction,
            heartbeat_timeout_s=math.inf, autopilot=autopilot, piloting=piloting,
        )  # fmt: skip
        self.head = SchedulerState(cluster, batching)
        self.batcher = CohortBatcher(batching, self.head.pool, self.head.directory)
        self.head.batcher = self.batcher
        self.head.pilot.learns, self.head.pilot.sees_limits = autopilot != "off", limits
        facts, rng = Facts(spec), np.random.default_rng(seed)
        factors = iter(()) if not rates.noise else _lognormal(rng, rates.noise)
        draw = (lambda: next(factors)) if rates.noise else None
        self.workers = {d.worker: SimWorker(d, facts, self.world, self, draw) for d in devices}
        self._concurrency = concurrency
        self._head_free_s = 0.0
        self._alarm_s = math.inf
        self._began_s = 0.0
        self._pending: list[Record] = []
        self._next = 0
        self._live: dict[int, Record] = {}
        self._change_id = 0
        self._asked: Layout | None = None
        self._seen: tuple[Layout | None, Layout | None] = (None, None)
        self._failure = ""
        self._serves = False
        self.outcome = Outcome([])

    @property
    def now_s(self) -> float:
        """On the trace's clock."""
        return self.world.now_s - self._began_s

    def run(self, trace: Trace, *, max_s: float = math.inf) -> Outcome:
        """Serve the trace to its end, or until `max_s` on its clock.

        Raises:
            SimulationError: the first layout does not come up.
        """
        self._start()
        records = [
            Record(i, float(at), int(prompt), int(output))
            for i, (at, prompt, output) in enumerate(
                zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True)
            )
        ]
        self.outcome.records = self._pending = records
        for _ in range(min(self._concurrency, len(records))):
            self._submit_next()
        if not self._concurrency and records:
            self.world.at(self._began_s + records[0].arrival_s, self._submit_next)
        if math.isfinite(max_s):
            self.world.at(self._began_s + max_s, self.world.stop)
        self._tick()
        self.world.run()
        return self._finish()

    @property
    def is_over(self) -> bool:
        return self._next >= len(self._pending) and not self._live and not self.head.reconfiguration.is_active

    # -- the network (`worker.Network`) -----------------------------------------------------------------------

    def to_head(self, sent_s: float, message: ToHead) -> None:
        self.world.at(sent_s + self.world.rates.flight_s, self._at_head, message)

    def peer(self, name: str) -> SimWorker:
        return self.workers[name]

    def _at_head(self, message: ToHead) -> None:
        """It has come, and waits for its turn."""
        rates, now_s = self.world.rates, self.world.now_s
        if not isinstance(message, StepResult):
            self._handle(FromWorker(message, now_s))
            return
        begun_s = max(now_s, self._head_free_s)
        self._head_free_s = begun_s + rates.head_s + rates.head_token_s * len(message.tokens)
        self.world.at(begun_s + rates.head_s, self._handle_message, message)

    def _handle_message(self, message: ToHead) -> None:
        self._handle(FromWorker(message, self.world.now_s))

    def _handle(self, event: Event) -> None:
        world, head = self.world, self.head
        self.batcher.lists_rows = head.pilot.is_noting(world.now_s)
        for effect in head.step(event):
            match effect:
                case Emit():
                    self._emit(effect.sequence, effect.output)
                case SendStep():
                    work = self.batcher.take_work(effect.plan)
                    worker = self.workers[effect.worker]
                    flight = Flight(effect.plan, work, [] if head.pilot.awaits(effect.plan) else None, {})
                    world.at(world.now_s + world.rates.flight_s, worker.step, flight, 0)
                case Send():
                    worker = self.workers[effect.worker]
                    world.at(world.now_s + world.rates.flight_s, worker.receive, effect.message)
                case Look():
                    answered = Looked(effect.question, answer(effect.question), world.now_s)
                    world.at(world.now_s, self._handle, answered)
                case EvictWorker() | Report():
                    if isinstance(effect, Report) and effect.level == "error":
                        self._failure = effect.text
        if (wake_s := head.batcher.wake_s) < self._alarm_s:
            self._alarm_s = wake_s
            world.at(wake_s, self._wake)
        if not self._serves and head.status in ("serving", "failed"):
            self._serves = True
            self.world.stop()
        if head.layout is not self._seen[0] or head.reconfiguration.target is not self._seen[1]:
            self._watch_layout()

    def _wake(self) -> None:
        self._alarm_s = math.inf
        self._handle(Wake(self.world.now_s))

    # -- the trace --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for worker in self.workers.values():
            self._handle(FromWorker(worker.join(), self.world.now_s))
        self.world.run()
        if self.head.status != "serving":
            raise SimulationError(f"the first layout does not come up: {self._failure or self.head.status}")
        self._began_s = self.world.now_s
        self.outcome.layouts = [(0.0, *entry[1:]) for entry in self.outcome.layouts]

    def _submit_next(self) -> None:
        """The next request arrives; in an open loop the one after it is due at its own time."""
        if self._next >= len(self._pending):
            return
        record = self._pending[self._next]
        self._next += 1
        if self._concurrency:
            record.arrival_s = self.now_s
        elif self._next < len(self._pending):
            self.world.at(self._began_s + self._pending[self._next].arrival_s, self._submit_next)
        prompt = [0] * record.prompt_tokens
        request = Request(str(record.index), prompt, _GREEDY, record.output_tokens, use_prefix_cache=False)
        self._live[record.index] = record
        try:
            self._handle(Submit(record.index, request, self.world.now_s))
        except AdmissionError:
            self._ended(record, "rejected")

    def _catch_up(self) -> None:
        """The head's autopilot, and the records, hear of tokens that have come and were held back."""
        for at_s, outputs in self.batcher.catch_up():
            self.head.pilot.outputs(outputs, at_s)
            for sequence, output in outputs:
                self._emit(sequence, output)
                self._live[sequence].last_s = at_s - self._began_s

    def _emit(self, sequence: int, output: TokenOutput) -> None:
        record, now_s = self._live[sequence], self.now_s
        if output.tokens:
            if not record.num_tokens:
                record.first_s = now_s
            record.last_s = now_s
            record.num_tokens += len(output.tokens)
        if output.finish_reason is not None:
            self._ended(record, output.finish_reason)

    def _ended(self, record: Record, outcome: str) -> None:
        record.outcome = outcome
        del self._live[record.index]
        if self.is_over:
            self.world.stop()
        if self._concurrency:
            self.world.at(self.world.now_s, self._submit_next)

    # -- layouts ----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Time passes for the head, its autopilot included, and the policy is asked."""
        head = self.head
        if head.pilot.autopilot.is_due(self.world.now_s):
            self._catch_up()
        self._handle(Tick(self.world.now_s))
        if head.status == "serving" and head.layout is not None:
            is_free = not head.reconfiguration.is_active
            layout = self.policy.decide(self.now_s, head.layout, is_free=is_free)
            if layout is not None:
                self._change(layout)
        if self.is_over:
            self.world.stop()
        else:
            self.world.at(self.world.now_s + TICK_S, self._tick)

    def _change(self, layout: Layout) -> None:
        self._asked = layout
        self._change_id = self.head.next_change
        change = Change(self._change_id, layout, "live", 600.0, self.head.cluster.piloting.snapshot_bytes_per_s)
        try:
            self._handle(ChangeLayout(change, False, self.world.now_s))
        except Refused as error:
            self.outcome.refused.append(f"at {self.now_s:.0f} s, {layout.brief()}: {error}")
            self._asked = None
            self.policy.failed(self.now_s, layout, str(error))

    def _watch_layout(self) -> None:
        """Note which layout serves and who holds any of it; tell the policy what became of its change."""
        head, outcome = self.head, self.outcome
        layout, target = head.layout, head.reconfiguration.target
        if layout is None or head.status != "serving":
            return
        self._seen = layout, target
        used = tuple(dict.fromkeys((*layout.workers, *(target.workers if target is not None else ()))))
        if not outcome.layouts or outcome.layouts[-1][1:] != (layout, used):
            outcome.layouts.append((self.now_s, layout, used))
        if self._asked is None or target is not None:
            return
        asked, self._asked = self._asked, None
        report = head.reconfiguration.reports[self._change_id]
        if report.outcome == "committed":
            self.policy.committed(self.now_s, layout)
        else:
            self.policy.failed(self.now_s, asked, report.why)

    def _finish(self) -> Outcome:
        head, outcome = self.head, self.outcome
        self._catch_up()
        head.check_integrity()
        for worker in self.workers.values():
            worker.end_passage()
        outcome.end_s = self.now_s
        outcome.changes = list(head.reconfiguration.reports.values())
        outcome.steps, outcome.events = head.batcher.counters.steps, self.world.num_events
        outcome.preemptions = head.batcher.counters.preemptions
        outcome.recomputed_tokens = head.batcher.counters.recomputed_tokens
        outcome.busy_s = {name: worker.busy_s for name, worker in self.workers.items()}
        return outcome


def _lognormal(rng: np.random.Generator, std: float):
    """Factors with mean 1, drawn a thousand at a time."""
    while True:
        yield from np.exp(rng.normal(-(std**2) / 2, std, 1000)).tolist()
