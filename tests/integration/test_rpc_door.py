"""The door with real processes: messages, membership, and members that die or freeze at the worst moment."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import permutations
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from runtime.address import Unreachable, listen, parse_address
from runtime.rpc import Door, JoinError, PeerLost, PeerTimeout, RemoteError
from tests.integration import echo_worker

DEADLINE_S = 30.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.integration.echo_worker"])


class Group:
    """A head in this process and echo workers in others."""

    def __init__(self, address: str = "127.0.0.1:0", *, founded: bool = True) -> None:
        self.lost: list[str] = []
        self.messages: list[tuple[bytes, list[torch.Tensor]]] = []
        self.processes: list[BaseProcess] = []
        self.current: dict[str, BaseProcess] = {}
        self.outputs: dict[str, Connection] = {}
        self.address = address
        if founded:
            self.found(address)

    def found(self, address: str, listener: socket.socket | None = None) -> None:
        self.door = Door(
            "head",
            address,
            is_head=True,
            handler=lambda payload, tensors: self.messages.append((payload, tensors)),
            on_lost=self.lost.append,
            timeout_s=10.0,
            listener=listener,
        )
        self.address = self.door.address

    def spawn(self, name: str, *args: str) -> BaseProcess:
        """An echo worker, forked from a process that has torch imported."""
        self.outputs[name], say = _FORKS.Pipe(duplex=False)
        argv = ["--head", self.address, "--name", name, "--lifeline-pid", str(os.getpid()), *args]
        process = _FORKS.Process(target=_run_worker, args=(argv, say), daemon=True)
        process.start()
        say.close()
        self.processes.append(process)
        self.current[name] = process
        return process

    def expect(self, name: str, text: str) -> str:
        """The next line of a worker's output, which must contain `text`."""
        assert self.outputs[name].poll(DEADLINE_S), f"{name} is silent"
        found = self.outputs[name].recv()
        assert text in found
        return found

    def join(self, *names: str, args: tuple[str, ...] = ()) -> None:
        for name in names:
            self.spawn(name, *args)
        for name in names:
            self.expect(name, "joined")

    def ask(self, name: str, question: str, timeout_s: float = 10.0) -> str:
        return self.door.call(name, question.encode(), timeout_s=timeout_s).result(timeout_s + 5.0).decode()

    def all_talk(self, *names: str) -> None:
        for source, target in permutations(names, 2):
            assert self.ask(source, f"say {target} hello from {source}") == f"hello from {source}"

    def close(self) -> None:
        self.door.close()
        for process in self.processes:
            process.kill()
            process.join(DEADLINE_S)

    def signal(self, name: str, number: int) -> None:
        pid = self.current[name].pid
        assert pid is not None
        os.kill(pid, number)


def _run_worker(argv: list[str], say: Connection) -> None:
    sys.exit(echo_worker.main(argv, say.send))


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group()
    yield group
    group.close()


