"""Fifty layout changes under load: every stream says, to the bit, what it says on a server that nobody changes.

The short version of ``scripts/bench changes``.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.integration.server import Server

NUM_CHANGES = 50
NUM_STREAMS = 6
NUM_LAYERS = 4
OPTIONS = (
    *("--stages", "2", "--dtype", "float32", "--kv-memory", "2M", "--step-tokens", "24", "--block-size", "8"),
    *("--look-ahead", "always"),
)


@dataclass
class Told:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def make_jobs(count: int) -> list[dict[str, Any]]:
    """Requests with prompts that half the time begin alike; every fourth is sampled with a seed."""
    draw = random.Random(11)
    alike = [draw.randrange(5, 300) for _ in range(60)]
    jobs = []
    for index in range(count):
        own = [draw.randrange(5, 300) for _ in range(draw.choice((3, 20, 70)))]
        prompt = [*alike[: draw.randint(20, 60)], *own] if index % 2 else own
        jobs.append(
            {
                "prompt": prompt, "max_tokens": draw.randint(40, 120), "temperature": float(index % 4 == 3),
                "seed": index, "ignore_eos": True, "logprobs": 0, "return_token_ids": True, "stream": True,
            }
        )  # fmt: skip
    return jobs


async def tell(session: aiohttp.ClientSession, server: Server, job: dict[str, Any]) -> Told:
    told = Told()
    async with session.post(f"{server.url}/v1/completions", json=job) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                told.tokens += choice["token_ids"]
                told.logprobs += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
    assert len(told.tokens) == job["max_tokens"]
    return told


def random_stages(draw: random.Random, workers: list[str]) -> list[dict[str, Any]]:
    """One to all workers in any order, cut anywhere; now and then one worker twice, or an end without layers."""
    chain = draw.sample(workers, draw.randint(1, len(workers)))
    if len(chain) > 1 and draw.random() < 0.3:
        chain.append(draw.choice(chain[:-1]))
    if len(chain) > 1 and draw.random() < 0.2:
        cuts = [0, *sorted(draw.sample(range(1, NUM_LAYERS), len(chain) - 2))]
    else:
        cuts = sorted(draw.sample(range(1, NUM_LAYERS), len(chain) - 1))
    edges = [0, *cuts, NUM_LAYERS]
    return [{"worker": name, "layers": edges[i : i + 2]} for i, name in enumerate(chain)]


async def change_all(session: aiohttp.ClientSession, server: Server, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all changes; after each, the prompt of `job` must still be cached."""
    draw = random.Random(12)
    workers = sorted(server.worker_pids())
    probe = {"prompt": job["prompt"], "max_tokens": 1, "temperature": 0}
    reports: list[dict[str, Any]] = []
    while len(reports) < NUM_CHANGES:
        wish = {"stages": random_stages(draw, workers)}
        async with session.post(f"{server.url}/admin/layout?wait=true", json=wish) as response:
            report = await response.json()
            assert response.status == 200, report
        assert report["outcome"] == "committed", report
        assert report["recomputed_tokens"] == 0, report
        assert report["dropped_requests"] == 0, report
        reports.append(report)
        async with session.post(f"{server.url}/v1/completions", json=probe) as response:
            usage = (await response.json())["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0 or len(reports) == 1, f"after change {report['id']}"
    return reports


async def repeat(
    session: aiohttp.ClientSession,
    server: Server,
    jobs: list[dict[str, Any]],
    expected: list[Told],
    over: asyncio.Event,
    number: int,
) -> int:
    """Job after job until `over`; how many were compared."""
    draw = random.Random(number)
    count = 0
    while not over.is_set():
        index = draw.randrange(len(jobs))
        told = await tell(session, server, jobs[index])
        assert told.tokens == expected[index].tokens, f"job {index} differs"
        assert told.logprobs == expected[index].logprobs, f"job {index}"
        count += 1
    return count


async def test_nobody_can_tell_when_the_layout_changes(tiny_llama: Path, tmp_path: Path) -> None:
    jobs = make_jobs(24)
    timeout = aiohttp.ClientTimeout(total=120.0)
    with Server(tiny_llama, *OPTIONS, "--local-workers", "3", log=tmp_path / "log") as server:
        await_workers(server, 3)
        pids = server.worker_pids()
        async with aiohttp.ClientSession(timeout=timeout) as session:
            expected = list(await asyncio.gather(*(tell(session, server, job) for job in jobs)))
            over = asyncio.Event()
            streams = [
                asyncio.create_task(repeat(session, server, jobs, expected, over, number))
                for number in range(NUM_STREAMS)
            ]
            try:
                reports = await change_all(session, server, jobs[1])
            finally:
                over.set()
                compared = await asyncio.gather(*streams)
        assert min(compared) > 0
        assert sum(report["sequences_flipped"] for report in reports) > NUM_CHANGES
        assert sum(report["snapshot_bytes"] for report in reports) > 0
        assert sum(report["mirror_bytes"] for report in reports) > 0
        _, stats = server.get("/admin/stats")
        assert (stats["running"], stats["kv_blocks_used"], stats["workers_lost"]) == (0, 0, 0)
        audit = server.audit()
        assert (audit["problems"], audit["sequences"], audit["sinks"]) == ([], 0, 0)
        assert server.worker_pids() == pids


def await_workers(server: Server, count: int) -> None:
    """Spare workers may join after the server is healthy."""
    deadline_s = time.monotonic() + 60.0
    while len(server.worker_pids()) < count:
        assert time.monotonic() < deadline_s, f"{count} workers did not join:\n{server.log_text()}"
        time.sleep(0.1)
