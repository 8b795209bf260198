"""The planner's and the autopilot's part of ``GET /metrics``."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from scheduler.request import PilotStats

_MODES = ("off", "advise", "on")


def pilot_families(stats: PilotStats) -> Iterator[Metric]:
    mode = GaugeMetricFamily("midflight_autopilot_mode", "1 for the mode that is set", labels=["mode"])
    for name in _MODES:
        mode.add_metric([name], float(stats.mode == name))
    yield mode
    yield _gauge("midflight_plan_gain_ratio", "Predicted relative gain of the proposed layout", stats.gain)
    yield _gauge("midflight_plan_trust_ratio", "Part of earlier predictions that came true", stats.trust)
    entries = CounterMetricFamily("midflight_autopilot_entries", "Lines of the autopilot's log", labels=["kind"])
    for kind, count in sorted(stats.entries.items()):
        entries.add_metric([kind], count)
    yield entries
    steps = GaugeMetricFamily(
        "midflight_plan_step_seconds", "Predicted time of a mean step", labels=["layout", "hop", "worker"]
    )
    for layout, hop, worker, seconds in stats.stages:
        steps.add_metric([layout, str(hop), worker], seconds)
    yield steps
    errors = GaugeMetricFamily(
        "midflight_plan_step_error_ratio",
        "Error of predicted step times, absolute and signed",
        labels=["worker", "mean"],
    )
    for worker, count, absolute, signed in stats.stage_errors:
        if count:
            errors.add_metric([worker, "absolute"], absolute)
            errors.add_metric([worker, "signed"], signed)
    yield errors
    service = GaugeMetricFamily(
        "midflight_plan_service_seconds",
        "Predicted and measured for the present layout: ttft, tpot, and time in service per token",
        labels=["what", "source"],
    )
    for what, (predicted, measured) in stats.service.items():
        service.add_metric([what, "predicted"], predicted)
        service.add_metric([what, "measured"], measured)
    yield service
    workers = GaugeMetricFamily("midflight_plan_workers", "Workers by what the planner says of them", labels=["state"])
    for state, count in stats.workers.items():
        workers.add_metric([state], count)
    yield workers


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=value)
