"""What `scripts/bench autopilot` makes of its runs: goodput, the composite, and how the autopilot stands beside the others. Pure.

A request belongs to the phase in which it was due. Of a run's phase there are the mean TTFT, the mean TPOT, and the
throughput, output tokens per second of the phase's requests from its start to the last token of them or the phase's
end, whichever is later. The *composite* of a run is the mean over the phases of

    (best TTFT / TTFT + best TPOT / TPOT + throughput / best throughput) / 3

where "best" is the best of all static layouts and of the oracle in that phase, each figure by itself, so that 1 is the most that
can be had. It is ours: what PipeLive (arXiv:2604.12171) adds up to its figure was not to be found. *Goodput* is requests per second that met the SLO; *settled*, of those
due at least `SETTLE_S` after the phase began. The *oracle* changes at the beginning of each phase to the static layout with the best settled goodput in it (a
layout that was bad before begins a phase with a backlog, which is why the whole phase does not decide).

What is never true: that a run with a failed request has a score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SETTLE_S = 40.0


@dataclass(frozen=True)
class Figures:
    """One run in one phase. Seconds, output tokens per second, requests per second."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    goodput: float
    settled_goodput: float
    settled_ttft_s: float
    settled_tpot_s: float


def figures(run: Mapping[str, Any], ttft_slo_s: float, tpot_slo_s: float) -> list[Figures]:
    """Of every phase of a run (as `autopilot.py` writes it)."""
    return [_phase(run["requests"], phase, ttft_slo_s, tpot_slo_s) for phase in run["phases"]]


def _phase(requests: Sequence[Mapping[str, float]], phase: Mapping[str, Any], ttft_slo_s: float, tpot_slo_s: float):
    start_s, stop_s = phase["start_s"], phase["stop_s"]
    mine = [r for r in requests if start_s <= r["due_s"] < stop_s]
    settled = [r for r in mine if r["due_s"] >= min(start_s + SETTLE_S, (start_s + stop_s) / 2)]
    seconds = max(stop_s, max(r["last_s"] for r in mine)) - start_s

    def good(chosen: Sequence[Mapping[str, float]]) -> int:
        return sum(r["ttft_s"] <= ttft_slo_s and r["tpot_s"] <= tpot_slo_s for r in chosen)

    def mean(chosen: Sequence[Mapping[str, float]], key: str) -> float:
        return float(np.mean([r[key] for r in chosen]))

    settled_s = stop_s - min(start_s + SETTLE_S, (start_s + stop_s) / 2)
    return Figures(
        mean(mine, "ttft_s"), mean(mine, "tpot_s"), sum(r["num_output"] for r in mine) / seconds,
        good(mine) / (stop_s - start_s), good(settled) / settled_s, mean(settled, "ttft_s"), mean(settled, "tpot_s"),
    )  # fmt: skip


def composite(run: Sequence[Figures], statics: Sequence[Sequence[Figures]]) -> float:
    """Of a run, against the best of these runs in each phase."""
    return float(np.mean([phase_composite(one, [static[i] for static in statics]) for i, one in enumerate(run)]))


def phase_composite(one: Figures, statics: Sequence[Figures]) -> float:
    ttft = min(static.ttft_s for static in statics) / one.ttft_s
    tpot = min(static.tpot_s for static in statics) / one.tpot_s
    return (ttft + tpot + one.tokens_per_s / max(static.tokens_per_s for static in statics)) / 3


def oracle(statics: Mapping[str, Sequence[Figures]]) -> list[str]:
    """For each phase, the static layout that is best in it; of equals the one with the shorter TTFT."""
    num_phases = len(next(iter(statics.values())))

    def merit(name: str, phase: int) -> tuple[float, float]:
        one = statics[name][phase]
        return one.settled_goodput, -one.settled_ttft_s

    return [max(statics, key=lambda name: merit(name, phase)) for phase in range(num_phases)]


def shift_times(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each phase but the first: seconds until the autopilot noticed, decided, and until the new layout served."""
    found = []
    for phase in run["phases"][1:]:
        row: dict[str, Any] = {"phase": phase["name"]}
        for kind, name in (("shift", "noticed_s"), ("change", "decided_s")):
            times = [
                e["at_s"] for e in run["log"] if e["kind"] == kind and phase["start_s"] <= e["at_s"] < phase["stop_s"]
            ]
            row[name] = round(times[0] - phase["start_s"], 1) if times else None
        changes = [at for at, _ in run["layouts"][1:] if phase["start_s"] <= at < phase["stop_s"]]
        row["first_layout_s"] = round(changes[0] - phase["start_s"], 1) if changes else None
        row["last_layout_s"] = round(changes[-1] - phase["start_s"], 1) if changes else None
        row["layouts"] = [text for at, text in run["layouts"] if phase["start_s"] <= at < phase["stop_s"]]
        found.append(row)
    return found
