"""`scripts/bench shift`: what clients feel of a layout change.

A seeded trace of Poisson arrivals, at a fraction of what this machine was just measured to sustain, is played three
times: on the one layout, on the other, and through changes there and back between them, one every few seconds. The plays
alternate on one running server, whose prefix cache is off (`--prefix-cache`: on, but no prompt is a hit). The grid is load x context x change x strategy. Words and figures are those of docs/benchmarks.md ("Layout changes: not felt").

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

from arms import DEFAULT_MODEL, machine_now, names_of, note
from shift_fleet import STRATEGIES, Fleet
from shift_grid import CONTEXTS, PAIRS, Plan, measure
from shift_pipelive import FOR_ANSWERS, measure_pipelive
from shift_plots import draw
from shift_steady import HOME, format_steady, measure_steady
from shift_summary import Sample, figures, format_table, summarise


def main() -> int:
    args = _parser().parse_args()
    machine = machine_now()
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-shift-"))
    note(f"server logs in {log_folder}")
    server = ["--threads", "1", "--kv-memory", args.kv_memory, "--dtype", args.dtype]
    server += [] if args.prefix_cache else ["--no-prefix-cache"]
    document: dict[str, Any] = {"benchmark": "shift", "machine": machine, "command": sys.argv, "server": server}
    try:
        if args.steady:
            document["steady"] = _steady(args, server, log_folder)
            failed = 0
        else:
            failed = _shift(args, server, log_folder, document)
    except KeyboardInterrupt:
        note("interrupted; what was measured until then is kept")
        failed = 130
    _write(document, args.out, args.plots)
    return failed


def _shift(args: argparse.Namespace, server: list[str], log_folder: Path, document: dict[str, Any]) -> int:
    """The grid or the pattern; fills in the document as far as it gets. 1 when a request failed."""
    plan = _plan(args)
    pipelive = args.pattern == "pipelive"
    layouts = [layout for pair in plan.pairs for layout in (pair.first, pair.second)]
    num_workers = 2 if pipelive else max(layout.num_workers for layout in layouts)
    fleet = Fleet(args.model, num_workers, server, log_folder, prefix_cache=args.prefix_cache)
    samples: list[Sample] = []
    try:
        fleet.start(FOR_ANSWERS if pipelive else layouts[0])
        asyncio.run(_measure(fleet, args, plan, samples, document))
    finally:
        fleet.stop()
        failed = _conclude(samples, document)
    return failed


async def _measure(
    fleet: Fleet, args: argparse.Namespace, plan: Plan, samples: list[Sample], document: dict[str, Any]
) -> None:
    await fleet.load_text()
    if args.pattern == "pipelive":
        halves = document["halves"] = []
        await measure_pipelive(
            fleet, args.rates, plan.seeds, args.requests, plan.options, plan.concurrency, samples, halves
        )
    else:
        await measure(fleet, plan, samples)


def _conclude(samples: Sequence[Sample], document: dict[str, Any]) -> int:
    found = [(sample.case, sample.seed, figures(sample)) for sample in samples]
    rows = summarise(found)
    note(format_table(rows))
    document["summary"] = [{**row, "case": asdict(row["case"])} for row in rows]
    document["changes"] = [
        {"case": asdict(sample.case), "seed": sample.seed, "source": sample.source, "target": sample.target, **each}
        for sample, (_, _, each) in zip(samples, found, strict=True)
    ]
    first = {sample.case: sample for sample in reversed(samples)}
    document["timelines"] = [_timeline(sample) for sample in first.values()]
    return int(any(row["errors"] or row["errors_plain"] for row in rows))


def _steady(args: argparse.Namespace, server: list[str], log_folder: Path) -> dict[str, Any]:
    fleets = [Fleet(args.model, 2, server, log_folder / name) for name in ("touched", "untouched")]
    try:
        for fleet in fleets:
            fleet.start(HOME)
        result = asyncio.run(measure_steady(*fleets, num_rounds=args.rounds, num_changes=args.steady_changes))
    finally:
        for fleet in fleets:
            fleet.stop()
    note(format_steady(result["summary"]))
    return result


def _timeline(sample: Sample) -> dict[str, Any]:
    """Every gap between two tokens of a stream, as ``[when it ended, how long it was]``, for the plot."""

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
        "trigger_s": sample.change.window.start_s,
        "commit_s": sample.change.commit_s,
        "changed": gaps(sample.changed.streams),
        "plain": gaps(sample.on_source.streams),
    }


def _write(document: dict[str, Any], out: Path | None, plots: Path | None) -> None:
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


def _plan(args: argparse.Namespace) -> Plan:
    loads, contexts, changes, num_seeds = args.loads, args.contexts, args.changes, args.seeds
    if num_seeds is None:
        num_seeds = 1 if args.pattern == "pipelive" else 2 if args.quick else 5
    if args.quick:
        loads, contexts, changes = [75.0], ["short"], ["4"]
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
        options={} if args.bytes_per_s is None else {"bytes_per_s": args.bytes_per_s},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench shift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="75 %% load, short context, 4 layers, 2 seeds of 10 s")
    add("--steady", action="store_true", help="two servers, one of which goes through changes; is it as fast after?")
    add("--pattern", choices=("grid", "pipelive"), default="grid")
    add("--loads", type=_numbers, default="50,75,90", help="percent of the measured saturation, comma separated")
    add("--contexts", type=names_of(CONTEXTS), default="short,long", help=f"of {', '.join(CONTEXTS)}")
    add("--changes", type=names_of(PAIRS), default="1,4,15,stages", help=f"of {', '.join(PAIRS)}")
    add("--strategies", type=names_of(STRATEGIES), default="live", help=f"of {', '.join(STRATEGIES)}")
    add("--seeds", type=int, help="how many traces; default: 5 (quick: 2, pipelive: 1)")
    add("--duration", type=float, default=0.0, metavar="S", help="of a trace's arrivals; default: the context's")
    add("--concurrency", type=int, default=16, help="of the closed loop that measures saturation")
    add("--rates", type=_numbers, default="1,3,5", help="pipelive: nominal requests per second, up to 5")
    add("--requests", type=int, default=200, help="pipelive: of both halves together")
    add("--rounds", type=int, default=8, help="steady: before and after the changes")
    add("--steady-changes", type=int, default=10, help="steady: an even number")
    add("--bytes-per-s", type=int, help="a bound on the snapshot's rate")
    add("--model", default=DEFAULT_MODEL, help="a name or a folder, as for `midflight serve`")
    add("--dtype", default="bfloat16")
    add("--kv-memory", default="512M", help="of each worker")
    add(
        "--prefix-cache",
        action="store_true",
        help="leave it on; no prompt is a hit, but the pool fills with cached blocks",
    )
    add("--out", type=Path, help="write the JSON here instead of to stdout")
    add("--plots", type=Path, metavar="FOLDER", help="for the PNG files; default: beside --out")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
