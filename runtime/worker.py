"""A worker: one process, one device, some layers. It obeys the head and decides nothing.

Three kinds of threads. RPC threads put what arrives into the inbox. The compute thread (the main thread) takes it out
and gives it to the `Member`, which does the work; between messages it does slices of what can be done in the background
when they are due: while the inbox is empty, and before the next message when it has not been empty for too long, so that a
busy worker still gives its layers away.
A heartbeat thread tells the head that the process lives, and for how long the compute thread has been at one message; that the head is
gone shows as the end of its connection, or as a beat nobody takes. (A fourth, the loader of shadows, is `runtime.loading`'s own.)

An error in a step is told to the head and ends the process: its agent starts a fresh one, which is the one recovery
path there is. So does a compute thread that hangs (a kernel, a dead file system) once the head has given this worker up for it:
that thread never hears of it, so the heartbeat's ends the process.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import psutil
import torch

from kvstore.ids import WorkerName
from runtime.device import DeviceInfo
from runtime.exchange import lent
from runtime.inbox import Inbox
from runtime.loading import Loader
from runtime.member import COMPUTE, Member, StepError, transition_of
from runtime.messages import (
    READING,
    UNIT_OF_LOAD,
    Audit,
    Cancel,
    Copy,
    Fetch,
    Heartbeat,
    Join,
    Leave,
    Lent,
    Load,
    LoadProgress,
    Mirror,
    Open,
    Pages,
    Prepare,
    Retire,
    ShadowProgress,
    Shutdown,
    StartMirror,
    Step,
    StepFailed,
    Taken,
    ToHead,
    Tokens,
    Trace,
    Traced,
    Weights,
    Welcome,
    decode_to_worker,
    encode,
)
from runtime.priority import Priority
from runtime.rpc import Door, Handler, PeerError, Reply
from runtime.trace import Tracer

__all__ = ["HeadLost", "StepError", "Worker"]

log = logging.getLogger("midflight.worker")

HEAD = "head"
JOIN_TIMEOUT_S = 30.0
BEAT_ENDS_WITHIN_S = 1.0
OVERDUE_S = 0.02
"""Background work that has been due for so long goes before the next message."""


class HeadLost(Exception):
    """The head does not answer any more. The worker may look for a new one at the same address."""


@dataclass(frozen=True, slots=True)
class _Undelivered:
    """A message to `peer` was lost; `transition` as `runtime.member.transition_of` gives it."""

    peer: WorkerName
    transition: int
    error: str


@dataclass(frozen=True, slots=True)
class _ShadowBuilt:
    transition: int
    seconds: float
    peer_bytes: int
    error: Exception | None


_Message = (
    Step
    | Tokens
    | Load
    | Prepare
    | Copy
    | Open
    | Retire
    | Cancel
    | Mirror
    | Pages
    | Taken
    | Fetch
    | StartMirror
    | Audit
    | Shutdown
    | _ShadowBuilt
    | _Undelivered
    | HeadLost
)


@dataclass(slots=True)
class _Arrival:
    message: _Message
    tensors: Sequence[torch.Tensor]
    arrived_s: float
    reply: "Future[bytes] | None" = None


class Worker:
    """One member of one head's group, from joining until `Shutdown`. `run` is its life. `priority` is the process's one."""

    def __init__(
        self, name: WorkerName, replaces: WorkerName, device: DeviceInfo, loader: Loader, priority: Priority
    ) -> None:
        self._name = name
        self._replaces = replaces
        self._device = device
        self._inbox: Inbox[_Arrival] = Inbox()
        self._door: Door | None = None
        self._stopping = threading.Event()
        self._busy: tuple[str, float] | None = None
        """What the compute thread is at, and since when; of a `Load` the unit that is read."""
        self._has_lost_head = False
        self.has_joined = False
        self._process = psutil.Process()
        self._tracer = loader.tracer = Tracer()
        pacer = device.pacer(time.perf_counter)
        copies = loader.queued.copies if loader.queued is not None else None
        self._member = Member(name, device.device, loader, self, time.perf_counter, self._tracer, pacer, copies)
        loader.on_shadow = lambda *built: self._put(_ShadowBuilt(*built))
        loader.on_progress = lambda *progress: self.to_head(ShadowProgress(name, *progress))
        loader.importer.name = name
        loader.importer.send = lambda peer, fetch: self.to_peer(peer, fetch, ())
        self._loader = loader
        self._priority = priority

    def run(self, make_door: Callable[[Handler, Callable[[str], None]], Door]) -> str:
        """Join, serve until the head says `Shutdown`, and return its reason.

        Raises:
            HeadLost: when the head went away.
            StepError: when a step failed.
        """
        if self._loader.queued is not None:
            self._loader.queued.settle_thread()
        self._door = door = make_door(self._arrived, lambda name: self._head_lost(f"{name} is gone"))
        try:
            welcome = self._join(door)
            interval_s = welcome.heartbeat_interval_s
            beat = threading.Thread(target=self._beat, args=(door, interval_s), name="heartbeat", daemon=True)
            beat.start()
            try:
                return self._serve()
            finally:
                self._stopping.set()
                beat.join(BEAT_ENDS_WITHIN_S)
        finally:
            door.close()

    def release(self) -> None:
        """After `run`, when the process goes on: hold no memory, so that its next life has all of it, and stand behind nobody. The
        loader keeps the units."""
        self._member.release()
        self._loader.release()
        self._priority.give_way(gives_way=False)

    def leave(self, reason: str) -> None:
        """Tell the head that this worker ends on purpose, and stop serving. Called from a signal handler."""
        if self._door is not None:
            self._door.send(HEAD, encode(Leave(self._name, reason)))
        self._put(Shutdown(reason))

    # -- the outbox of the member ---------------------------------------------------------------------------

    def to_head(self, message: ToHead) -> None:
        assert self._door is not None
        if isinstance(message, LoadProgress):
            self._busy = UNIT_OF_LOAD if message.phase == READING else Load.__name__, time.perf_counter()
        self._door.send(HEAD, encode(message), on_error=self._head_lost)

    def to_peer(
        self,
        worker: WorkerName,
        message: Step | Tokens | Mirror | Pages | Taken | Fetch | Weights | Lent,
        tensors: Sequence[torch.Tensor],
    ) -> None:
        if worker == self._name:
            assert not isinstance(message, Weights | Lent), "a worker has no need of its own units"
            self._put(message, tensors)
            return
        assert self._door is not None
        transition = transition_of(message)
        lost = _warn_of_peer if transition is None else partial(self._undelivered, worker, transition)
        self._door.send(worker, encode(message), tensors, on_error=lost)

    def next_step(self) -> tuple[Step, Sequence[torch.Tensor], float] | None:
        arrival = self._inbox.next_step
        if arrival is None:
            return None
        assert isinstance(arrival.message, Step), "the inbox tells them apart"
        return arrival.message, arrival.tensors, arrival.arrived_s

    def take_step(self) -> None:
        self._inbox.take_step()
        # This thread has not been at the step that waited since the one before began.
        self._busy = Step.__name__, time.perf_counter()

    # -- threads of the door and the heartbeat --------------------------------------------------------------

    def _arrived(self, payload: bytes, tensors: Sequence[torch.Tensor]) -> Reply:
        begun_s = time.perf_counter()
        message = decode_to_worker(payload)
        assert not isinstance(message, Welcome), "a Welcome is a reply, never a message"
        if isinstance(message, Trace):
            return encode(self._trace(message))
        if self._tracer.is_on:
            name = f"receive {type(message).__name__.lower()}"
            self._tracer.span("rpc", name, begun_s, time.perf_counter(), amounts={"bytes": len(payload)})
        if isinstance(message, Weights | Lent):  # for the loader's thread, which waits for it
            self._loader.importer.take(message, list(tensors))
            return None
        if isinstance(message, Fetch) and (answer := lent(message, self._loader.parts(message.unit, message.form))):
            self.to_peer(message.worker, *answer)  # a loan costs no step anything
            return None
        reply: Future[bytes] | None = Future() if isinstance(message, Audit) else None
        self._put(message, tensors, reply)
        return reply

    def _put(
        self, message: _Message, tensors: Sequence[torch.Tensor] = (), reply: "Future[bytes] | None" = None
    ) -> None:
        self._inbox.put(_Arrival(message, tensors, time.perf_counter(), reply), is_step=isinstance(message, Step))

    def _trace(self, message: Trace) -> Traced:
        spans, num_lost = self._tracer.stop()
        if message.on:
            self._tracer.start()
        return Traced(self._name, time.perf_counter(), spans, num_lost)

    def _undelivered(self, peer: WorkerName, transition: int, error: Exception) -> None:
        _warn_of_peer(error)
        self._put(_Undelivered(peer, transition, str(error)))

    def _head_lost(self, error: Exception | str) -> None:
        self._has_lost_head = True
        self._put(HeadLost(str(error)))

    def _beat(self, door: Door, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            busy_with, since_s = self._busy or ("", 0.0)
            beat = Heartbeat(
                worker=self._name,
                rss=self._process.memory_info().rss,
                pages_used=self._member.pages_used,
                num_sequences=self._member.num_sequences,
                num_stale=self._member.num_stale,
                busy_with=busy_with,
                busy_s=time.perf_counter() - since_s if busy_with else 0.0,
            )
            door.send(HEAD, encode(beat), on_error=self._head_lost)
            if beat.is_hung and self._has_lost_head:
                log.error("hung for %.0f s in one %s, and given up: this process ends", beat.busy_s, busy_with)
                os._exit(1)

    # -- the compute thread ---------------------------------------------------------------------------------

    def _join(self, door: Door) -> Welcome:
        join = Join(name=self._name, replaces=self._replaces, **self._device.describe())
        try:
            reply = door.call(HEAD, encode(join), timeout_s=JOIN_TIMEOUT_S).result(JOIN_TIMEOUT_S + 1.0)
        except (PeerError, TimeoutError) as error:
            raise HeadLost(f"the head did not answer when {self._name} joined: {error}") from error
        welcome = decode_to_worker(reply)
        assert isinstance(welcome, Welcome)
        self.has_joined = True
        return welcome

    def _serve(self) -> str:
        while True:
            arrival = self._next()
            if not isinstance(arrival.message, Step | Tokens):
                self._member.send_result()
            if isinstance(arrival.message, Shutdown):
                return arrival.message.reason
            self._busy = type(arrival.message).__name__.strip("_"), time.perf_counter()
            try:
                self._dispatch(arrival)
                self._busy = None
            except StepError as error:
                log.exception("a step failed")
                self._member.send_result()
                self.to_head(StepFailed(self._name, error.epoch, error.ordinal, str(error)))
                time.sleep(0.2)  # the message leaves before the process does
                raise

    def _next(self) -> _Arrival:
        """The next message; slices of background work while there is none, and before it when they are overdue."""
        while True:
            if self._inbox.is_empty:
                self._member.send_result()
            wait_s = self._member.background_wait_s()
            began_s = time.perf_counter()
            if wait_s is not None and wait_s < -OVERDUE_S:
                self._background()
                continue
            arrival = self._inbox.take(wait_s)
            if self._tracer.is_on:
                self._tracer.span(COMPUTE, "wait", began_s, time.perf_counter())
            if arrival is not None:
                return arrival
            self._background()

    def _background(self) -> None:
        self._busy = "background slice", time.perf_counter()
        self._member.background()
        self._busy = None

    def _dispatch(self, arrival: _Arrival) -> None:
        message, member = arrival.message, self._member
        match message:
            case Step():
                member.step(message, arrival.tensors, arrival.arrived_s)
            case Tokens():
                member.sampled(message, arrival.arrived_s)
            case Mirror() | Pages():
                member.arrive(message, arrival.tensors)
            case Taken():
                member.taken(message)
            case Load():
                member.load(message)
            case Prepare():
                member.prepare(message)
            case StartMirror():
                member.start_mirror(message)
            case Copy():
                member.copy(message)
            case Open():
                member.open(message)
            case Retire() | Cancel():
                member.retire(message)
            case Audit():
                assert arrival.reply is not None
                arrival.reply.set_result(encode(member.audit(message)))
            case _ShadowBuilt():
                member.shadow_built(message.transition, message.seconds, message.peer_bytes, message.error)
            case _Undelivered():
                member.unreachable(message.peer, message.transition, message.error)
            case Fetch():
                member.fetch(message)
            case HeadLost():
                raise message
            case Shutdown():
                raise AssertionError("handled by the caller")
            case _:
                assert_never(message)
        self._priority.give_way(gives_way=member.has_time)


def _warn_of_peer(error: Exception) -> None:
    log.warning("a message to a peer was lost: %s", error)
