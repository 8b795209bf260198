"""One server whose layout is changed, again and again, under load: asking, probing, aborting, looking at its memory.

Nothing here decides whether an answer is right (`changes_load` does) or what a layout looks like (`changes_layouts`). What is wrong
goes into the ledger; a refusal for want of room is no problem, it is counted.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp
import psutil
from arms import note
from changes_layouts import Stages, random_layout
from changes_load import REQUEST_TIMEOUT_S, Job, Ledger, Load, Told
from servers import Server

GROWTH_RATIO, GROWTH_BYTES = 0.05, 16 << 20
"""A process may hold this share, and this much, more at the end than early on."""
IDLE_TIMEOUT_S = 60.0
NUM_HOMECOMINGS = 25
MIN_MEMORY_SAMPLES = 3
"""Early, and late; fewer say nothing."""
MAX_PROBLEMS = 20
"""After so many it is over."""
MAX_REFUSALS = 50
"""Beside as many as there are changes."""
_PROBE_TOKENS = 80


class Run:
    """The server whose layout is changed."""

    def __init__(self, server: Server, args: argparse.Namespace, ledger: Ledger) -> None:
        self._server = server
        self._args = args
        self._ledger = ledger
        self._reports: list[dict[str, Any]] = []
        self._kinds: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._aborts: Counter[str] = Counter()
        self._memory: dict[str, list[int]] = {}
        self._processes: dict[str, psutil.Process] = {}

    async def run(self, jobs: Sequence[Job], expected: list[Told]) -> dict[str, Any]:
        args = self._args
        async with new_session() as self._session:
            self._load = load = Load(self._session, self._server.url, jobs, self._ledger)
            load.expected = expected
            home, workers, num_layers = await self._look_around()
            note(
                f"the other server is up after {self._server.started_in_s:.1f} s; {args.changes} changes over {workers}"
            )
            streams = [asyncio.create_task(load.repeat(number, args.seed)) for number in range(args.streams)]
            began_s = time.monotonic()
            try:
                await self._change_all(home, workers, num_layers)
            finally:
                seconds = time.monotonic() - began_s
                load.is_over = True
                await asyncio.wait(streams, timeout=REQUEST_TIMEOUT_S)
            await self._expect_idle()
        self._judge_memory()
        return self._figures(seconds)

    async def _look_around(self) -> tuple[Stages, list[str], int]:
        layout = await self._get("/admin/layout")
        deadline_s = time.monotonic() + 60.0
        while len(workers := (await self._get("/admin/workers"))["workers"]) < self._args.workers:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{len(workers)} workers joined within a minute, not {self._args.workers}")
            await asyncio.sleep(0.2)
        self._processes = {worker["name"]: psutil.Process(worker["pid"]) for worker in workers}
        self._processes["head"] = psutil.Process(self._server.pid)
        home = [{"worker": stage["worker"], "layers": stage["layers"]} for stage in layout["stages"]]
        return home, [worker["name"] for worker in workers], layout["num_layers"]

    async def _change_all(self, home: Stages, workers: list[str], num_layers: int) -> None:
        args, draw = self._args, random.Random(f"{self._args.seed}/layouts")
        every = max(5, args.changes // NUM_HOMECOMINGS)
        present, at_home_s = home, 0
        probe = self._load.jobs[1].prompt[:_PROBE_TOKENS]
        told = await self._probe(probe)
        while len(self._reports) < args.changes and len(self._ledger.problems) < MAX_PROBLEMS:
            if (refused := sum(self._refusals.values())) > MAX_REFUSALS + args.changes:
                self._ledger.problem(f"{refused} refusals, more than changes: {dict(self._refusals)}")
                return
            done = len(self._reports)
            going_home = done >= (at_home_s + 1) * every and present != home
            kind, wanted = ("home", home) if going_home else random_layout(draw, present, workers, num_layers)
            if not going_home and draw.random() < args.aborts:
                if await self._change_and_abort(wanted, 0.2 * draw.random() ** 2):
                    present = wanted
                continue
            report = await self._change(wanted)
            if report is None:
                continue
            present = wanted
            self._kinds[kind] += 1
            if (found := await self._probe(probe))[0] != told[0] or found[1] != told[1]:
                self._ledger.problem(f"the probe says {found} after change {report['id']}, before all {told}")
            elif found[2] == 0 and args.strategy == "live" and not args.evictions:
                self._ledger.problem(f"the probe's prompt was not cached any more after change {report['id']}")
            if going_home:
                at_home_s += 1
                self._sample_memory()
            if (done + 1) % max(1, args.changes // 10) == 0:
                note(f"  {done + 1} changes, {self._ledger.num_streams} streams, {len(self._ledger.problems)} problems")

    async def _change(self, wanted: Stages) -> dict[str, Any] | None:
        """Ask for a layout and wait; its report, or None when it was refused for want of room."""
        body = {"stages": wanted, "strategy": self._args.strategy}
        async with self._session.post(f"{self._server.url}/admin/layout?wait=true", json=body) as response:
            answer = await response.json()
        if response.status == 409 or (response.status == 200 and answer["outcome"] == "refused"):
            self._refuse(str(answer.get("why") or answer["error"]["message"]))
            await asyncio.sleep(0.05)
            return None
        if response.status != 200 or answer["outcome"] != "committed":
            self._ledger.problem(f"change to {wanted}: {response.status} {json.dumps(answer)[:600]}")
            return None
        self._book(answer)
        return answer

    def _refuse(self, why: str) -> None:
        """Counted by its wording; numbers in it differ every time."""
        self._refusals[re.sub(r"\d[\d,.]*", "#", why)[:60]] += 1

    def _book(self, answer: dict[str, Any]) -> None:
        self._reports.append(answer)
        self._load.commits_s.append(time.monotonic())
        preempted = answer["recomputed_tokens"] and not self._args.evictions
        if self._args.strategy == "live" and (preempted or answer["dropped_requests"]):
            self._ledger.problem(f"change {answer['id']} recomputed or dropped something: {answer}")

    async def _change_and_abort(self, wanted: Stages, after_s: float) -> bool:
        """Ask for a layout and, a little later, for its end; whether it was too late and the layout is there."""
        url = f"{self._server.url}/admin"
        body = {"stages": wanted, "strategy": self._args.strategy}
        async with self._session.post(f"{url}/layout", json=body) as response:
            answer = await response.json()
        if response.status != 202:
            self._refuse(answer["error"]["message"])
            return False
        change = answer["id"]
        await asyncio.sleep(after_s)
        async with self._session.delete(f"{url}/transitions/{change}") as response:
            in_time = response.status == 200
        while True:
            report = await self._get(f"/admin/transitions/{change}")
            if report["outcome"] != "running":
                break
            await asyncio.sleep(0.01)
        self._aborts[f"{report['outcome']}{' in time' if in_time else ''}"] += 1
        if (report["outcome"] == "aborted") != in_time:
            self._ledger.problem(f"change {change}: asked to abort it ({response.status}), it is {report['outcome']}")
        if report["outcome"] == "committed":
            self._book(report)
            return True
        if (await self._get("/admin/layout"))["transition"] is not None:
            self._ledger.problem(f"change {change} has ended ({report['outcome']}), and its transition is still there")
        return False

    async def _probe(self, prompt: Sequence[int]) -> tuple[int, float, int]:
        """Token, log-probability, cached tokens."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "logprobs": 0, "return_token_ids": True}
        async with self._session.post(f"{self._server.url}/v1/completions", json=body) as response:
            answer = await response.json()
        choice = answer["choices"][0]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return choice["token_ids"][0], choice["logprobs"]["token_logprobs"][0], cached

    async def _expect_idle(self) -> None:
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            stats = await self._get("/admin/stats")
            busy = {name: stats[name] for name in ("running", "waiting", "kv_blocks_used") if stats[name]}
            if not busy or time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.2)
        if busy:
            self._ledger.problem(f"not idle after {IDLE_TIMEOUT_S:.0f} s: {busy}")
        if stats["workers_lost"]:
            self._ledger.problem(f"{stats['workers_lost']} workers were lost")
        async with self._session.post(f"{self._server.url}/admin/audit", json={}) as response:
            audit = await response.json()
        if audit["problems"] or audit["sequences"] or audit["sinks"]:
            self._ledger.problem(f"audit: {json.dumps(audit)[:600]}")

    def _sample_memory(self) -> None:
        for name, process in self._processes.items():
            with contextlib.suppress(psutil.Error):
                self._memory.setdefault(name, []).append(process.memory_info().rss)

    def _judge_memory(self) -> None:
        """Medians of the first and the last third of the samples at home, the very first fifth left out."""
        for name, samples in self._memory.items():
            settled = samples[len(samples) // 5 :]
            if (third := len(settled) // 3) < MIN_MEMORY_SAMPLES:
                continue
            early, late = statistics.median(settled[:third]), statistics.median(settled[-third:])
            if late > early * (1 + GROWTH_RATIO) + GROWTH_BYTES:
                self._ledger.problem(f"{name} grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB")

    def _figures(self, seconds: float) -> dict[str, Any]:
        ledger, reports = self._ledger, self._reports
        phases = sorted({phase for report in reports for phase in report["phases_s"]})
        pauses = [report["engine_pause_ms"] for report in reports if report["engine_pause_ms"]]
        return {
            "seconds": seconds,
            "changes": len(reports),
            "changes_per_s": len(reports) / seconds,
            "kinds": dict(self._kinds),
            "refusals": dict(self._refusals),
            "asked_to_abort": dict(self._aborts),
            "commit_s": _spread([report["total_s"] for report in reports]),
            "phases_s": {p: _spread([report["phases_s"].get(p, 0.0) for report in reports]) for p in phases},
            "pause_p50_ms": _spread([pause["p50"] for pause in pauses]),
            "pause_max_ms": _spread([pause["max"] for pause in pauses]),
            "sums": {
                key: sum(report[key] for report in reports)
                for key in (
                    *("layers_moved", "weight_bytes", "snapshot_bytes", "mirror_bytes", "blocks_copied", "num_hops"),
                    *("sequences_flipped", "fence_waits", "fence_wait_ms", "recomputed_tokens", "dropped_requests"),
                )
            },
            "streams": ledger.num_streams,
            "tokens": ledger.num_tokens,
            "commits_inside_streams": ledger.num_crossings,
            "max_logprob_gap": ledger.max_logprob_gap,
            "stalls_s": _spread(ledger.stalls_s),
            "memory_mib": {name: [round(rss / 2**20, 1) for rss in samples] for name, samples in self._memory.items()},
        }

    async def _get(self, path: str) -> Any:
        async with self._session.get(self._server.url + path) as response:
            return await response.json()


def new_session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (10, 50, 90, 99)} | {
        "max": ordered[-1]
    }
