"""Between the head and its autopilot: what happens to requests and steps becomes a load, speeds and now and then a change. Pure.

The head calls the short methods (`submitted`, `sent`, `result`, `outputs`, `cancelled`) as things happen, and `tick` a few
times a second. Those in the way of every step do next to nothing: a step in ten at most is remembered with its work, and
what its timings teach is learned at the tick. Nothing is learned while a change is under way, since workers load and copy
then.

Never true: the head waits for this, or a change is begun here; `tick` returns what the head may ask for.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from kvstore.block_pool import BlockPool
from kvstore.ids import SequenceId, WorkerName
from runtime.layout import Layout
from runtime.messages import MIN_FREE_BYTES, HopTiming, Join, ProfilePoint, StepPlan, StepResult
from runtime.model.spec import ModelSpec
from scheduler.batching import Batcher, Output
from scheduler.lanes import BatchingConfig, BatchLoad, StepPrices
from scheduler.membership import Membership
from scheduler.planning.autopilot import Autopilot, Decision, Mode, Settings
from scheduler.planning.cost import Facts, Work, work_of_rows
from scheduler.planning.fleet import Fleet
from scheduler.planning.forecast import Device
from scheduler.planning.look import Answer, Question
from scheduler.planning.monitor import Running
from scheduler.planning.planner import plan
from scheduler.planning.plans import NoPlan, Plan
from scheduler.planning.traffic import Serving, Traffic
from scheduler.prices import step_prices
from scheduler.reconfiguration import Reconfiguration
from scheduler.request import PilotStats

SNAPSHOT_BYTES_PER_S = Settings().snapshot_bytes_per_s
"""The rate of a change's snapshot while its source serves, unless the change asks for another."""
NOTE_INTERVAL_S, SETTLED_INTERVAL_S = 0.2, 0.5
"""Steps that are learned from are at least so far apart: to learn from one takes as long as to schedule a dozen."""
NUM_UNTIL_SETTLED = 50
"""Steps of a layout that are learned from at the shorter interval."""
MAX_TIMED = 16
PRICES_LAST_S, PRICES_TOLERANCE = 5.0, 0.1
"""How long prices hold at most, and how far the load may be, relatively, from the one that they were drawn for."""


class Head(Protocol):
    """What is read of the head."""

    members: Membership
    batcher: Batcher
    pool: BlockPool
    layout: Layout | None
    now_s: float
    reconfiguration: Reconfiguration


@dataclass(slots=True)
class _Request:
    arrived_s: float
    prompt_tokens: int
    max_tokens: int
    cached_tokens: int = 0
    tokens: int = 0
    first_s: float = 0.0


