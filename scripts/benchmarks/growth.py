"""`scripts/bench growth`: how the cost of a step grows with sequences, context and stages, and whether anything grows too fast.

Four series, each with one thing that grows:

- **sequences**: a worker's step of 1 to 1,000 decoding rows of 128 tokens of context;
- **context**: its step of 8 decoding rows with 128 to 8,192 tokens of context, and a chunk of 128 prompt tokens at such a depth;
- **stages, real**: a server of 1 to 4 stages with one stream, milliseconds a token;
- **stages and sequences, pure**: the scheduler alone (`scheduler_alone`), 1 to 64 stages, 1 and 100 sequences a stage.

A worker's step is the real one, without the processes: `StageState`, the batch's arrays, embedding, layers, LM head and
sampling, over pages of its own, random weights, the least of some repeats. Each series is fitted by ``cost = fixed + slope * x``
in least squares of relative errors, and by the exponent of its upper end, log(cost) against log(x) over the last doublings: 1 is linear. A
term that is worse than linear shows as an exponent above 1 there, and one that surprises as a residual.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import DEFAULT_MODEL, machine_now, note
from growth_plots import draw
from growth_step import StepTimer
from loadgen import Workload, run_workload, warm_up
from scheduler_alone import measure as measure_scheduler
from servers import Server, midflight_arm

from api.pull import resolve_model

SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
REAL_STAGES = (1, 2, 3, 4)
PURE = ((1, 1), (4, 1), (16, 1), (64, 1), (1, 100), (4, 100), (16, 100), (64, 100))
MARGIN = 1.15
"""An exponent above this is reported as worse than linear."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench growth", description="How the cost of a step grows.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder; its config is what counts")
    parser.add_argument("--num-layers", type=int, default=4, help="of its layers, in the worker's steps")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, of each point of a worker's step")
    parser.add_argument(
        "--serve", default="--threads 1", metavar='"ARGS"', help="of `midflight serve`, for real stages"
    )
    parser.add_argument("--skip", default="", help="series to leave out: sequences, context, real, pure")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout; pictures lie beside it")
    args = parser.parse_args()

    machine, skip = machine_now(), set(args.skip.split(","))
    home = Path(os.environ.get("MIDFLIGHT_HOME") or "~/.cache/midflight").expanduser()
    folder = resolve_model(args.model, home, note)
    series: list[dict[str, Any]] = []
    if not {"sequences", "context"} <= skip:
        torch.set_num_threads(1)
        timer = StepTimer(folder, args.dtype, args.num_layers, max(CONTEXTS) + 1)
        if "sequences" not in skip:
            points = [(n, 1e3 * timer.decode(n, 128, args.seconds)) for n in SEQUENCES]
            series.append(_series("worker, decoding rows of 128 tokens", "rows", "ms a step", points))
        if "context" not in skip:
            points = [(c, 1e3 * timer.decode(8, c, args.seconds)) for c in CONTEXTS]
            series.append(_series("worker, 8 decoding rows", "context", "ms a step", points))
            points = [(c, 1e3 * timer.chunk(128, c, args.seconds)) for c in CONTEXTS]
            series.append(_series("worker, a chunk of 128 tokens", "context", "ms a step", points))
    if "real" not in skip:
        points = [(k, _real_stages(args, folder, k)) for k in REAL_STAGES]
        series.append(_series("server with one stream", "stages", "ms a token", points))
    if "pure" not in skip:
        series += _pure()
    for one in series:
        note(_line(one))
    text = json.dumps({"benchmark": "growth", "machine": machine, "command": sys.argv, "series": series}, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
        draw(series, args.out.with_suffix(".png"))
    return 0


def _real_stages(args: argparse.Namespace, folder: Path, num_stages: int) -> float:
    """Milliseconds a token of one stream, on a server with as many workers."""
    arguments = ["--dtype", args.dtype, "--stages", str(num_stages), *shlex.split(args.serve)]
    arm = midflight_arm(f"{num_stages}-stages", str(folder), arguments)
    log = Path(tempfile.mkdtemp(prefix="midflight-bench-")) / "server.log"
    with Server(arm, log) as server:
        asyncio.run(warm_up(server.url, arm.model, Workload("warm-up", 1, 1, 16, 8), seed=90_000))
        summary, _ = asyncio.run(run_workload(server.url, arm.model, Workload("c1", 1, 2, 16, 64), seed=num_stages))
    return 1e3 * summary["tpot_s"]["p50"]


def _pure() -> list[dict[str, Any]]:
    runs = [measure_scheduler(count * stages, stages, 0.6, 2) for stages, count in PURE]
    by_stages = [(run["stages"], run["us_per_step"]) for run in runs if run["tokens_per_step"] < 1.5]
    return [
        _series("scheduler, one row a step", "stages", "µs a step", by_stages),
        _series(
            "scheduler, 100 rows a step", "stages", "µs a step",
            [(run["stages"], run["us_per_step"]) for run in runs if run["tokens_per_step"] >= 1.5],
        ),
    ]  # fmt: skip


def _series(name: str, x_name: str, unit: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    for x, cost in points:
        note(f"{name}: {x} {x_name}, {cost:.3f} {unit}")
    xs, costs = np.array(points, dtype=float).T
    weighted = np.stack([np.ones_like(xs), xs], axis=1) / costs[:, None]
    fixed, slope = np.linalg.lstsq(weighted, np.ones_like(xs), rcond=None)[0]
    residual = (fixed + slope * xs) / costs - 1.0
    upper = slice(-3, None)
    exponent = float(np.polyfit(np.log(xs[upper]), np.log(costs[upper]), 1)[0])
    return {
        "name": name,
        "x": x_name,
        "unit": unit,
        "points": points,
        "fixed": float(fixed),
        "slope": float(slope),
        "largest_residual": float(np.abs(residual).max()),
        "upper_exponent": exponent,
        "is_worse_than_linear": exponent > MARGIN,
    }


def _line(one: dict[str, Any]) -> str:
    verdict = "WORSE THAN LINEAR" if one["is_worse_than_linear"] else "no worse than linear"
    return (
        f"| {one['name']} | {one['points'][0][0]:,} to {one['points'][-1][0]:,} {one['x']} | {one['points'][0][1]:.4g} to "
        f"{one['points'][-1][1]:.4g} {one['unit']} | {one['fixed']:.4g} + {one['slope']:.4g} x, off by at most "
        f"{one['largest_residual']:.0%} | {one['upper_exponent']:.2f} | {verdict} |"
    )


if __name__ == "__main__":
    sys.exit(main())
