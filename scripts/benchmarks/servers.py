"""Servers under measurement: start a command, wait until it is healthy, watch its processes, end all of them.

A server's environment carries a mark that everything it starts inherits, so all of it can be found and ended, also
what has a session or a new parent of its own. Nothing is ended that it did not start. What is never true: that `stop` returns while one of its processes is alive.
"""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
_MARK = "MIDFLIGHT_BENCH_SERVER"


@dataclass(frozen=True)
class Arm:
    """One way to serve. `command` has ``{port}`` where the port goes; `model` is the name that requests use."""

    name: str
    command: tuple[str, ...]
    model: str
    env: tuple[tuple[str, str], ...] = ()
    start_timeout_s: float = 180.0
    root: Path = ROOT
    """The checkout it is started in."""


def midflight_arm(name: str, model: str, arguments: Sequence[str], root: Path = ROOT) -> Arm:
    """`midflight serve` of the checkout `root`, by default this very one; `model` is a name or a folder."""
    command = (sys.executable, "-m", "api.cli", "serve", model, "--host", "127.0.0.1", "--port", "{port}", *arguments)
    return Arm(name, command, Path(model).name, root=root)


class Server:
    """A running arm.

    Raises (from `start`):
        RuntimeError: when it ends or is not healthy within the arm's `start_timeout_s`; the message has the log's end.
    """

    def __init__(self, arm: Arm, log_path: Path):
        self.arm = arm
        self.log_path = log_path
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.started_in_s = 0.0
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        command = [part.replace("{port}", str(self.port)) for part in self.arm.command]
        root = str(self.arm.root)
        env = {**os.environ, "PYTHONPATH": import_path(self.arm.root), **dict(self.arm.env), _MARK: self._mark}
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        began_s = time.monotonic()
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_ready(began_s + self.arm.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.started_in_s = time.monotonic() - began_s

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def processes(self) -> list[psutil.Process]:
        """The server's first process and everything that stems from it, by pid."""
        return sorted(_marked(self._mark), key=lambda process: process.pid)

    def stop(self, *, drain_timeout_s: float = 30.0) -> list[int]:
        """SIGTERM to the first process, then SIGKILL to what is left; the pids that had to be killed."""
        if self._process is None:
            return []
        known = self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(drain_timeout_s)
            except subprocess.TimeoutExpired:
                pass
        _, alive = psutil.wait_procs(known, timeout=5.0)
        left = {process for process in alive if process.is_running()} | _marked(self._mark)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(list(left), timeout=10.0)
        self._process.wait(10.0)
        return sorted(process.pid for process in left)

    def log_tail(self, num_lines: int = 25) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def _wait_ready(self, deadline_s: float) -> None:
        assert self._process is not None
        while not is_healthy(self.url):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.arm.name} ended with {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"{self.arm.name} was not healthy after {self.arm.start_timeout_s:.0f} s:\n{self.log_tail()}"
                )
            time.sleep(0.25)


def import_path(root: Path) -> str:
    """`PYTHONPATH` for what runs out of `root`; what this process has of it (packages laid beside a system's Python) comes after."""
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5.0) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def describe_machine() -> dict[str, object]:
    """What a reader needs beside a figure: hardware, versions, commit, and how busy the machine was."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "numba", "numpy")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _marked(mark: str) -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.add(process)
        except (psutil.Error, OSError):
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None
