"""`scripts/bench head`: processor time of the head per generated token, from one running sequence to a thousand.

All of it counts: parsing requests, scheduling, messages, detokenising, server-sent events, the RPC threads. It is read from
the operating system before and after some seconds of a load without an end, on a server that records nothing; the tokens
are those that the server counted. Up to 256 sequences the requests have 128 prompt and 128 output tokens, so new ones come all the
time; beyond that 16 and 512, so that all of them decode at once.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil
from arms import DEFAULT_MODEL, machine_now, note
from loadgen import Workload, run_workload, warm_up
from servers import Server, midflight_arm

MARK_US = 60.0
_SHORT, _LONG, _WIDE = (128, 128), (16, 512), 256
_MANY = 100_000
_RAMP_TIMEOUT_S = 120.0
_LEAD_S = 2.0
_THREAD_OF = {"pt_thread_pool": "RPC", "TP_UV_loop": "TensorPipe"}
_THREADS = ("event loop", "RPC", "TensorPipe", "others")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench head", description="The head's processor time per token.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder, as for `midflight serve`")
    parser.add_argument("--widths", default="1,8,32,128,1000", help="running sequences, comma separated")
    parser.add_argument("--seconds", type=float, default=15.0, help="that count, of each width")
    parser.add_argument("--serve", default="--stages 2 --threads 1", metavar='"ARGS"', help="of `midflight serve`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    widths = [int(width) for width in args.widths.split(",")]
    machine = machine_now()
    arguments = ["--dtype", args.dtype, "--max-running", str(max(widths)), "--max-queue", str(max(1024, *widths))]
    arm = midflight_arm("two-stages", args.model, [*arguments, *shlex.split(args.serve)])
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-bench-"))
    runs = []
    with Server(arm, log_folder / "server.log") as server:
        head = psutil.Process(server.pid)
        asyncio.run(warm_up(server.url, arm.model, Workload("warm-up", 8, 8, 128, 8), seed=90_000))
        for width in widths:
            runs.append(asyncio.run(_measure(server.url, arm.model, head, width, args)))
            note(f"c{width}: {runs[-1]['head_cpu_us_per_token']:.1f} us of head per token (mark {MARK_US:.0f})")
    note(format_table(runs))
    document = {"benchmark": "head", "machine": machine, "command": sys.argv, "arm": arm.command, "runs": runs}
    text = json.dumps(document, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


async def _measure(url: str, model: str, head: psutil.Process, width: int, args: argparse.Namespace) -> dict:
    """One width: a load without an end; some seconds of it count, once all of it runs."""
    prompt_tokens, output_tokens = _SHORT if width <= _WIDE else _LONG
    workload = Workload(f"c{width}", width, _MANY, prompt_tokens, output_tokens)
    load = asyncio.create_task(run_workload(url, model, workload, seed=width))
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(_RAMP_TIMEOUT_S):
            while (await _stats(session, url))["running"] < width:  # noqa: ASYNC110  there is no event for it
                await asyncio.sleep(0.2)
        await asyncio.sleep(_LEAD_S)
        async with aiohttp.ClientSession() as session:
            stats, threads_s = await _stats(session, url), _threads_s(head)
            begun_s = time.perf_counter()
            await asyncio.sleep(args.seconds)
            wall_s = time.perf_counter() - begun_s
            now_s = _threads_s(head)
            after = await _stats(session, url)
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    tokens, steps = (after[key] - stats[key] for key in ("generated_tokens", "steps"))
    threads_s = {name: spent - threads_s[name] for name, spent in now_s.items()}
    cpu_s = sum(threads_s.values())
    return {
        "width": width,
        "tokens_per_s": tokens / wall_s,
        "tokens_per_step": tokens / steps,
        "head_cpu_us_per_token": 1e6 * cpu_s / tokens,
        "head_cpu_us_per_step": 1e6 * cpu_s / steps,
        "head_cpu_share": cpu_s / wall_s,
        "threads_us_per_token": {name: 1e6 * threads_s.get(name, 0.0) / tokens for name in _THREADS},
    }


async def _stats(session: aiohttp.ClientSession, url: str) -> dict:
    async with session.get(f"{url}/admin/stats") as response:
        return await response.json()


def _threads_s(process: psutil.Process) -> dict[str, float]:
    """Processor seconds by what the threads are: the event loop's, torch's RPC threads, TensorPipe's.

    From the scheduler's own count, in nanoseconds: what `psutil` reads comes in hundredths of a second, 3 us a token in 3,000 tokens.
    """
    sums: dict[str, float] = {name: 0.0 for name in _THREADS}
    for folder in Path(f"/proc/{process.pid}/task").iterdir():
        try:
            name = (folder / "comm").read_text().strip()
            ran_ns = int((folder / "schedstat").read_text().split()[0])
        except OSError:
            continue
        name = "event loop" if folder.name == str(process.pid) else _THREAD_OF.get(name, "others")
        sums[name] += ran_ns / 1e9
    return sums


def format_table(runs: list[dict]) -> str:
    lines = [
        f"| running sequences | tokens/s | tokens a step | µs a token | µs a step | {', '.join(_THREADS)} (µs a token) |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        threads = ", ".join(f"{run['threads_us_per_token'][name]:.1f}" for name in _THREADS)
        lines.append(
            f"| {run['width']} | {run['tokens_per_s']:.0f} | {run['tokens_per_step']:.1f} | "
            f"{run['head_cpu_us_per_token']:.1f} | {run['head_cpu_us_per_step']:.0f} | {threads} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
