"""Who decides on the layout of a simulated cluster from outside: nobody, or an oracle that knows the trace. Pure.

The autopilot is no policy: it is in the head, in the simulated one too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.layout import Layout
from scheduler.planning.cost import Facts
from scheduler.planning.forecast import Device
from scheduler.planning.planner import plan
from scheduler.planning.plans import NoPlan, Plan
from scheduler.planning.traffic import Objective, Serving, Slo, Traffic
from scheduler.simulation.trace import Trace
from scheduler.simulation.world import SimDevice

__all__ = ["Oracle", "Planning", "Policy"]


class Policy:
    """Keeps the layout that it is given. Others override what they need; seconds are of the trace's clock."""

    def decide(self, now_s: float, present: Layout, *, is_free: bool) -> Layout | None:
        """The layout to change to now, if any; with `is_free` false a change is under way."""
        return None

    def committed(self, now_s: float, layout: Layout) -> None: ...

    def failed(self, now_s: float, layout: Layout, why: str) -> None: ...

    def notes(self) -> list[str]:
        """What there is to tell of its decisions."""
        return []


@dataclass(frozen=True)
class Planning:
    """How to ask the planner."""

    facts: Facts
    devices: tuple[Device, ...]
    serving: Serving
    objective: Objective
    slo: Slo

    @classmethod
    def of(
        cls,
        facts: Facts,
        devices: Sequence[SimDevice],
        serving: Serving,
        objective: Objective,
        slo: Slo,
        *,
        pool_bytes: int = 0,
    ) -> "Planning":
        """`pool_bytes` is each worker's page pool, if they have one already."""
        known = tuple(Device(d.worker, d.speed, d.memory_bytes, pool_bytes) for d in devices)
        return cls(facts, known, serving, objective, slo)

    def plan(self, traffic: Traffic, present: Layout | None) -> Plan:
        """Raises `NoPlan` when the model does not fit."""
        return plan(
            self.facts, self.devices, traffic,
            serving=self.serving, objective=self.objective, slo=self.slo, present=present,
        )  # fmt: skip


class Oracle(Policy):
    """Knows the trace: before each window it has the best layout planned for the requests that will arrive in it.

    It changes when that is better by `min_gain`, at the beginning of the window. Whether a change costs anything is the
    network's business (`Rates.free_changes`). A window without requests changes nothing.
    """

    def __init__(self, planning: Planning, trace: Trace, window_s: float, *, min_gain: float = 0.01) -> None:
        self._planning, self._trace = planning, trace
        self._window_s, self._min_gain = window_s, min_gain
        self._window = -1
        self._notes: list[str] = []

    def decide(self, now_s: float, present: Layout, *, is_free: bool) -> Layout | None:
        window = int(now_s // self._window_s)
        if window == self._window or not is_free:
            return None
        self._window = window
        coming = self._trace.window(window * self._window_s, (window + 1) * self._window_s)
        if not len(coming):
            return None
        try:
            found = self._planning.plan(coming.traffic(self._window_s), present)
        except NoPlan as error:
            self._notes.append(f"at {now_s:.0f} s: {error}")
            return None
        if not found.is_change or found.gain < self._min_gain:
            return None
        self._notes.append(f"at {now_s:.0f} s: {found.layout.brief()}, gain {found.gain:.1%}")
        return found.layout

    def failed(self, now_s: float, layout: Layout, why: str) -> None:
        self._notes.append(f"at {now_s:.0f} s: {layout.brief()} failed: {why}")

    def notes(self) -> list[str]:
        return self._notes
