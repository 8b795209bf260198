"""`scripts/bench step`: where a step goes, stage by stage, and what the head costs, as a table and as a trace.

How it works: one server, and one workload after the other. While a workload is in its steady state the server records spans for
some seconds (``POST /admin/trace``); the table is made of these. The trace that is kept for Perfetto is recorded once more,
under c8, with a change of the layout there and back in it, so that hops, snapshot, mirror and flips can be seen.

What the columns mean is `step_table`'s to say. Recording costs something itself; the head's processor time is therefore also
taken without it, by `scripts/bench head`.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import aiohttp
from arms import DEFAULT_MODEL, machine_now, note, parse_workloads
from loadgen import WORKLOADS, Workload, run_workload, warm_up
from servers import Arm, Server, midflight_arm
from step_table import breakdown, format_head, format_stages

_LEAD_S = 2.0
"""Into a workload before the recording begins: the prompts of the first requests are read by then."""
_MANY = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench step", description="Where a step goes, stage by stage.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder, as for `midflight serve`")
    parser.add_argument("--workloads", type=parse_workloads, default=",".join(WORKLOADS), help="comma separated")
    parser.add_argument("--seconds", type=float, default=5.0, help="recorded of each workload")
    parser.add_argument("--serve", default="--stages 2 --threads 1", metavar='"ARGS"', help="of `midflight serve`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace with a change of the layout in it here"
    )
    parser.add_argument("--trace-seconds", type=float, default=4.0)
    parser.add_argument("--move", type=int, default=4, help="layers that the traced change takes from the first stage")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    machine = machine_now()
    arm = midflight_arm("two-stages", args.model, ["--dtype", args.dtype, *shlex.split(args.serve)])
    log = Path(tempfile.mkdtemp(prefix="midflight-bench-")) / "server.log"
    note(f"server log: {log}")
    runs = asyncio.run(_measure(arm, log, args))
    document = {"benchmark": "step", "machine": machine, "command": sys.argv, "arm": arm.command, "runs": runs}
    note(format_stages(runs))
    note("")
    note(format_head(runs))
    text = json.dumps(document, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


async def _measure(arm: Arm, log: Path, args: argparse.Namespace) -> list[dict]:
    runs = []
    with Server(arm, log) as server:
        for workload in args.workloads:
            trace = await _traced(server.url, arm.model, workload, args.seconds)
            runs.append({"workload": workload.name, **breakdown(trace)})
            note(f"{workload.name}: {runs[-1]['tokens_per_s']:.0f} tokens/s while recording")
        if args.trace is not None:
            trace = await _traced(server.url, arm.model, WORKLOADS["c8"], args.trace_seconds, move=args.move)
            args.trace.write_text(json.dumps(trace), encoding="utf-8")
            note(f"trace in {args.trace}; open it at https://ui.perfetto.dev")
    return runs


async def _traced(url: str, model: str, workload: Workload, seconds: float, move: int = 0) -> dict:
    """The trace of some seconds of a workload that goes on all the while; with `move`, changed there and back."""
    await warm_up(url, model, workload, seed=10_000)
    endless = replace(workload, num_requests=_MANY)
    load = asyncio.create_task(run_workload(url, model, endless, seed=1))
    try:
        await asyncio.sleep(_LEAD_S)
        changing = asyncio.create_task(_there_and_back(url, move, seconds)) if move else None
        trace = await _post(f"{url}/admin/trace", {"seconds": seconds})
        if changing is not None:
            await changing
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    return trace


async def _there_and_back(url: str, move: int, seconds: float) -> None:
    """A change a fifth into the trace, and its reverse as soon as it has committed."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/admin/layout") as response:
        layout = await response.json()
    counts = [stop - start for start, stop in (stage["layers"] for stage in layout["stages"])]
    assert counts[0] > move, f"the first stage has {counts[0]} layers, --move {move} leaves it none"
    await asyncio.sleep(seconds / 5)
    for wish in ([counts[0] - move, counts[1] + move, *counts[2:]], counts):
        report = await _post(f"{url}/admin/layout?wait=true", {"layers": wish})
        note(f"changed to {wish}: {report['outcome']}")


async def _post(url: str, body: dict) -> dict:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        answer = await response.json()
    if response.status != 200:
        raise RuntimeError(f"{url} answered {response.status}: {answer['error']['message']}")
    return answer


if __name__ == "__main__":
    sys.exit(main())
