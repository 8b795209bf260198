"""`scripts/bench peers`: vLLM's CPU build and us, alternately, on the five workloads; prints the ratios.

Both serve the same checkpoint in the same type over two pipeline stages of one core each; prompts are unique, so a
prefix cache cannot help either. ``--one-stage`` adds both with one stage on all cores, ``--llama-server`` llama.cpp's server on them.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from arms import DEFAULT_MODEL, machine_now, measure, note, parse_workloads, report
from loadgen import WORKLOADS
from servers import Arm, midflight_arm
from vllm_peer import check_python, ensure_vllm, vllm_arm


def main() -> int:
    home = Path(os.environ.get("MIDFLIGHT_HOME", Path.home() / ".cache" / "midflight"))
    parser = argparse.ArgumentParser(
        prog="scripts/bench peers", description="vLLM's CPU build and us, alternately; ratios."
    )
    parser.add_argument("--model", type=Path, default=home / "models" / DEFAULT_MODEL, help="a checkpoint folder")
    parser.add_argument("--workloads", type=parse_workloads, default=",".join(WORKLOADS), help="comma separated")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is started and measured")
    parser.add_argument("--one-stage", action="store_true", help="also both with one stage and two threads")
    parser.add_argument(
        "--llama-server",
        type=Path,
        help="a llama.cpp server that was built for this machine, for an arm of two threads",
    )
    parser.add_argument("--gguf", type=Path, help="the same checkpoint for it, in the same type")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vllm-venv", type=Path, default=home / "peers" / "vllm", help="set up here when absent")
    parser.add_argument("--python", default="python3.11", help="the Python 3.11 that the environment is made from")
    parser.add_argument("--setup-only", action="store_true", help="make the environment, measure nothing")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    if not (args.model / "config.json").exists():
        parser.error(f"{args.model} is no checkpoint folder; `midflight pull {DEFAULT_MODEL}` makes the default one")
    if (args.llama_server is None) != (args.gguf is None):
        parser.error("--llama-server and --gguf go together")
    for path in filter(None, (args.llama_server, args.gguf)):
        if not path.is_file():
            parser.error(f"{path} is no file")
    check_python(args.python)
    ensure_vllm(args.vllm_venv, args.python)
    if args.setup_only:
        return 0

    machine = machine_now()
    arms = [
        vllm_arm("vllm", args.vllm_venv, args.model, num_stages=2, threads_bind="0|1", dtype=args.dtype),
        midflight_arm("midflight", str(args.model), ["--dtype", args.dtype, "--stages", "2", "--threads", "1"]),
    ]
    if args.one_stage:
        arms += [
            vllm_arm("vllm-one", args.vllm_venv, args.model, num_stages=1, threads_bind="0-1", dtype=args.dtype),
            midflight_arm("midflight-one", str(args.model), ["--dtype", args.dtype, "--stages", "1", "--threads", "2"]),
        ]
    if args.llama_server is not None:
        arms.append(_llama_arm(args.llama_server.resolve(), args.gguf.resolve()))
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-bench-"))
    note(f"server logs in {log_folder}")
    runs = measure(arms, args.workloads, repeats=args.rounds, log_folder=log_folder)
    return report("peers", machine, runs, baseline="vllm", out=args.out, arms=arms)


def _llama_arm(server: Path, gguf: Path) -> Arm:
    """Room for 32 requests of 1,280 tokens, two threads, and no cache of prompts, as the others have none to use."""
    options = ("--threads", "2", "--parallel", "32", "--ctx-size", str(32 * 1280), "--no-cache-prompt")
    command = (str(server), "--model", str(gguf), "--host", "127.0.0.1", "--port", "{port}", *options)
    return Arm("llama.cpp", command, gguf.stem)


if __name__ == "__main__":
    sys.exit(main())
