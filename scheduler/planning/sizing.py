"""How many workers the load needs: the fewest that carry it, and how many more when those there are do not. Pure.

Workers *carry* a load when they could take `1 / FULL` times its rate and, at the load given, its mean request meets the SLO
(which the objective "throughput" does not ask for). In a closed loop, where clients wait for their answers, there is no
rate to carry: they must come within a few percent of the best throughput instead. Whether more devices would help is
asked of the planner with copies of the fastest one there is.

Never true: more workers than there are are wanted for a closed loop; it takes as much as it gets.
"""

import math
from collections.abc import Callable, Sequence

import msgspec

from scheduler.planning.forecast import Device
from scheduler.planning.plans import Candidate, Plan
from scheduler.planning.traffic import Slo

FULL = 0.8
"""The utilization to plan for."""
FULL_WITH_LESS = 0.65
"""The same for fewer workers than serve now, or a load near the limit would take them and give them back for ever."""
ENOUGH = 0.97
"""The share of the best throughput that fewer workers must reach in a closed loop."""
MAX_MORE = 16
"""Beyond so many workers it is taken for granted that capacity grows with their number; not that a request of theirs gets faster."""

Ask = Callable[[Sequence[Device], int], Plan]
"""The planner, for these devices and this number of stages (0: any), without a present layout."""


class Workers(msgspec.Struct, frozen=True):
    """`present` could serve, `used` do under the proposal, `wanted` are needed; `spare` serve nothing and could go."""

    present: int
    used: int
    wanted: int
    spare: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        return {"present": self.present, "used": self.used, "wanted": self.wanted, "spare": len(self.spare)}


def num_wanted(ask: Ask, devices: Sequence[Device], num_layers: int, slo: Slo, num_serving: int) -> int:
    """The fewest workers that carry the load, while `num_serving` serve it.

    Raises:
        ValueError: the model does not fit on the devices (`plans.NoPlan`).
    """
    best = ask(devices, 0)
    used = len(best.layout.workers)
    if not _carries(best, best, slo, FULL):
        return _with_more(ask, best, devices, num_layers, slo)
    for candidate in best.candidates:
        k = candidate.num_stages
        full = FULL if k >= num_serving else FULL_WITH_LESS
        if k < used and _may_carry(candidate, best, full) and _carries(ask(devices, k), best, slo, full):
            return k
    return used


def _may_carry(candidate: Candidate, best: Plan, full: float) -> bool:
    """By the score alone, which for those that were not split is a bound: what fails here need not be planned."""
    rate = best.traffic.requests_per_s
    if candidate.score == -math.inf or best.objective == "latency":
        return candidate.score > -math.inf
    return candidate.score * full >= rate if rate > 0 else candidate.score >= ENOUGH * best.score


def _carries(found: Plan, best: Plan, slo: Slo, full: float) -> bool:
    forecast, rate = found.forecast, found.traffic.requests_per_s
    if found.objective != "throughput" and (forecast.ttft_s > slo.ttft_s or forecast.tpot_s > slo.tpot_s):
        return False
    if rate > 0:
        return not forecast.saturated and rate <= full * forecast.capacity_requests_per_s
    return forecast.requests_per_s >= ENOUGH * best.forecast.requests_per_s


def _with_more(ask: Ask, best: Plan, devices: Sequence[Device], num_layers: int, slo: Slo) -> int:
    """How many workers would carry the load; as many as there are when more are not known to help."""
    present = len(devices)
    if best.traffic.requests_per_s <= 0:
        return present
    if present > MAX_MORE:
        forecast = best.forecast
        short = best.traffic.requests_per_s / (FULL * forecast.capacity_requests_per_s)
        return max(present, min(num_layers, present + math.ceil(present * (short - 1.0))))
    model = max(devices, key=lambda device: device.speed.kind.bandwidth)
    low, high = 1, min(MAX_MORE, num_layers - present)
    found = present
    while low <= high:
        middle = (low + high) // 2
        copies = [msgspec.structs.replace(model, worker=f"{model.worker}+{i}") for i in range(middle)]
        if _carries(ask([*devices, *copies], 0), best, slo, FULL):
            found, high = present + middle, middle - 1
        else:
            low = middle + 1
    return found
