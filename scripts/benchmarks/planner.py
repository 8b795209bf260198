"""`scripts/bench planner`: how long the planner takes, whether it is ever beaten, and how far its cost model is off.

Without arguments: planning time for 8 devices and 80 layers, for 64, and how it grows. ``--instances N`` compares N random
problems of up to 6 devices with brute force over every order, every choice and every cut. ``--measure MODEL`` runs
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
from scheduler.planning.cost import TERMS, Facts, Speed
from scheduler.planning.devices import lookup
from scheduler.planning.forecast import Device
from scheduler.planning.planner import plan
from scheduler.planning.search import Solver
from scheduler.planning.splits import Problem
from scheduler.planning.traffic import Objective, Traffic

KINDS = ("a100", "l40s", "h100", "l4")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench planner", description="The planner's time, optimality and error."
    )
    parser.add_argument("--instances", type=int, default=0, help="random problems to compare with brute force")
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
        report["times"] = times(args.repeats)
    text = json.dumps(report, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 1 if failed else 0


# -- time ---------------------------------------------------------------------------------------------------------


def times(repeats: int) -> list[dict]:
    """Milliseconds of one `plan`, for every objective, with devices that are all different."""
    rows = []
    facts = Facts(_shape_70b())
    for n, alike, objective in itertools.product((2, 4, 8, 16, 32, 64), (False, True), get_args(Objective)):
        devices = _devices(n, alike)
        traffic = Traffic(requests_per_s=0.0, prompt_tokens=1020, output_tokens=129, concurrency=128)
        taken = []
        for _ in range(repeats):
            begun_s = time.perf_counter()
            try:
                plan(facts, devices, traffic, objective=objective)
            except ValueError:
                break  # the weights do not fit on so few
            taken.append(1e3 * (time.perf_counter() - begun_s))
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
    hidden, intermediate, vocab = 8192, 28672, 128256
    layer = 2 * (2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * intermediate)
    return ModelSpec(
        name="llama-3-70b", folder="", architecture="LlamaForCausalLM", dtype="bfloat16", load_format="dummy",
        num_layers=80, hidden_size=hidden, num_heads=64, num_kv_heads=8, head_dim=128, vocab_size=vocab, max_context=8192,
        tied_embeddings=False, layer_bytes=(layer,) * 80, embedding_bytes=2 * hidden * vocab,
        lm_head_bytes=2 * hidden * vocab, layer_flops_per_token=(layer,) * 80, lm_head_flops_per_token=2 * hidden * vocab,
        eos_token_ids=(),
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
