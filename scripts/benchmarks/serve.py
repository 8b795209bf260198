"""`scripts/bench serve`: our own server on the five workloads, one arm per way of starting it.

Without arguments: two workers of one thread each, three repeats. ``--arm one="--stages 1"`` adds an arm, and arms run
alternately. ``--arm before@FOLDER="--stages 1"`` starts the version that is checked out in FOLDER. ``--url`` measures a server that is running already and starts none.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from arms import DEFAULT_MODEL, machine_now, measure, measure_together, measure_url, note, parse_workloads, report
from loadgen import WORKLOADS
from servers import ROOT, midflight_arm


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench serve", description="Our own server on the five workloads.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder, as for `midflight serve`")
    parser.add_argument("--workloads", type=parse_workloads, default=",".join(WORKLOADS), help="comma separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar='NAME[@FOLDER]="ARGS"',
        help="arguments of `midflight serve` for one arm; may be given again (default: two-stages='--stages 2 --threads 1')",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--together", action="store_true", help="all arms up at once, alternating workload by workload")
    parser.add_argument("--url", help="measure this running server instead")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    machine = machine_now()
    if args.url:
        runs = [
            {"arm": "running", "repeat": repeat, **run}
            for repeat in range(args.repeats)
            for run in measure_url(args.url, args.model, args.workloads, seed=repeat)
        ]
        return report("serve", machine, runs, baseline=None, out=args.out, arms=[])

    arms = []
    for text in args.arm or ["two-stages=--stages 2 --threads 1"]:
        name, equals, arguments = text.partition("=")
        if not equals:
            parser.error(f'--arm {text!r}: expected NAME=ARGS, for example two="--stages 2"')
        name, _, folder = name.partition("@")
        root = Path(folder).resolve() if folder else ROOT
        if not (root / "api" / "cli.py").is_file():
            parser.error(f"--arm {text!r}: {root} is no checkout of Midflight")
        arms.append(midflight_arm(name, args.model, ["--dtype", args.dtype, *shlex.split(arguments)], root))
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-bench-"))
    note(f"server logs in {log_folder}")
    run = measure_together if args.together else measure
    runs = run(arms, args.workloads, repeats=args.repeats, log_folder=log_folder)
    baseline = arms[0].name if len(arms) > 1 else None
    return report("serve", machine, runs, baseline=baseline, out=args.out, arms=arms)


if __name__ == "__main__":
    sys.exit(main())
