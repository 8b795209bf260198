"""The door: the only module that knows `torch.distributed.rpc`.

One process has one `Door` at a time. A message is bytes plus tensors; it is delivered by calling the receiver's
handler in an RPC thread. The head hosts a small TCP store through which a joiner learns the head's TensorPipe
address and takes a number (its id, never used twice); everything after that goes over TensorPipe.

How it works:

- **Membership is the head's.** Torch's own dynamic groups let every joiner call every registered member under a
  token in the store, so that one dead member, or one joiner that dies half-way, blocks all later joins. Here each
  process keeps its address book in a private in-process store; a joiner asks the head alone, the head tells the
  members, waits a bounded time for their word, and answers. A joiner that dies half-way was never anybody's
  member, and a dead member delays nobody.
- **Nothing is pickled.** Torch would pickle a function and its arguments and unpickle them at the other end. We
  replace the four private hooks of its Python layer (`_Hooks`), so that the bytes on the wire are our own header
  and the caller's payload. Bytes that are not ours are refused, never unpickled.
- **Small tensors ride in the payload**, large ones as TensorPipe tensors: on loopback a separate tensor costs
  twice what a whole small message does.
- **Transport `uv` only.** Torch's default picks `shm`, whose reactor spins: a whole core per process, idle or not.
- **Tripwires.** The head keeps one unanswered request open at every member, and every member one at the head. It
  fails the moment the other end's connection does, which is how `on_lost` knows of a death without a heartbeat.

Never true: `send` never waits for the peer. A message of an evicted member, or of another group that once had
this address, never reaches the handler. With `num_threads=1` messages of one peer are handled in the order they
were sent; nothing is promised between peers, nor for two or more threads.

Sharp edges: handlers run in RPC threads and must hand work on, not do it; with one thread, a handler that waits
for a reply waits forever. TensorPipe neither authenticates nor encrypts: whoever reaches its port is a member. It
listens on one interface only (the head's), and a head that is not on loopback needs `allow_public=True`.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import msgspec
import torch
import torch.distributed.rpc as torch_rpc
from torch._C._distributed_autograd import _init as _init_autograd
from torch._C._distributed_c10d import HashStore, TCPStore
from torch._C._distributed_rpc import (
    TensorPipeAgent,
    WorkerInfo,
    _invoke_rpc_python_udf,
    _is_current_rpc_agent_set,
)
from torch.distributed.rpc import api as rpc_api
from torch.distributed.rpc import internal as rpc_internal

from runtime import wire
from runtime.address import Unreachable, await_port, interface_of, is_same_interface, listen, parse_address

log = logging.getLogger(__name__)

Reply: TypeAlias = "bytes | concurrent.futures.Future[bytes] | None"
Handler: TypeAlias = Callable[[bytes, list[torch.Tensor]], Reply]

MAX_MEMBER_ID = 32767  # TensorPipe's worker id is an int16

_SEND, _CALL, _ADMIT, _ADD, _REMOVE, _WATCH = range(6)
_ACK, _OK, _ERROR, _OUT, _STRANGER, _REFUSED = (bytes([code]) for code in range(6))
_NAME = re.compile(r"[A-Za-z0-9_:-]{1,127}")
_GONE = re.compile(
    r"eof|refused|reset|broken pipe|closed|no longer running|unknown (destination )?worker|shutting down|"
    r"unreachable|not initialized|canceled|EPIPE|ECONN",
    re.IGNORECASE,
)
_LATE = re.compile(r"timeout|timed out|time out", re.IGNORECASE)


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


class _HeadCard(msgspec.Struct, frozen=True, array_like=True):
    member: _Member
    group: bytes


class _Peer:
    """A member as the sender needs it: TensorPipe's handle and the ready-made first bytes of each message."""

    __slots__ = ("info", "member", "prefix")

    def __init__(self, member: _Member, group: bytes, self_id: int) -> None:
        self.member = member
        self.info = WorkerInfo(member.name, member.id)
        self.prefix = wire.address_prefix(group, member.id, self_id)


