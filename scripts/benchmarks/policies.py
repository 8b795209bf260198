"""`scripts/bench policies`: static layouts, the autopilot and an oracle on simulated clusters of 2, 8 and 64 mixed devices.

Llama-3-70B's shape, devices by the table, lengths as they are: the pattern of PipeLive (512 tokens in and 16 out, then 128 and
512, and back) and the Azure code trace giving way to the conversation trace, both at `LOAD` of what the cost model says the best
layout sustains in that part. The static layouts are those planned for each part, for the mean of all, and even shares of
layers over all devices; with so many devices there are too many to try all. The oracle plans each part beforehand and
changes at no cost. Figures are `autopilot_score`'s, the same as on real processes. One file per run is kept in `--folder`
and not simulated again. Everything here is simulated and says so.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import machine_now, note
from autopilot_report import report_of
from autopilot_setting import CODE, CONVERSATION
from servers import ROOT

sys.path.insert(0, str(ROOT))

from runtime.layout import Layout
from scheduler.batching import BatchingConfig
from scheduler.planning.autopilot import Settings
from scheduler.planning.cost import Facts
from scheduler.planning.plans import NoPlan
from scheduler.planning.traffic import Serving, Slo, Traffic
from scheduler.simulation.policies import Oracle, Planning, Policy
from scheduler.simulation.shapes import load_shape
from scheduler.simulation.simulator import Simulation
from scheduler.simulation.trace import Trace, read_trace
from scheduler.simulation.world import Rates, name_devices, parse_devices

CLUSTERS = {2: "h200:1,l40s:1", 8: "a100:4,l40s:4", 64: "a100:16,l40s:24,a10:12,l4:12"}
PHASE_S = {2: 300.0, 8: 300.0, 64: 300.0}
LOAD_BYTES_PER_S = 10e9
"""Weights come from the host's memory over PCIe."""
SNAPSHOT_BYTES_PER_S, KV_BYTES_PER_S = 2_500_000_000, 1e9
"""What a change may put on each source's network, a quarter of the table's link, and what the autopilot expects of it at first."""
LOAD = 0.75
LIMITS = "autopilot, limits set"
"""The arm where clients ask for as many tokens as they get, as load generators do and some programs. Elsewhere nobody knows."""
SLO = Slo(ttft_s=5.0, tpot_s=0.5)
MAX_RUNNING = {2: 96, 8: 256, 64: 512}
KV_BYTES = {2: 0, 8: 16 * 10**9, 64: 10 * 10**9}
"""Of each worker's page pool: enough for the sequences in service on as many layers as the layouts give to a worker, and small enough that layers can move beside it. 0: nine tenths of what
the weights leave at first, and then what they leave of that."""
PARTS = {
    "pipelive": [("prompts", 512.0, 16.0), ("answers", 128.0, 512.0), ("prompts again", 512.0, 16.0)],
    "steady": [("steady", 512.0, 128.0)],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench policies", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--devices", default="2,8,64")
    parser.add_argument("--patterns", default="pipelive,azure,steady")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/midflight-bench-policies"))
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    parser.add_argument("--report", action="store_true", help="simulate nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "benchmark": "policies",
        "SIMULATED": True,
        "machine": machine_now(),
        "slo": asdict_slo(),
        "load": LOAD,
    }
    for count in map(int, args.devices.split(",")):
        for pattern in args.patterns.split(","):
            if pattern == "azure" and not (CODE.is_file() and CONVERSATION.is_file()):
                note(f"skipped: the Azure traces are not there ({CODE.parent})")
                continue
            runs = _runs(args.folder, count, pattern, only_kept=args.report)
            if runs:
                title = f"{pattern}, {count} devices ({CLUSTERS[count]}), SIMULATED"
                report[f"{pattern} {count}"] = report_of(title, runs, SLO, args.plots, f"policies-{pattern}-{count}")
    text = json.dumps(report, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 0


def asdict_slo() -> dict[str, float]:
    return {"ttft_s": SLO.ttft_s, "tpot_s": SLO.tpot_s}


class Cluster:
    """One cluster and one pattern: the trace, and the layouts that are worth trying."""

    def __init__(self, count: int, pattern: str) -> None:
        self.spec = load_shape("llama-3-70b")
        self.facts, self.raw = Facts(self.spec), parse_devices(CLUSTERS[count])
        self.devices = name_devices(self.raw, ())
        self.serving = Serving(max_step_tokens=512, max_running=MAX_RUNNING[count])
        self.planning = Planning.of(
            self.facts, self.devices, self.serving, "throughput", SLO, pool_bytes=KV_BYTES[count]
        )
        self.phase_s = PHASE_S[count]
        if pattern == "azure":
            self._from_files()
        else:
            self._made_up(PARTS[pattern])

    def plan(self, prompt: float, output: float) -> tuple[Layout, float]:
        """The best layout, and what it sustains."""
        traffic = Traffic(prompt_tokens=prompt, output_tokens=output, concurrency=self.serving.max_running)
        found = self.planning.plan(traffic, None)
        return found.layout, found.forecast.capacity_requests_per_s

    def statics(self) -> dict[str, Layout]:
        found: dict[str, Layout] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            found[f"for {name}"] = self.plan(float(part.prompt_tokens.mean()), float(part.output_tokens.mean()))[0]
        whole = self.trace
        found["for the mean"] = self.plan(float(whole.prompt_tokens.mean()), float(whole.output_tokens.mean()))[0]
        unique: dict[object, str] = {}
        return {name: layout for name, layout in found.items() if unique.setdefault(layout.segments, name) == name}

    def _made_up(self, parts: Sequence[tuple[str, float, float]]) -> None:
        draw, made = np.random.default_rng(0), []
        for _, prompt, output in parts:
            rate = LOAD * self.plan(prompt, output)[1]
            at = draw.exponential(1 / rate, int(2 * rate * self.phase_s) + 20).cumsum()
            at = at[at < self.phase_s]
            made.append(Trace("", at, np.full(len(at), int(prompt)), np.full(len(at), int(output))))
        self._join([name for name, _, _ in parts], made)

    def _from_files(self) -> None:
        made = []
        for path in (CODE, CONVERSATION):
            trace = read_trace(path)
            part = trace
            for _ in range(3):  # the rate follows from the excerpt, its length from the rate
                rate = LOAD * self.plan(float(part.prompt_tokens.mean()), float(part.output_tokens.mean()))[1]
                part = trace.first(round(rate * self.phase_s))
            made.append(part.scaled(part.duration_s / self.phase_s * 1.0001))
        self._join(["code", "conversation"], made)

    def _join(self, names: list[str], parts: list[Trace]) -> None:
        self.names, self.parts = names, parts
        starts = [index * self.phase_s for index in range(len(parts))]
        self.trace = Trace(
            "joined",
            np.concatenate([part.arrival_s + start for part, start in zip(parts, starts, strict=True)]),
            np.concatenate([part.prompt_tokens for part in parts]),
            np.concatenate([part.output_tokens for part in parts]),
        )
        self.phases = [
            {"name": n, "start_s": s, "stop_s": s + self.phase_s, "rate": len(p) / self.phase_s}
            for n, s, p in zip(names, starts, parts, strict=True)
        ]


def _runs(folder: Path, count: int, pattern: str, *, only_kept: bool) -> dict[str, dict[str, Any]]:
    """Every arm of it, simulated where it has not been."""
    runs: dict[str, dict[str, Any]] = {}
    if only_kept:
        for path in sorted(folder.glob(f"{pattern}.{count}.*.json")):
            runs[path.name.split(".")[2]] = json.loads(path.read_text())
        return runs
    try:
        cluster = Cluster(count, pattern)
    except NoPlan as error:
        note(f"{pattern}, {count}: {error}")
        return {}
    statics = cluster.statics()
    first = next(iter(statics.values()))
    arms = {**statics, "oracle": first, "autopilot": first}
    if pattern == "pipelive":
        arms[LIMITS] = first
    for arm, layout in arms.items():
        path = folder / f"{pattern}.{count}.{arm}.json"
        if not path.exists():
            path.write_text(json.dumps(_simulate(cluster, arm, layout)))
        runs[arm] = json.loads(path.read_text())
    return runs


def _simulate(cluster: Cluster, arm: str, layout: Layout) -> dict[str, Any]:
    """One arm, which begins on `layout`."""
    index = {device.worker: i for i, device in enumerate(cluster.devices)}
    devices = name_devices(cluster.raw, [index[segment.worker] for segment in layout.segments])
    planning = Planning.of(
        cluster.facts, devices, cluster.serving, "throughput", SLO, pool_bytes=KV_BYTES[len(cluster.raw)]
    )
    policy = Oracle(planning, cluster.trace, cluster.phase_s) if arm == "oracle" else Policy()
    simulation = Simulation(
        cluster.spec,
        devices,
        layout.counts(),
        policy,
        batching=BatchingConfig(num_microbatches=0, max_step_tokens=512, max_running=cluster.serving.max_running, max_queue=1 << 20, prefix_cache=False),
        rates=Rates(load_bytes_per_s=LOAD_BYTES_PER_S, free_changes=arm == "oracle"),
        kv_bytes=KV_BYTES[len(cluster.raw)],
        memory_fraction=0.9,
        autopilot="on" if arm.startswith("autopilot") else "off",
        limits=arm == LIMITS,
        piloting=Settings(
            objective="throughput", slo=SLO, load_bytes_per_s=LOAD_BYTES_PER_S,
            kv_bytes_per_s=KV_BYTES_PER_S, snapshot_bytes_per_s=SNAPSHOT_BYTES_PER_S,
        ),
    )  # fmt: skip
    began_s, cpu_s = time.perf_counter(), time.process_time()
    outcome = simulation.run(cluster.trace)
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    base_s = simulation.world.now_s - simulation.now_s
    note(
        f"  {arm}: {layout.brief()}, {outcome.end_s:.0f} s in {wall_s:.1f} s, {outcome.steps} steps, {len(outcome.changes)} changes"
    )
    return {
        "phases": cluster.phases,
        "requests": [
            {"due_s": r.arrival_s, "ttft_s": r.ttft_s, "tpot_s": r.tpot_s, "last_s": r.last_s, "num_output": r.num_tokens}
            for r in outcome.records
            if r.outcome == "length"
        ],
        "lost": sum(r.outcome != "length" for r in outcome.records),
        "layouts": _briefs(outcome.layouts),
        "changes": [(change.outcome, change.why, round(change.total_s, 2)) for change in outcome.changes],
        "log": [
            {"at_s": e.at_s - base_s, "kind": e.kind, "text": e.text} for e in simulation.head.pilot.autopilot.log
        ],
        "cpu_share": cpu_s / outcome.end_s,
        "wall_s": wall_s,
        "simulated_s": outcome.end_s,
        "steps": outcome.steps,
    }  # fmt: skip


def _briefs(layouts: Sequence[tuple[float, Layout, Any]]) -> list[tuple[float, str]]:
    found: list[tuple[float, str]] = []
    for at_s, layout, _ in layouts:
        if not found or found[-1][1] != layout.brief():
            found.append((at_s, layout.brief()))
    return found


if __name__ == "__main__":
    sys.exit(main())
