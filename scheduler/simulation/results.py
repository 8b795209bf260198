"""What a simulation comes to: latencies, goodput, device time, changes; as values, and as rows of tables. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.layout import Layout
from scheduler.planning.traffic import Slo
from scheduler.simulation.simulator import Outcome, Record
from scheduler.simulation.world import SimDevice

REQUEST_COLUMNS = ("index", "arrival_s", "prompt_tokens", "output_tokens", "outcome", "ttft_s", "tpot_s", "e2e_s")
WINDOW_COLUMNS = (
    "start_s", "arrivals", "ended", "good", "output_tokens_per_s", "ttft_p50_s", "tpot_mean_s", "workers", "layout",
)  # fmt: skip


def summarise(outcome: Outcome, devices: Sequence[SimDevice], slo: Slo) -> dict[str, Any]:
    """The figures of a run. Times in seconds, rates over the time from the trace's start to the last token."""
    served = [record for record in outcome.records if record.outcome == "length"]
    good = [record for record in served if is_good(record, slo)]
    seconds = max((record.last_s for record in served), default=0.0) or math.inf
    labels = {device.worker: device.label for device in devices}
    used = device_seconds(outcome)
    by_kind: dict[str, float] = {}
    for worker, held_s in used.items():
        by_kind[labels[worker]] = by_kind.get(labels[worker], 0.0) + held_s
    return {
        "requests": len(outcome.records),
        "served": len(served),
        "rejected": sum(record.outcome == "rejected" for record in outcome.records),
        "errors": sum(record.outcome == "error" for record in outcome.records),
        "unfinished": len(outcome.unfinished),
        "seconds": 0.0 if seconds == math.inf else seconds,
        "requests_per_s": len(served) / seconds,
        "output_tokens_per_s": sum(record.num_tokens for record in served) / seconds,
        "prompt_tokens_per_s": sum(record.prompt_tokens for record in served) / seconds,
        "ttft_s": percentiles([record.ttft_s for record in served]),
        "tpot_s": percentiles([record.tpot_s for record in served if record.num_tokens > 1]),
        "e2e_s": percentiles([record.last_s - record.arrival_s for record in served]),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "good": len(good),
        "good_ratio": len(good) / max(1, len(outcome.records)),
        "goodput_requests_per_s": len(good) / seconds,
        "gpu_seconds": sum(used.values()),
        "gpu_seconds_of": by_kind,
        "busy_of": {worker: outcome.busy_s[worker] / held_s for worker, held_s in used.items() if held_s > 0},
        "changes": [_change(report) for report in outcome.changes],
        "changes_refused": outcome.refused,
        "layouts": [{"at_s": at_s, "layout": describe(layout, labels)} for at_s, layout in _changes_of(outcome)],
        "steps": outcome.steps,
        "preemptions": outcome.preemptions,
        "recomputed_tokens": outcome.recomputed_tokens,
    }


def is_good(record: Record, slo: Slo) -> bool:
    """Whether a request was served within the SLO: its own TTFT, and its own mean TPOT."""
    return record.outcome == "length" and record.ttft_s <= slo.ttft_s and record.tpot_s <= slo.tpot_s


def device_seconds(outcome: Outcome) -> dict[str, float]:
    """For how long each worker held any part of a layout, one that was being prepared included."""
    used: dict[str, float] = {}
    stops = [at_s for at_s, _, _ in outcome.layouts[1:]] + [outcome.end_s]
    for (start_s, _, workers), stop_s in zip(outcome.layouts, stops, strict=True):
        for worker in workers:
            used[worker] = used.get(worker, 0.0) + stop_s - start_s
    return used


def request_rows(outcome: Outcome) -> list[tuple[object, ...]]:
    """One row per request, in `REQUEST_COLUMNS`; what never happened is empty."""
    rows: list[tuple[object, ...]] = []
    for r in outcome.records:
        known = r.num_tokens > 0
        times = (round(r.ttft_s, 6), round(r.tpot_s, 6), round(r.last_s - r.arrival_s, 6)) if known else ("", "", "")
        rows.append((r.index, round(r.arrival_s, 6), r.prompt_tokens, r.output_tokens, r.outcome, *times))
    return rows


def window_rows(outcome: Outcome, devices: Sequence[SimDevice], slo: Slo, window_s: float) -> list[tuple[object, ...]]:
    """One row per window of time, in `WINDOW_COLUMNS`. Requests count where they arrived, tokens where requests ended."""
    labels = {device.worker: device.label for device in devices}
    rows: list[tuple[object, ...]] = []
    for index in range(max(1, math.ceil(outcome.end_s / window_s))):
        start_s, stop_s = index * window_s, (index + 1) * window_s
        arrived = [r for r in outcome.records if start_s <= r.arrival_s < stop_s]
        ended = [r for r in outcome.records if r.outcome == "length" and start_s <= r.last_s < stop_s]
        served = [r for r in arrived if r.outcome == "length"]
        ttft = np.median([r.ttft_s for r in served]) if served else math.nan
        tpots = [r.tpot_s for r in served if r.num_tokens > 1]
        tpot = np.mean(tpots) if tpots else math.nan
        _, layout, workers = [entry for entry in outcome.layouts if entry[0] < stop_s][-1]
        rows.append((
            start_s, len(arrived), len(ended), sum(is_good(r, slo) for r in arrived),
            round(sum(r.num_tokens for r in ended) / window_s, 3), round(float(ttft), 6), round(float(tpot), 6),
            len(workers), describe(layout, labels),
        ))  # fmt: skip
    return rows


def describe(layout: Layout, labels: Mapping[str, str]) -> str:
    """A layout in words: ``w0 a100 [0, 30) | w1 l40s [30, 80)``."""
    return " | ".join(f"{s.worker} {labels[s.worker]} [{s.layers.start}, {s.layers.stop})" for s in layout.segments)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99, top = (float(value) for value in np.percentile(values, [50, 90, 99, 100]))
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99, "max": top}


def _changes_of(outcome: Outcome) -> list[tuple[float, Layout]]:
    """When which layout began to serve."""
    found: list[tuple[float, Layout]] = []
    for at_s, layout, _ in outcome.layouts:
        if not found or found[-1][1] is not layout:
            found.append((at_s, layout))
    return found


def _change(report: Any) -> dict[str, Any]:
    fields = ("outcome", "why", "total_s", "layers_moved", "num_hops", "weight_bytes", "snapshot_bytes", "mirror_bytes")
    shown = {name: getattr(report, name) for name in fields}
    return {**shown, "sequences_flipped": report.sequences_flipped, "engine_pause_ms": report.engine_pause_ms}
