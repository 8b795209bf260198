"""Local workers under real torchrun agents: they start, crash, are told to end, are killed; nothing is left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime import lifeline
from runtime.launcher import MARK, LocalWorker
from runtime.rpc import Door

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLINE_S = 60.0


class Head:
    def __init__(self) -> None:
        self.door = Door("head", "127.0.0.1:0", is_head=True, handler=lambda *_: None)
        self.lines: list[tuple[str, str]] = []
        self.ends: list[tuple[str, int]] = []
        self.workers: list[LocalWorker] = []

    def start(self, name: str, *args: str, max_restarts: int = 0, num_threads: int = 1) -> LocalWorker:
        worker = LocalWorker(
            name,
            self.door.address,
            ["--name", name, *args],
            module="echo_worker",
            python_path=[str(HERE)],
            max_restarts=max_restarts,
            num_threads=num_threads,
            on_line=lambda *line: self.lines.append(line),
            on_exit=lambda *end: self.ends.append(end),
        )
        self.workers.append(worker)
        worker.start()
        return worker

    def joined(self, *names: str) -> None:
        eventually(lambda: all((name.partition("-r")[0], f"joined as {name}") in self.lines for name in names))

    def ask(self, name: str, question: str) -> str:
        return self.door.call(name, question.encode(), timeout_s=20.0).result(25.0).decode()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.door.close()
        for worker in self.workers:
            assert worker.join(DEADLINE_S) is not None
            assert worker.processes() == []


@pytest.fixture
def head() -> Iterator[Head]:
    head = Head()
    yield head
    head.close()


def eventually(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


async def test_workers_start_side_by_side_and_end_when_told(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()  # not ours, wherever the user stands
    (tmp_path / "runtime" / "__init__.py").write_text("raise ImportError('the wrong runtime')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_PORT", "1")  # as left by an outer torchrun
    first = head.start("a", max_restarts=2)
    second = head.start("b", max_restarts=2, num_threads=2)
    await asyncio.to_thread(head.joined, "a", "b")
    assert head.ask("a", "say b hello") == "hello"
    about_a, about_b = (json.loads(head.ask(name, "about")) for name in "ab")
    assert (about_a["OMP_NUM_THREADS"], about_b["OMP_NUM_THREADS"]) == ("1", "2")
    assert about_a["parent"] == first.pid
    assert about_a["cwd"] == str(tmp_path)
    assert about_a["MASTER_PORT"] not in ("1", about_b["MASTER_PORT"])
    assert {process.pid for process in first.processes()} == {first.pid, about_a["pid"]}
    for process in [*first.processes(), *second.processes()]:
        ports = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {port.ip for port in ports} <= {"127.0.0.1"}
    head.ask("a", "exit 0")
    assert await asyncio.wait_for(first.wait(), DEADLINE_S) == 0
    assert first.poll() == 0
    assert first.processes() == []
    assert second.poll() is None
    second.terminate(grace_s=DEADLINE_S)
    assert await asyncio.wait_for(second.wait(), DEADLINE_S) == 0
    assert not any(os.path.exists(worker._scratch) for worker in (first, second))  # noqa: ASYNC240
    assert sorted(head.lines) == [("a", "joined as a"), ("b", "joined as b")]  # and no word from torchrun


def test_a_crash_is_restarted_as_often_as_allowed(head: Head) -> None:
    worker = head.start("a", max_restarts=1)
    head.joined("a")
    head.ask("a", "exit 7")
    head.joined("a-r1")
    assert head.ask("a-r1", "echo again") == "again"
    head.ask("a-r1", "exit 8")
    assert worker.join(DEADLINE_S) == 8
    eventually(lambda: head.ends == [("a", 8)])
    assert not any("Traceback" in line for _, line in head.lines)
    assert worker.processes() == []


def test_a_worker_that_will_not_end_is_killed_after_its_grace(head: Head) -> None:
    worker = head.start("a", "--deaf")
    head.joined("a")
    pid = json.loads(head.ask("a", "about"))["pid"]
    worker.terminate(grace_s=0.5)
    assert worker.join(DEADLINE_S) is not None
    assert lifeline.start_time(pid) is None
    assert worker.processes() == []


@pytest.mark.parametrize("by_us", [True, False])
def test_a_killed_agent_takes_its_worker_along(head: Head, by_us: bool) -> None:
    worker = head.start("a", "--deaf", max_restarts=3)
    head.joined("a")
    pid = json.loads(head.ask("a", "about"))["pid"]
    if by_us:
        worker.kill()
    else:
        os.kill(worker.pid, signal.SIGKILL)
    assert worker.join(DEADLINE_S) == -signal.SIGKILL
    assert lifeline.start_time(pid) is None
    eventually(lambda: head.ends == [("a", -signal.SIGKILL)])


def test_a_worker_killed_while_its_agent_starts_leaves_nothing(head: Head) -> None:
    worker = head.start("a")
    worker.kill()
    assert worker.join(DEADLINE_S) == -signal.SIGKILL
    assert worker.processes() == []


def test_a_killed_head_takes_everything_along(tmp_path: Path) -> None:
    script = f"""
        import threading, time
        from runtime.launcher import LocalWorker
        from runtime.rpc import Door
        door = Door("head", "127.0.0.1:0", is_head=True, handler=lambda *_: None)
        for name in ("deaf", "b"):
            args = ["--name", name, "--rejoin"] + (["--deaf"] if name == "deaf" else [])
            LocalWorker(name, door.address, args, module="echo_worker", python_path=[{str(HERE)!r}], max_restarts=9,
                        on_line=lambda name, line: print(name, line, flush=True)).start()
        time.sleep(3600)
    """
    head = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert head.stdout is not None
        assert {head.stdout.readline(), head.stdout.readline()} == {"deaf joined as deaf\n", "b joined as b\n"}
        tree = [process for process in psutil.process_iter() if _is_of(process, head.pid)]
        assert len(tree) == 4
    finally:
        head.kill()
        head.wait(DEADLINE_S)
    eventually(lambda: not any(_is_of(process, head.pid) for process in tree))


def _is_of(process: psutil.Process, head_pid: int) -> bool:
    try:
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get(MARK, "").startswith(f"{head_pid}-")
    except psutil.Error:
        return False


def test_output_goes_to_the_log_file_line_by_line(head: Head, tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text(
        "import sys, os; print('one'); print('two', file=sys.stderr); os.write(1, b'\\xff' * 40000); os._exit(0)"
    )
    worker = LocalWorker(
        "t", head.door.address, module="talker", python_path=[str(tmp_path)], log_file=tmp_path / "log"
    )
    head.workers.append(worker)
    worker.start()
    assert worker.join(DEADLINE_S) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:2] == ["[t] one", "[t] two"]
    assert sum(line.count("\N{REPLACEMENT CHARACTER}") for line in lines[2:]) == 40000
    assert all(line.startswith("[t] ") for line in lines)


def test_absurd_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="0 threads"):
        LocalWorker("a", "127.0.0.1:1", num_threads=0)
    with pytest.raises(ValueError, match="-1 restarts"):
        LocalWorker("a", "127.0.0.1:1", max_restarts=-1)


@pytest.mark.parametrize("with_pidfd", [True, False])
def test_the_lifeline_tells_of_a_death_and_of_no_other(monkeypatch: pytest.MonkeyPatch, with_pidfd: bool) -> None:
    if not with_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        deaths: list[str] = []
        started = lifeline.start_time(process.pid)
        assert started is not None
        right = lifeline.watch(process.pid, lambda: deaths.append("right"), started=started)
        lifeline.watch(process.pid, lambda: deaths.append("other"), started=started - 5).join(DEADLINE_S)
        lifeline.watch(process.pid, lambda: deaths.append("younger")).join(DEADLINE_S)
        assert deaths == ["other", "younger"]
        right.join(0.3)
        assert right.is_alive()
    finally:
        process.kill()
    right.join(DEADLINE_S)
    assert deaths == ["other", "younger", "right"]
    process.wait(DEADLINE_S)
    assert lifeline.start_time(process.pid) is None
    with pytest.raises(ValueError, match="another process"):
        lifeline.watch(os.getpid(), lambda: None)
