"""A real server in a process of its own, as a user starts it, with real torchrun workers."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """``midflight serve MODEL ARGS`` on a free port. Use as a context manager; the log is kept in `log`."""

    def __init__(self, model: str | Path, *args: str, log: Path, wait: bool = True, home: Path | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._wait = wait
        self._command = [
            *(sys.executable, "-m", "api.cli", "serve", str(model), "--port", str(self.port), "--threads", "1"),
            *args,
        ]
        self._environment = {**os.environ, **({"MIDFLIGHT_HOME": str(home)} if home else {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.model = Path(model).name

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                self._command, stdout=sink, stderr=sink, env=self._environment, start_new_session=True
            )
        if self._wait:
            self.await_health()

    def await_health(self, wanted: int = 200, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log_text()}")
            try:
                status, body = self.get("/health")
            except OSError:
                status, body = 0, {}
            if status == wanted:
                return body
            time.sleep(0.1)
        raise AssertionError(f"/health was not {wanted} within {timeout_s} s:\n{self.log_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the head, wait for its end, and check that nothing of its tree is left."""
        assert self.process is not None
        tree = self.tree()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the server did not end within {STOP_TIMEOUT_S} s:\n{self.log_text()}") from None
        _, alive = psutil.wait_procs(tree, timeout=5.0)
        for process in alive:
            process.kill()
        assert not alive, f"the server left {[(p.pid, p.name()) for p in alive]} behind:\n{self.log_text()}"
        return code

    def tree(self) -> list[psutil.Process]:
        """All processes below the head, and the head."""
        assert self.process is not None
        try:
            head = psutil.Process(self.process.pid)
            return [*head.children(recursive=True), head]
        except psutil.NoSuchProcess:
            return []

    def worker_pids(self) -> dict[str, int]:
        _, body = self.get("/admin/workers")
        return {worker["name"]: worker["pid"] for worker in body["workers"]}

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")[-8000:]

    # -- HTTP, blocking ---------------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, Any]:
        return self._open(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any, timeout_s: float = 120.0) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self.url + path, data=data, headers=headers), timeout_s)

    def _open(self, request: urllib.request.Request, timeout_s: float = 30.0) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, _parse(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _parse(error.read())

    async def post_all(self, path: str, bodies: list[Any], concurrency: int = 32) -> list[Any]:
        """Post all `bodies`, many at once; every answer must be 200."""
        gate = asyncio.Semaphore(concurrency)

        async def one(body: Any) -> Any:
            async with gate:
                status, answer = await asyncio.to_thread(self.post, path, body)
                assert status == 200, answer
                return answer

        return await asyncio.gather(*(one(body) for body in bodies))

    def audit(self) -> dict[str, Any]:
        """The server's own integrity checks, once it is idle."""
        status, body = self.post("/admin/audit", {})
        assert status == 200, body
        return body


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")
