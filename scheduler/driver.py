"""The thin asyncio shell around `scheduler.state`: it brings events in and carries effects out.

Everything here runs on the head's event loop. The RPC door calls `receive` in its own threads, which only hands the
bytes over to the loop. Nothing is decided here.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, assert_never, cast

import msgspec
import torch

from kvstore.ids import SequenceId
from runtime.messages import (
    Audit,
    Audited,
    Join,
    Shutdown,
    Step,
    Trace,
    Traced,
    Welcome,
    decode_to_head,
    encode,
)
from runtime.rpc import Door, DoorError
from runtime.trace import Tracer
from scheduler import compiling
from scheduler.course import Change
from scheduler.events import (
    AbortChange,
    Cancel,
    ChangeLayout,
    Drain,
    Effect,
    Emit,
    Event,
    EvictWorker,
    FromWorker,
    Look,
    Looked,
    NotComing,
    PeerDown,
    Report,
    Resume,
    Send,
    SendStep,
    SetAutopilot,
    Submit,
    Tick,
    Wake,
)
from scheduler.pilot import SNAPSHOT_BYTES_PER_S
from scheduler.planning.autopilot import Mode
from scheduler.planning.look import Answer, Question, answer
from scheduler.planning.sizing import Workers
from scheduler.request import (
    AdmissionError,
    EngineStats,
    Health,
    Limits,
    PilotStats,
    ProcessTrace,
    Request,
    Sink,
    TokenOutput,
    TraceRun,
)
from scheduler.state import SchedulerState
from scheduler.transition import STRATEGIES, Refused
from scheduler.wishes import Drained, LayoutError, Wish, parse_wish

log = logging.getLogger("midflight.head")

HEARTBEAT_INTERVAL_S = 2.0
TICK_INTERVAL_S = 0.5
_WATCHED = ("id", "phase", "hop", "loading", "weights", "snapshot_blocks_arrived", "sequences_flipped")
MIN_BYTES_PER_S = 1_000_000
"""The slowest that an operator may have a snapshot copied: at less, what a few long requests hold outlives any deadline."""
MAX_BYTES_PER_S = 10**15
_RATE = (
    f"a whole number of bytes per second from {MIN_BYTES_PER_S:,} to {MAX_BYTES_PER_S:,}; leave it out for "
    f"{SNAPSHOT_BYTES_PER_S:,}"
)
AUDIT_TIMEOUT_S = 30.0
PLANNER_TIMEOUT_S = 15.0
"""How long who asks for a plan waits for a planner that is being compiled."""
TRACE_TIMEOUT_S = 10.0
_TRACED_AS = {SendStep: "send step", Send: "send", Emit: "emit", EvictWorker: "evict", Report: "report", Look: "look"}


class Driver:
    """The engine that the API calls (`scheduler.request.Engine`)."""

    def __init__(self, state: SchedulerState, loop: asyncio.AbstractEventLoop) -> None:
        self._state = state
        self._loop = loop
        self._sinks: dict[SequenceId, Sink] = {}
        self._next_sequence = 1
        self._door: Door | None = None
        self._closed = False
        self._has_alarm = False
        self._ticker: asyncio.Task[None] | None = None
        self._finish_rate = 0.0
        self._num_finished_before = 0
        self._changed = asyncio.Event()
        self._listeners: set[Callable[[dict[str, Any]], None]] = set()
        self._seen: tuple[Any, ...] = ()
        self._unended: list[int] = []
        self._tracer = Tracer()
        self._workers: Workers | None = None
        self._prepared: asyncio.Future[None] | None = None
        self._answering: asyncio.Task[Answer] | None = None

    # -- life ---------------------------------------------------------------------------------------------

    def start(self, door: Door) -> None:
        self._door = door
        self._ticker = self._loop.create_task(self._tick_forever())

    async def close(self, reason: str) -> None:
        """Tell every worker to end, then leave the group. Unfinished requests end with an error."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        self._changed.set()
        farewell = TokenOutput([], finish_reason="error", error=reason)
        for sequence in list(self._sinks):
            self._state.step(Cancel(sequence, "abort"))
            self._emit(sequence, farewell)
        if self._door is None:
            return
        payload = encode(Shutdown(reason))
        for name in self._state.members.workers:
            self._door.send(name, payload)
        await asyncio.sleep(0.2)  # let the farewells leave: the door closes without waiting for anybody
        await self._loop.run_in_executor(None, self._door.close)

    def receive(self, payload: bytes, tensors: Sequence[torch.Tensor]) -> bytes | None:
        """A message from a worker, in an RPC thread. Only `Join` is a call and has a reply."""
        begun_s = time.perf_counter()
        message = decode_to_head(payload)
        if self._tracer.is_on:
            name = f"receive {type(message).__name__.lower()}"
            self._tracer.span("rpc", name, begun_s, time.perf_counter(), amounts={"bytes": len(payload)})
        self._loop.call_soon_threadsafe(self._received, message)
        if isinstance(message, Join):
            return encode(Welcome(HEARTBEAT_INTERVAL_S))
        return None

    def peer_lost(self, name: str) -> None:
        """A worker's connection ended; called in an RPC thread."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self.worker_exited, name, "its connection ended")

    def nobody_comes(self) -> None:
        """A local worker has ended for good: whoever is there may serve at once."""
        self._handle(NotComing(self._loop.time()))

    def worker_exited(self, name: str, reason: str) -> None:
        """A worker is known to have ended."""
        self._handle(PeerDown(name, reason, self._loop.time()))

    # -- the engine's interface ---------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> SequenceId:
        sequence = self._next_sequence
        self._sinks[sequence] = sink
        try:
            self._handle(Submit(sequence, request, self._loop.time()))
        except AdmissionError as error:
            del self._sinks[sequence]
            if error.status == 429:
                error.retry_after_s = self._retry_after_s()
            raise
        self._next_sequence += 1
        return sequence

    def abort(self, sequence: SequenceId) -> None:
        self._cancel(sequence, "abort")

    def finish(self, sequence: SequenceId) -> None:
        self._cancel(sequence, "stop")

    def limits(self) -> Limits:
        state = self._state
        if not state.served_once:
            raise AdmissionError(f"the server is {state.status.replace('_', ' ')}", status=503, code="not_ready")
        return Limits(
            max_context=state.batcher.max_context,
            model_max_context=state.cluster.spec.max_context,
            kv_tokens=state.num_blocks * state.batching.block_size,
            vocab_size=state.cluster.spec.vocab_size,
            max_queue=state.batching.max_queue,
            max_running=state.batching.max_running,
        )

    @property
    def served_once(self) -> bool:
        """Whether requests have been taken: from then on they wait for workers, not the other way round."""
        return self._state.served_once

    def health(self) -> Health:
        state = self._state
        workers = state.members.workers.values()
        names = state.layout.workers if state.layout else ()
        loading = [w for w in workers if w.info.name in names]
        return Health(
            status="draining" if state.draining and state.status == "serving" else state.status,
            detail=state.detail or "; ".join(f"{w.info.name}: {w.phase}" for w in loading if w.status == "loading"),
            workers_joined=len(workers),
            workers_wanted=state.num_wanted,
            units_loaded=sum(w.units_loaded for w in loading),
            units_total=sum(w.units_total for w in loading) or state.cluster.spec.num_layers + 2,
        )

    def stats(self) -> EngineStats:
        state, counters, pool = self._state, self._state.batcher.counters, self._state.pool
        return EngineStats(
            waiting=state.batcher.num_waiting,
            running=state.batcher.num_running,
            kv_blocks_total=state.num_blocks,
            kv_blocks_used=pool.num_used,
            kv_blocks_cached=pool.num_cached,
            prefix_queries_tokens=counters.prefix_queries_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            steps=counters.steps,
            steps_ahead=counters.steps_ahead,
            discarded_tokens=counters.discarded_tokens,
            preemptions=counters.preemptions,
            finished=dict(counters.finished),
            rejected=counters.rejected,
            stale_results=counters.stale_results,
            workers_lost=state.members.num_lost,
            stages=state.stage_stats(),
        )

    def layout_view(self) -> dict[str, Any]:
        state = self._state
        stages = []
        for segment in state.layout.segments if state.layout else ():
            worker = state.members.workers.get(segment.worker)
            stages.append(
                {
                    "worker": segment.worker,
                    "layers": [segment.layers.start, segment.layers.stop],
                    "device": worker.info.device if worker else None,
                    "device_name": worker.info.device_name if worker else None,
                    "pace": worker.info.pace if worker else None,
                    "roofline": worker.info.roofline if worker else None,
                    "weight_bytes": worker.weight_bytes if worker else None,
                    "kv_pages": worker.num_pages if worker else None,
                    "implementation": worker.implementation if worker else None,
                }
            )
        return {
            "epoch": state.epoch,
            "model": state.cluster.spec.name,
            "num_layers": state.cluster.spec.num_layers,
            "status": state.status,
            "stages": stages,
            "transition": state.reconfiguration.view(),
        }

    def workers_view(self) -> list[dict[str, Any]]:
        state, now = self._state, self._loop.time()
        layout = state.layout
        return [
            {
                "name": name,
                "status": worker.status,
                "layers": list(layout.layers_of(name)) if layout else [],
                "drained": worker.drained,
                "host": worker.info.host,
                "pid": worker.info.pid,
                "device": worker.info.device,
                "device_name": worker.info.device_name,
                "pace": worker.info.pace,
                "roofline": worker.info.roofline,
                "memory_total": worker.info.memory_total,
                "memory_available": worker.info.memory_available,
                "num_threads": worker.info.num_threads,
                "versions": worker.info.versions,
                "rss": worker.rss,
                "pages_used": worker.pages_used,
                "num_sequences": worker.num_sequences,
                "last_seen_s": round(now - worker.last_seen_s, 3),
                "units_loaded": worker.units_loaded,
                "units_total": worker.units_total,
            }
            for name, worker in sorted(state.members.workers.items())
        ]

    def begin_drain(self) -> None:
        self._handle(Drain())

    def num_unfinished(self) -> int:
        return self._state.batcher.num_unfinished

    async def audit(self) -> dict[str, Any]:
        """Every structure's own integrity check, here and on every worker: problems in words, and what is in use."""
        problems: list[str] = []
        try:
            self._state.check_integrity()
        except AssertionError as error:
            problems.append(f"head: {error}")
        live = self._state.batcher.live_sequences()
        names = list(self._state.layout.workers) if self._state.layout else []
        workers = await asyncio.gather(*(self._audit_worker(name, live) for name in names), return_exceptions=True)
        for name, found in zip(names, workers, strict=True):
            if isinstance(found, BaseException):
                problems.append(f"{name}: {found}")
            else:
                problems += [f"{name}: {problem}" for problem in found.problems]
        return {
            "problems": problems,
            "sinks": len(self._sinks),
            "sequences": len(live),
            "tasks": len(asyncio.all_tasks(self._loop)),
            "workers": [
                {"worker": w.worker, "num_sequences": w.num_sequences, "pages_used": w.pages_used, "rss": w.rss}
                for w in workers
                if isinstance(w, Audited)
            ],
        }

    async def trace(self, seconds: float) -> TraceRun:
        """Have every process record what its threads do for so long.

        Raises:
            Refused: somebody else's trace is being recorded.
        """
        if self._tracer.is_on:
            raise Refused("a trace is being recorded already; try again when it has ended")
        self._tracer.start()
        layout, members = self._state.layout, self._state.members.workers
        names = [name for name in dict.fromkeys((*(layout.workers if layout else ()), *members)) if name in members]
        counters = self._state.batcher.counters
        try:
            started = await asyncio.gather(*(self._trace_worker(name, True) for name in names))
            begun_s, cpu_s, tokens = time.perf_counter(), time.process_time(), counters.generated_tokens
            await asyncio.sleep(seconds)
            ended_s, cpu_s = time.perf_counter(), time.process_time() - cpu_s
        finally:  # also when nobody wants it any more
            spans, num_lost = self._tracer.stop()
            stopping = [asyncio.ensure_future(self._trace_worker(name, False)) for name in names]
        stopped = await asyncio.gather(*stopping)
        processes = [ProcessTrace("head", 0.0, 0.0, spans, num_lost)]
        for first, last in zip(started, stopped, strict=True):
            if first is not None and last is not None:
                (_, offset_s, error_s), (traced, *_) = min(first, last, key=lambda answer: answer[2]), last
                is_same = abs(offset_s) <= error_s
                processes.append(
                    ProcessTrace(traced.worker, 0.0 if is_same else offset_s, error_s, traced.spans, traced.num_lost)
                )
        return TraceRun(begun_s, ended_s, processes, cpu_s, counters.generated_tokens - tokens)

    # -- planning -----------------------------------------------------------------------------------------

    async def plan_view(self) -> dict[str, Any]:
        """What the planner says of the present load; see `scheduler.pilot.Pilot.view`. Raises TimeoutError while it is being compiled."""
        await asyncio.wait_for(asyncio.shield(self.prepare_planner()), PLANNER_TIMEOUT_S)
        state = self._state
        state.now_s = self._loop.time()
        question, answered = state.pilot.question(state), None
        if question is not None:
            answered = await self._loop.run_in_executor(None, answer, question)
            state.now_s = self._loop.time()
            if state.layout is None or state.layout.segments != question.present.segments:
                question = answered = None  # it was for a layout that is gone
        return state.pilot.view(state, question, answered)

    def prepare_planner(self) -> "asyncio.Future[None]":
        """Have the planner's loops, before it is asked; done when they are there. Asking again costs nothing."""
        if self._prepared is None:
            self._prepared = compiling.prepare_beside(self._loop)
        return self._prepared

    async def _answer(self, question: Question) -> Answer:
        await asyncio.shield(self.prepare_planner())
        return await self._loop.run_in_executor(None, answer, question)

    def _answered(self, question: Question, answering: "asyncio.Future[Answer]") -> None:
        """Hand the answer on; a planner that fails must not keep the autopilot from asking again."""
        if self._closed or answering.cancelled():
            return
        if (error := answering.exception()) is not None:
            log.error("the planner failed", exc_info=error)
        answered = Answer(None, f"the planner failed: {error}") if error is not None else answering.result()
        self._handle(Looked(question, answered, self._loop.time()))

    def pilot_stats(self) -> PilotStats:
        return self._state.pilot.stats()

    def set_autopilot(self, mode: Mode) -> None:
        self._handle(SetAutopilot(mode, self._loop.time()))

    # -- changing the layout ------------------------------------------------------------------------------

    def change_layout(self, wish: dict[str, Any]) -> int:
        """Begin (or queue) a change of layout; its id. `wish` is the body of ``POST /admin/layout``.

        Raises:
            LayoutError: it is not a layout of this model over these workers, or an option is wrong.
            Refused: it cannot be made now; nothing has changed.
        """
        state = self._state
        if state.layout is None:
            raise Refused(f"the server is {state.status.replace('_', ' ')}; a layout changes while it serves")
        parsed = parse_wish(wish, state.cluster.spec.num_layers, state.members.in_order())
        return self._change(parsed, wish)

    def drain_worker(self, name: str, wish: dict[str, Any]) -> int:
        """Move everything off a worker, balanced over the other ones of the layout; the id of the change.

        Raises:
            LayoutError, Refused: as `change_layout`.
        """
        state = self._state
        if state.layout is None:
            raise Refused(f"the server is {state.status.replace('_', ' ')}; a worker is drained while it serves")
        self._check_worker(name)
        if len(state.members.workers) == 1:
            raise Refused(f"{name} is the only worker; start another one first")
        return self._change(Drained(name), wish)

    def resume_worker(self, name: str) -> None:
        """Let a drained worker have layers again; nothing happens to one that is not.

        Raises:
            LayoutError: there is no such worker.
        """
        self._check_worker(name)
        self._handle(Resume(name, self._loop.time()))

    def _check_worker(self, name: str) -> None:
        members = self._state.members
        if name not in members.workers:
            raise LayoutError(f"there is no worker {name!r}; there are {members.listed()}", "worker")

    def abort_change(self, change: int) -> bool:
        """Abort a change that is queued, or whose last hop has not begun to flip, or leave one that is being aborted to it.

        False when it is too late or unknown.
        """
        report = self._state.reconfiguration.reports.get(change)
        if report is None or report.outcome not in ("running", "queued"):
            return False
        before = self._state.reconfiguration.num_aborts_asked
        is_aborting = self._state.reconfiguration.is_aborting(change)
        self._handle(AbortChange(change, self._loop.time()))
        return is_aborting or self._state.reconfiguration.num_aborts_asked > before

    def change_view(self, change: int) -> dict[str, Any] | None:
        """The report of a change so far; None when it is not known (any more)."""
        report = self._state.reconfiguration.reports.get(change)
        if report is None:
            return None
        view = msgspec.to_builtins(report)
        now = self._state.reconfiguration.view()
        view["progress"] = now if now is not None and now["id"] == change else None
        return view

    def changes_view(self) -> list[dict[str, Any]]:
        """The reports of the last changes, oldest first."""
        return [msgspec.to_builtins(report) for report in self._state.reconfiguration.reports.values()]

    async def wait_change(self, change: int) -> dict[str, Any]:
        """The report, once the change has ended; or as it is when the server ends before."""
        while (view := self.change_view(change)) is not None and view["outcome"] in ("running", "queued"):
            if self._closed:
                break
            self._changed.clear()
            await self._changed.wait()
        assert view is not None, f"the report of change {change} was dropped before anybody read it"
        return view

    def _change(self, wanted: Wish, wish: dict[str, Any]) -> int:
        is_bound = wish.get("bytes_per_s") is not None
        change = Change(
            self._state.next_change,
            self._state.preview(wanted),
            _option(wish, "strategy", "live", lambda v: v in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
            _option(wish, "deadline_s", 600.0, lambda v: _is_number(v) and v > 0, "a positive number of seconds"),
            _option(wish, "bytes_per_s", SNAPSHOT_BYTES_PER_S, _is_rate, _RATE),
            wanted,
            is_bound,
        )
        queue = _option(wish, "queue", False, lambda v: isinstance(v, bool), "true or false")
        self._handle(ChangeLayout(change, queue, self._loop.time()))
        if change.id not in self._unended:
            self._unended.append(change.id)
        self._watch()
        return change.id

    # -- events and effects -------------------------------------------------------------------------------

    def _cancel(self, sequence: SequenceId, reason: Any) -> None:
        if self._sinks.pop(sequence, None) is not None:
            self._handle(Cancel(sequence, reason))

    def _received(self, message: Any) -> None:
        if not self._closed:
            self._handle(FromWorker(message, self._loop.time()))

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `listener` on the loop with every event for operators, until the returned function is called."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def _handle(self, event: Event) -> None:
        if self._tracer.is_on:
            self._handle_traced(event)
        else:
            for effect in self._state.step(event):
                if isinstance(effect, Emit):  # nearly all are, so they go the shortest way
                    self._emit(effect.sequence, effect.output)
                else:
                    self._carry_out(effect)
        if self._state.reconfiguration.is_active or self._unended or self._seen:
            self._watch()
        if not self._has_alarm and (wake_s := self._state.batcher.wake_s) < math.inf:
            self._has_alarm = True
            self._loop.call_at(wake_s, self._wake)

    def _wake(self) -> None:
        self._has_alarm = False
        if not self._closed:
            self._handle(Wake(self._loop.time()))

    def _handle_traced(self, event: Event) -> None:
        span, begun_s = self._tracer.span, time.perf_counter()
        effects = self._state.step(event)
        what = event.message if isinstance(event, FromWorker) else event
        span("loop", f"decide {type(what).__name__.lower()}", begun_s, time.perf_counter())
        for kind, group in itertools.groupby(effects, type):
            begun_s, count = time.perf_counter(), 0
            for count, effect in enumerate(group, 1):  # noqa: B007
                self._carry_out(effect)
            span("loop", _TRACED_AS[kind], begun_s, time.perf_counter(), amounts={"count": count})

    def _watch(self) -> None:
        """Tell listeners when the transition has gone on (another phase, more arrived) and when a change has ended."""
        view = self._state.reconfiguration.view()
        if view is not None and (change := cast("int", view["id"])) not in self._unended:  # the autopilot's
            self._unended.append(change)
        seen = () if view is None else tuple(view[key] for key in _WATCHED)
        if seen != self._seen:
            self._seen = seen
            self._tell({"type": "transition", "transition": view})
        reports = self._state.reconfiguration.reports
        for change in [c for c in self._unended if reports[c].outcome not in ("running", "queued")]:
            self._unended.remove(change)
            self._changed.set()
            self._tell({"type": "report", "report": msgspec.to_builtins(reports[change])})

    def _watch_workers(self) -> None:
        """Tell listeners when another number of workers is wanted, or others are spare."""
        workers = self._state.pilot.autopilot.workers
        if workers is not None and workers != self._workers:
            self._workers = workers
            self._tell({"type": "workers", "workers": msgspec.to_builtins(workers)})

    def _tell(self, event: dict[str, Any]) -> None:
        for listener in list(self._listeners):
            listener(event)

    def _carry_out(self, effect: Effect) -> None:
        door = self._door
        match effect:
            case Emit():
                self._emit(effect.sequence, effect.output)
            case SendStep():
                assert door is not None
                payload = encode(Step(0, encode(effect.plan), []))
                door.send(effect.worker, payload, on_error=self._on_send_error(effect.worker))
            case Send():
                assert door is not None
                door.send(effect.worker, encode(effect.message), on_error=self._on_send_error(effect.worker))
            case EvictWorker():
                assert door is not None
                door.evict(effect.worker)
            case Look():
                self._answering = self._loop.create_task(self._answer(effect.question))
                self._answering.add_done_callback(partial(self._answered, effect.question))
            case Report():
                log.log(getattr(logging, effect.level.upper()), "%s", effect.text)
                self._tell({"type": "note", "level": effect.level, "text": effect.text})
            case _:
                assert_never(effect)

    def _emit(self, sequence: SequenceId, output: TokenOutput) -> None:
        last = output.finish_reason is not None
        sink = self._sinks.pop(sequence, None) if last else self._sinks.get(sequence)
        if sink is None:
            return
        try:
            sink(output)
        except Exception:
            log.exception("the sink of sequence %d failed; the request is aborted", sequence)
            self._sinks.pop(sequence, None)
            if not last:  # not from inside the effects of this very event
                self._loop.call_soon(self._handle, Cancel(sequence, "abort"))

    def _on_send_error(self, worker: str) -> Callable[[Exception], None]:
        def lost(error: Exception) -> None:  # in an RPC thread
            if not self._closed:
                self._loop.call_soon_threadsafe(self.worker_exited, worker, str(error))

        return lost

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_INTERVAL_S)
            finished = sum(self._state.batcher.counters.finished.values())
            rate = (finished - self._num_finished_before) / TICK_INTERVAL_S
            self._num_finished_before = finished
            self._finish_rate += 0.1 * (rate - self._finish_rate)
            self._handle(Tick(self._loop.time()))
            self._watch_workers()

    def _retry_after_s(self) -> int:
        """How long the present queue takes at the present rate, between 1 s and a minute."""
        if self._finish_rate <= 0.0:
            return 10
        return max(1, min(60, round(self._state.batcher.num_waiting / self._finish_rate)))

    async def _audit_worker(self, name: str, live: list[SequenceId]) -> Audited:
        assert self._door is not None
        future = self._door.call(name, encode(Audit(live, self._next_sequence - 1)), timeout_s=AUDIT_TIMEOUT_S)
        reply = decode_to_head(await asyncio.wrap_future(future))
        assert isinstance(reply, Audited)
        return reply

    async def _trace_worker(self, name: str, on: bool) -> tuple[Traced, float, float] | None:
        """What it recorded, how far its clock is ahead of ours and how far off that may be; None when it is lost."""
        assert self._door is not None
        begun_s = time.perf_counter()
        try:
            reply = await asyncio.wrap_future(self._door.call(name, encode(Trace(on)), timeout_s=TRACE_TIMEOUT_S))
        except DoorError as error:
            log.warning("%s does not take part in the trace: %s", name, error)
            return None
        ended_s = time.perf_counter()
        traced = decode_to_head(reply)
        assert isinstance(traced, Traced)
        return traced, traced.clock_s - (begun_s + ended_s) / 2, (ended_s - begun_s) / 2


def _option(wish: dict[str, Any], name: str, default: Any, is_valid: Callable[[Any], bool], wanted: str) -> Any:
    value = wish.get(name)
    if value is None:
        return default
    if not is_valid(value):
        raise LayoutError(f"{name}: {value!r} is not {wanted}", name)
    return value


def _is_rate(value: Any) -> bool:
    return type(value) is int and MIN_BYTES_PER_S <= value <= MAX_BYTES_PER_S


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
