"""`scripts/bench kernels`: what a worker's step costs on one core, and what the processor's newer instructions and more cores make of it.

A step is the real one without its processes (`growth_step`): 15 layers of the model's shape with embedding, LM head and sampling, random
weights, the least of some repeats; decoding rows with 256 tokens of context, or one chunk of a prompt. An *arm* is a process
of its own whose kernels are compiled without some of the instructions that the processor has, or run on several threads. The arms take
turns, round after round; the least of the rounds counts.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from arms import DEFAULT_MODEL, machine_now, note
from growth_step import StepTimer

from api.pull import resolve_model
from runtime.kernels import team

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (32, 128, 512)
CONTEXT = 256
NUM_LAYERS = 15
ARMS = {
    "all": ("everything the processor has", ()),
    "vectors": ("without matrix registers", ("amx",)),
    "plain": ("without bfloat16 products", ("amx", "avx512bf16")),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench kernels", description="A worker's step on one core.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder; its config is what counts")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", default="", choices=("", "int8"), help="the weights")
    parser.add_argument("--threads", type=int, default=1, help="an arm on so many threads as well")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="at most, of each point")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args)))
        return 0

    machine = machine_now()
    arms = {name: each for name, each in ARMS.items() if _differs(name)}
    if args.threads > 1:
        arms["team"] = (f"everything, {args.threads} threads", ())
    points: dict[str, dict[str, float]] = {name: {} for name in arms}
    for _ in range(args.rounds):
        for name in arms:
            for point, seconds in _run_arm(arms[name][1], args.threads if name == "team" else 1).items():
                points[name][point] = min(seconds, points[name].get(point, float("inf")))
    note(_table(arms, points))
    text = json.dumps(
        {
            "benchmark": "kernels",
            "machine": machine,
            "command": sys.argv,
            "processor": _features(()),
            "seconds": points,
        },
        indent=2,
    )
    if args.out is None:
        print(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


def _measure(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    team.set_num_threads(args.threads)
    home = Path(os.environ.get("MIDFLIGHT_HOME") or "~/.cache/midflight").expanduser()
    timer = StepTimer(resolve_model(args.model, home, note), args.dtype, NUM_LAYERS, 1024, args.quantize)
    found = {f"decode {rows}": timer.decode(rows, CONTEXT, args.seconds) for rows in DECODE_ROWS}
    return found | {f"chunk {tokens}": timer.chunk(tokens, tokens, 2 * args.seconds) for tokens in CHUNKS}


def _run_arm(without: tuple[str, ...], num_threads: int) -> dict[str, float]:
    environment = os.environ | {
        "NUMBA_CPU_NAME": llvm.get_host_cpu_name(),
        "NUMBA_CPU_FEATURES": _features(without),
        "OMP_WAIT_POLICY": "PASSIVE",  # as in a worker
    }
    command = [sys.executable, *sys.argv, "--one", "--threads", str(num_threads)]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _features(without: tuple[str, ...]) -> str:
    """As LLVM wants them, those that begin like one of `without` taken away."""
    return ",".join(
        ("+" if present and not name.startswith(without) else "-") + name
        for name, present in sorted(llvm.get_host_cpu_features().items())
    )


def _differs(name: str) -> bool:
    """Whether this arm lacks something that the arms before it have."""
    before = list(ARMS)[: list(ARMS).index(name)]
    return all(_features(ARMS[name][1]) != _features(ARMS[other][1]) for other in before)


def _table(arms: dict[str, Any], points: dict[str, dict[str, float]]) -> str:
    lines = ["| ms a step | " + " | ".join(label for label, _ in arms.values()) + " |", "|---" * (len(arms) + 1) + "|"]
    for point in points["all"]:
        lines.append(f"| {point} | " + " | ".join(f"{1e3 * points[name][point]:.2f}" for name in arms) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
