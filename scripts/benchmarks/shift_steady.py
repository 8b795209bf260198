"""`scripts/bench shift --steady`: does a server that has changed its layout serve as well as one that never did?

What makes changes possible is always compiled in, so there is no server without it to compare with. What can be seen is
whether anything remains: two servers of one layout run side by side and are measured in turn, first both untouched (what
two equal servers differ by on this machine), then after one of them has gone through changes there and back under load.
The figure is how the ratio of the two moved, round by round with the same seeds; drift of the machine meets both.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arms import note
from loadgen import Workload, run_workload
from shift_fleet import Fleet, LayoutSpec, parse_layout
from shift_metrics import interval, mean_of

HOME, AWAY = parse_layout("19,11"), parse_layout("15,15")
WORKLOAD = Workload("steady", 8, 16, 128, 64)
UNDER_LOAD = Workload("under changes", 8, 64, 128, 64)


@dataclass(frozen=True)
class Round:
    """One server, one seed, one phase."""

    server: str
    phase: str
    seed: int
    tokens_per_s: float
    tpot_s: float
    ttft_s: float


async def measure_steady(touched: Fleet, untouched: Fleet, *, num_rounds: int, num_changes: int) -> dict[str, Any]:
    """Rounds before and after `num_changes` (an even number) on `touched`; both are on `HOME`.

    Raises:
        RuntimeError: when a request or a change fails.
    """
    fleets = {"touched": touched, "untouched": untouched}
    for fleet in fleets.values():
        await _play(fleet, 0)
    rounds = await _rounds(fleets, "before", num_rounds)
    await _changes(touched, num_changes)
    rounds += await _rounds(fleets, "after", num_rounds)
    summary = {
        metric: {
            "before": interval([[r] for r in _ratios(rounds, "before", metric)], mean_of),
            "after": interval([[r] for r in _ratios(rounds, "after", metric)], mean_of),
            "moved": interval(
                [
                    [after - before]
                    for before, after in zip(
                        _ratios(rounds, "before", metric), _ratios(rounds, "after", metric), strict=True
                    )
                ],
                mean_of,
            ),
        }
        for metric in ("tokens_per_s", "tpot_s", "ttft_s")
    }
    return {"num_changes": num_changes, "summary": summary, "rounds": [vars(each) for each in rounds]}


def format_steady(summary: dict[str, Any]) -> str:
    """A Markdown table; percent by which the touched server's figure exceeds the untouched one's."""
    lines = ["| figure | both untouched, % | after the changes, % | moved by, points |", "|---|---|---|---|"]
    for metric, row in summary.items():
        cells = [f"{100 * f['value']:+.2f} ({100 * f['low']:+.2f} to {100 * f['high']:+.2f})" for f in row.values()]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


async def _rounds(fleets: dict[str, Fleet], phase: str, num_rounds: int) -> list[Round]:
    """Each server once a round; who goes first alternates."""
    rounds = []
    for seed in range(1, num_rounds + 1):
        names = list(fleets)[:: 1 if seed % 2 else -1]
        for name in names:
            summary = await _play(fleets[name], seed)
            figures = (summary["output_tokens_per_s"], summary["tpot_s"]["mean"], summary["ttft_s"]["mean"])
            rounds.append(Round(name, phase, seed, *figures))
        note(f"  {phase}, round {seed}: {[f'{r.server} {r.tokens_per_s:.1f}' for r in rounds[-2:]]} tokens/s")
    return rounds


async def _play(fleet: Fleet, seed: int) -> dict[str, Any]:
    summary, _ = await run_workload(fleet.url, fleet.model, WORKLOAD, seed=seed)
    if summary["errors"]:
        raise RuntimeError(f"a request failed: {summary['error_examples'][0]}")
    return summary


async def _changes(fleet: Fleet, num_changes: int) -> None:
    """There and back while requests run, so that sequences flip and KV moves."""
    if num_changes % 2:
        raise ValueError(f"{num_changes} changes do not end where they began; an even number does")
    load = asyncio.create_task(run_workload(fleet.url, fleet.model, UNDER_LOAD, seed=10_000))
    for at in range(num_changes):
        target: LayoutSpec = HOME if at % 2 else AWAY
        report = await fleet.change(target, "live", {})
        note(f"  change {at + 1} of {num_changes}: {report['sequences_flipped']} sequences, {report['total_s']:.2f} s")
    summary, _ = await load
    if summary["errors"]:
        raise RuntimeError(f"a request failed during the changes: {summary['error_examples'][0]}")


def _ratios(rounds: Sequence[Round], phase: str, metric: str) -> list[float]:
    """Per seed, the logarithm of touched over untouched."""
    figures = {(r.server, r.seed): getattr(r, metric) for r in rounds if r.phase == phase}
    seeds = dict.fromkeys(r.seed for r in rounds)
    return [math.log(figures["touched", seed] / figures["untouched", seed]) for seed in seeds]
