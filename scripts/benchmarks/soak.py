"""`scripts/soak`: saturation by clients that come, go and misbehave, and what the server looks like afterwards.

How it works: a server is started with a KV pool too small for what is asked of it, so that it preempts, evicts and
refuses; the clients of `soak_clients` run at it for the given time while the memory of each process is sampled. Then
they stop, the server gets a while to become idle, and everything that could have leaked is looked at. The verdict is
one line; all of it goes out as JSON.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from arms import DEFAULT_MODEL, machine_now, note
from servers import Server, midflight_arm
from soak_clients import CLIENTS, REQUEST_TIMEOUT_S, Client, Tally, Target

GROWTH_RATIO = 0.05
GROWTH_BYTES = 16 << 20
"""A process may end with this share of its early memory, and this much, on top."""
IDLE_TIMEOUT_S = 60.0
_SAMPLE_S = 2.0


@dataclass
class Memory:
    """Resident bytes of one process over time, ``(seconds since the load began, bytes)``."""

    role: str
    samples: list[tuple[float, int]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="A server under clients that misbehave.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--serve-args", default="--stages 2 --threads 1 --kv-memory 48MiB --max-queue 32", help="for the server"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    machine = machine_now()
    log_path = Path(tempfile.mkdtemp(prefix="midflight-soak-")) / "server.log"
    note(f"server log in {log_path}")
    server = Server(midflight_arm("soak", args.model, args.serve_args.split()), log_path)
    with server:
        note(f"healthy after {server.started_in_s:.1f} s; {args.minutes:g} minutes of load")
        result = asyncio.run(_soak(server, args.minutes * 60, args.seed))
        killed = server.stop()
    problems = result["problems"]
    if killed:
        problems.append(f"{len(killed)} processes had to be killed at the end")
    problems += _problems_in_log(log_path)

    text = json.dumps({"benchmark": "soak", "machine": machine, "command": sys.argv, **result}, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
    for problem in problems[:20]:
        note(f"  {problem}")
    growth = ", ".join(f"{m['role']} {m['early_mib']:.0f} to {m['late_mib']:.0f} MiB" for m in result["memory"])
    verdict = "PASSED" if not problems else f"FAILED with {len(problems)} problems"
    note(f"soak {verdict}: {result['seconds']:.0f} s, {result['counts'].get('tokens', 0)} tokens checked; {growth}")
    return 1 if problems else 0


async def _soak(server: Server, duration_s: float, seed: int) -> dict:
    tally, memory, began_s = Tally(), {}, time.monotonic()
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        target = Target("127.0.0.1", server.port, server.arm.model, session, tally)
        deadline_s = began_s + duration_s
        names = [(client, number) for client, count in CLIENTS.items() for number in range(count)]
        sampler = asyncio.create_task(_sample(server, memory, began_s))
        loops = [
            _repeat(client, target, random.Random(f"{seed}/{client.__name__}/{n}"), deadline_s) for client, n in names
        ]
        await asyncio.gather(*loops)
        seconds = time.monotonic() - began_s
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        await _expect_idle(target)
        await _expect_sound(target)
    figures = [_judge(memory[pid], pid, duration_s, tally) for pid in sorted(memory)]
    return {
        "seconds": seconds,
        "counts": dict(tally.counts),
        "problems": tally.problems,
        "memory": [figure for figure in figures if figure],
    }


async def _repeat(client: Client, target: Target, draw: random.Random, deadline_s: float) -> None:
    while time.monotonic() < deadline_s:
        try:
            await client(target, draw)
            target.tally.counts[client.__name__] += 1
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            target.tally.problem(f"{client.__name__}: {type(error).__name__} {error}")
            await asyncio.sleep(0.5)
        await asyncio.sleep(draw.uniform(0.0, 0.05))


async def _sample(server: Server, memory: dict[int, Memory], began_s: float) -> None:
    while True:
        for process in await asyncio.to_thread(server.processes):
            with contextlib.suppress(psutil.Error):
                entry = memory.setdefault(process.pid, Memory(_role(process, server.pid)))
                entry.samples.append((time.monotonic() - began_s, process.memory_info().rss))
        await asyncio.sleep(_SAMPLE_S)


def _role(process: psutil.Process, head: int) -> str:
    if process.pid == head:
        return "head"
    words = process.cmdline()
    if any(word.endswith(("agent.py", "torchrun")) for word in words):
        return "agent"
    return "worker" if "runtime" in words else "helper"


def _judge(entry: Memory, pid: int, duration_s: float, tally: Tally) -> dict | None:
    """Medians of the first minute after a settling time and of the last; a process that came late is a problem."""
    settle_s, window_s = min(60.0, duration_s / 5), min(60.0, duration_s / 4)
    early = [rss for at_s, rss in entry.samples if settle_s <= at_s < settle_s + window_s]
    late = [rss for at_s, rss in entry.samples if duration_s - window_s <= at_s < duration_s]
    if not early or not late:
        if entry.role != "helper":
            tally.problem(f"{entry.role} {pid} did not live through the whole soak")
        return None
    before, after = statistics.median(early), statistics.median(late)
    if after > before * (1 + GROWTH_RATIO) + GROWTH_BYTES:
        tally.problem(f"{entry.role} {pid} grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    return {"role": entry.role, "pid": pid, "early_mib": before / 2**20, "late_mib": after / 2**20}


async def _expect_idle(target: Target) -> None:
    """Nothing runs, nothing waits and no block is held, a while after the last client left."""
    wanted = ("midflight_requests_running", "midflight_requests_waiting", 'midflight_kv_blocks{state="used"}')
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        metrics = await _metrics(target)
        missing = [name for name in wanted if name not in metrics]
        if missing:
            return target.tally.problem(f"/metrics lacks {', '.join(missing)}")
        busy = {name: metrics[name] for name in wanted if metrics[name] != 0}
        if not busy:
            return
        if time.monotonic() > deadline_s:
            return target.tally.problem(f"not idle after {IDLE_TIMEOUT_S:.0f} s: {busy}")
        await asyncio.sleep(0.5)


async def _expect_sound(target: Target) -> None:
    async with target.session.get(f"{target.url}/health") as response:
        if response.status != 200:
            target.tally.problem(f"/health answers {response.status}: {await response.text()}")
    async with target.session.post(f"{target.url}/admin/audit") as response:
        text = await response.text()
        if response.status != 200 or json.loads(text)["problems"] != []:
            target.tally.problem(f"/admin/audit answers {response.status}: {text[:500]}")


async def _metrics(target: Target) -> dict[str, float]:
    """Values by name and labels, as they are written."""
    async with target.session.get(f"{target.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def _problems_in_log(log_path: Path) -> list[str]:
    lines = log_path.read_text(errors="replace").splitlines()
    signs = ("Traceback (most recent call last)", "Task was destroyed", "never retrieved", "was never awaited")
    return [f"log line {n + 1}: {line[:200]}" for n, line in enumerate(lines) if any(sign in line for sign in signs)]


if __name__ == "__main__":
    sys.exit(main())
