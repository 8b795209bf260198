"""A worker's lives, each with a head of its own, without a server: the door is a stand-in that says what a head would."""

import gc
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.ids import LayerRange
from runtime import __main__ as entry
from runtime import garbage, worker
from runtime.layout import Move
from runtime.messages import (
    UNIT_OF_LOAD,
    Audit,
    Heartbeat,
    Join,
    Load,
    Loaded,
    Prepare,
    Shutdown,
    ToHead,
    Welcome,
    decode_to_head,
    encode,
)
from runtime.priority import BEHIND
from runtime.rpc import Door as RealDoor
from tests.tiny_models import NUM_LAYERS, write_tiny
from tests.unit.test_loading import load_message, split
from tests.unit.test_priority import Busy, standing

HEARTBEAT_S = 0.02


class Door:
    """The head's door, from the worker's side. `heads` says, life by life, what the head does with what it is told."""

    heads: Iterator[Callable[["Door", ToHead], None]]

    def __init__(self, name: str, address: str, *, handler: Any, on_lost: Callable[[str], None], **rest: Any) -> None:
        self._hear = next(Door.heads)
        self._handler = handler
        self.lose = lambda: on_lost("head")

    def say(self, message: Any) -> None:
        self._handler(encode(message), ())

    def send(self, peer: str, payload: bytes, tensors: Any = (), on_error: Any = None) -> None:
        self._hear(self, decode_to_head(payload))

    def call(self, peer: str, payload: bytes, timeout_s: float) -> "Future[bytes]":
        reply: Future[bytes] = Future()
        reply.set_result(encode(Welcome(HEARTBEAT_S)))
        self._hear(self, decode_to_head(payload))
        return reply

    def close(self) -> None:
        pass


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[entry._Process]:
    """A worker's process that nobody else's head holds. The collector does nothing by itself, as in one with little garbage."""
    monkeypatch.setattr("runtime.rpc.Door", Door)
    monkeypatch.setattr(garbage, "settle", lambda: None)
    monkeypatch.setattr(entry, "_TRY_AGAIN_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    gc.disable()
    yield entry._Process(entry._parse(["--head", "nowhere:1", "--name", "w0", "--device", "cpu", "--threads", "1"]))
    gc.enable()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("option", "variable", "expected"), [("3", "2", 3), ("0", "2", 2), ("0", None, 4), ("0", "0", 4)]
)
def test_how_many_threads_it_has(
    option: str, variable: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []

    def choose(wanted: str, num_threads: int, emulation: object) -> None:
        chosen.append(num_threads)
        raise ValueError("enough")

    monkeypatch.setattr("runtime.device.choose_device", choose)
    monkeypatch.setattr("runtime.cores.usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(ValueError, match="enough"):
        entry._Process(entry._parse(["--head", "nowhere:1", "--threads", option]))
    assert chosen == [expected]


def test_a_worker_that_loses_its_head_keeps_the_weights_and_nothing_else(
    process: entry._Process, tmp_path: Path
) -> None:
    message: Load = load_message(write_tiny("llama", tmp_path), split(NUM_LAYERS), kv_bytes=8 << 20)
    held: list[weakref.ref[Any]] = []

    def first(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            door.say(message)
        elif isinstance(said, Loaded):
            member = process._worker._member
            held.extend(map(weakref.ref, (process._worker, member, member.pool, *member._stages.values())))
            member._give_back()  # as a change of layout does, which lets the loader ask this member
            door.lose()

    def second(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            assert said.name == "w0-r1"
            assert [ref() for ref in held] == [None] * 4, (
                "its memory is free before the next head hears how much there is"
            )
            assert sorted(process._loader.units.layers) == list(range(NUM_LAYERS))
            door.say(Shutdown("enough"))

    Door.heads = iter((first, second))
    assert process.run() == 0
    assert len(held) == 4


def test_a_worker_told_to_end_between_two_heads_serves_no_other(
    process: entry._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "collect", process._leave)
    Door.heads = iter((lambda door, said: door.lose() if isinstance(said, Join) else None,))
    assert process.run() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--head", "nowhere"), "write HOST:PORT"),
        (("--head", "192.0.2.7:7000"), "allow it explicitly (--allow-public-rpc)"),
        (("--head", "127.0.0.1:7000", "--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_what_a_worker_cannot_be_is_said_without_a_traceback(arguments: tuple[str, ...], said: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "runtime", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_head_whose_name_is_not_known_at_present_is_looked_for_again(
    process: entry._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            assert said.name == "w0-r1"
            door.say(Shutdown("enough"))

    def resolve(*arguments: Any) -> Any:
        monkeypatch.setattr("runtime.rpc.Door", Door)
        raise socket.gaierror("Name or service not known")

    Door.heads = iter((last,))
    monkeypatch.setattr("runtime.rpc.Door", RealDoor)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert process.run() == 0


def hang_in_audit(process: entry._Process, monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> None:
    """An audit lasts until the event, and a tenth of a second is too long for it."""

    def audit(message: Audit) -> None:
        assert until.wait(20.0)

    monkeypatch.setattr("runtime.messages.MAX_BUSY_S", 0.1)
    monkeypatch.setattr(process._worker._member, "audit", audit)


def test_the_heartbeat_says_for_how_long_the_compute_thread_is_at_one_message(
    process: entry._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[Heartbeat] = []
    goes_on = threading.Event()

    def head(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            hang_in_audit(process, monkeypatch, goes_on)
        if not isinstance(said, Heartbeat):
            return
        beats.append(said)
        if len(beats) == 1:
            door.say(Audit([], 0))
        elif said.is_hung:
            goes_on.set()
        elif goes_on.is_set() and not said.busy_with:
            door.say(Shutdown("enough"))

    Door.heads = iter((head,))
    assert process.run() == 0
    assert (beats[0].busy_with, beats[0].busy_s) == ("", 0.0)
    at_it = [beat for beat in beats if beat.busy_with]
    assert {beat.busy_with for beat in at_it} == {"Audit"}
    lengths = [beat.busy_s for beat in at_it]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 0.1
    assert (beats[-1].busy_with, beats[-1].busy_s) == ("", 0.0)


def test_a_process_whose_compute_thread_hangs_ends_once_it_is_given_up(
    process: entry._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    goes_on = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        goes_on.set()

    monkeypatch.setattr(worker.os, "_exit", end)

    def head(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            hang_in_audit(process, monkeypatch, goes_on)
            door.say(Audit([], 0))
        elif isinstance(said, Heartbeat) and said.is_hung:
            assert not codes, "it is the head that decides"
            door.lose()

    Door.heads = iter((head, lambda door, said: door.say(Shutdown("enough")) if isinstance(said, Join) else None))
    assert process.run() == 0
    assert codes == [1]


def test_a_load_that_reads_is_hung_when_one_unit_takes_too_long_not_the_whole(
    process: entry._Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load: Load = load_message(write_tiny("llama", tmp_path), split(NUM_LAYERS), kv_bytes=8 << 20)
    codes: list[int] = []
    reading: list[Any] = []
    hung_at: list[Any] = []
    goes_on = threading.Event()
    build = process._loader._build

    def end(code: int) -> None:
        codes.append(code)
        goes_on.set()

    def slow(key: Any, parts: Any = None) -> Any:
        reading.append(key)
        assert goes_on.wait(20.0) if key == NUM_LAYERS - 1 else not time.sleep(0.15)
        return build(key, parts)

    monkeypatch.setattr(worker.os, "_exit", end)
    monkeypatch.setattr("runtime.messages.MAX_READING_S", 0.4)
    monkeypatch.setattr("runtime.messages.MAX_BUSY_S", 0.01)
    monkeypatch.setattr(process._loader, "_build", slow)

    def first(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            door.say(load)
        elif isinstance(said, Heartbeat) and said.is_hung:
            assert said.busy_with == UNIT_OF_LOAD
            hung_at.append(reading[-1])
            door.lose()

    def second(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            door.say(Shutdown("enough"))

    Door.heads = iter((first, second))
    assert process.run() == 0
    assert codes[:1] == [1]
    assert hung_at[0] == NUM_LAYERS - 1, "all together took too long before"


def test_a_worker_whose_head_dies_while_it_prepares_does_not_stay_behind_others(
    process: entry._Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Busy(0)
    process._priority = standing(file, monkeypatch)
    load: Load = load_message(write_tiny("llama", tmp_path), split(NUM_LAYERS), kv_bytes=8 << 20)
    moves = (Move(LayerRange(0, NUM_LAYERS), "w9", "w0"),)

    def first(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            door.say(Prepare(load.layout.epoch, 0, load, moves, [], copies=False, ends=("w9", "w9")))
        elif isinstance(said, Heartbeat) and file.written:
            door.lose()

    def second(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            assert file.written == [str(BEHIND), "0"]
            door.say(Shutdown("enough"))

    Door.heads = iter((first, second))
    assert process.run() == 0
    assert file.written == [str(BEHIND), "0"]


def test_the_time_without_a_head_begins_anew_when_one_was_there_for_a_moment(
    process: entry._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = iter((100.0, 100.0 + 0.9 * process._args.rejoin_timeout, 100.0 + 1.1 * process._args.rejoin_timeout))
    monkeypatch.setattr(entry, "time", SimpleNamespace(monotonic=lambda: next(now_s), sleep=lambda seconds: None))

    def dies(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            door.lose()

    def last(door: Door, said: ToHead) -> None:
        if isinstance(said, Join):
            assert said.name == "w0-r3", "each of the three was there"
            door.say(Shutdown("enough"))

    Door.heads = iter((dies, dies, dies, last))
    assert process.run() == 0
    assert next(now_s, None) is None
