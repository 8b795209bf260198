"""Pictures of what `scripts/bench shift` wrote: PNG files, when matplotlib is there.

Run on its own, ``shift_plots.py RESULT.json [FOLDER]`` draws an earlier result again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from arms import note
from pictures import pyplot_if_there

_LIVE, _PLAIN, _MARK = "#c0392b", "#7f8c8d", "#2c3e50"


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """The pictures that `document` has figures for; none, and a line that says why, without matplotlib."""
    if (pyplot := pyplot_if_there()) is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if document.get("timelines"):
        drawn.append(_timelines(pyplot, document["timelines"], folder / "shift-timeline.png"))
    live = [change for change in document.get("changes", []) if change["case"]["strategy"] == "live"]
    if live:
        drawn.append(_pauses(pyplot, live, "snapshot_bytes", 1e-6, "KV copied, MB", folder / "shift-pause-kv.png"))
        drawn.append(_pauses(pyplot, live, "layers_moved", 1.0, "layers moved", folder / "shift-pause-layers.png"))
    if len({change["case"]["strategy"] for change in document.get("changes", [])}) > 1:
        drawn.append(_strategies(pyplot, document["summary"], folder / "shift-strategies.png"))
    for path in drawn:
        note(f"picture in {path}")
    return drawn


def _timelines(pyplot: Any, timelines: list[dict[str, Any]], path: Path, *, most: int = 6) -> Path:
    """One panel per strategy (the first timeline of each), inter-token gaps over the time around the change."""
    chosen = list({entry["case"]["strategy"] + entry["case"]["change"]: entry for entry in timelines[::-1]}.values())
    chosen = chosen[::-1][:most]
    figure, axes = pyplot.subplots(len(chosen), 1, figsize=(9, 2.6 * len(chosen)), squeeze=False)
    for axis, entry in zip(axes[:, 0], chosen, strict=True):
        trigger_s = entry["trigger_s"]
        for name, color, label in (("plain", _PLAIN, "without a change"), ("changed", _LIVE, "with it")):
            points = entry[name]
            axis.plot(
                [at - trigger_s for at, _ in points],
                [1e3 * gap for _, gap in points],
                ".",
                color=color,
                ms=2.5,
                alpha=0.5,
                label=label,
            )
        axis.axvspan(0.0, entry["commit_s"] - trigger_s, color=_MARK, alpha=0.12, lw=0, label="trigger to commit")
        axis.set_yscale("log")
        axis.set_ylabel("gap between tokens, ms")
        case = entry["case"]
        axis.set_title(
            f"{case['change']} ({entry['source']} to {entry['target']}), {case['strategy']}, {case['load']:.0%} load, {case['context']}",
            fontsize=9,
        )
    axes[0, 0].legend(loc="upper right", fontsize=8)
    axes[-1, 0].set_xlabel("seconds since the trigger")
    return _save(pyplot, figure, path)


def _pauses(pyplot: Any, changes: list[dict[str, Any]], key: str, scale: float, label: str, path: Path) -> Path:
    """Engine pause and service gap of each change over something that it moved."""
    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    sizes = [scale * change["report"][key] for change in changes]
    for name, marker, color, values in (
        ("engine pause, median of a change", "o", _LIVE, [change["engine_pause_s"].get("p50") for change in changes]),
        ("service gap (D2)", "^", _MARK, [change["service_gap_s"] for change in changes]),
        ("service gap without a change", "_", _PLAIN, [change["service_gap_usual_s"] for change in changes]),
    ):
        points = [(size, 1e3 * value) for size, value in zip(sizes, values, strict=True) if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=color, label=name, alpha=0.7)
    axis.set_ylim(bottom=0.0)
    axis.set_xlabel(label)
    axis.set_ylabel("ms")
    axis.legend(fontsize=8)
    return _save(pyplot, figure, path)


def _strategies(pyplot: Any, summary: list[dict[str, Any]], path: Path) -> Path:
    """The longest time without a token to anybody, for each case; a logarithmic scale, since they differ by powers of ten."""
    rows = [row for row in summary if row["silence_s"] is not None]
    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.2))
    names = [
        f"{row['case']['change']}, {row['case']['strategy']}, {row['case']['load']:.0%}, {row['case']['context']}"
        for row in rows
    ]
    values = [1e3 * row["silence_s"]["value"] for row in rows]
    errors = [
        [1e3 * (r["silence_s"]["value"] - r["silence_s"]["low"]) for r in rows],
        [1e3 * (r["silence_s"]["high"] - r["silence_s"]["value"]) for r in rows],
    ]
    axis.barh(
        names, values, xerr=errors, color=[_LIVE if row["case"]["strategy"] == "live" else _PLAIN for row in rows]
    )
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("longest time without a token while a request was open, ms")
    return _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    result = Path(sys.argv[1])
    draw(json.loads(result.read_text(encoding="utf-8")), Path(sys.argv[2]) if len(sys.argv) > 2 else result.parent)
