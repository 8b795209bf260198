"""`scripts/bench planner`: how long the planner takes, whether it is ever beaten, and how far its cost model is off.

Without arguments: planning time for 8 devices and 80 layers, for 64, and how it grows. ``--instances N`` compares N random
problems of up to 6 devices with brute force over every order, every choice and every cut: the busiest stage and the sum, for which the search
is exact. ``--plans N`` does so with N whole plans for the throughput, by the round with convoys, and states by how much they fall short. ``--measure MODEL`` runs
stages of a real model here and states the error of the cost model, by the table and after a profile.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from arms import DEFAULT_MODEL, machine_now, note

from runtime.model.config import inspect_model
from runtime.model.spec import ModelSpec
from scheduler.planning import compiled
from scheduler.planning.convoy import round_seconds, weighted
from scheduler.planning.cost import TERMS, Facts, Speed, unit_times
from scheduler.planning.devices import lookup
from scheduler.planning.forecast import Cluster, Device
from scheduler.planning.planner import plan
from scheduler.planning.search import Solver
from scheduler.planning.splits import Problem
from scheduler.planning.traffic import Objective, Serving, Traffic, mean_steps

KINDS = ("a100", "l40s", "h100", "l4")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench planner", description="The planner's time, optimality and error."
    )
    parser.add_argument("--instances", type=int, default=0, help="random problems to compare with brute force")
    parser.add_argument("--plans", type=int, default=0, help="random clusters whose plans to compare with brute force")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--max-devices", type=int, default=6)
    parser.add_argument("--max-layers", type=int, default=7)
    parser.add_argument(
        "--measure", nargs="?", const=DEFAULT_MODEL, metavar="MODEL", help="measure the cost model's error"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    report: dict[str, Any] = {"benchmark": "planner", "machine": machine_now()}
    failed = False
    if args.instances:
        report["brute_force"] = compare(args.instances, args.seed, args.max_devices, args.max_layers)
        failed = report["brute_force"]["worse"] > 0
    elif args.plans:
        report["plans"] = compare_plans(args.plans, args.seed, args.max_devices, args.max_layers)
    elif args.measure:
        from planner_measure import measure_device

        home = Path(os.environ.get("MIDFLIGHT_HOME") or "~/.cache/midflight").expanduser()
        folder = Path(args.measure) if Path(args.measure).is_dir() else home / "models" / args.measure
        if not folder.is_dir():
            note(
                f"--measure {args.measure}: neither a folder nor a model in {home / 'models'}; `midflight pull` fetches one"
            )
            return 2
        report["cost_model"] = measure_device(inspect_model(folder, dtype="bfloat16"), device=args.device)
        note(json.dumps(report["cost_model"]["errors"], indent=1))
    else:
        begun_s = time.process_time()
        compiled.load()
        compiled.build.compile_all()
        report["prepare_s"] = round(time.process_time() - begun_s, 3)
        report["times"] = times(args.repeats)
    text = json.dumps(report, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 1 if failed else 0


# -- time ---------------------------------------------------------------------------------------------------------


def times(repeats: int) -> list[dict]:
    """Milliseconds of processor time of one `plan`, loops compiled and nothing else kept from the one before, for every objective."""
    rows = []
    facts = Facts(_shape_70b())
    for n, alike, objective in itertools.product((2, 4, 8, 16, 32, 64), (False, True), get_args(Objective)):
        devices = _devices(n, alike)
        traffic = Traffic(requests_per_s=0.0, prompt_tokens=1020, output_tokens=129, concurrency=128)
        taken = []
        for _ in range(repeats):
            begun_s = time.process_time()
            try:
                plan(facts, devices, traffic, objective=objective)
            except ValueError:
                break  # the weights do not fit on so few
            taken.append(1e3 * (time.process_time() - begun_s))
        if not taken:
            continue
        row = {
            "devices": n, "layers": facts.num_layers, "alike": alike, "objective": objective,
            "median_ms": round(statistics.median(taken), 3), "min_ms": round(min(taken), 3), "max_ms": round(max(taken), 3),
        }  # fmt: skip
        note(f"{n:3} devices, {'4 kinds' if alike else 'all different'}, {objective}: {row['median_ms']:.2f} ms")
        rows.append(row)
    return rows


def _devices(n: int, alike: bool) -> list[Device]:
    rng = np.random.default_rng(0)
    devices = []
    for index in range(n):
        kind = lookup(KINDS[index % len(KINDS)])
        scale = (1.0,) * len(TERMS) if alike else tuple(rng.uniform(0.9, 1.1, len(TERMS)).tolist())
        devices.append(Device(f"w{index}", Speed(kind, scale), kind.memory_bytes))
    return devices


def _shape_70b() -> ModelSpec:
    return _shape(80, 8192, 28672, 128256, heads=64, kv_heads=8, head_dim=128)


def _shape(
    num_layers: int, hidden: int, intermediate: int, vocab: int, *, heads: int, kv_heads: int, head_dim: int
) -> ModelSpec:
    layer = 2 * (hidden * head_dim * 2 * (heads + kv_heads) + 3 * hidden * intermediate)
    return ModelSpec(
        name="shape", folder="", architecture="LlamaForCausalLM", dtype="bfloat16", load_format="dummy",
        num_layers=num_layers, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocab, max_context=8192, tied_embeddings=False, layer_bytes=(layer,) * num_layers,
        embedding_bytes=2 * hidden * vocab, lm_head_bytes=2 * hidden * vocab, layer_flops_per_token=(layer,) * num_layers,
        lm_head_flops_per_token=2 * hidden * vocab, eos_token_ids=(),
    )  # fmt: skip


# -- optimality ---------------------------------------------------------------------------------------------------


def compare(instances: int, seed: int, max_devices: int, max_layers: int) -> dict:
    """Random problems, each with a random number of stages: the planner's cycle against the best of all splits."""
    worse, impossible, largest_off, num_splits = [], 0, 0.0, 0
    begun_s = time.perf_counter()
    for index in range(instances):
        rng = np.random.default_rng(seed + index)
        problem = random_problem(rng, max_devices, max_layers)
        k = int(rng.integers(1, min(problem.num_devices, problem.num_layers + 2) + 1))
        best, tried = brute_force(problem, k)
        num_splits += tried
        found = Solver(problem, k).best()
        value = np.inf if found is None else found.cycle_s(problem)
        if not np.isfinite(best):
            impossible += 1
        off = 0.0 if value == best else abs(value / best - 1.0) if np.isfinite(best) else np.inf
        largest_off = max(largest_off, off)
        if off > 1e-8:
            worse.append(seed + index)
        if (index + 1) % 10_000 == 0:
            note(f"{index + 1} of {instances} instances, {len(worse)} worse, {time.perf_counter() - begun_s:.0f} s")
    return {
        "instances": instances, "seed": seed, "max_devices": max_devices, "max_layers": max_layers, "worse": len(worse),
        "seeds_of_worse": worse[:20], "nothing_fits": impossible, "largest_relative_difference": largest_off,
        "splits_tried": num_splits, "seconds": round(time.perf_counter() - begun_s, 1),
    }  # fmt: skip