class Pilot:
    """The autopilot at work in a head."""

    def __init__(
        self, spec: ModelSpec, batching: BatchingConfig, settings: Settings, mode: Mode, kv_bytes: int, fraction: float
    ) -> None:
        self.facts = Facts(spec)
        self.fleet = Fleet(self.facts)
        serving = Serving(
            max_step_tokens=batching.max_step_tokens,
            max_running=batching.max_running,
            num_microbatches=batching.num_microbatches,
            block_size=batching.block_size,
        )
        self.autopilot = Autopilot(self.facts, settings, serving, mode)
        self._spec, self._block_size = spec, batching.block_size
        self._kv_bytes, self._fraction = kv_bytes, fraction
        self._requests: dict[SequenceId, _Request] = {}
        self._started: dict[SequenceId, _Request] = {}
        """Those of them that have a token."""
        self._noted: dict[tuple[int, int], Work] = {}
        self._noted_s = -1.0
        self._num_learned = 0
        self._timed: list[tuple[Work, Layout, list[HopTiming]]] = []
        self.learns = True
        """Whether steps and requests teach anything; where nobody asks what they taught (the simulator), it can be saved."""
        self.sees_limits = True
        """Whether the limits of outputs are looked at; not where they are no client's, but the lengths of a recorded trace."""
        self._priced: tuple[float, Layout, BatchLoad] | None = None
        self._known: Layout | None = None
        self._asked: tuple[int, Layout] | None = None

    # -- as things happen -------------------------------------------------------------------------------------

    def joined(self, info: Join) -> None:
        self.fleet.joined(info)

    def lost(self, worker: WorkerName) -> None:
        self.fleet.lost(worker)

    def loaded(self, worker: WorkerName, profile: Sequence[ProfilePoint]) -> None:
        if profile:
            self.fleet.profiled(worker, profile)

    def submitted(self, sequence: SequenceId, prompt_tokens: int, max_tokens: int, now_s: float) -> None:
        """`max_tokens` is the limit of its output."""
        limit = max_tokens if self.sees_limits else 0
        self._requests[sequence] = _Request(now_s, prompt_tokens, limit)
        self.autopilot.monitor.arrived(now_s, prompt_tokens, limit)

    def refused(self) -> None:
        """A request was not taken, for want of room in the queue."""
        self.autopilot.monitor.refused()

    def cancelled(self, sequence: SequenceId, *, is_end: bool, now_s: float) -> None:
        """`is_end`: the request has all it wanted; otherwise its client went away, and it counts for nothing."""
        request = self._requests.pop(sequence, None)
        self._started.pop(sequence, None)
        if request is not None and is_end and request.tokens:
            self._ended(request, now_s)

    def is_noting(self, now_s: float) -> bool:
        """Whether a step that is sent now will be learned from."""
        interval_s = NOTE_INTERVAL_S if self._num_learned < NUM_UNTIL_SETTLED else SETTLED_INTERVAL_S
        return self.learns and now_s - self._noted_s >= interval_s

    def sent(self, step: StepPlan, now_s: float) -> None:
        if not self.is_noting(now_s):
            return
        self._noted_s = now_s
        if len(self._noted) >= MAX_TIMED:
            self._noted.clear()  # steps that never came back
        rows = ((row.start, len(row.tokens), row.sample) for row in step.rows)
        self._noted[step.epoch, step.ordinal] = work_of_rows(rows)

    def awaits(self, step: StepPlan) -> bool:
        """Whether the timings of this step, which was sent, will be learned from."""
        return (step.epoch, step.ordinal) in self._noted

    def result(self, result: StepResult, layout: Layout, is_changing: bool) -> None:
        work = self._noted.pop((result.epoch, result.ordinal), None) if self._noted else None
        if work is not None and not is_changing and len(self._timed) < MAX_TIMED:
            self._timed.append((work, layout, result.timings))

    def outputs(self, outputs: Sequence[Output], now_s: float) -> None:
        for sequence, output in outputs:
            request = self._requests.get(sequence)
            if request is None:
                continue
            if not request.tokens:
                request.first_s, request.cached_tokens = now_s, output.num_cached_tokens
                if output.tokens:
                    self._started[sequence] = request
            request.tokens += len(output.tokens)
            if output.finish_reason is not None:
                del self._requests[sequence]
                self._started.pop(sequence, None)
                if output.finish_reason in ("stop", "length") and request.tokens:
                    self._ended(request, now_s)

    def _ended(self, request: _Request, now_s: float) -> None:
        self.autopilot.monitor.ended(
            now_s,
            request.arrived_s,
            request.prompt_tokens,
            request.tokens,
            request.cached_tokens,
            ttft_s=request.first_s - request.arrived_s,
            decode_s=now_s - request.first_s,
            max_tokens=request.max_tokens,
        )

    # -- a few times a second -----------------------------------------------------------------------------------

    def tick(self, head: Head, *, is_serving: bool) -> Question | None:
        """Learn, and perhaps ask: `heard` wants the answer."""
        autopilot, now_s, batcher = self.autopilot, head.now_s, head.batcher
        if self.learns:
            self._learn()
            autopilot.observe(
                now_s, self._running(batcher.num_running), batcher.num_waiting, batcher.counters.generated_tokens
            )
        if head.layout is None or not is_serving:
            return None
        self._follow(head)
        is_free = not head.reconfiguration.is_active
        if not autopilot.is_due(now_s):
            return None
        return autopilot.ask(
            now_s,
            self.devices(head),
            head.layout,
            kv_tokens=self._kv_tokens(head),
            error=self.fleet.error(),
            is_free=is_free,
        )

    def heard(self, head: Head, question: Question, found: Answer) -> Decision | None:
        """The change that the head should ask for now, if it could."""
        if head.reconfiguration.is_active:
            return self.autopilot.heard(head.now_s, question, found, None)
        return self.autopilot.heard(head.now_s, question, found, head.layout)

    def asked(self, change: int, layout: Layout) -> None:
        """What was decided has become a change of layout."""
        self._asked = change, layout

    def prices(self, head: Head) -> StepPrices | None:
        """What the next steps cost, as far as is known; None where those drawn last still hold: they are of this layout, and the load is about
        the same and they are not old, or nothing decodes, for which the first prompt to come needs some, but no new ones."""
        load, layout = head.batcher.load(), head.layout
        if layout is None:
            return None
        if self._priced is not None and self._priced[1] is layout:
            at_s, _, of_load = self._priced
            still_holds = head.now_s - at_s < PRICES_LAST_S and load.is_like(of_load, PRICES_TOLERANCE)
            if still_holds or not load.decode_rows:
                return None
        self._priced = head.now_s, layout, load
        speeds = {name: self.fleet.speed(name) for name in layout.workers}
        return step_prices(self.facts, layout, speeds, load)

    def devices(self, head: Head) -> list[Device]:
        """Every worker that may have layers or has some, and what it may use for weights and KV."""
        found = []
        serving = head.layout.workers if head.layout is not None else ()
        same_host = head.members.same_host()
        for name in head.members.in_order():
            worker = head.members.workers[name]
            if worker.drained and name not in serving:
                continue
            pages = worker.num_pages * self._block_size * self._spec.kv_bytes_per_token_layer()
            kv_bytes = pages or self._kv_bytes or self._share_of(name, head)
            usable = worker.info.memory_available // same_host[name] - MIN_FREE_BYTES
            memory = max(usable, kv_bytes + worker.weight_bytes)
            if worker.room_bytes:  # its pages are what weights leave of that
                memory, kv_bytes = worker.room_bytes, 0
            found.append(Device(name, self.fleet.speed(name), memory, kv_bytes))
        return found

    def _share_of(self, name: WorkerName, head: Head) -> int:
        """Bytes of KV that a worker which was not given any would get."""
        members = head.members
        weights = {n: w.weight_bytes for n, w in members.workers.items() if not w.drained}
        return members.memory_for_pages(name, weights, self._fraction)

    def _running(self, num_running: int) -> list[Running]:
        """The requests in service: those with a token, and the first that have none yet."""
        running = [Running(r.arrived_s, r.tokens, r.max_tokens) for r in self._started.values()]
        reading = (Running(r.arrived_s, 0, r.max_tokens) for r in self._requests.values() if not r.tokens)
        return running + list(itertools.islice(reading, max(0, num_running - len(running))))

    def _learn(self) -> None:
        timed, self._timed = self._timed, []
        self._num_learned += len(timed)
        for work, layout, timings in timed:
            last = layout.num_hops - 1
            for hop, (segment, timing) in enumerate(zip(layout.segments, timings, strict=True)):
                self.fleet.ran(
                    timing.worker,
                    work,
                    segment.layers,
                    is_last=hop == last,
                    compute_s=timing.compute_us / 1e6,
                    sample_s=timing.sample_us / 1e6,
                )

    def _follow(self, head: Head) -> None:
        """Notice layouts that have come and decisions that came to nothing."""
        assert head.layout is not None
        report = None
        if self._asked is not None:
            report = head.reconfiguration.reports.get(self._asked[0])
            if report is None or report.outcome in ("aborted", "refused"):
                self.autopilot.failed(head.now_s, self._asked[1], report.why if report else "it was dropped")
                self._asked = None
        is_ours = report is not None and report.outcome == "committed"
        if self._known is None:
            self._known, self._num_learned = head.layout, 0
        elif head.reconfiguration.is_active:
            return  # where it leads is seen when it has ended
        elif self._known.segments != head.layout.segments or is_ours:
            took_s = report.total_s if report is not None and is_ours else 0.0
            self.autopilot.committed(head.now_s, head.layout, took_s)
            self._known, self._num_learned = head.layout, 0
        if is_ours:
            self._asked = None

    def _kv_tokens(self, head: Head) -> float:
        """Tokens whose KV a change would copy."""
        return float((head.pool.num_used + head.pool.num_cached) * self._block_size)

    # -- to be looked at ----------------------------------------------------------------------------------------

    def question(self, head: Head) -> Question | None:
        """What `view` wants to have answered; None without a load."""
        if head.layout is None:
            return None
        devices, error = self.devices(head), self.fleet.error()
        return self.autopilot.question(head.now_s, devices, head.layout, kv_tokens=self._kv_tokens(head), error=error)

    def view(self, head: Head, question: Question | None, answered: Answer | None) -> dict[str, Any]:
        """The body of ``GET /admin/plan``, when its question has been answered; without a load, a plan for the usual one."""
        autopilot = self.autopilot
        found, is_assumed = None, False
        if question is not None and answered is not None:
            found = autopilot.noted(head.now_s, question, answered)
        if found is None and head.layout is not None:
            found, is_assumed = self._usual(self.devices(head), head.layout), True
        settings, load = autopilot.settings, autopilot.load
        return {
            "mode": autopilot.mode,
            "objective": settings.objective,
            "slo": msgspec.to_builtins(settings.slo),
            "elastic": settings.elastic,
            "load": None if load is None else _plain(load),
            "load_is_assumed": is_assumed,
            "plan": None if found is None else _plan_view(found, head.layout),
            "cost": None if is_assumed or autopilot.cost is None else _plain(autopilot.cost),
            "worth": 0.0 if found is None or is_assumed else autopilot.worth(found),
            "trust": autopilot.trust,
            "threshold": autopilot.threshold(head.now_s),
            "regret_s": autopilot.regret_s,
            "errors": {
                "stages": [_plain(error) for error in self.fleet.errors()],
                "service": None if autopilot.error is None else _plain(autopilot.error),
            },
            "coefficients": {name: self.fleet.coefficients(name) for name in head.members.in_order()},
            "workers": None if autopilot.workers is None else _plain(autopilot.workers),
            "log": [
                {"age_s": round(head.now_s - entry.at_s, 1), "kind": entry.kind, "text": entry.text, **entry.numbers}
                for entry in autopilot.log
            ],
        }

    def stats(self) -> PilotStats:
        autopilot, found, error = self.autopilot, self.autopilot.plan, self.autopilot.error
        stages = []
        for name, forecast in (("present", found.present), ("proposed", found.forecast)) if found else ():
            for hop, stage in enumerate(forecast.stages if forecast else ()):
                stages.append((name, hop, stage.worker, stage.seconds))
        service = {}
        if error is not None:
            service = {
                "ttft": (error.ttft_predicted_s, error.ttft_measured_s),
                "tpot": (error.tpot_predicted_s, error.tpot_measured_s),
                "per_token": (error.per_token_predicted_s, error.per_token_measured_s),
            }
        workers = autopilot.workers
        return PilotStats(
            mode=autopilot.mode,
            gain=found.gain if found else 0.0,
            trust=autopilot.trust,
            regret_s=autopilot.regret_s,
            entries=dict(autopilot.num_entries),
            stage_errors=[(e.worker, e.num_steps, e.mape, e.bias) for e in self.fleet.errors()],
            stages=stages,
            service=service,
            workers={} if workers is None else workers.counts(),
        )

    def _usual(self, devices: Sequence[Device], present: Layout) -> Plan | None:
        traffic = Traffic(concurrency=16.0 * present.num_hops)
        settings = self.autopilot.settings
        try:
            return plan(
                self.facts, devices, traffic, serving=self.autopilot.serving, objective=settings.objective,
                slo=settings.slo, present=present, headroom=settings.headroom, error=self.fleet.error(),
            )  # fmt: skip
        except NoPlan:
            return None


def _plan_view(found: Plan, present: Layout | None) -> dict[str, Any]:
    return {
        "is_change": found.is_change,
        "gain": found.gain,
        "traffic": _plain(found.traffic),
        "present": None if present is None else {"layout": present.brief(), **_plain(found.present)},
        "proposed": {"layout": found.layout.brief(), "layers": found.layout.counts(), **_plain(found.forecast)},
        "present_score": found.present_score,
        "proposed_score": found.score,
        "candidates": [_plain(candidate) for candidate in found.candidates],
        "unused": found.unused,
        "text": found.explain(),
    }


def _plain(value: Any) -> dict[str, Any]:
    return msgspec.to_builtins(value)
