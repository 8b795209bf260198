"""`scripts/bench forecast`: what the planner's forecast says of static layouts, beside what the simulator makes of them.

Clusters, model and lengths are those of `scripts/bench policies`. For each number of stages the planner's best layout serves a closed loop
of as many clients as may be in service; those of the first round stop at random places, so that they do not end together. After
two of a request's lives steps are counted for four more: steps per second, the tokens that they sample, the share that
carries a prompt, and the mean time per token of the requests that end. Everything here is simulated and says so.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from arms import note
from policies import KV_BYTES, SLO, Cluster

from scheduler.batching import BatchingConfig
from scheduler.planning.cost import Work
from scheduler.planning.planner import plan
from scheduler.planning.traffic import Traffic
from scheduler.simulation.policies import Policy
from scheduler.simulation.simulator import Simulation
from scheduler.simulation.trace import Trace
from scheduler.simulation.worker import Flight, SimWorker
from scheduler.simulation.world import Rates, name_devices

STAGES = {2: (2,), 8: (4, 8), 64: (12, 24, 40)}
LENGTHS = ((512, 16), (128, 512), (512, 128))
MIN_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench forecast", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--devices", default="2,8,64")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for count in map(int, args.devices.split(",")):
        cluster = Cluster(count, "steady")
        for prompt, output in LENGTHS:
            for num_stages in STAGES[count]:
                rows.append(_row(cluster, count, num_stages, prompt, output))
                note(_text(rows[-1]))
    report = json.dumps({"benchmark": "forecast", "SIMULATED": True, "rows": rows}, indent=1)
    if args.out:
        args.out.write_text(report + "\n")
    else:
        print(report)
    return 0


def _row(cluster: Cluster, count: int, num_stages: int, prompt: int, output: int) -> dict[str, Any]:
    traffic = Traffic(prompt_tokens=prompt, output_tokens=output, concurrency=cluster.serving.max_running)
    known = cluster.planning
    found = plan(known.facts, known.devices, traffic, serving=cluster.serving, slo=SLO, num_stages=num_stages)
    forecast = found.forecast
    clients = int(forecast.max_sequences)
    life_s = clients / forecast.capacity_requests_per_s
    from_s, to_s = 2 * life_s, 2 * life_s + 4 * max(MIN_S, life_s)
    index = {device.worker: i for i, device in enumerate(cluster.devices)}
    devices = name_devices(cluster.raw, [index[segment.worker] for segment in found.layout.segments])
    simulation = Simulation(
        cluster.spec,
        devices,
        found.layout.counts(),
        Policy(),
        batching=BatchingConfig(num_microbatches=0, max_step_tokens=512, max_running=cluster.serving.max_running, max_queue=1 << 20, prefix_cache=False),
        rates=Rates(),
        kv_bytes=KV_BYTES[count],
        memory_fraction=0.5,
        concurrency=clients,
    )  # fmt: skip
    steps: list[tuple[float, Work]] = []
    _watch(simulation.workers[devices[0].worker], lambda work: steps.append((simulation.now_s, work)))
    outcome = simulation.run(_trace(clients, prompt, output, to_s, forecast.capacity_requests_per_s), max_s=to_s)
    counted = [work for at_s, work in steps if from_s <= at_s <= to_s]
    ended = [r.tpot_s for r in outcome.records if r.outcome == "length" and from_s <= r.last_s <= to_s]
    return {
        "devices": count, "stages": num_stages, "prompt": prompt, "output": output, "clients": clients,
        "layers": found.layout.counts(),
        "forecast_requests_per_s": forecast.capacity_requests_per_s,
        "simulated_requests_per_s": sum(work.samples for work in counted) / (to_s - from_s) / output,
        "forecast_tpot_s": forecast.tpot_s,
        "simulated_tpot_s": float(np.mean(ended)),
        "share_with_prompt": sum(work.prefill_tokens > 0 for work in counted) / len(counted),
        "slow_over_fast": max(stage.prefill_s / stage.decode_s for stage in forecast.stages),
    }  # fmt: skip


def _watch(first: SimWorker, seen: Any) -> None:
    """Tell `seen` of the work of each step that comes to the first stage."""
    step = first.step

    def watched(flight: Flight, hop: int) -> None:
        if hop == 0:
            seen(flight.work)
        step(flight, hop)

    first.step = watched  # type: ignore[method-assign]


def _trace(clients: int, prompt: int, output: int, seconds: float, rate: float) -> Trace:
    num = clients + int(3 * rate * seconds)
    outputs = np.full(num, output)
    outputs[:clients] = np.maximum(1, output * np.random.default_rng(1).random(clients))
    return Trace("", np.zeros(num), np.full(num, prompt), outputs)


def _text(row: dict[str, Any]) -> str:
    rate = row["forecast_requests_per_s"] / row["simulated_requests_per_s"] - 1
    tpot = row["forecast_tpot_s"] / row["simulated_tpot_s"] - 1
    return (
        f"| {row['devices']} | {row['stages']} | {row['prompt']}, {row['output']} | {row['share_with_prompt']:.2f} | {row['slow_over_fast']:.1f}"
        f" | {row['simulated_requests_per_s']:.2f} | {row['forecast_requests_per_s']:.2f} ({rate:+.0%})"
        f" | {1e3 * row['simulated_tpot_s']:.0f} | {1e3 * row['forecast_tpot_s']:.0f} ({tpot:+.0%}) |"
    )


if __name__ == "__main__":
    sys.exit(main())
