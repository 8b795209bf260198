"""The simulator against reality: a server with two workers, several loads and layouts, beside what the simulator says.

One server runs all of it; between the parts its layout is changed live. The steps of the first layout are written down
(`simulator_head`), and from them alone come the cost model's coefficients, the spread of stage times, and what a hop costs:
once from all loads together, and once for each load from its own steps, as a head knows its workers that has served this
load for a while. Then every load is simulated on every layout. Figures of the first layout say how good the fit is, those of
the others how good the prediction is.

A worker that has only ever run 17 layers cannot tell what a step costs from what a layer costs: any split of the time between the two
fits, and predicts something else for 22 layers. The workers are alike, so the coefficients are fitted to all of them at once, which
hold different numbers of layers (the first layout must be uneven for that). How fast each one is by itself, as its core has its own
neighbours, is one factor on its layers, and one on the LM head where it holds that.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
from loadgen import Workload, emulated_devices, run_workload, warm_up
from servers import ROOT, Arm, Server, describe_machine

sys.path.insert(0, str(ROOT))

from kvstore.ids import LayerRange
from runtime.model.config import inspect_model
from runtime.model.spec import ModelSpec
from scheduler.batching import BatchingConfig
from scheduler.planning.calibration import Measurement, Profile, correct, predict
from scheduler.planning.cost import TERMS, Facts, Speed, Work
from scheduler.planning.devices import kind_of_worker
from scheduler.planning.traffic import Slo
from scheduler.simulation.policies import Policy
from scheduler.simulation.results import summarise
from scheduler.simulation.simulator import Simulation
from scheduler.simulation.trace import Trace
from scheduler.simulation.world import Rates, SimDevice

WORKLOADS = (
    Workload("one client", 1, 3, 128, 96),
    Workload("8 clients", 8, 24, 128, 96),
    Workload("32 clients", 32, 64, 128, 64),
    Workload("decode", 16, 32, 16, 160),
    Workload("prefill", 8, 16, 768, 16),
)
MAX_MEASUREMENTS = 3000


@dataclass(frozen=True)
class Calibration:
    """What the first layout's steps say of this machine: of all workers in `common`, and of each by itself. Seconds."""

    common: Speed
    speeds: tuple[Speed, ...]
    rates: Rates
    send_s: float
    num_steps: int
    step_mape: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench simulator", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--folder", type=Path, help="the model's folder; default: where `midflight pull` keeps it")
    parser.add_argument("--layouts", default="17,13 22,8 12,18", help="layers per stage; the first one calibrates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("/tmp/midflight-bench-simulator"))
    parser.add_argument("--again", action="store_true", help="compare anew what the last run left in --log")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layouts = [[int(part) for part in text.split(",")] for text in args.layouts.split()]
    args.log.mkdir(parents=True, exist_ok=True)
    if args.again:
        measured = json.loads((args.log / "measured.json").read_text())
    else:
        measured = asyncio.run(_measure(args, layouts))
        (args.log / "measured.json").write_text(json.dumps(measured))
    steps = [json.loads(line) for line in (args.log / "steps.jsonl").read_text().splitlines()]
    folder = args.folder or Path.home() / ".cache/midflight/models" / args.model
    report = compare(inspect_model(folder, dtype="bfloat16"), layouts, measured, steps, args.seed)
    report = {"machine": describe_machine(), "model": args.model, **report}
    text = json.dumps(report, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if not args.out else _table(report))
    return 0


async def _measure(args: argparse.Namespace, layouts: list[list[int]]) -> list[dict]:
    """Every workload on every layout: the client's figures, with the times between which its steps ran."""
    command = (
        sys.executable, str(Path(__file__).with_name("simulator_head.py")), str(args.log / "steps.jsonl"),
        str(args.folder or args.model), "--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16",
        "--threads", "1", "--layers", ",".join(map(str, layouts[0])), "--no-prefix-cache",
    )  # fmt: skip
    measured = []
    with Server(Arm("midflight", command, args.model), args.log / "server.log") as server:
        if devices := await emulated_devices(server.url):
            raise RuntimeError(f"these workers emulate other devices: {devices}")
        name = (args.folder or Path(args.model)).name
        for index, layout in enumerate(layouts):
            if index:
                await _change(server.url, layout)
            await warm_up(server.url, name, WORKLOADS[2], seed=args.seed + 99)
            for workload in WORKLOADS:
                began_s = time.monotonic()
                summary, _ = await run_workload(server.url, name, workload, seed=args.seed)
                ended_s = time.monotonic()
                assert not summary["errors"], summary["error_examples"]
                measured.append(
                    {"layout": layout, "load": vars(workload), "from_s": began_s, "to_s": ended_s, **summary}
                )
                print(f"{layout} {workload.name}: {summary['output_tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    return measured


async def _change(url: str, layout: list[int]) -> None:
    wish, url = {"layers": layout}, f"{url}/admin/layout?wait=true"
    async with aiohttp.ClientSession() as session, session.post(url, json=wish) as response:
        report = await response.json()
        assert report.get("outcome") == "committed", report


def compare(spec: ModelSpec, layouts: list[list[int]], measured: list[dict], steps: list[dict], seed: int) -> dict:
    """Calibrates on the first layout, simulates all, and sets the figures side by side."""
    facts = Facts(spec)
    calibration = calibrate(facts, layouts[0], measured, steps)
    rows = []
    for one in measured:
        same_load = [other for other in measured if other["load"] == one["load"]]
        own = calibrate(facts, layouts[0], same_load, steps, calibration.common)
        load = Workload(**one["load"])
        said, said_own = (simulate(spec, known, one["layout"], load, seed) for known in (calibration, own))
        row = {"layout": one["layout"], "workload": load.name, "calibrated_on": one["layout"] == layouts[0]}
        row["tokens_per_s"] = _beside(*(x["output_tokens_per_s"] for x in (one, said, said_own)))
        for key in ("tpot", "ttft"):
            row[f"{key}_ms"] = _beside(*(1e3 * x[f"{key}_s"]["mean"] for x in (one, said, said_own)))
        rows.append(row)
    others = [row for row in rows if not row["calibrated_on"]]
    return {
        "calibration": {
            "scales": [[round(value, 3) for value in speed.scale] for speed in calibration.speeds],
            "send_ms": 1e3 * calibration.send_s,
            "flight_ms": 1e3 * calibration.rates.flight_s,
            "head_ms": 1e3 * calibration.rates.head_s,
            "noise": calibration.rates.noise,
            "steps": calibration.num_steps,
            "step_mape": calibration.step_mape,
        },
        "rows": rows,
        "errors": {
            f"{key} {which}": {"worst": max(errors), "mean": statistics.mean(errors)}
            for key in ("tokens_per_s", "tpot_ms")
            for which in ("error", "error_own")
            if (errors := [abs(row[key][which]) for row in others])
        },
    }


def _beside(measured: float, simulated: float, own: float) -> dict[str, float]:
    """`own` is simulated with what was learned from this load alone."""
    return {
        "measured": measured, "simulated": simulated, "error": simulated / measured - 1,
        "simulated_own": own, "error_own": own / measured - 1,
    }  # fmt: skip


def calibrate(
    facts: Facts, layout: list[int], measured: list[dict], steps: list[dict], start: Speed | None = None
) -> Calibration:
    """Coefficients, spread and overheads from the steps of the workloads on `layout`; the fit begins at `start`."""
    windows = [(one["from_s"], one["to_s"]) for one in measured if one["layout"] == layout]
    groups = [[step for step in steps if a <= step["sent_s"] and step["back_s"] <= b] for a, b in windows]
    chosen = [step for group in groups for step in group]
    of_hop = [_measurements(chosen, hop) for hop in range(len(layout))]
    common = _fit(facts, start or Speed(kind_of_worker("cpu", "", 1)), [m for some in of_hop for m in some])
    speeds = [_paced(facts, common, some) for some in of_hop]
    ratios = [[m.seconds / predict(facts, speed, m) for m in some] for speed, some in zip(speeds, of_hop, strict=True)]
    send_s = statistics.mean(_overheads(groups))
    round_trips = [_transit_s(step) for step in chosen if not step["is_ahead"]]  # the others wait for tokens, too
    head_s, hops = statistics.mean(step["step_s"] for step in chosen), len(layout)
    flight_s = max(0.0, (statistics.mean(round_trips) - hops * send_s - head_s) / (hops + 1))
    return Calibration(
        common,
        tuple(Speed(msgspec.structs.replace(s.kind, link_latency_s=send_s), s.scale) for s in speeds),
        Rates(flight_s=flight_s, head_s=head_s, noise=statistics.mean(float(np.log(some).std()) for some in ratios)),
        send_s,
        len(chosen),
        statistics.mean(abs(1 / ratio - 1) for some in ratios for ratio in some),
    )


def _measurements(steps: list[dict], hop: int) -> list[Measurement]:
    """What one worker's steps took; of the LM head on the last one."""
    found = []
    for step in steps:
        work, (_, _, compute_us, sample_us) = Work(*step["work"]), step["hops"][hop]
        found.append(Measurement(work, LayerRange(*step["layers"][hop]), 1e-6 * compute_us, with_step=True))
        if hop == len(step["hops"]) - 1 and work.samples:
            found.append(Measurement(work, LayerRange(0, 0), 1e-6 * sample_us, with_head=True))
    return [m for m in found if m.seconds > 0]


def _fit(facts: Facts, known: Speed, measurements: list[Measurement]) -> Speed:
    """Coefficients for a sample of these."""
    picked = np.random.default_rng(0).permutation(len(measurements))[:MAX_MEASUREMENTS]
    sample = tuple(measurements[index] for index in picked)
    return correct(facts, known, Profile("cpu", facts.spec.name, sample))


def _paced(facts: Facts, common: Speed, measurements: list[Measurement]) -> Speed:
    """A worker that takes as long as these in sum, for its layers and for the LM head (the fit leans to the median, time is spent
    by the mean)."""

    def pace(some: list[Measurement]) -> float:
        return sum(m.seconds for m in some) / sum(predict(facts, common, m) for m in some) if some else 1.0

    layers, head = (pace([m for m in measurements if m.with_head is with_head]) for with_head in (False, True))
    paces = [head if term in ("head", "sample") else layers for term in TERMS]
    return Speed(common.kind, tuple(value * pace for value, pace in zip(common.scale, paces, strict=True)))


def _overheads(groups: list[list[dict]]) -> list[float]:
    """What a worker's thread spends on a step beside computing: its time that is neither idle nor a step's, per step."""
    found = []
    for group in groups:
        wall_us = 1e6 * (max(step["back_s"] for step in group) - min(step["sent_s"] for step in group))
        for hop in range(len(group[0]["hops"])):
            known_us = sum(step["hops"][hop][i] for step in group for i in (0, 2, 3))
            found.append(max(0.0, wall_us - known_us) / len(group) / 1e6)
    return found


def _transit_s(step: dict) -> float:
    """Of the time from the head and back, what the step spent neither in a worker's queue nor computed."""
    return step["back_s"] - step["sent_s"] - 1e-6 * sum(sum(hop[1:]) for hop in step["hops"])


def simulate(spec: ModelSpec, calibration: Calibration, layout: list[int], workload: Workload, seed: int) -> dict:
    """What the simulator says of a workload on a layout."""
    count = workload.num_requests
    trace = Trace(
        workload.name,
        np.zeros(count),
        np.full(count, workload.prompt_tokens),
        np.full(count, workload.output_tokens),
    )
    devices = [SimDevice(f"w{i}", "cpu", speed, 8 << 30) for i, speed in enumerate(calibration.speeds)]
    simulation = Simulation(
        spec, devices, layout, Policy(),
        batching=BatchingConfig(num_microbatches=len(layout), max_step_tokens=512, prefix_cache=False, look_ahead="idle"),
        rates=calibration.rates, seed=seed, concurrency=workload.concurrency,
    )  # fmt: skip
    return summarise(simulation.run(trace), devices, Slo())


def _table(report: dict) -> str:
    """The report as a table in Markdown: rates and TPOT measured and simulated, with both errors."""
    titles = ("layout", "load", *("tokens/s", "simulated", "error", "own"), *("TPOT, ms", "simulated", "error", "own"))
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in report["rows"]:
        cells = [",".join(map(str, row["layout"])) + (" (fit)" if row["calibrated_on"] else ""), row["workload"]]
        for figures in (row["tokens_per_s"], row["tpot_ms"]):
            cells += [f"{figures['measured']:.1f}", f"{figures['simulated']:.1f}"]
            cells += [f"{figures['error']:+.1%}", f"{figures['error_own']:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
