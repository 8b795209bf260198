"""From plays of a trace to figures: one dict per change, and one per case with its intervals. Pure.

A *sample* is a change under a trace beside the same trace without it, on the layout before and on the layout after. A
case gathers the samples of one kind of change under one load by one strategy; both directions of a change that has no
preferred one are one case, so that a layout which is itself a little faster favours neither side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shift_client import Change, Run
from shift_metrics import (
    Window,
    arriving,
    difference,
    gaps_s,
    good,
    interval,
    latencies,
    mean_of,
    median_gap_s,
    overlapping,
    percentile_of,
    ratio_less_one,
    service_gap,
    service_gap_s,
    shares_before,
    silence_s,
    stalls_s,
    stretches,
    usual_gaps_s,
    went_over_s,
)

SETTLE_S = 1.0


@dataclass(frozen=True)
class Case:
    """What the samples of a row of the table have in common. `rate` is in requests per second."""

    change: str
    strategy: str
    load: float
    context: str
    rate: float

    def __str__(self) -> str:
        return f"{self.change}, {self.strategy}, {self.load:.0%} load, {self.context}"


@dataclass
class Sample:
    """A change, and the three plays of its trace: the one that it is part of, and one on each layout. Its window is judged in all
    three; other changes of the first play lie outside of it, but a request may have met two of them."""

    case: Case
    seed: int
    source: str
    target: str
    change: Change
    changed: Run
    on_source: Run
    on_target: Run
    usage: dict[str, float] = field(default_factory=dict)
    """As `shift_fleet.Fleet.usage`, of the whole first play; ``cpu_more_s`` is the processor time that it took beyond the mean of
    the other two, for each of its changes."""
    trace_s: float = 0.0
    """How long the trace's arrivals last."""


def figures(sample: Sample) -> dict[str, Any]:
    """Everything that one change has to say; seconds and bytes. Lists are per request or per stream."""
    changed, plain, target = sample.changed, sample.on_source, sample.on_target
    window, report = sample.change.window, sample.change.report
    steady = Window(SETTLE_S, max(sample.trace_s, 2 * SETTLE_S))
    whole = {s.index for s in good(changed.streams)} & {s.index for s in good(plain.streams)}
    whole &= {s.index for s in good(target.streams)}
    ttft, _ = latencies(changed.streams, arriving(changed.streams, window) & whole)
    ttft_plain, _ = latencies(plain.streams, arriving(changed.streams, window) & whole)
    touched = overlapping(changed.streams, window) & whole
    around, around_plain, around_target = (latencies(run.streams, touched) for run in (changed, plain, target))
    over_s = went_over_s(window.start_s, sample.change.commit_s, report.get("phases_s", {}))
    before = shares_before(changed.streams, touched, over_s)
    gap = service_gap_s(changed.streams, window)
    usual = [usual_gaps_s(run.streams, window.length_s, steady) for run in (plain, target)]
    usual_s = mean_of(usual) or 0.0
    return {
        "trigger_s": window.start_s,
        "commit_s": sample.change.commit_s,
        "change_s": sample.change.commit_s - window.start_s,
        "report": report,
        "engine_pause_s": {key: ms / 1e3 for key, ms in report.get("engine_pause_ms", {}).items() if key != "count"},
        "service_gap_s": gap,
        "service_gap_at_s": service_gap(changed.streams, window)[0] - window.start_s,
        "service_gap_usual_s": usual_s,
        "service_gaps_s": [[gap], [gap for run in usual for gap in run]],
        "service_gap_same_moment_s": service_gap_s(plain.streams, window),
        "service_gap_excess_s": gap - usual_s,
        "silence_s": silence_s(changed.streams, window),
        "silence_same_moment_s": silence_s(plain.streams, window),
        "step_s": median_gap_s(plain.streams, window),
        "stalls_s": [stalls_s(changed.streams, window), stalls_s(plain.streams, window)],
        "gaps_s": _gaps(sample),
        "ttft_arriving_s": [ttft, ttft_plain],
        "ttft_s": [around[0], around_plain[0], around_target[0], _mixed(around_plain[0], around_target[0], before[0])],
        "tpot_s": [around[1], around_plain[1], around_target[1], _mixed(around_plain[1], around_target[1], before[1])],
        "usage": sample.usage,
        "errors": len(changed.errors),
        "errors_plain": len(plain.errors) + len(target.errors),
        "retries": sum(stream.num_retries for stream in changed.streams),
        "requests": len(changed.streams),
    }


