"""A load generator for servers with OpenAI's streaming ``/v1/completions``, and the statistics of one run.

How it works: every request gets a prompt of its own, random token ids from (seed, index), so its length is exact for
any tokenizer and no prefix cache can help. A closed loop keeps `concurrency` requests in flight; an open loop starts
them at Poisson arrivals. One task per request reads the server-sent events and notes when each came.

What is honest about it: in an open loop a request's time counts from when it was *due*, not from when the client got
round to sending it; tokens are counted by the server's own `usage`, and a request with fewer than asked is an error;
the client's own CPU time is reported, because it shares the machine with what it measures. What is never true: that a
failed request enters the latencies.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import aiohttp
import msgspec
import numpy as np


@dataclass(frozen=True)
class Workload:
    """`rate` is in requests per second; None closes the loop."""

    name: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    rate: float | None = None


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("c1", 1, 4, 128, 128),
        Workload("c8", 8, 24, 128, 128),
        Workload("c32", 32, 64, 128, 128),
        Workload("prefill", 8, 16, 1024, 16),
        Workload("decode", 16, 32, 16, 256),
    )
}


@dataclass
class Record:
    """One request; times are seconds of one monotonic clock, `due_s` is when it should have started."""

    index: int
    due_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_output: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.num_output - 1)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


def make_prompt(num_tokens: int, seed: int, index: int, vocabulary: tuple[int, int] = (1000, 40000)) -> list[int]:
    """Token ids drawn evenly from the half-open range `vocabulary`; the same for the same arguments."""
    draw = random.Random(f"{seed}/{index}/{num_tokens}")
    return [draw.randrange(*vocabulary) for _ in range(num_tokens)]


async def run_workload(
    url: str, model: str, workload: Workload, *, seed: int, timeout_s: float = 900.0
) -> tuple[dict, list[Record]]:
    """Run `workload` once against the server at `url`; the summary (times in seconds) and the requests behind it."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp ends connections that it said it would keep
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    cpu_before, began_s = time.process_time(), time.perf_counter()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def one(index: int, due_s: float) -> Record:
            return await _request(session, url, model, workload, index, seed, due_s)

        records = await (_open_loop(one, workload, seed) if workload.rate else _closed_loop(one, workload))
    wall_s = time.perf_counter() - began_s
    return _summarise(workload, records, wall_s, time.process_time() - cpu_before), records


async def emulated_devices(url: str) -> list[str]:
    """The names of the devices that our server's workers emulate: figures with any of them are not of this machine."""
    timeout = aiohttp.ClientTimeout(total=10.0)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url}/admin/workers") as response:
        if response.status != 200:
            return []  # another server, or one that wants a key
        workers = (await response.json())["workers"]
    return [worker["device_name"] for worker in workers if worker.get("pace") or worker.get("roofline")]


async def warm_up(url: str, model: str, workload: Workload, *, seed: int) -> None:
    """A few short requests of the workload's width, so that nothing is compiled or allocated for the first time.

    Raises:
        RuntimeError: when one of them fails.
    """
    width = workload.concurrency
    short = replace(workload, num_requests=width, output_tokens=min(8, workload.output_tokens), rate=None)
    summary, _ = await run_workload(url, model, short, seed=seed)
    if summary["errors"]:
        raise RuntimeError(f"warm-up of {workload.name} at {url} failed: {summary['error_examples']}")


async def _closed_loop(one, workload: Workload) -> list[Record]:
    indices = iter(range(workload.num_requests))

    async def client() -> list[Record]:
        return [await one(index, time.perf_counter()) for index in indices]

    done = await asyncio.gather(*(client() for _ in range(min(workload.concurrency, workload.num_requests))))
    return [record for records in done for record in records]


async def _open_loop(one, workload: Workload, seed: int) -> list[Record]:
    assert workload.rate
    draw, due_s, tasks = random.Random(f"arrivals/{seed}"), time.perf_counter(), []
    for index in range(workload.num_requests):
        due_s += draw.expovariate(workload.rate)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(index, due_s)))
    return await asyncio.gather(*tasks)


async def _request(session, url: str, model: str, workload: Workload, index: int, seed: int, due_s: float) -> Record:
    record = Record(index=index, due_s=due_s)
    body = {
        "model": model,
        "prompt": make_prompt(workload.prompt_tokens, seed, index),
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                record.error = f"{response.status}: {(await response.text())[:200]}"
                return record
            await _read_events(response.content, record)
    except (aiohttp.ClientError, TimeoutError, ConnectionError, msgspec.DecodeError) as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is None and record.num_output != workload.output_tokens:
        record.error = f"{record.num_output} of {workload.output_tokens} tokens"
    return record


def split_events(received: bytes) -> tuple[list[_Event], bytes]:
    """The whole server-sent events in `received`, without ``[DONE]``, and what is left of one that is still coming."""
    *events, rest = received.split(b"\n\n")
    return [_decode_event(event[6:]) for event in events if event.startswith(b"data: {")], rest


async def _read_events(content: aiohttp.StreamReader, record: Record) -> None:
    """Reads to the end of the stream. All events of one network read came at the same moment."""
    rest = b""
    async for chunk in content.iter_any():
        now_s = time.perf_counter()
        events, rest = split_events(rest + chunk)
        for decoded in events:
            if decoded.error is not None:
                record.error = f"in the stream: {decoded.error}"
            if decoded.usage is not None:
                record.num_prompt, record.num_output = decoded.usage.prompt_tokens, decoded.usage.completion_tokens
            if decoded.choices:
                if record.first_s:
                    record.gaps_s.append(now_s - record.last_s)
                else:
                    record.first_s = now_s
                record.last_s = now_s


def _summarise(workload: Workload, records: Sequence[Record], wall_s: float, client_cpu_s: float) -> dict:
    good = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    num_output = sum(record.num_output for record in good)
    num_prompt = sum(record.num_prompt for record in good)
    return {
        "workload": workload.name,
        "concurrency": workload.concurrency,
        "rate": workload.rate,
        "requests": len(records),
        "errors": len(errors),
        "error_examples": errors[:3],
        "wall_s": wall_s,
        "client_cpu_s": client_cpu_s,
        "output_tokens": num_output,
        "prompt_tokens": num_prompt,
        "output_tokens_per_s": num_output / wall_s,
        "total_tokens_per_s": (num_output + num_prompt) / wall_s,
        "ttft_s": _percentiles([record.ttft_s for record in good]),
        "tpot_s": _percentiles([record.tpot_s for record in good if record.num_output > 1]),
        "itl_s": _percentiles([gap for record in good for gap in record.gaps_s]),
        "e2e_s": _percentiles([record.last_s - record.due_s for record in good]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99, top = (float(value) for value in np.percentile(values, [50, 90, 99, 100]))
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99, "max": top}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench loadgen", description="One workload against a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="c8", help="the rest overrides parts of it")
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--output-tokens", type=int)
    parser.add_argument("--rate", type=float, help="open loop: Poisson arrivals, requests per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dump", help="write one JSON line per request to this file")
    args = parser.parse_args()
    given = {
        "concurrency": args.concurrency,
        "num_requests": args.requests,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "rate": args.rate,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    workload = replace(WORKLOADS[args.workload], **overrides)
    if overrides:
        workload = replace(workload, name="custom")
    summary, records = asyncio.run(run_workload(args.url, args.model, workload, seed=args.seed))
    if args.dump:
        with open(args.dump, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(record)) + "\n" for record in records)
    summary["emulated"] = asyncio.run(emulated_devices(args.url))
    print(json.dumps(summary, indent=2))
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
