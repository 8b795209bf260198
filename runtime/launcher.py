"""Workers on this host, each under its own `torchrun` agent, started and ended by the head.

How it works: `LocalWorker.start` runs `agent.py`, which is torchrun tied to its parent's life; it starts the worker
and starts it again when it crashes. A monitor thread per worker reads the tree's output and notices its end.

torchrun puts the worker in a session of its own, so that signals to the agent's group do not reach it. Every
process of the tree therefore carries a random mark in its environment, and `kill` ends whatever carries it. The
agent goes first, so that it starts nothing again.

Never true: nothing of the tree outlives the agent for longer than a moment, whatever the agent died of. A tree
outlives its head only until the worker's lifeline fires (``--lifeline-pid``), at most a second. An exit code of 0
means that the worker was told to end; anything else that torchrun ran out of restarts or was killed.

Agents do not meet, and open no port: ``--standalone`` would open two on every interface, so each gets a rendezvous of
its own in a scratch folder, which ends with it.
"""

import asyncio
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

MARK = "MIDFLIGHT_TREE"
MAX_LINE_BYTES = 16 << 10
SWEEP_TIMEOUT_S = 10.0
_AGENT = Path(__file__).resolve().with_name("agent.py")

OnLine = Callable[[str, str], None]
OnExit = Callable[[str, int], None]


class LocalWorker:
    """One worker and its agent.

    Args:
        name: what its output and its callbacks are labelled with.
        head: "HOST:PORT" of the head.
        args: more arguments for the worker.
        module: the module that the agent runs.
        num_threads: OMP_NUM_THREADS of the worker.
        max_restarts: how often the agent starts a crashed worker again.
        log_file: where the tree's output is appended, each line labelled. With `on_line` as well, both get it.
        on_line: called with (name, line) in the monitor thread. With neither, output goes to our own log.
        on_exit: called with (name, exit code) in the monitor thread once the whole tree is gone. The code of a tree
            that was killed is minus the signal's number.
        environment: added to ours; `python_path` goes in front of the worker's import path.
    """

    def __init__(
        self,
        name: str,
        head: str,
        args: Sequence[str] = (),
        *,
        module: str = "runtime",
        num_threads: int = 1,
        max_restarts: int = 3,
        log_file: Path | None = None,
        on_line: OnLine | None = None,
        on_exit: OnExit | None = None,
        environment: Mapping[str, str] | None = None,
        python_path: Sequence[str] = (),
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"worker {name}: {num_threads} threads; it needs at least one")
        if max_restarts < 0:
            raise ValueError(f"worker {name}: {max_restarts} restarts; 0 or more")
        self.name = name
        self._mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._command = [
            *("--nproc-per-node", "1", "--max-restarts", str(max_restarts), "--rdzv-id", name, "-m", module),
            *("--head", head, "--lifeline-pid", str(os.getpid()), *args),
        ]
        self._environment = _environment(self._mark, num_threads, environment or {}, python_path)
        self._log_file = log_file
        self._on_line = on_line
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._kill_at_s: float | None = None
        self._wake_read = self._wake_write = -1
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[int]]] = []
        self.exit_code: int | None = None

    @property
    def pid(self) -> int:
        """The agent's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the agent; a few milliseconds. Call it from a thread that lives as long as the head (the main one):
        the kernel takes the end of the starting thread for the parent's death.

        Raises:
            OSError: the process could not be started, or the log file not be opened.
        """
        assert self._process is None, "a worker is started once"
        sink = self._log_file.open("ab") if self._log_file is not None else None
        self._scratch = tempfile.mkdtemp(prefix="midflight-agent-")
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_AGENT), str(os.getpid()), self._scratch, *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        threading.Thread(target=self._monitor, args=(sink,), name=f"monitor-{self.name}", daemon=True).start()

    def poll(self) -> int | None:
        """The exit code once the whole tree is gone, else None."""
        return self.exit_code

    async def wait(self) -> int:
        """Wait for the end of the whole tree without blocking the loop; the exit code."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        with self._lock:
            if self.exit_code is not None:
                return self.exit_code
            self._waiters.append((loop, future))
        return await future

    def join(self, timeout_s: float) -> int | None:
        """Block until the whole tree is gone; None when it is not within `timeout_s`."""
        self._ended.wait(timeout_s)
        return self.exit_code

    def terminate(self, grace_s: float) -> None:
        """Ask the tree to end and return; what is left of it after `grace_s` is killed."""
        with self._lock:
            if self._process is None or self.exit_code is not None:
                return
            kill_at_s = time.monotonic() + grace_s
            self._kill_at_s = kill_at_s if self._kill_at_s is None else min(self._kill_at_s, kill_at_s)
            self._signal_agent(signal.SIGTERM)
        self._wake()

    def kill(self) -> None:
        """End the tree now and return; `join` or `wait` for the end."""
        with self._lock:
            if self._process is None or self.exit_code is not None:
                return
            self._kill_at_s = 0.0
            self._signal_agent(signal.SIGKILL)
        self._wake()

    def processes(self) -> list[psutil.Process]:
        """The living processes of the tree, the agent included."""
        return _marked(self._mark)

    def _signal_agent(self, number: int) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                pass

    def _wake(self) -> None:
        with self._lock:
            if self._wake_write >= 0:
                try:
                    os.write(self._wake_write, b"x")
                except BlockingIOError:
                    pass

    # -- the monitor thread ---------------------------------------------------------------------------------

    def _monitor(self, sink) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        try:
            self._pump(output, _Lines(self.name, sink, self._on_line))
            code = self._process.wait()
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._process.stdout.close()
            if sink is not None:
                sink.close()
        with self._lock:
            self.exit_code = code
            waiters, self._waiters = self._waiters, []
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1
        self._ended.set()
        for loop, future in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future, code)
        if self._on_exit is not None:
            self._on_exit(self.name, code)

    def _pump(self, output: int, lines: "_Lines") -> None:
        """Read output until the agent has ended and the rest of its tree is swept away."""
        assert self._process is not None
        poller = select.poll()
        agent = _pidfd(self._process.pid)
        for fd in (output, self._wake_read, agent):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        try:
            while self._process.poll() is None:
                kill_at_s = self._kill_at_s
                left_s = 3600.0 if kill_at_s is None else max(0.0, kill_at_s - time.monotonic())
                if left_s == 0.0:
                    self._process.kill()
                    self._process.wait()
                    break
                ready = dict(poller.poll((left_s if agent >= 0 else min(left_s, 0.2)) * 1000))
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                if output in ready and not lines.read(output):
                    poller.unregister(output)
        finally:
            if agent >= 0:
                os.close(agent)
        _sweep(self._mark, self.name)
        os.set_blocking(output, False)
        while lines.read(output):
            pass
        lines.flush()


class _Lines:
    """Cuts a stream into lines and hands them on; never fails for what is in them."""

    def __init__(self, name: str, sink, on_line: OnLine | None) -> None:
        self._name = name
        self._sink = sink
        self._on_line = on_line
        self._rest = b""

    def read(self, fd: int) -> bool:
        """Take what is there; False at the end of the stream, or when nothing is there and `fd` does not block."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._rest) > MAX_LINE_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        if self._rest:
            self._emit(self._rest)
            self._rest = b""

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        try:
            if self._sink is not None:
                self._sink.write(f"[{self._name}] {text}\n".encode())
                self._sink.flush()
            if self._on_line is not None:
                self._on_line(self._name, text)
            elif self._sink is None:
                log.info("[%s] %s", self._name, text)
        except Exception:
            log.exception("output of %s could not be handed on", self._name)


