"""The door: how a process joins the group of a head, and how bytes and tensors get from one member to another.

One process has one `Door` at a time. A message is bytes plus tensors; it is delivered by calling the receiver's
handler in an RPC thread. The head hosts a small TCP store through which a joiner learns the head's TensorPipe
address and takes a number (its id, never used twice); everything after that goes over TensorPipe.

How it works:

- **Membership is the head's.** A joiner asks the head alone; the head tells the members, waits a bounded time for
  their word, and answers. A joiner that dies half-way was never anybody's member, and a dead or frozen member delays
  a join by that bounded time at most.
- **Tripwires.** The head keeps one unanswered request open at every member, and every member one at the head. It
  fails the moment the other end's connection does, which is how `on_lost` knows of a death without a heartbeat.
- **Acknowledgements are late**, many at a time (`runtime.acks`); a thread of the door sees to it that none is very late.
- **Small tensors ride in the message**, large ones beside it: on loopback a tensor of its own costs as much again as
  a whole small message.

Never true: `send` never waits for the peer. A message of an evicted member, or of another group that once had
this address, never reaches the handler. With `num_threads=1` messages of one peer are handled in the order they
were sent; nothing is promised between peers, nor for two or more threads.

Sharp edges: handlers run in RPC threads and must hand work on, not do it; with one thread, a handler that waits
for a reply waits forever. TensorPipe neither authenticates nor encrypts: whoever reaches its port is a member. It
listens on one interface only (the head's), and a head that is not on loopback needs `allow_public=True`. What we
use of torch's RPC is in `tensorpipe.py`, the one module that imports `torch.distributed`.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
import torch

from runtime import wire
from runtime.acks import Awaited, Owed
from runtime.address import Unreachable, await_port, listen, parse_address
from runtime.tensorpipe import Agent, Gone, Late, host_store, outcome_of, read_store

log = logging.getLogger(__name__)

Reply: TypeAlias = "bytes | concurrent.futures.Future[bytes] | None"
Handler: TypeAlias = Callable[[bytes, list[torch.Tensor]], Reply]

MAX_MEMBER_ID = 32767  # TensorPipe's worker id is an int16

_CARD = "head"  # the key in the store
_SEND, _CALL, _ADMIT, _ADD, _REMOVE, _WATCH = range(6)
_ANSWERED_LATER = frozenset((_SEND, _CALL, _ADMIT, _WATCH))
_TEND_INTERVAL_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9_:-]{1,127}")


class DoorError(RuntimeError):
    """Something between two members went wrong; the subclasses say what."""


class JoinError(DoorError):
    """This process could not join the group; the message says what it waited for."""


class PeerError(DoorError):
    """`name` did not take, or did not answer, a message."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


class PeerLost(PeerError):
    """The peer is gone: its connection ended, it was evicted, or this process was."""


class PeerTimeout(PeerError):
    """The peer did not answer in time. It may still have handled the message, or do so later."""


class RemoteError(PeerError):
    """The peer's handler raised; `why` is the exception's text."""


class _Member(msgspec.Struct, frozen=True, array_like=True):
    name: str
    id: int
    address: str
    device: int | None = None
    """The CUDA device whose tensors it takes as they are, if any."""


class _HeadCard(msgspec.Struct, frozen=True, array_like=True):
    member: _Member
    group: bytes


class _Peer:
    """A member as the sender needs it: TensorPipe's handle and the ready-made first bytes of each message."""

    __slots__ = ("awaited", "handle", "lock", "member", "prefix")

    def __init__(self, member: _Member, handle: Any, prefix: bytes) -> None:
        self.member = member
        self.handle = handle
        self.prefix = prefix
        self.awaited = Awaited()
        self.lock = threading.Lock()  # of `awaited`


