"""A server whose layout the benchmark sets: written layouts, changes by every strategy, memory of its workers.

A layout is written as counts for the workers w0, w1, ... in order, ``19,11``, or with the worker of each stage,
``15@0,15@2``. One server serves all of them, because it has as many workers as the widest needs; those without layers
idle. `restart` is the strategy of a server that cannot change: end it, start it with the other layout. `none` is the control:
nothing is done for about as long as a change takes, and whatever its figures show is not of a change.

What is never true: that a change which did not commit passes for one that did.
"""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from arms import note
from servers import ROOT, Server, midflight_arm

STRATEGIES = ("live", "stop-copy", "drain", "recompute", "restart", "none")
NOTHING_TAKES_S = 1.5
CHANGE_TIMEOUT_S = 300.0
SAMPLE_EVERY_S = 0.1
_STAGE = re.compile(r"(\d+)(?:@(\d+))?")
_FIRST_TOKEN = 1000
"""And those after it are ordinary words in any vocabulary."""


@dataclass(frozen=True)
class LayoutSpec:
    """Stages in order: ``(worker, num_layers)``, workers by their number."""

    stages: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        in_order = all(worker == at for at, (worker, _) in enumerate(self.stages))
        return ",".join(str(count) if in_order else f"{count}@{worker}" for worker, count in self.stages)

    @property
    def num_workers(self) -> int:
        """Workers that must be there."""
        return max(worker for worker, _ in self.stages) + 1

    def wish(self) -> dict[str, Any]:
        """The body of ``POST /admin/layout`` that asks for it."""
        stages, start = [], 0
        for worker, count in self.stages:
            stages.append({"worker": f"w{worker}", "layers": [start, start + count]})
            start += count
        return {"stages": stages}


def parse_layout(text: str) -> LayoutSpec:
    """Raises `ValueError` for what is not written as the module says."""
    stages = []
    for at, part in enumerate(text.split(",")):
        match = _STAGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} in the layout {text!r}: a count, such as 19, or COUNT@WORKER, such as 15@2")
        stages.append((int(match[2]) if match[2] else at, int(match[1])))
    return LayoutSpec(tuple(stages))


class Fleet:
    """One server with `num_workers` local workers of one thread each, started anew when a strategy asks for it."""

    def __init__(
        self,
        model: str,
        num_workers: int,
        arguments: Sequence[str],
        log_folder: Path,
        *,
        prefix_cache: bool = False,
        start_timeout_s: float = 180.0,
    ) -> None:
        self._model = model
        self._num_workers = num_workers
        self._arguments = list(arguments)
        self._prefix_cache = prefix_cache
        self._num_plays = 0
        self._log_folder = log_folder
        self._start_timeout_s = start_timeout_s
        self._num_starts = 0
        self._server: Server | None = None
        self.layout: LayoutSpec | None = None
        self.text: list[int] = []

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def server(self) -> Server:
        assert self._server is not None, "not started"
        return self._server

    @property
    def model(self) -> str:
        """As requests name it."""
        return Path(self._model).name

    def start(self, layout: LayoutSpec) -> None:
        """A fresh server; its layout has the stages of `layout` on the first workers."""
        counts = [count for _, count in layout.stages]
        arguments = ["--layers", ",".join(map(str, counts)), "--local-workers", str(self._num_workers)]
        arm = midflight_arm("midflight", self._model, [*arguments, *self._arguments])
        arm = replace(arm, start_timeout_s=self._start_timeout_s)
        self._num_starts += 1
        self._server = Server(arm, self._log_folder / f"server-{self._num_starts}.log")
        self._server.start()
        self.layout = LayoutSpec(tuple(enumerate(counts)))
        note(f"server {self._num_starts} with {self.layout} is healthy after {self._server.started_in_s:.1f} s")

    def first_token(self) -> int | None:
        """With a prefix cache, what the prompts of the next play begin with: another token for each."""
        self._num_plays += 1
        return _FIRST_TOKEN + self._num_plays if self._prefix_cache else None

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    async def load_text(self) -> None:
        """The token ids of some English, for prompts."""
        english = (ROOT / "LICENSE").read_text(encoding="utf-8")
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.url}/tokenize", json={"prompt": english}) as response,
        ):
            response.raise_for_status()
            self.text = (await response.json())["tokens"]

    async def change(self, layout: LayoutSpec, strategy: str, options: dict[str, Any]) -> dict[str, Any]:
        """Change to `layout`; the server's report, or for `restart` what it took.

        Raises:
            RuntimeError: when it was refused or did not commit.
        """
        if strategy == "none":
            await asyncio.sleep(NOTHING_TAKES_S)
            return {"outcome": "committed", "strategy": strategy, "total_s": NOTHING_TAKES_S}
        if strategy == "restart":
            began_s = time.perf_counter()
            await asyncio.to_thread(self.stop_and_start, layout)
            return {"outcome": "committed", "strategy": strategy, "total_s": time.perf_counter() - began_s}
        wish = {**layout.wish(), "strategy": strategy, **options}
        timeout = aiohttp.ClientTimeout(total=CHANGE_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{self.url}/admin/layout?wait=true", json=wish) as response,
        ):
            report = await response.json()
        if response.status != 200 or report["outcome"] != "committed":
            raise RuntimeError(f"the change to {layout} ({strategy}) did not commit: {report}")
        self.layout = layout
        return report

    async def ensure(self, layout: LayoutSpec) -> None:
        """Be on `layout`; what it takes happens before this returns."""
        if self.layout != layout:
            await self.change(layout, "live", {})

    def stop_and_start(self, layout: LayoutSpec) -> None:
        """What an operator does without live changes: let running requests end, stop, start with other arguments."""
        self.server.stop(drain_timeout_s=60.0)
        self.start(layout)

    @contextlib.contextmanager
    def usage(self) -> Iterator[dict[str, float]]:
        """What the server's processes use while it is open, filled in at the end: resident memory (MiB) at first, at most and at
        last, and processor time (seconds)."""
        sizes: list[float] = []
        figures: dict[str, float] = {}
        processes = self.server.processes()
        ended = threading.Event()

        def watch() -> None:
            while True:
                sizes.append(sum(_rss_mib(process) for process in processes))
                if ended.wait(SAMPLE_EVERY_S):
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        began_s = sum(_cpu_s(process) for process in processes)
        try:
            yield figures
        finally:
            ended.set()
            watcher.join()
            cpu_s = sum(_cpu_s(process) for process in processes) - began_s
            figures.update(first_mib=sizes[0], peak_mib=max(sizes), last_mib=sizes[-1], cpu_s=cpu_s)


def _rss_mib(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / 2**20
    except psutil.Error:
        return 0.0


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system
