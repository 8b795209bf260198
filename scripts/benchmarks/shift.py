"""`scripts/bench shift`: what clients feel of a layout change.

A seeded trace of Poisson arrivals, at a fraction of what this machine was just measured to sustain, is played three
times: on the layout before, with the change at a fixed moment of the trace, on the layout after. The plays alternate on
one running server, whose prefix cache is off. The grid is load x context x change x strategy; a change goes there and
back within a seed. Words and figures are those of docs/benchmarks.md ("Layout changes: not felt").

    scripts/bench shift --quick                        one load, 4 layers, two seeds: three minutes
    scripts/bench shift                                the whole grid: about three hours
    scripts/bench shift --loads 75 --contexts short --changes 4 --strategies live,stop-copy,drain,recompute,restart
    scripts/bench shift --steady                       does the machinery cost anything while nothing changes?
    scripts/bench shift --pattern pipelive             long prompts give way to long answers, and the layout follows
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from arms import DEFAULT_MODEL, machine_now, note
from shift_fleet import STRATEGIES, Fleet
from shift_grid import CONTEXTS, PAIRS, Plan, measure
from shift_plots import draw
from shift_summary import Sample, figures, format_table, summarise

BYTES_PER_S = 200_000_000
"""The snapshot's rate; the server's own default, said here so that D5 can be judged against it."""


def main() -> int:
    args = _parser().parse_args()
    plan = _plan(args)
    machine = machine_now()
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-shift-"))
    note(f"server logs in {log_folder}")
    first = plan.pairs[0].first
    num_workers = max(layout.num_workers for pair in plan.pairs for layout in (pair.first, pair.second))
    arguments = ["--threads", "1", "--no-prefix-cache", "--kv-memory", args.kv_memory, "--dtype", args.dtype]
    fleet = Fleet(args.model, num_workers, arguments, log_folder)
    document: dict[str, Any] = {"benchmark": "shift", "machine": machine, "command": sys.argv, "server": arguments}
    try:
        fleet.start(first)
        failed = asyncio.run(_measure(fleet, plan, document))
    finally:
        fleet.stop()
    return _write(document, args.out, args.plots) or failed


async def _measure(fleet: Fleet, plan: Plan, document: dict[str, Any]) -> int:
    """Fill in the document; 1 when a request failed under a change that promises that none does."""
    await fleet.load_text()
    samples = await measure(fleet, plan)
    found = [(sample.case, sample.seed, figures(sample)) for sample in samples]
    rows = summarise(found)
    note(format_table(rows))
    document["summary"] = [{**row, "case": asdict(row["case"])} for row in rows]
    document["changes"] = [
        {"case": asdict(sample.case), "seed": sample.seed, "source": sample.source, "target": sample.target, **each}
        for sample, (_, _, each) in zip(samples, found, strict=True)
    ]
    document["timelines"] = [_timeline(sample) for sample in samples if sample.seed == plan.seeds[0]]
    return int(any(row["errors"] or row["errors_plain"] for row in rows))


def _timeline(sample: Sample) -> dict[str, Any]:
    """Every gap between two tokens of a stream, as ``[when it ended, how long it was]``, for the plot."""
    window = sample.changed.window
    assert window is not None

    def gaps(streams: Sequence) -> list[list[float]]:
        return [
            [round(later, 4), round(later - earlier, 4)]
            for stream in streams
            for earlier, later in zip(stream.times_s, stream.times_s[1:], strict=False)
        ]

    return {
        "case": asdict(sample.case),
        "source": sample.source,
        "target": sample.target,
        "trigger_s": window.start_s,
        "commit_s": sample.changed.commit_s,
        "changed": gaps(sample.changed.streams),
        "plain": gaps(sample.on_source.streams),
    }


def _write(document: dict[str, Any], out: Path | None, plots: Path | None) -> int:
    text = json.dumps(document)
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
        note(f"JSON in {out}")
    folder = plots or (out.parent if out is not None else None)
    if folder is not None:
        draw(document, folder)
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    loads, contexts, changes, num_seeds = args.loads, args.contexts, args.changes, args.seeds
    if args.quick:
        loads, contexts, changes, num_seeds = [75], ["short"], ["4"], 2
    chosen = [CONTEXTS[name] for name in contexts]
    if args.duration:
        chosen = [replace(context, duration_s=args.duration) for context in chosen]
    elif args.quick:
        chosen = [replace(context, duration_s=10.0) for context in chosen]
    return Plan(
        loads=tuple(load / 100 for load in loads),
        contexts=tuple(chosen),
        pairs=tuple(PAIRS[name] for name in changes),
        strategies=tuple(args.strategies),
        seeds=tuple(range(1, num_seeds + 1)),
        concurrency=args.concurrency,
        options={"bytes_per_s": args.bytes_per_s},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench shift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="75 %% load, short context, 4 layers, 2 seeds of 10 s")
    add("--loads", type=_numbers, default="50,75,90", help="percent of the measured saturation, comma separated")
    add("--contexts", type=_one_of(CONTEXTS), default="short,long", help=f"of {', '.join(CONTEXTS)}")
    add("--changes", type=_one_of(PAIRS), default="1,4,15,stages", help=f"of {', '.join(PAIRS)}")
    add("--strategies", type=_one_of(STRATEGIES), default="live", help=f"of {', '.join(STRATEGIES)}")
    add("--seeds", type=int, default=5, help="how many traces")
    add("--duration", type=float, default=0.0, metavar="S", help="of a trace's arrivals; default: the context's")
    add("--concurrency", type=int, default=16, help="of the closed loop that measures saturation")
    add("--bytes-per-s", type=int, default=BYTES_PER_S, help="the snapshot's rate")
    add("--model", default=DEFAULT_MODEL, help="a name or a folder, as for `midflight serve`")
    add("--dtype", default="bfloat16")
    add("--kv-memory", default="512M", help="of each worker")
    add("--out", type=Path, help="write the JSON here instead of to stdout")
    add("--plots", type=Path, metavar="FOLDER", help="for the PNG files; default: beside --out")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _one_of(known: Sequence[str] | dict[str, Any]):
    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; there are {', '.join(known)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    sys.exit(main())