class Door:
    """This process's membership in the group of the head at `head`.

    The constructor returns when the head and every live member know this one, or raises.

    Args:
        name: unique in the group: letters, digits, ``_``, ``:`` and ``-``, at most 127.
        head: "HOST:PORT" of the head's store. The head may give port 0 and read `address`.
        is_head: this process hosts the store and decides who is a member.
        handler: called in an RPC thread with each message's payload and tensors (owned by the callee; one
            on a device has an event `arrived`, to be waited for). For a
            `call` it returns the reply, or a `concurrent.futures.Future` of it when the reply takes time.
        on_lost: called once per member, in an RPC thread, when its connection ends. The head hears of every
            member, a member hears of the head only (also when it finds itself evicted).
        num_threads: RPC threads. One is the cheapest and keeps the order of each peer's messages.
        timeout_s: how long a `send` may stay unacknowledged, and the default for `call`.
        join_timeout_s: limit on the constructor.
        allow_public: permits a head that is not on loopback.
        device: the index of the CUDA device whose tensors travel as they are to members that have one too.
        listener: head only, what `address.listen` gave for this address: workers can then be started before the door.

    Raises:
        ValueError: bad name or address, or a public address without `allow_public`.
        JoinError: no head at the address, which may not be known at present, the name is taken, or the deadline passed.
    """

    def __init__(
        self,
        name: str,
        head: str,
        *,
        is_head: bool,
        handler: Handler,
        on_lost: Callable[[str], None] | None = None,
        num_threads: int = 1,
        timeout_s: float = 30.0,
        join_timeout_s: float = 30.0,
        ack_timeout_s: float = 2.0,
        allow_public: bool = False,
        listener: socket.socket | None = None,
        device: int | None = None,
    ) -> None:
        global _door
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no member name: 1 to 127 letters, digits, '_', ':' or '-'")
        if _door is not None:
            raise DoorError(f"this process already has a door ({_door.name}); close it first")
        try:
            host, port = parse_address(head, allow_public=allow_public)
        except Unreachable as error:
            raise JoinError(str(error)) from None
        if not is_head and port == 0:
            raise ValueError(f"{head}: a worker needs the head's port")
        self.name = name
        self.is_head = is_head
        self._handler = handler
        self._on_lost = on_lost
        self._timeout_s = timeout_s
        self._ack_timeout_s = ack_timeout_s
        self._device = device
        self._lock = threading.RLock()
        self._peers: dict[str, _Peer] = {}
        self._out: set[int] = set()
        self._watchers: dict[int, torch.futures.Future] = {}
        self._pending: dict[concurrent.futures.Future[bytes], int] = {}
        self._closed = False
        self._evicted = False
        self._head_name = name
        self._id = 0
        self._group = b""
        self._agent: Agent | None = None
        self._store: Any = None
        deadline = time.monotonic() + join_timeout_s
        _door = self
        self._owed = Owed()
        self._closing = threading.Event()
        try:
            if is_head:
                self._found(listener or listen(host, port), num_threads, join_timeout_s)
            else:
                self._join(host, port, num_threads, deadline, join_timeout_s)
        except Unreachable as error:
            self.close()
            raise JoinError(str(error)) from None
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._tend, name="door", daemon=True).start()

    # -- messages -------------------------------------------------------------------------------------------

    def send(
        self,
        to: str,
        payload: bytes,
        tensors: Sequence[torch.Tensor] = (),
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Hand a message to the network and return; the peer's handler runs some time later, or never.

        Tensors on a device go by way of the host unless both ends were given a `device`. Their memory must stay as it is
        until the message is out when they are larger than `wire.INLINE_TENSOR_BYTES` (smaller ones are copied here).
        `on_error` gets a `PeerError` when the message was not handled, up to a second after that is known, in
        a thread of the door; or on this thread before `send` returns when the peer is unknown. Nobody is told of messages to
        a peer that was evicted meanwhile.

        Raises:
            ValueError: the payload is too large or a tensor is of a kind that cannot travel.
        """
        try:
            peer = self._peer(to)
            answer = self._invoke(peer, _SEND, payload, tensors, 0.0)
        except PeerError as error:
            if on_error is not None:
                on_error(error)
            return
        if on_error is not None:
            with peer.lock:
                is_time = peer.awaited.add(time.monotonic(), answer, on_error)
            if is_time:
                self._report(peer)

    def call(
        self, to: str, payload: bytes, tensors: Sequence[torch.Tensor] = (), timeout_s: float | None = None
    ) -> concurrent.futures.Future[bytes]:
        """Send a message and get the handler's reply. The future fails with `PeerLost`, `PeerTimeout`, `RemoteError`.

        It completes in an RPC thread: never wait for it inside a handler.
        """
        result: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        result.set_running_or_notify_cancel()
        try:
            peer = self._peer(to)
        except PeerLost as error:
            result.set_exception(error)
            return result
        with self._lock:
            self._pending[result] = peer.member.id
        try:
            limit_s = self._timeout_s if timeout_s is None else max(timeout_s, 0.001)
            request = self._invoke(peer, _CALL, payload, tensors, limit_s)
        except PeerError as error:
            self._settle(result, None, error)
        except BaseException:
            self._pending.pop(result, None)
            raise
        else:
            request.add_done_callback(lambda done: self._settle(result, *self._outcome(to, done)))
        return result

    # -- membership -----------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """ "HOST:PORT" at which others join."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    def members(self) -> list[str]:
        """Names of all members that this process knows, itself included."""
        with self._lock:
            return [self.name, *self._peers]

    def evict(self, name: str) -> None:
        """Head only: `name` is out, here and at every live member. Returns at once; unknown names are ignored.

        Its messages are dropped from now on, and it is told when it can still hear. The name is free again.
        """
        assert self.is_head, "only the head evicts"
        with self._lock:
            peer = self._peers.get(name)
            if peer is None:
                return
            note = msgspec.msgpack.encode(peer.member)
            for other in [peer, *(p for p in self._peers.values() if p is not peer)]:
                self._try_invoke(other, _REMOVE, note, self._timeout_s)
            self._remove(peer.member)
            waiting = [result for result, member_id in self._pending.items() if member_id == peer.member.id]
        for result in waiting:
            self._settle(result, None, PeerLost(name, "it was evicted"))

    def close(self) -> None:
        """Leave at once, without a word to anybody. Pending calls fail. Never call it from a handler."""
        global _door
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._closing.set()
            pending, self._pending = list(self._pending), {}
        for future in pending:
            future.set_exception(PeerLost(self.name, "the door was closed"))
        try:
            if self._agent is not None:
                self._agent.close()
        finally:
            self._store = None
            if _door is self:
                _door = None

    # -- founding and joining -------------------------------------------------------------------------------

    def _found(self, listener: socket.socket, num_threads: int, timeout_s: float) -> None:
        self._host, self._port = listener.getsockname()[:2]
        self._store = host_store(listener, timeout_s)
        self._group = secrets.token_bytes(8)
        me = self._start_agent(0, self._host, num_threads)
        self._store.set(_CARD, msgspec.json.encode(_HeadCard(me, self._group)).decode())

    def _join(self, host: str, port: int, num_threads: int, deadline: float, timeout_s: float) -> None:
        self._host, self._port = host, port
        where = f"{host}:{port}"
        local_host = await_port(host, port, deadline, timeout_s)
        try:
            text, self._id = read_store(host, port, _CARD, deadline)
            card = msgspec.json.decode(text, type=_HeadCard)
        except (Unreachable, msgspec.MsgspecError) as error:
            raise JoinError(f"no head at {where}: {error}") from None
        if self._id > MAX_MEMBER_ID:
            raise JoinError(f"the head at {where} has handed out all {MAX_MEMBER_ID} member ids; restart it")
        self._group, self._head_name = card.group, card.member.name
        me = self._start_agent(self._id, local_host, num_threads)
        self._add(card.member)
        self._ask_admission(me, where, deadline)
        self._watch(self._peer(self._head_name))

    def _ask_admission(self, me: _Member, where: str, deadline: float) -> None:
        answered = threading.Event()
        outcome: list[Any] = [None, None]

        def finish(done: torch.futures.Future) -> None:
            outcome[:] = self._outcome(self._head_name, done)
            answered.set()

        left_s = max(0.05, deadline - time.monotonic())
        request = self._invoke(self._peer(self._head_name), _ADMIT, msgspec.msgpack.encode(me), (), left_s)
        request.add_done_callback(finish)
        if not answered.wait(left_s + 1.0):
            raise JoinError(f"the head at {where} did not admit {me.name} in time")
        members, error = outcome
        if isinstance(error, RemoteError):
            raise JoinError(f"the head at {where} refused {me.name}: {error.why}")
        if error is not None:
            raise JoinError(f"the head at {where} did not admit {me.name}: {error.why}")
        for member in msgspec.msgpack.decode(members, type=list[_Member]):
            self._add(member)

    def _start_agent(self, member_id: int, host: str, num_threads: int) -> _Member:
        self._agent = Agent(
            self.name,
            member_id,
            host,
            self._receive,
            self._note_reply,
            num_threads=num_threads,
            timeout_s=self._timeout_s,
            device=self._device,
        )
        return _Member(self.name, member_id, self._agent.address, self._device)

    # -- what goes out --------------------------------------------------------------------------------------

    def _peer(self, name: str) -> _Peer:
        peer = self._peers.get(name)
        if self._closed or self._evicted:
            raise PeerLost(name, "this member was evicted" if self._evicted else "the door is closed")
        if peer is None:
            raise PeerLost(name, "not a member")
        return peer

    def _invoke(
        self, peer: _Peer, kind: int, payload: bytes, tensors: Sequence[torch.Tensor], timeout_s: float
    ) -> torch.futures.Future:
        assert self._agent is not None
        data, beside = wire.pack(peer.prefix, kind, payload, self._agent.presentable(peer.handle, tensors))
        try:
            return self._agent.post(peer.handle, data, beside, timeout_s, answered_later=kind in _ANSWERED_LATER)
        except Gone as error:
            raise PeerLost(peer.member.name, str(error)) from None

    def _try_invoke(self, peer: _Peer, kind: int, payload: bytes, timeout_s: float) -> torch.futures.Future | None:
        try:
            return self._invoke(peer, kind, payload, (), timeout_s)
        except PeerError:
            return None

    def _settle(self, result: concurrent.futures.Future[bytes], value: Any, error: PeerError | None) -> None:
        """Complete a call's future, unless an eviction or the close has done so."""
        with self._lock:
            if self._pending.pop(result, None) is None:
                return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)

    def _outcome(self, name: str, done: torch.futures.Future) -> tuple[bytes, PeerError | None]:
        """The handler's reply, or what went wrong."""
        try:
            reply = outcome_of(done)
        except Late as error:
            return b"", PeerTimeout(name, str(error))
        except Gone as error:
            return b"", PeerLost(name, str(error))
        code, rest = reply[:1], reply[1:]
        if code in (wire.ACK, wire.OK):
            return rest, None
        if code == wire.OUT:
            return b"", PeerLost(name, "this member was evicted")
        if code == wire.STRANGER:
            return b"", PeerLost(name, "its address now belongs to another group, or it is leaving")
        if code == wire.ERROR:
            return b"", RemoteError(name, rest.decode(errors="replace"))
        return b"", RemoteError(name, "it does not speak this protocol")

    def _report(self, peer: _Peer) -> None:
        """Tell the senders of messages to `peer` that failed."""
        with peer.lock:
            ended = peer.awaited.take(time.monotonic(), self._timeout_s)
        name = peer.member.name
        for on_error, answer in ended:
            error = PeerTimeout(name, "not acknowledged in time") if answer is None else self._outcome(name, answer)[1]
            if error is not None and not self._closed:
                on_error(error)

    def _tend(self) -> None:
        """Give and look at acknowledgements that no further message brings along."""
        while not self._closing.wait(_TEND_INTERVAL_S):
            self._owed.flush()
            with self._lock:
                peers = list(self._peers.values())
            for peer in peers:
                self._report(peer)

    # -- what comes in (RPC threads) ------------------------------------------------------------------------

    def _note_reply(self, reply: bytes) -> None:
        if reply == wire.OUT:
            self._found_out()

    def _receive(self, data: bytes, beside: list[torch.Tensor]) -> bytes | torch.futures.Future:
        """Handle one message; the reply, which is a future of it for the kinds that are answered later."""
        header = wire.header_of(data)
        try:
            reply = self._handle(header, data, beside)
        except Exception as error:
            log.exception("%s could not handle a message", self.name)
            reply = wire.ERROR + f"{type(error).__name__}: {error}".encode()
        if header.kind in _ANSWERED_LATER and isinstance(reply, bytes):
            return _completed(reply)
        return reply

    def _handle(self, header: wire.Header, data: bytes, beside: list[torch.Tensor]) -> bytes | torch.futures.Future:
        kind, sender = header.kind, header.sender
        if header.group != self._group or header.to != self._id or self._closed:
            return wire.STRANGER
        if sender in self._out:
            return wire.OUT
        payload, tensors = wire.unpack(data, header, beside)
        if kind == _SEND:
            self._handler(payload, tensors)
            return self._owed.owe()
        if kind == _CALL:
            return _answer(self._handler(payload, tensors))
        if kind == _WATCH:
            future = torch.futures.Future()
            with self._lock:
                self._watchers[sender] = future
            return future
        member = msgspec.msgpack.decode(payload, type=_Member)
        if kind == _ADD:
            self._add(member)
            return wire.ACK
        if kind == _REMOVE:
            if member.id == self._id:
                self._found_out()
            else:
                with self._lock:
                    self._remove(member)
            return wire.ACK
        if kind == _ADMIT:
            return self._admit(member)
        return wire.ERROR + b"unknown kind of message"

    def _admit(self, joiner: _Member) -> torch.futures.Future:
        """Head: make `joiner` a member and answer with the members once they all know it, or had time to."""
        future = torch.futures.Future()
        with self._lock:
            if joiner.name == self.name or joiner.name in self._peers:
                future.set_result(wire.ERROR + f"the name {joiner.name} is taken by a live member".encode())
                return future
            others = list(self._peers.values())
            members = [peer.member for peer in others]
            self._add(joiner)
            peer = self._peers[joiner.name]
        note = msgspec.msgpack.encode(joiner)
        acks = [ack for other in others if (ack := self._try_invoke(other, _ADD, note, self._ack_timeout_s))]
        left = [len(acks) + 1]

        def acknowledged(_: Any = None) -> None:
            with self._lock:
                left[0] -= 1
                if left[0]:
                    return
            future.set_result(wire.OK + msgspec.msgpack.encode(members))

        for ack in acks:
            ack.add_done_callback(acknowledged)
        acknowledged()
        self._watch(peer)
        return future

    # -- the address book -----------------------------------------------------------------------------------

    def _add(self, member: _Member) -> None:
        with self._lock:
            known = self._peers.get(member.name)
            if self._closed or member.id in self._out or member.id == self._id:
                return
            if known is not None:
                if known.member.id >= member.id:
                    return
                self._remove(known.member)
            assert self._agent is not None
            handle = self._agent.add(member.id, member.address, member.device)
            self._peers[member.name] = _Peer(member, handle, wire.address_prefix(self._group, member.id, self._id))

    def _remove(self, member: _Member) -> None:
        """Forget `member` (not a later one of the same name) and refuse it from now on. The lock is held."""
        self._out.add(member.id)
        watcher = self._watchers.pop(member.id, None)
        if watcher is not None:
            watcher.set_result(wire.OUT)
        known = self._peers.get(member.name)
        if known is not None and known.member.id == member.id:
            del self._peers[member.name]
            assert self._agent is not None
            self._agent.remove(known.handle)

    # -- losing and being lost ------------------------------------------------------------------------------

    def _watch(self, peer: _Peer) -> None:
        """Open the tripwire: a request that is only ever answered by the end of one of us."""

        def broken(done: torch.futures.Future) -> None:
            _, error = self._outcome(peer.member.name, done)
            with self._lock:
                quiet = self._closed or self._evicted or peer.member.id in self._out
            if quiet:
                return
            log.debug("tripwire of %s: %s", peer.member.name, error)
            if self._on_lost is not None:
                self._on_lost(peer.member.name)

        request = self._try_invoke(peer, _WATCH, b"", 0.0)
        if request is not None:
            request.add_done_callback(broken)

    def _found_out(self) -> None:
        """This member is no longer one."""
        with self._lock:
            if self._evicted or self._closed or self.is_head:
                return
            self._evicted = True
        log.warning("%s was evicted from the group", self.name)
        if self._on_lost is not None:
            self._on_lost(self._head_name)


_door: Door | None = None


def _completed(reply: bytes) -> torch.futures.Future:
    future = torch.futures.Future()
    future.set_result(reply)
    return future


def _answer(reply: Reply) -> bytes | torch.futures.Future:
    """A handler's reply as it travels."""
    if not isinstance(reply, concurrent.futures.Future):
        return wire.OK + (reply or b"")
    future = torch.futures.Future()

    def finish(done: concurrent.futures.Future[bytes]) -> None:
        if done.cancelled():
            future.set_result(wire.ERROR + b"the reply was cancelled")
        elif error := done.exception():
            future.set_result(wire.ERROR + f"{type(error).__name__}: {error}".encode())
        else:
            future.set_result(wire.OK + (done.result() or b""))

    reply.add_done_callback(finish)
    return future


@atexit.register
def _close_at_exit() -> None:
    if _door is not None:
        _door.close()
