"""What the planner answers, and the words for it: a `Plan` with its forecasts, and why other numbers of stages lost. Pure.

A score is the objective's figure, higher is better: requests per second for throughput and goodput, seconds with a minus sign for
latency, -inf for what cannot be.

Never true: a plan tells when to act on it, or what a change costs (`cost.migration_cost`).
"""

import math

import msgspec

from kvstore.ids import WorkerName
from runtime.layout import Layout
from scheduler.planning.forecast import Forecast
from scheduler.planning.traffic import Objective, Slo, Traffic


class NoPlan(ValueError):
    """The model does not fit on the devices; the message says what is missing."""


class Candidate(msgspec.Struct, frozen=True):
    """The best split with a given number of stages, and its score.

    `workers` and `layers` are empty where a bound on the score sufficed to see that it loses.
    """

    num_stages: int
    workers: tuple[WorkerName, ...]
    layers: tuple[int, ...]
    score: float
    why_not: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What the planner proposes, and the reasons. `gain` is the relative gain in the objective over the present layout."""

    objective: Objective
    traffic: Traffic
    slo: Slo
    layout: Layout
    forecast: Forecast
    score: float
    present: Forecast | None
    present_score: float
    gain: float
    is_change: bool
    candidates: tuple[Candidate, ...]
    unused: tuple[WorkerName, ...]
    error: float = 0.0
    within_error: str = ""
    """A layout that looks better by less than `error`, which is therefore not proposed, and by how much."""

    def explain(self) -> str:
        """Some lines for an operator."""
        lines = [f"objective {self.objective}: {amount(self.objective, self.score)}"]
        if self.is_change:
            lines.append(f"proposed  {self.layout.brief()}")
            lines += _describe(self.forecast)
        if self.present is not None:
            head = "present" if self.is_change else "present, kept"
            lines.append(f"{head}: {amount(self.objective, self.present_score)}; the proposal {gained(self.gain)}")
            lines += _describe(self.present)
        if self.within_error:
            lines.append(
                f"not proposed, as it is within the model's own error of {self.error:.1%}: {self.within_error}"
            )
        lines += [f"{c.num_stages} stages {list(c.layers) or ''}: {c.why_not}" for c in self.candidates if c.why_not]
        if self.unused:
            lines.append(f"not used: {', '.join(self.unused)}")
        return "\n".join(lines)


def relative_gain(objective: Objective, before: float, after: float) -> float:
    """How much better the score `after` is than `before`, as a share of it."""
    if before == after:
        return 0.0
    if objective == "latency":
        return math.inf if before == -math.inf else before / after - 1.0 if after > -math.inf else -1.0
    return after / before - 1.0 if before > 0 else math.inf


def why_not(objective: Objective, score: float, best: float, is_split: bool) -> str:
    """Why a number of stages with this score lost against the best one; without a split the score is a bound."""
    if score == -math.inf:
        return "it cannot take the load" if is_split else "the weights do not fit on so few devices"
    bound = "" if is_split else "at best "
    return f"{bound}{amount(objective, score)}, {relative_gain(objective, best, score):+.1%}"


def gained(gain: float) -> str:
    """A relative gain in words; there is no share of nothing."""
    return f"gains {gain:.1%}" if gain < math.inf else "can, the present layout cannot"


def amount(objective: Objective, score: float) -> str:
    """A score in words."""
    if objective == "latency":
        return "cannot take the load" if score == -math.inf else f"{-score:.3g} s per request"
    return f"{score:.4g} requests/s"


def _describe(forecast: Forecast) -> list[str]:
    lines = [
        f"  {forecast.requests_per_s:.3g} of {forecast.capacity_requests_per_s:.3g} requests/s, TTFT {forecast.ttft_s * 1e3:.0f} ms,"
        f" TPOT {forecast.tpot_s * 1e3:.1f} ms, {forecast.num_sequences:.0f} in service, limited by {forecast.limited_by}"
    ]
    for hop, stage in enumerate(forecast.stages):
        mark = "  <- bottleneck" if hop == forecast.bottleneck else ""
        lines.append(
            f"  {stage.worker} ({stage.device}) [{stage.layers[0]}, {stage.layers[1]}): {stage.seconds * 1e3:.2f} ms a step"
            f" ({stage.decode_s * 1e3:.2f} decoding, {stage.prefill_s * 1e3:.2f} with a chunk), busy {stage.utilization:.0%}{mark}"
        )
    return lines