class Door:
    """This process's membership in the group of the head at `head`.

    The constructor returns when the head and every live member know this one, or raises.

    Args:
        name: unique in the group: letters, digits, ``_``, ``:`` and ``-``, at most 127.
        head: "HOST:PORT" of the head's store. The head may give port 0 and read `address`.
        is_head: this process hosts the store and decides who is a member.
        handler: called in an RPC thread with each message's payload and tensors (CPU, owned by the callee). For a
            `call` it returns the reply, or a `concurrent.futures.Future` of it when the reply takes time.
        on_lost: called once per member, in an RPC thread, when its connection ends. The head hears of every
            member, a member hears of the head only (also when it finds itself evicted).
        num_threads: RPC threads. One is the cheapest and keeps the order of each peer's messages.
        timeout_s: how long a `send` may stay unacknowledged, and the default for `call`.
        join_timeout_s: limit on the constructor.
        allow_public: permits a head that is not on loopback.
        listener: head only, what `address.listen` gave for this address: workers can then be started before the door.

    Raises:
        ValueError: bad name or address, or a public address without `allow_public`.
        JoinError: no head at the address, the name is taken, or the deadline passed.
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
    ) -> None:
        global _door
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no member name: 1 to 127 letters, digits, '_', ':' or '-'")
        if _door is not None:
            raise DoorError(f"this process already has a door ({_door.name}); close it first")
        host, port = parse_address(head, allow_public=allow_public)
        if not is_head and port == 0:
            raise ValueError(f"{head}: a worker needs the head's port")
        self.name = name
        self.is_head = is_head
        self._handler = handler
        self._on_lost = on_lost
        self._timeout_s = timeout_s
        self._ack_timeout_s = ack_timeout_s
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
        self._book = HashStore()
        self._store: TCPStore | None = None
        deadline = time.monotonic() + join_timeout_s
        _door = self
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

    # -- messages -------------------------------------------------------------------------------------------

    def send(
        self,
        to: str,
        payload: bytes,
        tensors: Sequence[torch.Tensor] = (),
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Hand a message to the network and return; the peer's handler runs some time later, or never.

        CPU tensors only. Their memory must stay as it is until the message is out when they are larger than
        `wire.INLINE_TENSOR_BYTES` (smaller ones are copied here). `on_error` gets a `PeerLost` or `PeerTimeout` when
        delivery failed, in an RPC thread, or on this thread before `send` returns when the peer is unknown.

        Raises:
            ValueError: the payload is too large or a tensor is of a kind that cannot travel.
        """
        try:
            future = self._invoke(self._peer(to), _SEND, payload, tensors, self._timeout_s)
        except PeerError as error:
            if on_error is not None:
                on_error(error)
            return
        if on_error is not None:
            future.add_done_callback(lambda done: self._report(to, done, on_error))

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
            pending, self._pending = list(self._pending), {}
        for future in pending:
            future.set_exception(PeerLost(self.name, "the door was closed"))
        try:
            if _is_current_rpc_agent_set():
                rpc_api.shutdown(graceful=False)
        finally:
            self._store = None
            if _door is self:
                _door = None

    # -- founding and joining -------------------------------------------------------------------------------

    def _found(self, listener: socket.socket, num_threads: int, timeout_s: float) -> None:
        self._host, self._port = listener.getsockname()[:2]
        self._store = TCPStore(
            host_name=self._host,
            port=self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        self._group = secrets.token_bytes(8)
        me = self._start_agent(0, self._host, num_threads)
        self._store.set("head", msgspec.json.encode(_HeadCard(me, self._group)).decode())

    def _join(self, host: str, port: int, num_threads: int, deadline: float, timeout_s: float) -> None:
        self._host, self._port = host, port
        where = f"{host}:{port}"
        local_host = await_port(host, port, deadline, timeout_s)
        card, self._id = _read_card(host, port, deadline)
        if self._id > MAX_MEMBER_ID:
            raise JoinError(f"the head at {where} has handed out all {MAX_MEMBER_ID} member ids; restart it")
        self._group, self._head_name = card.group, card.member.name
        me = self._start_agent(self._id, local_host, num_threads)
        self._add(card.member)
        self._ask_admission(me, where, deadline)
        self._watch(self._peers[self._head_name])

    def _ask_admission(self, me: _Member, where: str, deadline: float) -> None:
        answered = threading.Event()
        outcome: list[Any] = [None, None]

        def finish(done: torch.futures.Future) -> None:
            outcome[:] = self._outcome(self._head_name, done)
            answered.set()

        left_s = _left(deadline).total_seconds()
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
        """Start TensorPipe on the interface that has `host`, with an address book that nobody else writes."""
        _Hooks.install()
        # TensorPipe takes its address from this variable alone, once per process.
        os.environ["TP_SOCKET_IFNAME"] = interface_of(host)
        options = torch_rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=num_threads, rpc_timeout=self._timeout_s, _transports=["uv"], _channels=["basic"]
        )
        _init_autograd(0)  # a required call; the id is only used by distributed autograd
        agent = TensorPipeAgent(self._book, self.name, member_id, None, options, {}, [])
        rpc_api._init_rpc_states(agent)
        self._agent = agent
        address = self._book.get(f"addrs/{self.name}").decode()
        if not is_same_interface(address, host):
            raise JoinError(f"TensorPipe listens on {address}, not on {host}; one process can serve one interface only")
        return _Member(self.name, member_id, address)

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
        data, beside = wire.pack(peer.prefix, kind, payload, tensors)
        return self._post(peer, data, beside, timeout_s, kind in _ANSWERED_LATER)

    def _post(
        self, peer: _Peer, data: bytes, beside: list[torch.Tensor], timeout_s: float, answered_later: bool
    ) -> torch.futures.Future:
        try:
            return _invoke_rpc_python_udf(peer.info, data, beside, timeout_s, answered_later)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _translate(peer.member.name, error) from None

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

    def _outcome(self, name: str, done: torch.futures.Future) -> tuple[Any, PeerError | None]:
        try:
            value = done.value()
        except RuntimeError as error:
            return None, _translate(name, error)
        if isinstance(value, _Refusal):
            return None, (PeerLost if value.is_loss else RemoteError)(name, value.why)
        return value, None

    def _report(self, name: str, done: torch.futures.Future, on_error: Callable[[Exception], None]) -> None:
        _, error = self._outcome(name, done)
        if error is not None and not self._closed:
            on_error(error)

    # -- what comes in (RPC threads) ------------------------------------------------------------------------

    def _receive(self, data: bytes, beside: list[torch.Tensor]) -> Any:
        """Handle one request; returns the reply's bytes or a torch future of them."""
        header = wire.header_of(data)
        kind, sender = header.kind, header.sender
        if header.group != self._group or header.to != self._id or self._closed:
            return _wrap(_STRANGER, kind in _ANSWERED_LATER)
        if sender in self._out:
            return _wrap(_OUT, kind in _ANSWERED_LATER)
        payload, tensors = wire.unpack(data, header, beside)
        if kind == _SEND:
            self._handler(payload, tensors)
            return _ACK
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
            return _ACK
        if kind == _REMOVE:
            if member.id == self._id:
                self._found_out()
            else:
                with self._lock:
                    self._remove(member)
            return _ACK
        if kind == _ADMIT:
            return self._admit(member)
        return _ERROR + b"unknown kind of message"

    def _admit(self, joiner: _Member) -> torch.futures.Future:
        """Head: make `joiner` a member and answer with the members once they all know it, or had time to."""
        future = torch.futures.Future()
        with self._lock:
            if joiner.name == self.name or joiner.name in self._peers:
                future.set_result(_ERROR + f"the name {joiner.name} is taken by a live member".encode())
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
            future.set_result(_OK + msgspec.msgpack.encode(members))

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
            self._book.set(f"addrs/{member.name}", member.address)
            self._agent._update_group_membership(WorkerInfo(member.name, member.id), [], {}, True)
            self._peers[member.name] = _Peer(member, self._group, self._id)

    def _remove(self, member: _Member) -> None:
        """Forget `member` (not a later one of the same name) and refuse it from now on. The lock is held."""
        self._out.add(member.id)
        watcher = self._watchers.pop(member.id, None)
        if watcher is not None:
            watcher.set_result(_OUT)
        known = self._peers.get(member.name)
        if known is not None and known.member.id == member.id:
            del self._peers[member.name]
            self._agent._update_group_membership(WorkerInfo(member.name, member.id), [], {}, False)

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


