"""`midflight simulate`: from options to a run of the simulator, and its figures to the terminal and to files.

Nothing is started and nothing is asked of a server. Files go into the folder that ``--out`` names: ``summary.json``,
``requests.csv``, ``windows.csv``, and plots where matplotlib is installed.
"""

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.model.spec import ModelSpec
from scheduler.batching import BatchingConfig
from scheduler.planning.autopilot import Settings
from scheduler.planning.cost import Facts, Speed
from scheduler.planning.plans import NoPlan
from scheduler.planning.traffic import Serving, Slo, Traffic
from scheduler.simulation.policies import Oracle, Planning, Policy
from scheduler.simulation.results import REQUEST_COLUMNS, WINDOW_COLUMNS, request_rows, summarise, window_rows
from scheduler.simulation.shapes import load_shape
from scheduler.simulation.simulator import Outcome, Simulation
from scheduler.simulation.trace import Trace, make_trace, read_trace
from scheduler.simulation.world import Rates, SimDevice, name_devices, parse_devices

Devices = Sequence[tuple[str, Speed, int]]


@dataclass(frozen=True)
class Scenario:
    """Everything that a run consists of."""

    spec: ModelSpec
    devices: list[SimDevice]
    counts: tuple[int, ...]
    trace: Trace
    policy: Policy
    slo: Slo
    simulation: Simulation


def simulate(options: argparse.Namespace) -> int:
    """Run what `options` say (`api.cli` parses them); the exit code."""
    try:
        scenario = build(options)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)  # a long simulation must not end with this
        began_s = time.perf_counter()
        outcome = scenario.simulation.run(scenario.trace)
        wall_s = time.perf_counter() - began_s
    except (ValueError, OSError) as error:
        print(f"midflight: simulate: {error}", file=sys.stderr)
        return 2
    summary = {
        "model": scenario.spec.name,
        "cluster": options.cluster,
        "trace": scenario.trace.name,
        "policy": options.policy,
        "changes_cost": not scenario.simulation.world.rates.free_changes,
        "num_microbatches": scenario.simulation.head.batching.num_microbatches or "one per stage",
        **summarise(outcome, scenario.devices, scenario.slo),
        "notes": scenario.policy.notes() or _pilot_notes(scenario.simulation),
        "wall_s": wall_s,
        "times_real_time": outcome.end_s / wall_s,
        "events": outcome.events,
    }
    print(json.dumps(summary, indent=2) if options.json else "\n".join(lines_of(summary)))
    try:
        if options.out:
            _write(options.out, summary, scenario, outcome, options.window)
    except OSError as error:
        print(f"midflight: simulate: {error}", file=sys.stderr)
        return 1
    return 0