def _environment(mark: str, num_threads: int, extra: Mapping[str, str], python_path: Sequence[str]) -> dict[str, str]:
    """What the tree sees: ours, less what another torchrun may have left, so that it works from any folder."""
    stale = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(stale)}
    for key in ("RANK", "WORLD_SIZE"):
        environment.pop(key, None)
    root = str(Path(__file__).resolve().parent.parent)
    installed = root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = [*python_path, *([] if installed else [root]), *filter(None, [environment.get("PYTHONPATH", "")])]
    environment.update(
        PYTHONPATH=os.pathsep.join(path),
        PYTHONSAFEPATH="1",  # a folder named `runtime` where the user stands is not ours
        OMP_NUM_THREADS=str(num_threads),
        TORCH_CPP_LOG_LEVEL="ERROR",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # else the agent opens a port on every interface
    )
    environment.update(extra)
    environment[MARK] = mark
    if not environment["PYTHONPATH"]:
        del environment["PYTHONPATH"]
    return environment


def _resolve(future: "asyncio.Future[int]", code: int) -> None:
    if not future.done():
        future.set_result(code)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _sweep(mark: str, name: str) -> None:
    """Kill all that carries the mark until nothing does."""
    deadline_s = time.monotonic() + SWEEP_TIMEOUT_S
    while rest := _marked(mark):
        if time.monotonic() > deadline_s:
            log.error("worker %s: processes %s do not end", name, [process.pid for process in rest])
            return
        for process in rest:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(rest, timeout=1.0)