def compare_plans(num_plans: int, seed: int, max_devices: int, max_layers: int) -> dict:
    """Random clusters and loads in a closed loop, the number of stages given or not: the throughput of `plan` against the best of all layouts, by number of devices."""
    short: dict[int, list[tuple[float, bool]]] = {}
    begun_s = time.perf_counter()
    for index in range(num_plans):
        rng = np.random.default_rng(seed + index)
        n, num_layers = int(rng.integers(1, max_devices + 1)), int(rng.integers(1, max_layers + 1))
        hidden, vocab = int(rng.choice([2048, 8192, 16384])), int(rng.choice([4096, 49152, 200_000]))
        facts = Facts(_shape(num_layers, hidden, 4 * hidden, vocab, heads=hidden // 128, kv_heads=8, head_dim=128))
        spread, kinds = float(rng.choice([0.1, 0.3, 0.6])), rng.choice((*KINDS, "cpu"), 2)
        num_stages = int(rng.integers(0, min(n, num_layers) + 1))  # 0: the plan chooses
        devices = [
            Device(f"w{i}", Speed(lookup(str(rng.choice(kinds))), tuple(np.exp(spread * rng.normal(size=8)).tolist())))
            for i in range(n)
        ]  # fmt: skip
        traffic = Traffic(
            prompt_tokens=float(np.exp(rng.uniform(1, 8))),
            output_tokens=1.0 + float(np.exp(rng.uniform(0, 6))),
            concurrency=float(rng.choice([1, 2, 4, 16, 64, 256])),
        )
        best = best_of_all(facts, devices, traffic, num_stages)
        found = plan(facts, devices, traffic, num_stages=num_stages)
        short.setdefault(n, []).append((max(0.0, 1.0 - found.score / best), found.layout.num_hops > 1))
        if (index + 1) % 1000 == 0:
            note(f"{index + 1} of {num_plans} plans, {time.perf_counter() - begun_s:.0f} s")
    rows = []
    for n, seen in sorted(short.items()):
        off = [shortfall for shortfall, _ in seen]
        rows.append({
            "devices": n, "plans": len(off), "of_several_stages": sum(several for _, several in seen),
            "short": sum(x > 1e-6 for x in off), "short_by_1_percent": sum(x > 0.01 for x in off),
            "mean_shortfall": statistics.fmean(off), "worst_shortfall": max(off),
        })  # fmt: skip
    return {"plans": num_plans, "seed": seed, "max_layers": max_layers, "by_devices": rows, "seconds": round(time.perf_counter() - begun_s, 1)}  # fmt: skip


def best_of_all(facts: Facts, devices: list[Device], traffic: Traffic, num_stages: int) -> float:
    """Requests per second of the best layout over every choice and order of devices and every cut, memory being no limit.

    `num_stages` 0: over every number of stages, too.
    """
    serving, cluster, best = Serving(), Cluster(facts, devices), 0.0
    in_service = min(traffic.concurrency, serving.max_running)
    for k in [num_stages] if num_stages else range(1, min(len(devices), facts.num_layers) + 1):
        steps = mean_steps(traffic, serving, cluster.pieces, k, k, in_service)
        times = unit_times(facts, cluster.speeds, steps.works)
        stage, share = times.fixed + cluster.hops(steps.works), float(steps.prefill_share[0])
        orders, bounds = _orders(len(devices), k), _cuts(facts.num_layers, k)
        counts = np.diff(bounds, axis=1)[None]
        fast, slow = (
            stage[kind][orders][:, None] + counts * times.layers[kind, :, 0][orders][:, None] for kind in (0, 1)
        )
        fast[..., -1] += times.last[0][orders[:, -1]][:, None]
        slow[..., -1] += times.last[1][orders[:, -1]][:, None]
        mean = weighted(share, fast, slow)
        cycle = round_seconds(
            share,
            float(steps.in_flight[0]),
            mean_sum=mean.sum(axis=2),
            mean_busiest=mean.max(axis=2),
            slow_sum=slow.sum(axis=2),
            fast_sum=fast.sum(axis=2),
            fast_busiest=fast.max(axis=2),
        )
        rate = float(steps.requests[0] * steps.in_flight[0]) / (serving.head_s + float(cycle.min()))
        best = max(best, rate)
    return best


def random_problem(rng: np.random.Generator, max_devices: int, max_layers: int) -> Problem:
    """Equal layers or not, devices alike or not, memory short or not, the LM head large or not, any steps in flight."""
    n, num_layers = int(rng.integers(1, max_devices + 1)), int(rng.integers(1, max_layers + 1))

    def costs(*shape: int) -> np.ndarray:
        exact = rng.random() < 0.4  # quarters make ties
        return rng.integers(1, 5, shape) / 4.0 if exact else rng.random(shape) + 1e-3

    uniform = rng.random() < 0.5
    layers = np.repeat(costs(n, 1), num_layers, axis=1) if uniform else costs(n, num_layers)
    layer_bytes = np.full(num_layers, 1.0 + rng.random()) if uniform else 1.0 + rng.random(num_layers)
    stage, last = costs(n) * rng.random(), costs(n) * 4 * rng.random()
    room = np.where(rng.random(n) < 0.5, np.inf, 1.0 + 2 * layer_bytes.sum() * rng.random(n))
    if rng.random() < 0.4:
        for device in rng.integers(0, n, 2):
            layers[device], stage[device], last[device], room[device] = layers[0], stage[0], last[0], room[0]
    in_flight = float(rng.choice([1.0, 1.5, 2.0, 3.0, n, n + 1]))
    return Problem(stage, layers, last, room, layer_bytes, rng.random(), 3 * rng.random(), in_flight)


def brute_force(problem: Problem, k: int) -> tuple[float, int]:
    """The shortest cycle of all splits into k stages (inf: none fits), and how many there are."""
    orders, cuts = _orders(problem.num_devices, k), _cuts(problem.num_layers, k)
    times = np.concatenate([np.zeros((problem.num_devices, 1)), np.cumsum(problem.layers, axis=1)], axis=1)
    need = np.concatenate([[0.0], np.cumsum(problem.layer_bytes)])
    held = need[cuts[:, 1:]] - need[cuts[:, :-1]]
    held[:, 0] += problem.first_bytes
    held[:, -1] += problem.last_bytes
    stages = np.empty((len(orders), len(cuts), k))
    for position in range(k):
        device = orders[:, position]
        spans = times[:, cuts[:, position + 1]] - times[:, cuts[:, position]]
        stages[:, :, position] = problem.stage[device][:, None] + spans[device]
        stages[:, :, position][held[:, position] > problem.room[device][:, None]] = np.inf
    stages[:, :, -1] += problem.last[orders[:, -1]][:, None]
    cycle = np.maximum(stages.sum(axis=2), problem.in_flight * stages.max(axis=2))
    return float(cycle.min()), cycle.size


@cache
def _orders(n: int, k: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(n), k)))


@cache
def _cuts(num_layers: int, k: int) -> np.ndarray:
    """Every boundary vector ``[C, k + 1]`` in which only the ends may hold no layer."""
    found = []
    for inner in itertools.combinations_with_replacement(range(num_layers + 1), k - 1):
        bounds = (0, *inner, num_layers)
        if all(stop > start for start, stop in itertools.pairwise(bounds[1:-1])):
            found.append(bounds)
    return np.array(found)


if __name__ == "__main__":
    sys.exit(main())