_ANSWERED_LATER = frozenset((_CALL, _ADMIT, _WATCH))
_door: Door | None = None


class _Refusal:
    """The sender's view of a reply that is no answer."""

    __slots__ = ("is_loss", "why")

    def __init__(self, why: str, is_loss: bool = False) -> None:
        self.why = why
        self.is_loss = is_loss


class _Handled:
    """A request that was handled while torch believed it was unpickling it."""

    __slots__ = ("reply",)

    def __init__(self, reply: Any) -> None:
        self.reply = reply


_ACKNOWLEDGED = _Handled(_ACK)


class _Hooks:
    """Torch's C++ looks these up in `torch.distributed.rpc.internal` when an agent starts, and calls them for
    each request (`deserialize`, `_run_function`, `serialize`) and each reply (`deserialize`)."""

    @staticmethod
    def install() -> None:
        rpc_internal.deserialize = _Hooks.deserialize
        rpc_internal.serialize = _Hooks.serialize
        rpc_internal._run_function = _Hooks.run

    @staticmethod
    def deserialize(data: bytes, tensors: list[torch.Tensor]) -> Any:
        if data == _ACK:
            return None
        if wire.is_message(data):
            return _handle_request(data, tensors)
        return _read_reply(data)

    @staticmethod
    def run(handled: Any) -> Any:
        return handled.reply if isinstance(handled, _Handled) else _REFUSED

    @staticmethod
    def serialize(reply: Any) -> tuple[bytes, list[torch.Tensor]]:
        return (reply if isinstance(reply, bytes) else _REFUSED), []


