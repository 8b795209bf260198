"""A worker: one process, one device, some layers. It obeys the head and decides nothing.

Three kinds of threads. RPC threads put what arrives into the inbox. The compute thread (the main thread) takes it out,
restores the order of the steps, runs them and sends the results on. A heartbeat thread tells the head that the
process lives; that the head is gone shows as the end of its connection, or as a beat nobody takes.

Steps of an epoch run in the order of their ordinals at each hop (TensorPipe does not order what it carries); a step of
an epoch that is not loaded is counted as stale and dropped. An error in a step is told to the head and ends the
process: its agent starts a fresh one, which is the one recovery path there is.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import psutil
import torch

from kvstore.ids import Epoch, WorkerName
from runtime.device import DeviceInfo
from runtime.loading import Loader
from runtime.messages import (
    Audit,
    Audited,
    Heartbeat,
    HopTiming,
    Join,
    Leave,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Shutdown,
    Step,
    StepFailed,
    StepPlan,
    StepResult,
    Welcome,
    decode_plan,
    decode_to_worker,
    encode,
)
from runtime.rpc import Door, Handler, PeerError
from runtime.stage import Stage
from runtime.stage_state import StepOrder

log = logging.getLogger("midflight.worker")

HEAD = "head"
JOIN_TIMEOUT_S = 30.0
MAX_INBOX = 4096


class HeadLost(Exception):
    """The head does not answer any more. The worker may look for a new one at the same address."""


class StepError(Exception):
    """A step could not be run; the head has been told and this process should end."""


@dataclass(slots=True)
class _Arrival:
    message: Load | Step | Shutdown | Audit | Exception
    tensors: Sequence[torch.Tensor]
    arrived_s: float
    reply: "Future[bytes] | None" = None


_Due: TypeAlias = tuple[Step, StepPlan, Sequence[torch.Tensor], float]


class Worker:
    """One member of one head's group, from joining until `Shutdown`. `run` is its life."""

    def __init__(self, name: WorkerName, replaces: WorkerName, device: DeviceInfo, loader: Loader) -> None:
        self._name = name
        self._replaces = replaces
        self._device = device
        self._loader = loader
        self._inbox: queue.Queue[_Arrival] = queue.Queue(MAX_INBOX)
        self._door: Door | None = None
        self._stage: Stage | None = None
        self._epoch: Epoch = -1
        self._order: dict[int, StepOrder[_Due]] = {}
        self._num_stale = 0
        self._stopping = threading.Event()
        self._idle_since_s = time.perf_counter()
        self._process = psutil.Process()

    def run(self, make_door: Callable[[Handler, Callable[[str], None]], Door]) -> str:
        """Join, serve until the head says `Shutdown`, and return its reason.

        Raises:
            HeadLost: when the head went away.
            StepError: when a step failed.
        """
        self._door = door = make_door(self._arrived, lambda name: self._head_lost(f"{name} is gone"))
        try:
            welcome = self._join(door)
            interval_s = welcome.heartbeat_interval_s
            beat = threading.Thread(target=self._beat, args=(door, interval_s), name="heartbeat", daemon=True)
            beat.start()
            return self._serve()
        finally:
            self._stopping.set()
            door.close()

    def leave(self, reason: str) -> None:
        """Tell the head that this worker ends on purpose, and stop serving. Called from a signal handler."""
        if self._door is not None:
            self._door.send(HEAD, encode(Leave(self._name, reason)))
        self._put(_Arrival(Shutdown(reason), (), time.perf_counter()))

    # -- threads of the door and the heartbeat -------------------------------------------------------------

    def _arrived(self, payload: bytes, tensors: Sequence[torch.Tensor]) -> "Future[bytes] | None":
        message = decode_to_worker(payload)
        assert not isinstance(message, Welcome), "a Welcome is a reply, never a message"
        reply: Future[bytes] | None = Future() if isinstance(message, Audit) else None
        self._put(_Arrival(message, tensors, time.perf_counter(), reply))
        return reply

    def _put(self, arrival: _Arrival) -> None:
        self._inbox.put_nowait(arrival)

    def _head_lost(self, error: Exception | str) -> None:
        self._put(_Arrival(HeadLost(str(error)), (), time.perf_counter()))

    def _beat(self, door: Door, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            stage = self._stage
            beat = Heartbeat(
                worker=self._name,
                rss=self._process.memory_info().rss,
                pages_used=stage.pool.num_used if stage else 0,
                num_sequences=stage.state.num_sequences if stage else 0,
                num_stale=self._num_stale,
            )
            door.send(HEAD, encode(beat), on_error=self._head_lost)

    # -- the compute thread -------------------------------------------------------------------------------

    def _join(self, door: Door) -> Welcome:
        join = Join(
            name=self._name,
            replaces=self._replaces,
            **self._device.describe(),
        )
        try:
            reply = door.call(HEAD, encode(join), timeout_s=JOIN_TIMEOUT_S).result(JOIN_TIMEOUT_S + 1.0)
        except (PeerError, TimeoutError) as error:
            raise HeadLost(f"the head did not answer when {self._name} joined: {error}") from error
        welcome = decode_to_worker(reply)
        assert isinstance(welcome, Welcome)
        return welcome

    def _serve(self) -> str:
        while True:
            arrival = self._inbox.get()
            message = arrival.message
            match message:
                case Step():
                    self._step_arrived(message, arrival.tensors, arrival.arrived_s)
                case Load():
                    self._load(message)
                case Audit():
                    assert arrival.reply is not None
                    arrival.reply.set_result(encode(self._audit(message)))
                case Shutdown():
                    return message.reason
                case Exception():
                    raise message
                case _:
                    assert_never(message)

    def _load(self, load: Load) -> None:
        """Drop what the new layout does not need, load what it does, start with empty KV."""
        self._stage, self._order, self._epoch = None, {}, load.layout.epoch

        def progress(units_loaded: int, units_total: int, phase: str) -> None:
            self._send_head(LoadProgress(self._name, load.layout.epoch, units_loaded, units_total, phase))

        started_s = time.perf_counter()
        try:
            units, pool = self._loader.load(load, self._name, progress)
        except Exception as error:
            log.exception("loading failed")
            self._send_head(LoadFailed(self._name, load.layout.epoch, f"{type(error).__name__}: {error}"))
            return
        self._stage = Stage(load.layout, self._name, units, pool, self._device.device)
        self._idle_since_s = time.perf_counter()
        self._send_head(
            Loaded(
                worker=self._name,
                epoch=load.layout.epoch,
                weight_bytes=self._loader.weight_bytes,
                num_pages=pool.num_pages,
                page_bytes=pool.page_bytes,
                seconds=time.perf_counter() - started_s,
                implementation=self._loader.implementation,
            )
        )

    def _step_arrived(self, step: Step, tensors: Sequence[torch.Tensor], arrived_s: float) -> None:
        plan = decode_plan(step.plan)
        if plan.epoch != self._epoch or self._stage is None:
            self._num_stale += 1
            return
        order = self._order.setdefault(step.hop, StepOrder())
        if not order.push(plan.ordinal, (step, plan, tensors, arrived_s)):
            self._num_stale += 1
            return
        while (due := order.pop()) is not None:
            try:
                self._run(self._stage, *due)
            except Exception as error:
                log.exception("step %d of epoch %d failed", due[1].ordinal, due[1].epoch)
                failed = StepFailed(self._name, due[1].epoch, due[1].ordinal, f"{type(error).__name__}: {error}")
                self._send_head(failed)
                time.sleep(0.2)  # the message leaves before the process does
                raise StepError(str(error)) from error

    def _run(self, stage: Stage, step: Step, plan: StepPlan, tensors: Sequence[torch.Tensor], arrived_s: float) -> None:
        hop, layout = step.hop, stage.layout
        begun_s = time.perf_counter()
        with torch.inference_mode():
            hidden = stage.run(plan, hop, tensors[0] if tensors else None)
            computed_s = time.perf_counter()
            sampled = stage.sample(hidden) if hop == layout.num_hops - 1 else None
        ended_s = time.perf_counter()
        timing = HopTiming(
            worker=self._name,
            idle_us=max(0, int(1e6 * (arrived_s - self._idle_since_s))),
            queued_us=max(0, int(1e6 * (begun_s - arrived_s))),
            compute_us=int(1e6 * (computed_s - begun_s)),
            sample_us=int(1e6 * (ended_s - computed_s)),
        )
        timings = [*step.timings, timing]
        if sampled is None:
            self._send_hop(layout.segments[hop + 1].worker, Step(hop + 1, step.plan, timings), hidden)
        else:
            self._send_head(
                StepResult(
                    epoch=plan.epoch,
                    ordinal=plan.ordinal,
                    microbatch=plan.microbatch,
                    tokens=sampled.tokens,
                    logprobs=sampled.logprobs,
                    prompt_logprobs=sampled.prompt_logprobs,
                    timings=timings,
                    failed=sampled.failed,
                )
            )
        self._idle_since_s = time.perf_counter()

    def _send_hop(self, to: WorkerName, step: Step, hidden: torch.Tensor) -> None:
        if to == self._name:
            self._put(_Arrival(step, (hidden,), time.perf_counter()))
            return
        assert self._door is not None
        self._door.send(to, encode(step), (hidden,), on_error=lambda e: log.warning("hop to %s failed: %s", to, e))

    def _send_head(self, message: LoadProgress | Loaded | LoadFailed | StepResult | StepFailed) -> None:
        assert self._door is not None
        self._door.send(HEAD, encode(message), on_error=self._head_lost)

    def _audit(self, audit: Audit) -> Audited:
        problems: list[str] = []
        stage = self._stage
        if stage is not None:
            stage.state.retain_only(audit.live_sequences, audit.newest)
            try:
                stage.check_integrity()
            except AssertionError as error:
                problems.append(str(error))
        return Audited(
            worker=self._name,
            num_sequences=stage.state.num_sequences if stage else 0,
            pages_used=stage.pool.num_used if stage else 0,
            rss=self._process.memory_info().rss,
            problems=problems,
        )
