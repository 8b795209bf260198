"""Pictures of how the planner's and the scheduler's cost grow: ``scaling_plots.py FOLDER RESULT.json...``.

The results are those of `scripts/bench planner` and `scripts/bench scheduler`, which are told apart by what they say they are.
"""

import json
import sys
from pathlib import Path
from typing import Any

from arms import note
from pictures import pyplot_if_there


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    if (pyplot := pyplot_if_there()) is None:
        return 1
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(Path, sys.argv[2:]):
        document = json.loads(path.read_text())
        draw = {"planner": _planner, "scheduler": _scheduler}[document["benchmark"]]
        figure, axis = pyplot.subplots(figsize=(6, 4))
        draw(axis, document)
        axis.set_xscale("log", base=2 if document["benchmark"] == "planner" else 10)
        axis.set_yscale("log")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=8)
        picture = folder / f"scaling-{document['benchmark']}.png"
        figure.savefig(picture, dpi=110, bbox_inches="tight")
        note(f"picture in {picture}")
    return 0


def _planner(axis: Any, document: dict[str, Any]) -> None:
    rows = document["times"]
    for objective in ("throughput", "latency", "goodput"):
        for alike, style in ((False, "-"), (True, "--")):
            chosen = [row for row in rows if row["objective"] == objective and row["alike"] == alike]
            label = f"{objective}, {'4 kinds' if alike else 'all different'}"
            axis.plot([r["devices"] for r in chosen], [r["median_ms"] for r in chosen], style, marker=".", label=label)
    axis.plot([8, 64], [1.0, 10.0], "kx", ms=9, label="marks")
    axis.set_xlabel("devices (80 layers)")
    axis.set_ylabel("one plan, ms")


def _scheduler(axis: Any, document: dict[str, Any]) -> None:
    rows = document["runs"]
    for stages in sorted({row["stages"] for row in rows}):
        chosen = [row for row in rows if row["stages"] == stages]
        label = f"{stages} stage{'s' * (stages > 1)}"
        axis.plot([r["sequences"] for r in chosen], [r["us_per_step"] for r in chosen], marker=".", label=label)
    axis.set_xlabel("sequences")
    axis.set_ylabel("scheduler, us a step")


if __name__ == "__main__":
    sys.exit(main())