def build(options: argparse.Namespace) -> Scenario:
    """The run that the options describe.

    Raises:
        ValueError: an option that makes no sense, or a model that does not fit.
    """
    spec = load_shape(options.model)
    facts, slo = Facts(spec), Slo(options.slo_ttft, options.slo_tpot)
    trace = _trace(options)
    if options.policy == "oracle" and options.concurrency:
        raise ValueError(
            "--policy oracle looks ahead in the trace's arrival times, which --concurrency puts aside; leave one out"
        )
    traffic = trace.traffic(clients=options.concurrency)
    raw = parse_devices(options.cluster)
    serving = Serving(options.step_tokens, options.max_running, options.microbatches, options.block_size)
    if options.layout:
        first, counts = _given(options.layout, raw, spec.num_layers)
    else:
        first, counts = _planned(Planning.of(facts, name_devices(raw, ()), serving, options.objective, slo), traffic)
    devices = name_devices(raw, first)
    planning = Planning.of(facts, devices, serving, options.objective, slo, pool_bytes=options.kv_memory)
    policy = _policy(options, planning, trace)
    free = options.policy == "oracle" and not options.paid_changes
    simulation = Simulation(
        spec,
        devices,
        counts,
        policy,
        batching=BatchingConfig(
            num_microbatches=options.microbatches,
            max_step_tokens=options.step_tokens,
            max_running=options.max_running,
            max_queue=options.max_queue,
            block_size=options.block_size,
            prefix_cache=False,
        ),
        rates=Rates(load_bytes_per_s=float(options.load_rate), free_changes=free, noise=options.noise),
        seed=options.seed,
        kv_bytes=options.kv_memory,
        memory_fraction=options.memory_fraction,
        concurrency=options.concurrency,
        autopilot="on" if options.policy == "autopilot" else "off",
        piloting=Settings(
            objective=options.objective, slo=slo, elastic=options.elastic, load_bytes_per_s=float(options.load_rate)
        ),
        limits=options.limits,
    )
    return Scenario(spec, devices, counts, trace, policy, slo, simulation)


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The figures for people."""
    ttft, tpot, slo = summary["ttft_s"], summary["tpot_s"], summary["slo"]
    lines = [
        f"SIMULATED: {summary['model']} on {summary['cluster']}, trace {summary['trace']}, policy {summary['policy']}"
        + ("" if summary["changes_cost"] else " (changes cost nothing)"),
        f"requests  {summary['served']} of {summary['requests']} served in {summary['seconds']:.1f} s,"
        f" {summary['rejected']} rejected, {summary['errors']} failed, {summary['unfinished']} unfinished",
        f"rate      {summary['requests_per_s']:.3f} requests/s, {summary['output_tokens_per_s']:.1f} output tokens/s,"
        f" {summary['prompt_tokens_per_s']:.1f} prompt tokens/s",
    ]
    if ttft is not None:
        lines.append(f"TTFT      mean {ttft['mean']:.3f} s, p50 {ttft['p50']:.3f}, p99 {ttft['p99']:.3f}")
    if tpot is not None:
        lines.append(
            f"TPOT      mean {1e3 * tpot['mean']:.1f} ms, p50 {1e3 * tpot['p50']:.1f}, p99 {1e3 * tpot['p99']:.1f}"
        )
    lines.append(
        f"goodput   {summary['goodput_requests_per_s']:.3f} requests/s, {summary['good_ratio']:.1%} of all within"
        f" TTFT {slo['ttft_s']:g} s and TPOT {1e3 * slo['tpot_s']:g} ms"
    )
    kinds = ", ".join(f"{label} {seconds:.0f}" for label, seconds in summary["gpu_seconds_of"].items())
    lines.append(f"devices   {summary['gpu_seconds']:.0f} device-seconds ({kinds})")
    lines += [f"  from {entry['at_s']:8.1f} s  {entry['layout']}" for entry in summary["layouts"]]
    outcomes = [change["outcome"] for change in summary["changes"]]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    lines.append(
        f"changes   {counts or 'none'}"
        + (f", {len(summary['changes_refused'])} refused" if summary["changes_refused"] else "")
    )
    lines += [f"  {note}" for note in [*summary["changes_refused"], *summary["notes"]]]
    lines.append(f"simulated in {summary['wall_s']:.2f} s, {summary['times_real_time']:,.0f} times real time")
    return lines


# -- parts -----------------------------------------------------------------------------------------------------


def _trace(options: argparse.Namespace) -> Trace:
    path = Path(options.trace).expanduser()
    if ":" in options.trace and not path.exists():
        trace = make_trace(options.trace, options.seed)
    else:
        trace = read_trace(path)
    if options.duration:
        trace = trace.window(0.0, options.duration)
    if options.requests:
        trace = trace.first(options.requests)
    if not len(trace):
        raise ValueError(f"the trace {options.trace} has no requests (within --duration)")
    return trace.scaled(options.rate_scale)


def _planned(planning: Planning, traffic: Traffic) -> tuple[list[int], tuple[int, ...]]:
    """The planner's layout for the mean load: indices of devices in their order, and layers for each."""
    try:
        found = planning.plan(traffic, None)
    except NoPlan as error:
        raise ValueError(str(error)) from error
    index = {device.worker: i for i, device in enumerate(planning.devices)}
    return [index[w] for w in found.layout.workers], tuple(len(s.layers) for s in found.layout.segments)


def _given(text: str, devices: Devices, num_layers: int) -> tuple[list[int], tuple[int, ...]]:
    """``a100:30,l40s:20,l40s:30``: the next device of that kind takes so many layers."""
    chosen, counts = [], []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^:\s]+):(\d{1,5})\s*", part)
        if match is None:
            raise ValueError(f"layout: {part!r} is no stage; it looks like a100:30,l40s:20,l40s:30")
        left = [i for i, (label, _, _) in enumerate(devices) if label == match[1].lower() and i not in chosen]
        if not left:
            raise ValueError(f"layout: the cluster has no (other) {match[1]} for {part.strip()}")
        chosen.append(left[0])
        counts.append(int(match[2]))
    if sum(counts) != num_layers or not all(counts[1:-1]):
        raise ValueError(
            f"layout: {text} covers {sum(counts)} layers, the model has {num_layers}; inner stages need one"
        )
    return chosen, tuple(counts)


def _policy(options: argparse.Namespace, planning: Planning, trace: Trace) -> Policy:
    if options.policy == "oracle":
        return Oracle(planning, trace, options.window)
    return Policy()


def _pilot_notes(simulation: Simulation) -> list[str]:
    """The autopilot's log."""
    began_s = simulation.world.now_s - simulation.now_s
    log = simulation.head.pilot.autopilot.log
    return [f"at {entry.at_s - began_s:.0f} s: {entry.kind}: {entry.text}" for entry in log]


def _write(folder: Path, summary: dict[str, Any], scenario: Scenario, outcome: Outcome, window_s: float) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    windows = window_rows(outcome, scenario.devices, scenario.slo, window_s)
    for name, columns, rows in (
        ("requests.csv", REQUEST_COLUMNS, request_rows(outcome)),
        ("windows.csv", WINDOW_COLUMNS, windows),
    ):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    try:
        from api.simulate_plots import plot
    except ImportError:
        print(f"midflight: no plots without matplotlib; the tables are in {folder}", file=sys.stderr)
        return
    plot(folder / "simulation.png", summary, outcome)