def _handle_request(data: bytes, tensors: list[torch.Tensor]) -> _Handled:
    door = _door
    later = wire.kind_of(data) in _ANSWERED_LATER
    if door is None:
        return _Handled(_wrap(_STRANGER, later))
    try:
        reply = door._receive(data, tensors)
    except Exception as error:
        log.exception("%s could not handle a message", door.name)
        return _Handled(_wrap(_ERROR + f"{type(error).__name__}: {error}".encode(), later))
    return _ACKNOWLEDGED if reply is _ACK else _Handled(reply)


def _read_reply(data: bytes) -> Any:
    code = data[:1]
    if code == _OK:
        return data[1:]
    if code == _OUT:
        if _door is not None:
            _door._found_out()
        return _Refusal("this member was evicted", is_loss=True)
    if code == _STRANGER:
        return _Refusal("its address now belongs to another group, or it is leaving", is_loss=True)
    if code == _ERROR:
        return _Refusal(data[1:].decode(errors="replace"))
    return _Refusal("the peer does not speak this protocol")


def _wrap(reply: bytes, later: bool) -> Any:
    if not later:
        return reply
    future = torch.futures.Future()
    future.set_result(reply)
    return future


def _answer(reply: Reply) -> torch.futures.Future:
    """The torch future of a handler's reply."""
    if not isinstance(reply, concurrent.futures.Future):
        return _wrap(_OK + (reply or b""), later=True)
    future = torch.futures.Future()

    def finish(done: concurrent.futures.Future[bytes]) -> None:
        if done.cancelled():
            future.set_result(_ERROR + b"the reply was cancelled")
        elif error := done.exception():
            future.set_result(_ERROR + f"{type(error).__name__}: {error}".encode())
        else:
            future.set_result(_OK + (done.result() or b""))

    reply.add_done_callback(finish)
    return future


def _translate(name: str, error: Exception) -> PeerError:
    text = _first_line(error)
    if _LATE.search(text):
        return PeerTimeout(name, text)
    if _GONE.search(text):
        return PeerLost(name, text)
    return RemoteError(name, text)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _read_card(host: str, port: int, deadline: float) -> tuple[_HeadCard, int]:
    """The head's card from its store, and an id for us.

    The store's client connects without a deadline of its own (something else, or a frozen head, may listen there), so
    it gets a thread that we can leave behind.
    """
    result: list[Any] = []

    def read() -> None:
        try:
            store = TCPStore(
                host_name=host, port=port, is_master=False, wait_for_workers=False, timeout=_left(deadline)
            )
            store.wait(["head"], _left(deadline))
            result.append((msgspec.json.decode(store.get("head"), type=_HeadCard), store.add("ids", 1)))
        except Exception as error:
            result.append(error)

    reader = threading.Thread(target=read, name="join", daemon=True)
    reader.start()
    reader.join(max(0.0, deadline - time.monotonic()) + 0.1)
    if not result:
        raise JoinError(f"something listens at {host}:{port}, but no head's store answers there in time")
    if isinstance(result[0], Exception):
        raise JoinError(f"no head's store at {host}:{port}: {_first_line(result[0])}") from None
    return result[0]


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.05, deadline - time.monotonic()))


@atexit.register
def _close_at_exit() -> None:
    if _door is not None:
        _door.close()
