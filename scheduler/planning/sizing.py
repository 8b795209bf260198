"""How many workers the load needs: the fewest that carry it, and how many more when those there are do not. Pure.

Workers *carry* a load when they could take `1 / FULL` times its rate and, at the load given, its mean request meets the SLO
(which the objective "throughput" does not ask for). In a closed loop, where clients wait for their answers, there is no
rate to carry: they must come within a few percent of the best throughput instead. Whether more devices would help is
asked of the planner with copies of the fastest one there is.

Never true: more workers than there are are wanted for a closed loop; it takes as much as it gets.
"""

from collections.abc import Callable, Sequence

import msgspec

from scheduler.planning.forecast import Device
from scheduler.planning.planner import Plan
from scheduler.planning.traffic import Slo

FULL = 0.8
"""The utilization to plan for."""
FULL_WITH_LESS = 0.65
"""The same for fewer workers than serve now, or a load near the limit would take them and give them back for ever."""
ENOUGH = 0.97
"""The share of the best throughput that fewer workers must reach in a closed loop."""
MAX_MORE = 16

Ask = Callable[[Sequence[Device], int], Plan]
"""The planner, for these devices and this number of stages (0: any), without a present layout."""


class Workers(msgspec.Struct, frozen=True):
    """`present` could serve, `used` do under the proposal, `wanted` are needed; `spare` serve nothing and could go."""

    present: int
    used: int
    wanted: int
    spare: tuple[str, ...] = ()


def num_wanted(ask: Ask, devices: Sequence[Device], num_layers: int, slo: Slo, num_serving: int) -> int:
    """The fewest workers that carry the load, while `num_serving` serve it.

    Raises:
        ValueError: the model does not fit on the devices (`planner.NoPlan`).
    """
    best = ask(devices, 0)
    used = len(best.layout.workers)
    if not _carries(best, best, slo, FULL):
        return _with_more(ask, best, devices, num_layers, slo)
    low, high = 1, used
    while low < high:  # capacity grows with the number of stages for as long as more of them help
        middle = (low + high) // 2
        try:
            found = ask(devices, middle)
        except ValueError:  # it does not fit on so few
            low = middle + 1
            continue
        if _carries(found, best, slo, FULL if middle >= num_serving else FULL_WITH_LESS):
            high = middle
        else:
            low = middle + 1
    return high


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