def _gaps(sample: Sample) -> dict[str, list[list[float]]]:
    """By stretch of the change: the times between tokens with it, and at the same time without it, on the layout that serves then."""
    changed, source, target = sample.changed, sample.on_source, sample.on_target
    phases_s = sample.change.report.get("phases_s", {})
    found = {}
    for name, window in stretches(sample.change.window.start_s, sample.change.commit_s, phases_s).items():
        beside = target if name in ("flip", "after") else source
        found[name] = [gaps_s(changed.streams, window), gaps_s(beside.streams, window)]
    return found


def summarise(found: Sequence[tuple[Case, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per case out of ``(case, seed, figures)``, in the order in which the cases first appear."""
    rows = []
    for case in dict.fromkeys(case for case, _, _ in found):
        mine = [(seed, each) for of, seed, each in found if of == case]
        seeds = [[each for seed, each in mine if seed == wanted] for wanted in dict.fromkeys(seed for seed, _ in mine)]
        rows.append({"case": case, "num_changes": len(mine), **_row(seeds)})
    return rows


def _row(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """`seeds` has for each seed the figures of its changes, which are of one play: what counts its requests is counted once."""
    p50, p99, top = percentile_of(50), percentile_of(99), percentile_of(100)
    excess = _values(seeds, "service_gap_excess_s")
    row: dict[str, Any] = {
        "d1_pause_p50_s": interval(_inner(seeds, "engine_pause_s", "p50"), p50),
        "d1_pause_max_s": interval(_inner(seeds, "engine_pause_s", "max"), top),
        "d1_excess_p50_s": interval(_inner(seeds, "engine_pause_s", "excess_p50"), p50),
        "d1_excess_p99_s": interval(_inner(seeds, "engine_pause_s", "excess_p99"), top),
        "d1_ordinary_p99_s": interval(_inner(seeds, "engine_pause_s", "ordinary_p99"), p50),
        "d2_gap_s": interval(_values(seeds, "service_gap_s"), mean_of),
        "d2_excess_s": interval(excess, mean_of),
        "d2_excess_p99_s": interval(excess, p99),
        "d2_excess_max_s": interval(excess, top),
        "d2_p99_more_s": interval(_sides(seeds, "service_gaps_s", 0, 1), difference(p99)),
        "silence_s": interval(_values(seeds, "silence_s"), mean_of),
        "silence_same_moment_s": interval(_values(seeds, "silence_same_moment_s"), mean_of),
        "step_s": interval(_values(seeds, "step_s"), mean_of),
        "d5_change_s": interval(_values(seeds, "change_s"), mean_of),
        "d5_over_paced": interval(
            [[e["change_s"] / e["report"]["paced_s"] for e in seed if e["report"].get("paced_s")] for seed in seeds],
            p50,
        ),
        **{key: sum(seed[0][key] for seed in seeds) for key in ("errors", "errors_plain", "retries", "requests")},
    }
    for name, statistic in (("p50", p50), ("p99", p99), ("max", top)):
        row[f"d3_stall_{name}_s"] = interval(_side(seeds, "stalls_s", 0), statistic)
        row[f"d3_stall_plain_{name}_s"] = interval(_side(seeds, "stalls_s", 1), statistic)
    row["d4_ttft_s"] = interval(_side(seeds, "ttft_arriving_s", 0), mean_of)
    row["d4_ttft_plain_s"] = interval(_side(seeds, "ttft_arriving_s", 1), mean_of)
    row["d4_ttft_excess_s"] = interval(_sides(seeds, "ttft_arriving_s", 0, 1), difference(mean_of))
    for metric in ("ttft", "tpot"):
        for name, statistic in (("mean", mean_of), ("p99", p99)):
            for against, side in (("source", 1), ("target", 2), ("both", 3)):
                pairs = _sides(seeds, f"{metric}_s", 0, side)
                row[f"{metric}_{name}_over_{against}"] = interval(pairs, ratio_less_one(statistic))
    for name in seeds[0][0]["gaps_s"]:
        pairs = [
            (
                [gap for each in seed for gap in each["gaps_s"][name][0]],
                [gap for each in seed for gap in each["gaps_s"][name][1]],
            )
            for seed in seeds
        ]
        row[f"gap_{name}_more"] = interval(pairs, ratio_less_one(mean_of))
    for name in ("weight_bytes", "snapshot_bytes", "mirror_bytes", "recomputed_tokens", "layers_moved"):
        row[name] = interval([[e["report"].get(name, 0) for e in seed] for seed in seeds], mean_of)
    for name, key in (("rss_first_mib", "first_mib"), ("rss_peak_mib", "peak_mib"), ("cpu_more_s", "cpu_more_s")):
        row[name] = interval(_inner(seeds, "usage", key), mean_of)
    return row


def _mixed(source: Sequence[float], target: Sequence[float], shares: Sequence[float]) -> list[float]:
    """What each request takes if it has that share of its time on the source layout and the rest on the target."""
    return [share * a + (1.0 - share) * b for a, b, share in zip(source, target, shares, strict=True)]


def _values(seeds: Sequence[Sequence[dict[str, Any]]], key: str) -> list[list[float]]:
    return [[each[key] for each in seed] for seed in seeds]


def _inner(seeds: Sequence[Sequence[dict[str, Any]]], key: str, inner: str) -> list[list[float]]:
    return [[each[key][inner] for each in seed if inner in each[key]] for seed in seeds]


def _side(seeds: Sequence[Sequence[dict[str, Any]]], key: str, side: int) -> list[list[float]]:
    return [[value for each in seed for value in each[key][side]] for seed in seeds]


def _sides(
    seeds: Sequence[Sequence[dict[str, Any]]], key: str, left: int, right: int
) -> list[tuple[list[float], list[float]]]:
    return list(zip(_side(seeds, key, left), _side(seeds, key, right), strict=True))


# -- as text -------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("D1 p50 ms", "d1_pause_p50_s", 1e3),
    ("D1 over mean gap p50 ms", "d1_excess_p50_s", 1e3),
    ("D1 p99", "d1_excess_p99_s", 1e3),
    ("ordinary p99", "d1_ordinary_p99_s", 1e3),
    ("D2 excess ms", "d2_excess_s", 1e3),
    ("D2 p99 more", "d2_p99_more_s", 1e3),
    ("silence ms", "silence_s", 1e3),
    ("step ms", "step_s", 1e3),
    ("D3 p99 ms", "d3_stall_p99_s", 1e3),
    ("D3 p99 without", "d3_stall_plain_p99_s", 1e3),
    ("D4 TTFT ms more", "d4_ttft_excess_s", 1e3),
    ("D5 s", "d5_change_s", 1.0),
    ("D5 over paced", "d5_over_paced", 1.0),
    ("TTFT mean %", "ttft_mean_over_both", 100.0),
    ("TTFT p99 %", "ttft_p99_over_both", 100.0),
    ("TPOT mean %", "tpot_mean_over_both", 100.0),
    ("TPOT p99 %", "tpot_p99_over_both", 100.0),
    ("gaps before %", "gap_before_more", 100.0),
    ("while weights load %", "gap_weights_more", 100.0),
    ("while KV is copied %", "gap_copy_more", 100.0),
    ("at the flip %", "gap_flip_more", 100.0),
    ("after %", "gap_after_more", 100.0),
    ("weights MB", "weight_bytes", 1e-6),
    ("KV MB", "snapshot_bytes", 1e-6),
    ("mirrored MB", "mirror_bytes", 1e-6),
    ("processor s more", "cpu_more_s", 1.0),
    ("resident MiB at first", "rss_first_mib", 1.0),  # summed over processes: what is lent counts for each that maps it
    ("at most", "rss_peak_mib", 1.0),
)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; each figure with its 95 % interval."""
    lines = ["| case | " + " | ".join(name for name, _, _ in _COLUMNS) + " | failed |"]
    lines.append("|---" * (len(_COLUMNS) + 2) + "|")
    for row in rows:
        cells = [_cell(row[key], scale) for _, key, scale in _COLUMNS]
        name = f"{row['case']} ({row['num_changes']} changes)"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['errors']} of {row['requests']} |")
    return "\n".join(lines)


def _cell(figure: dict[str, float] | None, scale: float) -> str:
    if figure is None:
        return "-"
    value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
    places = 2 if scale == 1.0 else 1
    if abs(high - low) < 10**-places / 2:
        return f"{value:.{places}f}"
    return f"{value:.{places}f} ({low:.{places}f} to {high:.{places}f})"
