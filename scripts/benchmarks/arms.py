"""Runs arms alternately over workloads and makes one table of them; shared by `serve` and `peers`.

A shared machine drifts over minutes. So each repeat starts every arm once, in turn, and only ratios within one sitting
are worth quoting. Each figure is the median over the repeats; the single runs stay in the JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import psutil
from loadgen import WORKLOADS, Workload, run_workload, warm_up
from servers import Arm, Server, describe_machine

DEFAULT_MODEL = "smollm2-135m-instruct"


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """For argparse: a parser of comma-separated names, all of which must be known."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; there are {', '.join(known)}")
        return text.split(",")

    return parse


def parse_workloads(names: str) -> list[Workload]:
    """Comma-separated names.

    Raises:
        ValueError: for a name that is not known.
    """
    unknown = [name for name in names.split(",") if name not in WORKLOADS]
    if unknown:
        raise ValueError(f"unknown workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in names.split(",")]


def measure(arms: Sequence[Arm], workloads: Sequence[Workload], *, repeats: int, log_folder: Path) -> list[dict]:
    """One dict per arm, repeat and workload, in the order they ran."""
    runs = []
    for repeat in range(repeats):
        for arm in arms:
            note(f"round {repeat + 1} of {repeats}: starting {arm.name}")
            with Server(arm, log_folder / f"{arm.name}-{repeat}.log") as server:
                note(f"{arm.name} is healthy after {server.started_in_s:.1f} s")
                for run in measure_url(server.url, arm.model, workloads, seed=repeat):
                    memory = {"rss_mib": _total_rss_mib(server), "started_in_s": server.started_in_s}
                    runs.append({"arm": arm.name, "repeat": repeat, **memory, **run})
    return runs


def measure_together(
    arms: Sequence[Arm], workloads: Sequence[Workload], *, repeats: int, log_folder: Path
) -> list[dict]:
    """As `measure`, with all arms up at once and alternating workload by workload: for arms that cost nothing when idle.

    What else the machine does then changes little between two runs that are compared.
    """
    runs = []
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(arm, log_folder / f"{arm.name}.log")) for arm in arms]
        for repeat in range(repeats):
            for workload in workloads:
                for arm, server in zip(arms, servers, strict=True):
                    (run,) = measure_url(server.url, arm.model, [workload], seed=repeat)
                    note(f"    by {arm.name}")
                    runs.append({"arm": arm.name, "repeat": repeat, **run})
    return runs


def measure_url(url: str, model: str, workloads: Sequence[Workload], *, seed: int) -> Iterator[dict]:
    """Each workload once on a running server, after a warm-up of its width."""
    for workload in workloads:
        asyncio.run(warm_up(url, model, workload, seed=10_000 + seed))
        summary, _ = asyncio.run(run_workload(url, model, workload, seed=seed))
        note(f"  {workload.name}: {summary['output_tokens_per_s']:.1f} tokens/s, {summary['errors']} errors")
        yield {"load_average": os.getloadavg()[0], **summary}


def summarise(runs: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """``{workload: {arm: figures}}``, medians over the repeats; seconds and output tokens per second."""
    table: dict[str, dict[str, dict]] = {}
    for workload, arm in dict.fromkeys((run["workload"], run["arm"]) for run in runs):
        group = [run for run in runs if run["workload"] == workload and run["arm"] == arm]
        table.setdefault(workload, {})[arm] = {
            "output_tokens_per_s": statistics.median(run["output_tokens_per_s"] for run in group),
            "spread": [min(r["output_tokens_per_s"] for r in group), max(r["output_tokens_per_s"] for r in group)],
            "ttft_p50_s": _median_of(group, "ttft_s", "p50"),
            "tpot_p50_s": _median_of(group, "tpot_s", "p50"),
            "itl_p99_s": _median_of(group, "itl_s", "p99"),
            "errors": sum(run["errors"] for run in group),
            "repeats": len(group),
        }
    return table


def format_table(table: dict[str, dict[str, dict]], baseline: str | None = None) -> str:
    """A Markdown table. With `baseline`, the last columns say how many times the baseline each arm is."""
    head = "| workload | arm | output tokens/s (min to max) | TTFT p50 ms | TPOT p50 ms | ITL p99 ms | errors |"
    rule = "|---|---|---|---|---|---|---|"
    lines = [head + (f" tokens/s over {baseline} |" if baseline else ""), rule + ("---|" if baseline else "")]
    for workload, arms in table.items():
        for arm, figures in arms.items():
            low, high = figures["spread"]
            cells = [workload, arm, f"{figures['output_tokens_per_s']:.1f} ({low:.1f} to {high:.1f})"]
            cells += [_milliseconds(figures[key]) for key in ("ttft_p50_s", "tpot_p50_s", "itl_p99_s")]
            cells.append(str(figures["errors"]))
            if baseline:
                ratio = figures["output_tokens_per_s"] / arms[baseline]["output_tokens_per_s"]
                cells.append(f"{ratio:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    name: str, machine: dict, runs: Sequence[dict], *, baseline: str | None, out: Path | None, arms: Sequence[Arm]
) -> int:
    """The table to stderr, all of it as JSON to `out` or stdout; the exit status, 1 when a request failed."""
    table = summarise(runs)
    document = {
        "benchmark": name,
        "machine": machine,
        "command": sys.argv,
        "arms": {arm.name: {"command": arm.command, "env": dict(arm.env)} for arm in arms},
        "summary": table,
        "runs": list(runs),
    }
    note(format_table(table, baseline))
    text = json.dumps(document, indent=2)
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
        note(f"JSON in {out}")
    return 1 if any(run["errors"] for run in runs) else 0


def machine_now() -> dict:
    """Taken before the first server starts, so that the load average is what was there without us."""
    machine = describe_machine()
    load = os.getloadavg()[0]
    if load > 0.5:
        note(f"the machine is busy (load average {load:.1f}); only ratios of this sitting mean anything")
    return machine


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _total_rss_mib(server: Server) -> float:
    total = 0
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 2**20


def _median_of(group: Sequence[dict], metric: str, key: str) -> float | None:
    values = [run[metric][key] for run in group if run[metric] is not None]
    return statistics.median(values) if values else None


def _milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f}"
