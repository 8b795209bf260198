"""Tables and pictures of what `scripts/bench autopilot` played."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from arms import note
from autopilot_score import Figures, composite, figures, oracle, shift_times
from autopilot_setting import LOAD, SCALE, SLO, Slo, laws
from pictures import pyplot_if_there


def _is_static(arm: str) -> bool:
    """Whether it is one of the layouts to be compared with, which nobody changes."""
    return not arm.startswith("autopilot") and arm != "oracle"


def report(folder: Path, machine: dict[str, Any], plots: Path | None) -> dict[str, Any]:
    """Everything in `folder`; tables go to stderr."""
    document: dict[str, Any] = {
        "benchmark": "autopilot", "EMULATED DEVICES": [f"{x.name}: {x.read_s:g} s a layer, {x.token_s:g} s a token" for x in laws().values()],
        "machine": machine, "scale": SCALE, "slo": {"ttft_s": SLO.ttft_s, "tpot_s": SLO.tpot_s}, "patterns": {},
    }  # fmt: skip
    for pattern in ("pipelive", "azure", "steady"):
        runs = {
            run["arm"]: run
            for path in sorted(folder.glob(f"{pattern}.*.json"))
            if (run := json.loads(path.read_text()))
        }
        if not any(map(_is_static, runs)):
            continue
        load = next(iter(runs.values())).get("load", LOAD)
        title = f"{pattern}, EMULATED A100-like and L40S-like workers, at {load:.0%} of what the best layout sustains"
        document["patterns"][pattern] = report_of(title, runs, SLO, plots, f"autopilot-{pattern}")
    return document


def report_of(
    title: str, runs: Mapping[str, dict[str, Any]], slo: Slo, plots: Path | None, picture: str
) -> dict[str, Any]:
    """The figures of one pattern's runs; a table of them goes to stderr, a picture called `picture` into `plots`."""
    if plots is not None:
        _draw(plots / f"{picture}.png", title, runs)
    known = {arm: figures(run, slo.ttft_s, slo.tpot_s) for arm, run in runs.items()}
    statics = {arm: known[arm] for arm in sorted(known, key=_order) if _is_static(arm)}
    all_statics = [*statics.values(), *([known["oracle"]] if "oracle" in known else [])]
    best_of = oracle(statics)
    scores = {arm: composite(known[arm], all_statics) for arm in known}
    best = max(statics, key=lambda arm: scores[arm])
    found: dict[str, Any] = {
        "phases": next(iter(runs.values()))["phases"],
        "best_static": best,
        "best_static_of_phase": best_of,
        "arms": {
            arm: {
                "composite": scores[arm],
                "cpu_share": runs[arm]["cpu_share"],
                "changes": len(runs[arm]["layouts"]) - 1,
                "phases": [asdict(one) for one in known[arm]],
            }
            for arm in sorted(known, key=_order)
        },
    }
    note(f"\n{title}. SLO: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s; best static {best}, by phase {best_of}")
    note(_table(found))
    pilots = [arm for arm in known if arm.startswith("autopilot")]
    reference = known.get("oracle") or [statics[name][i] for i, name in enumerate(best_of)]
    for arm in pilots:
        row = found["arms"][arm]
        row["over_best_static"] = scores[arm] / scores[best] - 1
        row["settled_of_oracle"] = [
            a.settled_goodput / max(b.settled_goodput, 1e-9) for a, b in zip(known[arm], reference, strict=True)
        ]
        row["shifts"] = shift_times(runs[arm])
        row["layouts"] = runs[arm]["layouts"]
        row["log"] = [f"{e['at_s']:7.1f} {e['kind']} {e['text']}" for e in runs[arm]["log"]]
        note(
            f"{arm}: composite {scores[arm]:.3f}, {row['over_best_static']:+.1%} over the best static; settled goodput / oracle's "
            + ", ".join(f"{x:.1%}" for x in row["settled_of_oracle"])
            + "".join(
                f"; {s['phase']}: noticed {s['noticed_s']} s, decided {s['decided_s']} s, serving {s['first_layout_s']} s"
                for s in row["shifts"]
            )
        )
    return found


def _table(found: Mapping[str, Any]) -> str:
    names = [phase["name"] for phase in found["phases"]]
    head = ["arm", "composite", *(f"{name}: TTFT s, TPOT ms, tokens/s, goodput (settled)" for name in names), "cpu"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, row in found["arms"].items():
        cells = [arm, f"{row['composite']:.3f}"]
        for one in map(lambda fields: Figures(**fields), row["phases"]):
            cells.append(
                f"{one.ttft_s:.2f}, {1e3 * one.tpot_s:.0f}, {one.tokens_per_s:.1f}, {one.goodput:.2f} ({one.settled_goodput:.2f})"
            )
        lines.append("| " + " | ".join([*cells, f"{row['cpu_share']:.0%}"]) + " |")
    return "\n".join(lines)


def _order(arm: str) -> tuple[int, str]:
    first = arm.split("-")[0]
    return (1, arm) if not _is_static(arm) else (0, f"{int(first):03}" if first.isdigit() else arm)


def _draw(path: Path, title: str, runs: Mapping[str, dict[str, Any]]) -> None:
    """TTFT over time of some arms, with the layouts that the autopilot chose."""
    if (pyplot := pyplot_if_there()) is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = pyplot.subplots(figsize=(9, 4))
    for arm in sorted(runs, key=_order):
        if arm.endswith(" again") or arm in ("autopilot-2", "autopilot-3"):
            continue
        times, values = _smooth(runs[arm]["requests"])
        ours = not _is_static(arm)
        axis.plot(
            times, values, lw=2.2 if ours else 0.8, alpha=1.0 if ours else 0.6, label=arm, ls="-" if ours else "--"
        )
    for phase in next(iter(runs.values()))["phases"][1:]:
        axis.axvline(phase["start_s"], color="k", lw=0.6)
    for at_s, text in runs.get("autopilot", {"layouts": []})["layouts"]:
        axis.annotate(text, (at_s, axis.get_ylim()[0]), rotation=90, fontsize=7, va="bottom")
    axis.set_yscale("log")
    axis.set_xlabel("s")
    axis.set_ylabel("TTFT, s (mean of 5 s)")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, ncol=2)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    note(f"picture in {path}")


def _smooth(requests: Sequence[Mapping[str, float]], width_s: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    due = np.array([r["due_s"] for r in requests])
    ttft = np.array([r["ttft_s"] for r in requests])
    bins = (due // width_s).astype(int)
    chosen = np.unique(bins)
    return (chosen + 0.5) * width_s, np.array([ttft[bins == b].mean() for b in chosen])
