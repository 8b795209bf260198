# ruff: noqa: TID251 - this is the one door
"""TensorPipe as the door needs it: one agent per process, raw bytes and tensors, an address book of our own.

All private API of `torch.distributed.rpc` that we use is here (written against torch 2.11 and 2.13):

- **The agent is made by hand**, not by `init_rpc`. A dynamic group of `init_rpc` lets a joiner call every registered
  member, under a token in a shared store: one dead member, or one joiner that dies half-way, blocks all later joins.
  Our agent gets a store of its own process as its address book, and who is in it is the caller's business.
- **Nothing is pickled.** Torch pickles a function and its arguments at one end and unpickles them at the other, through
  three functions of its `internal` module that its C++ looks up when an agent starts. We put ours in their place
  (`_Hooks`): bytes that are no message of ours are refused, never unpickled.
- **Tensors on a device**, when an agent is given one, travel by TensorPipe's CUDA channels. Which device of the peer they go
  to is said by a map that an agent takes at its start and never again, by names; so the names here, unlike those that people
  see, are made of a member's id and device (`_pipe_name`), and the map names members before they exist. Torch runs
  a request on streams of its own, which it sets only after it has unpickled; so such a request is handled in `_Hooks.run`.
- **Transport `uv` only.** Torch's default prefers `shm`, whose reactor spins: a whole core per process, idle or not.

Never true: two agents in one process at a time; an agent that listens on another interface than it was given.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed.rpc as torch_rpc
from torch._C._distributed_autograd import _init as _init_autograd
from torch._C._distributed_c10d import HashStore, TCPStore
from torch._C._distributed_rpc import TensorPipeAgent, WorkerInfo, _invoke_rpc_python_udf, _is_current_rpc_agent_set
from torch.distributed.rpc import api as rpc_api
from torch.distributed.rpc import internal as rpc_internal

from runtime import wire
from runtime.address import Unreachable, interface_of, is_same_interface

log = logging.getLogger(__name__)

Receive: TypeAlias = Callable[[bytes, list[torch.Tensor]], "bytes | torch.futures.Future[bytes]"]

MAX_MAPPED_ID = 1024
"""Members with larger ids get what is on a device by way of the host: the map of names has an end."""

_GONE = re.compile(
    r"eof|refused|reset|broken pipe|closed|no longer running|unknown (destination )?worker|shutting down|"
    r"unreachable|not initialized|canceled|EPIPE|ECONN",
    re.IGNORECASE,
)
_kept = threading.local()
_LATE = re.compile(r"timeout|timed out|time out", re.IGNORECASE)


class Gone(Exception):
    """The connection ended, or there never was one."""


class Late(Exception):
    """No answer within the time given."""


class Agent:
    """This process on the network.

    Args:
        name, member_id: who we are; an id is never used twice in a group.
        host: our own address; TensorPipe listens on its interface.
        receive: called in an RPC thread for each message; the reply's bytes, or for a message that was posted with
            `answered_later` a torch future of them.
        on_reply: called in an RPC thread with each reply that is more than `wire.ACK`.
        num_threads: RPC threads.
        timeout_s: unless a post gives its own.
        device: the index of the CUDA device whose tensors may travel as they are; None for none.
    """

    def __init__(
        self,
        name: str,
        member_id: int,
        host: str,
        receive: Receive,
        on_reply: Callable[[bytes], None],
        *,
        num_threads: int,
        timeout_s: float,
        device: int | None = None,
    ) -> None:
        self.receive = receive
        self.on_reply = on_reply
        self._book = HashStore()
        # TensorPipe takes its address from this variable alone, once per process.
        os.environ["TP_SOCKET_IFNAME"] = interface_of(host)
        self._device = device
        self._takers: set[int] = set()
        options = _options(num_threads, timeout_s, device)
        pipe_name = _pipe_name(member_id, device)
        _Hooks.install(self)
        try:
            _init_autograd(0)  # a required call; the id is only used by distributed autograd
            self._agent = TensorPipeAgent(self._book, pipe_name, member_id, None, options, {}, _devices(device))
            rpc_api._init_rpc_states(self._agent)
            self.address = self._book.get(f"addrs/{pipe_name}").decode()
            if not is_same_interface(self.address, host):
                raise Unreachable(
                    f"TensorPipe listens on {self.address}, not on {host}; one process can serve one interface only"
                )
        except BaseException:
            self.close()
            raise

    def add(self, member_id: int, address: str, device: int | None = None) -> WorkerInfo:
        """Know a member, which must not be known by that id; the handle for `post`. `device` is its agent's."""
        pipe_name = _pipe_name(member_id, device)
        info = WorkerInfo(pipe_name, member_id)
        self._book.set(f"addrs/{pipe_name}", address)
        self._agent._update_group_membership(info, [], {}, True)
        if None not in (device, self._device) and member_id <= MAX_MAPPED_ID:
            self._takers.add(member_id)
        return info

    def presentable(self, info: WorkerInfo, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`tensors` as this member can take them: those on a device on the host, unless there is a way between devices."""
        if not tensors or info.id in self._takers or all(tensor.is_cpu for tensor in tensors):
            return tensors
        return [tensor.cpu() for tensor in tensors]

    def remove(self, info: WorkerInfo) -> None:
        self._agent._update_group_membership(info, [], {}, False)

    def post(
        self, info: WorkerInfo, data: bytes, beside: list[torch.Tensor], timeout_s: float, *, answered_later: bool
    ) -> torch.futures.Future:
        """Hand a message to the network; a future of the reply, for `outcome_of`. A timeout of 0 is none.

        Raises:
            Gone: the member is not known, or the agent is closed.
        """
        try:
            return _invoke_rpc_python_udf(info, data, beside, timeout_s, answered_later)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise Gone(first_line(error)) from None

    def close(self) -> None:
        """Stop at once. Never from an RPC thread."""
        _Hooks.remove(self)
        if _is_current_rpc_agent_set():
            rpc_api.shutdown(graceful=False)


def host_store(listener: socket.socket, timeout_s: float) -> TCPStore:
    """A store that answers at `listener`, which it takes over. (Left alone it would listen on every interface.)"""
    host, port = listener.getsockname()[:2]
    return TCPStore(
        host_name=host,
        port=port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def read_store(host: str, port: int, key: str, deadline: float) -> tuple[bytes, int]:
    """The value of `key` in the store there, and a number from 1 on that nobody else gets.

    The store's client connects without a deadline of its own (something else, or a frozen process, may listen there),
    so it gets a thread that we can leave behind.

    Raises:
        Unreachable: no store, or no such key, by `deadline` (`time.monotonic`).
    """
    result: list[Any] = []

    def read() -> None:
        try:
            left = timedelta(seconds=max(0.05, deadline - time.monotonic()))
            store = TCPStore(host_name=host, port=port, is_master=False, wait_for_workers=False, timeout=left)
            store.wait([key], left)
            result.append((store.get(key), store.add("ids", 1)))
        except Exception as error:
            result.append(Unreachable(first_line(error)))

    reader = threading.Thread(target=read, name="join", daemon=True)
    reader.start()
    reader.join(max(0.0, deadline - time.monotonic()) + 0.1)
    if not result:
        raise Unreachable("something listens there, but no head's store answers in time")
    if isinstance(result[0], Unreachable):
        raise result[0]
    return result[0]


def outcome_of(done: torch.futures.Future) -> bytes:
    """The reply's bytes (`wire.ACK` for a plain acknowledgement) of a completed future.

    Raises:
        Gone, Late: there is none.
    """
    try:
        value = done.value()
    except RuntimeError as error:
        text = first_line(error)
        if _LATE.search(text):
            raise Late(text) from None
        if not _GONE.search(text):
            log.warning("an unforeseen error of TensorPipe, taken for a lost connection: %s", text)
        raise Gone(text) from None
    return wire.ACK if value is None else value


def _pipe_name(member_id: int, device: int | None) -> str:
    return f"m{member_id}" if device is None else f"m{member_id}-cuda{device}"


def _devices(device: int | None) -> list[torch.device]:
    return [] if device is None else [torch.device("cuda", device)]


def _options(num_threads: int, timeout_s: float, device: int | None) -> torch_rpc.TensorPipeRpcBackendOptions:
    """Of an agent whose device, if it has one, is mapped to the device of every member that there may ever be."""
    channels = ["basic"]
    maps: dict[str, Any] = {}
    devices: list[Any] = [*_devices(device)]
    if device is not None:
        channels += ["cuda_ipc", "cuda_basic"]
        theirs = range(torch.cuda.device_count())
        maps = {_pipe_name(i, d): {device: d} for i in range(1, MAX_MAPPED_ID + 1) for d in theirs}
    return torch_rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=num_threads,
        rpc_timeout=timeout_s,
        device_maps=maps,
        devices=devices,
        _transports=["uv"],
        _channels=channels,
    )


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _keep_thread_state() -> None:
    """Let this thread of torch's keep its interpreter state.

    Torch's threads are not Python's: each call into Python makes an interpreter state, 16 KiB of fresh memory, and gives
    it back at its end, four times a message. One reference that is never released keeps it for the life of the thread.
    """
    _kept.state = ctypes.pythonapi.PyGILState_Ensure()


class _Handled:
    """A request that was handled while torch believed it was unpickling it."""

    __slots__ = ("reply",)

    def __init__(self, reply: Any) -> None:
        self.reply = reply


_ACKNOWLEDGED = _Handled(wire.ACK)


class _Arriving:
    """A request with tensors on a device, to be handled on the streams on which they arrive."""

    __slots__ = ("data", "tensors")

    def __init__(self, data: bytes, tensors: list[torch.Tensor]) -> None:
        self.data = data
        self.tensors = tensors

    def handle(self, agent: Agent) -> Any:
        for tensor in self.tensors:
            if tensor.is_cuda:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(tensor.device))
                tensor.arrived = event  # type: ignore[attr-defined]
        return agent.receive(self.data, self.tensors)


class _Hooks:
    """What torch's C++ calls for each request (`deserialize`, `run`, `serialize`) and each reply (`deserialize`)."""

    agent: Agent | None = None

    @classmethod
    def install(cls, agent: Agent) -> None:
        assert cls.agent is None, "one agent per process"
        cls.agent = agent
        rpc_internal.deserialize = cls.deserialize
        rpc_internal.serialize = cls.serialize
        rpc_internal._run_function = cls.run

    @classmethod
    def remove(cls, agent: Agent) -> None:
        if cls.agent is agent:
            cls.agent = None

    @staticmethod
    def deserialize(data: bytes, tensors: list[torch.Tensor]) -> Any:
        if not hasattr(_kept, "state"):
            _keep_thread_state()
        if data == wire.ACK:
            return None
        agent = _Hooks.agent
        if not wire.is_message(data):
            if agent is not None:
                agent.on_reply(data)
            return data
        if agent is None:
            return _Handled(wire.STRANGER)
        if tensors and any(tensor.is_cuda for tensor in tensors):
            return _Arriving(data, tensors)
        reply = agent.receive(data, tensors)
        return _ACKNOWLEDGED if reply is wire.ACK else _Handled(reply)

    @staticmethod
    def run(handled: Any) -> Any:
        if isinstance(handled, _Arriving):
            agent = _Hooks.agent
            return wire.STRANGER if agent is None else handled.handle(agent)
        return handled.reply if isinstance(handled, _Handled) else wire.REFUSED

    @staticmethod
    def serialize(reply: Any) -> tuple[bytes, list[torch.Tensor]]:
        return (reply if isinstance(reply, bytes) else wire.REFUSED), []
