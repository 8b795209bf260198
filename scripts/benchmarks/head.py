"""`scripts/bench head`: processor time of the head per generated token, from one running sequence to a thousand.

All of it counts: parsing the request, scheduling, messages, detokenising, server-sent events, the RPC threads. It is read
from the operating system before and after each workload, so nothing is added to what is measured; the requests' own
share (parsing, headers) is spread over the tokens they generate. Width by width on one server, which is the default one
with two stages unless told otherwise; ``--url`` is not offered, because the head's process must be one that we started.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from pathlib import Path

import psutil
from arms import DEFAULT_MODEL, machine_now, note
from loadgen import Workload, run_workload, warm_up
from servers import Server, midflight_arm

MARK_US = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench head", description="The head's processor time per token.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder, as for `midflight serve`")
    parser.add_argument("--widths", default="1,8,32,128,1000", help="running sequences, comma separated")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=25.0, help="about how long each width may run")
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
        for width in widths:
            runs.append(_measure(server.url, arm.model, head, width, args))
            note(_line(runs[-1]))
    document = {"benchmark": "head", "machine": machine, "command": sys.argv, "arm": arm.command, "runs": runs}
    text = json.dumps(document, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 1 if any(run["errors"] for run in runs) else 0


def _measure(url: str, model: str, head: psutil.Process, width: int, args: argparse.Namespace) -> dict:
    """One width: a warm-up that also says how many requests fit the time, then the run that counts."""
    workload = Workload(f"c{width}", width, width, args.prompt_tokens, args.output_tokens)
    asyncio.run(warm_up(url, model, workload, seed=90_000 + width))
    summary, _ = asyncio.run(run_workload(url, model, workload, seed=50_000 + width))
    rounds = max(1, round(args.seconds / summary["wall_s"]))
    workload = Workload(workload.name, width, width * rounds, args.prompt_tokens, args.output_tokens)
    before, threads_before = _cpu_s(head), {t.id: t.user_time + t.system_time for t in head.threads()}
    summary, _ = asyncio.run(run_workload(url, model, workload, seed=width))
    cpu_s = _cpu_s(head) - before
    threads = {t.id: t.user_time + t.system_time - threads_before.get(t.id, 0.0) for t in head.threads()}
    return {
        "width": width,
        "head_cpu_us_per_token": 1e6 * cpu_s / summary["output_tokens"],
        "loop_thread_us_per_token": 1e6 * threads.get(head.pid, 0.0) / summary["output_tokens"],
        "head_cpu_share": cpu_s / summary["wall_s"],
        **{key: summary[key] for key in ("wall_s", "output_tokens", "output_tokens_per_s", "requests", "errors")},
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _line(run: dict) -> str:
    return (
        f"c{run['width']}: {run['head_cpu_us_per_token']:.1f} us of head per token (mark {MARK_US:.0f}), of which the "
        f"event loop {run['loop_thread_us_per_token']:.1f}; {run['output_tokens_per_s']:.0f} tokens/s over "
        f"{run['wall_s']:.1f} s, {run['errors']} errors"
    )


if __name__ == "__main__":
    sys.exit(main())