def eventually(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def test_payloads_and_tensors_arrive_as_they_were(group: Group) -> None:
    group.join("a")
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 24, generator=generator)
    tensors = [
        *(base.to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)),
        *(
            (base * 9).to(dtype)
            for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
        ),
        torch.tensor(7.5),
        torch.empty(0, 576),
        base.t()[3:9, ::2],
        torch.randn(300, 576, generator=generator),  # beside the payload
        torch.randn(64, 4096, generator=generator).bfloat16()[:, 7:2000],
        torch.ones(3, requires_grad=True),
    ]
    with torch.inference_mode():
        tensors.append(torch.randn(2, 3))
    group.door.send("a", b"back", tensors)
    eventually(lambda: group.messages)
    returned = group.messages[0][1]
    assert len(returned) == len(tensors)
    for sent, got in zip(tensors, returned, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert torch.equal(got, sent)
        got.zero_()  # it is ours to write
    assert group.ask("a", "echo " + "x" * 3_000_000) == "x" * 3_000_000
    assert group.ask("a", "echo ") == ""


def test_sends_of_one_peer_are_handled_in_order(group: Group) -> None:
    group.join("a")
    sent = [f"message-{i}" for i in range(500)]
    for i, text in enumerate(sent):
        group.door.send("a", text.encode(), [torch.zeros(1 << 18)] if i % 50 == 0 else [])
    eventually(lambda: len(json.loads(group.ask("a", "received"))) == 500)
    assert json.loads(group.ask("a", "received")) == sent


def test_a_failing_handler_is_the_callers_error_and_nothing_more(group: Group) -> None:
    group.join("a")
    errors: list[Exception] = []
    with pytest.raises(RemoteError, match="as you wish"):
        group.ask("a", "fail")
    group.door.send("a", b"fail", on_error=errors.append)
    eventually(lambda: errors)
    assert isinstance(errors[0], RemoteError)
    assert group.ask("a", "echo still here") == "still here"
    with pytest.raises(ValueError, match="complex64"):
        group.door.send("a", b"", [torch.zeros(1, dtype=torch.complex64)])


def test_four_join_at_once_and_all_know_each_other(group: Group) -> None:
    group.join("a", "b", "c", "d")
    assert sorted(group.door.members()) == ["a", "b", "c", "d", "head"]
    for name in "abcd":
        assert sorted(json.loads(group.ask(name, "members"))) == ["a", "b", "c", "d", "head"]
    group.all_talk("a", "b", "c", "d")


def test_a_killed_member_is_noticed_evicted_and_replaced(group: Group) -> None:
    group.join("a", "b", "c")
    group.all_talk("a", "b", "c")
    group.current["b"].kill()
    eventually(lambda: group.lost)
    assert group.lost == ["b"]
    errors: list[Exception] = []
    group.door.send("b", b"anyone", on_error=errors.append)
    eventually(lambda: errors)
    assert isinstance(errors[0], PeerLost)
    with pytest.raises(PeerLost):
        group.ask("b", "echo anyone")
    with pytest.raises(RemoteError, match="b"):  # a's own call to b fails, and a says so
        group.ask("a", "say b anyone")
    group.all_talk("a", "c")
    group.join("d")  # before the eviction: the dead delay nobody
    group.door.evict("b")
    assert "b" not in group.door.members()
    eventually(lambda: "b" not in json.loads(group.ask("a", "members")))
    group.join("b")
    group.all_talk("a", "b", "c", "d")
    assert group.lost == ["b"]


@pytest.mark.parametrize("moment", ["before-admission", "after-admission"])
def test_a_member_killed_while_it_joins_blocks_nobody(group: Group, moment: str) -> None:
    group.join("a")
    halfway = group.spawn("b", "--hang", moment)
    group.expect("b", "hanging")
    halfway.kill()
    halfway.join(DEADLINE_S)
    if moment == "after-admission":
        eventually(lambda: group.lost == ["b"])
        group.door.evict("b")
    group.join("c", "b")
    group.all_talk("a", "b", "c")


def test_a_frozen_member_times_out_and_finds_itself_out_when_it_wakes(group: Group) -> None:
    group.join("a")
    group.join("frozen", args=("--tick",))
    eventually(lambda: any(payload == b"tick frozen" for payload, _ in group.messages))
    process = group.current["frozen"]
    group.signal("frozen", signal.SIGSTOP)
    with pytest.raises(PeerTimeout):
        group.ask("frozen", "echo anyone", timeout_s=0.5)
    group.join("b")  # waits for the frozen member's word, but not for long
    unanswered = group.door.call("frozen", b"echo anyone", timeout_s=3600.0)
    group.door.evict("frozen")
    with pytest.raises(PeerLost):
        unanswered.result(DEADLINE_S)
    time.sleep(0.2)
    group.messages.clear()
    group.signal("frozen", signal.SIGCONT)
    process.join(DEADLINE_S)
    assert process.exitcode == 3
    assert group.messages == []
    assert group.lost == []
    group.join("frozen")
    group.all_talk("a", "b", "frozen")


def test_a_broken_connection_stays_broken_and_the_sender_is_told_of_all_that_it_cannot_know_of(group: Group) -> None:
    """What `tests/sim/network.py` takes for granted. Nobody has died, so nobody else hears of it."""
    group.join("a", "b")
    group.all_talk("a", "b")
    group.ask("a", "tell b before")
    eventually(lambda: json.loads(group.ask("b", "received")) == ["before"])
    assert int(group.ask("a", "cut b")) > 0
    group.ask("a", "tell b after")
    eventually(lambda: len(json.loads(group.ask("a", "received"))) == 2)
    assert all(error.startswith("b: ") for error in json.loads(group.ask("a", "received")))
    group.ask("a", "tell b much later")
    eventually(lambda: len(json.loads(group.ask("a", "received"))) == 3)
    assert json.loads(group.ask("b", "received")) == ["before"]
    assert group.ask("b", "say a hello from b") == "hello from b", "the other way round there is another connection"
    assert not group.lost
    assert sorted(group.door.members()) == ["a", "b", "head"]


def test_a_worker_joins_the_next_head_at_the_same_address(group: Group) -> None:
    group.join("a", args=("--rejoin",))
    about = json.loads(group.ask("a", "about"))
    for _ in range(2):
        address = group.door.address
        group.door.close()
        group.found(address)
        group.expect("a", "joined")
        assert json.loads(group.ask("a", "about"))["pid"] == about["pid"]
    group.join("b")
    group.all_talk("a", "b")


def test_calls_that_are_pending_at_the_close_fail(group: Group) -> None:
    group.join("a")
    group.signal("a", signal.SIGSTOP)
    future = group.door.call("a", b"echo anyone")
    group.door.close()
    with pytest.raises(PeerLost):
        future.result(DEADLINE_S)
    with pytest.raises(PeerLost):
        group.door.call("a", b"echo anyone").result(DEADLINE_S)


def test_a_taken_name_is_refused(group: Group) -> None:
    group.join("a")
    second = group.spawn("a")
    assert "the name a is taken" in group.expect("a", "refused")
    second.join(DEADLINE_S)
    assert second.exitcode == 4
    assert group.ask("a", "echo mine") == "mine"


def test_pickles_are_refused_unread(group: Group, tmp_path: Path) -> None:
    group.join("a")
    group.ask("a", f"smuggle {tmp_path / 'pwned'}")
    eventually(lambda: json.loads(group.ask("a", "received")))
    assert "does not speak this protocol" in json.loads(group.ask("a", "received"))[0]
    assert not (tmp_path / "pwned").exists()


def test_everything_listens_on_loopback_only(group: Group) -> None:
    group.join("a")
    for pid in (os.getpid(), group.current["a"].pid):
        listening = [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1"}


def test_addresses_that_cannot_be_meant_are_refused() -> None:
    for text in ("localhost", "localhost:http", "127.0.0.1:70000", ":8000"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(text)
    with pytest.raises(Unreachable, match="cannot resolve"):
        parse_address("no.such.host.invalid:1")
    with pytest.raises(ValueError, match="neither authenticates nor encrypts"):
        parse_address("192.0.2.7:8000")
    with pytest.raises(ValueError, match="every interface"):
        parse_address("0.0.0.0:8000", allow_public=True)
    assert parse_address("192.0.2.7:8000", allow_public=True) == ("192.0.2.7", 8000)
    assert parse_address("localhost:0") == ("127.0.0.1", 0)
    with pytest.raises(ValueError, match="member name"):
        Door("no spaces", "localhost:0", is_head=True, handler=lambda *_: None)


def test_a_join_without_a_head_ends_and_says_what_it_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(JoinError, match=f"127.0.0.1:{port}"):
            Door("a", f"127.0.0.1:{port}", is_head=False, handler=lambda *_: None, join_timeout_s=1.0)
    with pytest.raises(JoinError, match=f"no head at 127.0.0.1:{port} within 0.5 s"):
        Door("a", f"127.0.0.1:{port}", is_head=False, handler=lambda *_: None, join_timeout_s=0.5)


def test_workers_may_come_before_their_head() -> None:
    listener = listen("127.0.0.1", 0)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    group = Group(address, founded=False)
    group.spawn("a")
    time.sleep(1.0)  # the worker knocks by now, or will later: both must do
    group.found(address, listener)
    try:
        group.expect("a", "joined")
        assert group.ask("a", "echo hello") == "hello"
    finally:
        group.close()


@pytest.mark.parametrize("address", ["[::1]:0", "127.0.0.3:0"])
def test_any_loopback_address_serves(address: str) -> None:
    group = Group(address)
    try:
        group.join("a", "b")
        group.all_talk("a", "b")
    finally:
        group.close()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(JoinError, match=f"127.0.0.1:{port}.*in use"):
            Door("head", f"127.0.0.1:{port}", is_head=True, handler=lambda *_: None)
