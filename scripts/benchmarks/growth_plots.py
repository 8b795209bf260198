"""The picture of what `scripts/bench growth` measured: a panel a series, both axes logarithmic, with the fitted line."""

from pathlib import Path
from typing import Any

import numpy as np
from arms import note
from pictures import pyplot_if_there

_MEASURED, _FITTED = "#c0392b", "#7f8c8d"


def draw(series: list[dict[str, Any]], path: Path) -> None:
    """Write the picture; without matplotlib say so, and nothing else."""
    if (pyplot := pyplot_if_there()) is None:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, one in zip(axes.flat, series, strict=False):
        xs, costs = np.array(one["points"], dtype=float).T
        line = np.geomspace(xs[0], xs[-1], 50)
        axis.loglog(line, one["fixed"] + one["slope"] * line, color=_FITTED, linewidth=1, label="fixed + slope x")
        axis.loglog(xs, costs, "o", color=_MEASURED, markersize=4, label=f"upper exponent {one['upper_exponent']:.2f}")
        axis.set_title(one["name"], fontsize=9)
        axis.set_xlabel(one["x"])
        axis.set_ylabel(one["unit"])
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    note(f"picture in {path}")
