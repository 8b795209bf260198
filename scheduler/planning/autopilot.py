"""When to change the layout: the planner's proposals against what a change costs, and what became of earlier ones. Pure.

Every `interval_s` the planner is asked, and as soon as enough is known of a load that has changed: `ask` gives a question, somebody answers it (`planning.look`; in a thread, if need be),
and `heard` decides. Its gain is taken with a grain of salt: times `trust`, which is what came
true of earlier predictions, and times the *pressure*, since more capacity is worth nothing to a load that has enough of it.

Then time works for the change. While the gain exceeds a threshold, the excess is added up (Page's one-sided CUSUM, 1954): the
*regret* is how many seconds' worth of service the present layout has lost so far to the best one known. A change is due
when the regret has reached its cost (for a load that has just been told from the one before, since it began), as one buys skis when the rent paid has reached their price (Karlin, Manasse,
Rudolph and Sleator 1988; for changing loads Borodin, Linial and Saks 1992): whatever comes, little more is lost than by
knowing it. So a large gain acts within seconds, a small one after a while, and noise, which is sometimes above and
sometimes below the threshold, never.

On top of that, no change before the last one has stayed `min_stay_s`; none that the load, by how long loads lasted so far,
will not pay back (loads that take turns faster than that are planned for together, as their mean); and each change raises the threshold for the next by a penalty that halves every `half_life_s` (route
flap damping, RFC 2439), in full for one that takes a layer back to where it came from, so that an oscillating load is followed only as far as it is worth it.

After a change the time that a request in service spends per token is measured: r = measured / predicted, by the coefficients
that the decision was made with, before and after it. The gain that came true is (1 + predicted) r_before / r_after - 1, and
`trust` moves towards what part of the prediction that is.

Never true: something is decided from the time of day or by chance; two changes within `min_stay_s`; a change in "advise".
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from runtime.layout import Layout
from scheduler.planning.cost import Facts, MigrationCost
from scheduler.planning.forecast import Device
from scheduler.planning.look import Answer, Question, Staffing, answer, cost_s, per_token_s
from scheduler.planning.monitor import Load, Measured, Monitor, Running
from scheduler.planning.plans import Plan
from scheduler.planning.settings import Settings
from scheduler.planning.sizing import Workers
from scheduler.planning.traffic import Serving, Traffic

Mode: TypeAlias = Literal["off", "advise", "on"]
MODES: tuple[Mode, ...] = ("off", "advise", "on")
MAX_LOG = 200
_ONWARD = 0.25
"""The share of the penalty for earlier changes that counts against one that takes nothing back."""
_AT_ONCE = 3
"""Regret is added for so many intervals at most, however long nothing could be told."""
_LONGEST_REST_S, _MOST_BLOCKED = 3600.0, 64
"""How long a layout that could not be got to is left alone at most, and how many of them are known."""
_JUDGED_FROM = 0.02
"""Predicted gains per token below this drown in noise and are not judged."""


class Entry(msgspec.Struct, frozen=True):
    """A line of the log. `kind` is shift, advice, change, kept, refused, result, mode or workers."""

    at_s: float
    kind: str
    text: str
    numbers: dict[str, float] = {}


class Decision(msgspec.Struct, frozen=True):
    """Change to `layout` now."""

    layout: Layout
    gain: float
    cost: MigrationCost
    why: str


class Error(msgspec.Struct, frozen=True):
    """Predicted and measured for the layout that serves, under the load that there is. Seconds; 0 when not known."""

    ttft_predicted_s: float
    ttft_measured_s: float
    tpot_predicted_s: float
    tpot_measured_s: float
    per_token_predicted_s: float
    per_token_measured_s: float


class _Trial(msgspec.Struct):
    """A change whose result is awaited: the devices as they were seen, the gain per token that was predicted for it, and
    measured over predicted before it."""

    decision: Decision
    devices: tuple[Device, ...]
    gain: float
    ratio: float
    committed_s: float = math.inf


class Autopilot:
    """Tell `monitor` of the load; `ask` often; say what became of a decision with `committed` or `failed`."""

    def __init__(self, facts: Facts, settings: Settings, serving: Serving, mode: Mode = "off") -> None:
        self.facts, self.serving = facts, serving
        self.settings = settings
        self.mode: Mode = mode
        self.monitor = Monitor()
        self.log: deque[Entry] = deque(maxlen=MAX_LOG)
        self.num_entries: dict[str, int] = {}
        self.plan: Plan | None = None
        self.load: Load | None = None
        self.workers: Workers | None = None
        self.error: Error | None = None
        self.trust = 1.0
        self.slowness = 1.0
        """How long changes take, relative to what the table of speeds says."""
        self.regret_s = 0.0
        self.cost: MigrationCost | None = None
        self._penalty = 0.0
        self._penalty_at_s = 0.0
        self._before: Layout | None = None
        self._present: Layout | None = None
        self._num_logged = self._num_told = 0
        self._looked_s = -math.inf
        self._changed_s = -math.inf
        self._pending: _Trial | None = None
        self._trial: _Trial | None = None
        self._ratio = 0.0
        """Measured over predicted per token, when last a load had gone on for long enough to tell."""
        self._staffing = Staffing()
        self._is_asking = False
        self._weighed_s = -math.inf
        """Up to when regret was added up."""
        self._blocked: dict[tuple[object, ...], tuple[float, float]] = {}
        """Layouts that were refused or failed: until when they are left alone, and for how long that was."""
        self._advised: tuple[object, ...] | None = None
        self._needed_s = 0.0
        """How long a load must last for the change that it asked for to pay; loads that do not are planned for together."""

    # -- what happens -----------------------------------------------------------------------------------------

    def observe(self, now_s: float, running: Sequence[Running], waiting: int, generated_tokens: int) -> None:
        """A sample of the load, as `Monitor.sample` takes it."""
        shift = self.monitor.sample(now_s, running, waiting, generated_tokens)
        if shift is not None:
            self._note(now_s, "shift", shift.text(), before=shift.before, after=shift.after)
            known_s = shift.began_s + self.settings.min_age_s
            self._looked_s = min(self._looked_s, known_s - self.settings.interval_s)

    def set_mode(self, now_s: float, mode: Mode) -> None:
        if mode != self.mode:
            self.mode, self._advised, self.regret_s = mode, None, 0.0
            if mode == "off":
                self.plan = self.cost = self.workers = self.error = None  # nobody looks any more
            self._note(now_s, "mode", f"the autopilot is {mode}" if mode != "advise" else "the autopilot advises")

    def committed(self, now_s: float, layout: Layout, took_s: float = 0.0) -> None:
        """The layout has changed, by our decision or an operator's. `took_s` is how long the change went on, if known."""
        self._penalty, self._penalty_at_s = self.penalty(now_s) + 1.0, now_s
        self._before, self._present = self._present, layout
        self._changed_s, self.regret_s, self._advised, self._trial = now_s, 0.0, None, None
        self._weighed_s = now_s
        self._blocked.pop(layout.segments, None)
        trial, self._pending = self._pending, None
        if trial is not None and trial.decision.layout.segments == layout.segments:
            if took_s > 0 and trial.decision.cost.seconds > 0:
                off = math.log(took_s / trial.decision.cost.seconds)
                self.slowness = min(max(self.slowness * math.exp(0.5 * off), 0.01), 100.0)
            trial.committed_s = now_s
            self._trial = trial

    def failed(self, now_s: float, layout: Layout, why: str) -> None:
        """What was decided could not be done; it is left alone for a while, twice as long each time, an hour at most."""
        _, before_s = self._blocked.pop(layout.segments, (0.0, self.settings.retry_s / 2))
        while len(self._blocked) >= _MOST_BLOCKED:
            del self._blocked[next(iter(self._blocked))]
        rest_s = min(2 * before_s, _LONGEST_REST_S)
        self._blocked[layout.segments] = now_s + rest_s, rest_s
        self._pending, self.regret_s = None, 0.0
        self._note(now_s, "refused", f"{layout.brief()}: {why}")

    def penalty(self, now_s: float) -> float:
        """What is left of the penalties for changes; each added 1."""
        return self._penalty * 0.5 ** ((now_s - self._penalty_at_s) / self.settings.half_life_s)

    def threshold(self, now_s: float, *, is_return: bool = True) -> float:
        """The gain from which on regret is counted. A change that goes further does not flap, one that goes back might."""
        return self.settings.min_gain * (1.0 + self.penalty(now_s) * (1.0 if is_return else _ONWARD))

    def _is_return(self, present: Layout, proposed: Layout) -> bool:
        """Whether some layer would go back to where it was before the last change."""
        if self._before is None or self._before.num_layers != present.num_layers:
            return False
        owners = zip(self._before.owners(), present.owners(), proposed.owners(), strict=True)
        return any(before == then != now for before, now, then in owners)

    # -- deciding -----------------------------------------------------------------------------------------------

    def is_due(self, now_s: float) -> bool:
        """Whether `ask` would look at the load now, if no change is under way."""
        looks = self.mode != "off" or self.settings.tells_workers
        return looks and not self._is_asking and now_s - self._looked_s >= self.settings.interval_s

    def ask(
        self,
        now_s: float,
        devices: Sequence[Device],
        present: Layout,
        *,
        kv_tokens: float = 0.0,
        error: float = 0.0,
        is_free: bool = True,
    ) -> Question | None:
        """The question to be answered now, if any. `devices` are all workers that could serve, `error` is that of their
        speeds; with `is_free` false (a change is under way) nothing is asked. `kv_tokens` are the live and cached tokens
        that a change would copy.
        """
        if not is_free or not self.is_due(now_s):
            return None
        self._looked_s = now_s
        question = self.question(now_s, devices, present, kv_tokens=kv_tokens, error=error)
        self._is_asking = question is not None
        return question

    def heard(self, now_s: float, question: Question, found: Answer, present: Layout | None) -> Decision | None:
        """The answer to what `ask` gave: the change to make now, if any. It stands until `committed` or `failed` is called.

        An answer for another layout than the `present` one came too late and is dropped.
        """
        self._is_asking = False
        if present is None or present.segments != question.present.segments:
            return None
        plan = self.noted(now_s, question, found)
        if plan is None or self._pending is not None or self.mode == "off":
            return None
        elapsed_s = min(question.asked_s - self._weighed_s, question.load.age_s, _AT_ONCE * self.settings.interval_s)
        self._weighed_s = question.asked_s
        return self._weigh(now_s, elapsed_s, plan, question.devices, present)

    def decide(
        self, now_s: float, devices: Sequence[Device], present: Layout, *, kv_tokens: float = 0.0, is_free: bool = True
    ) -> Decision | None:
        """`ask`, `answer` and `heard` at once."""
        question = self.ask(now_s, devices, present, kv_tokens=kv_tokens, is_free=is_free)
        return None if question is None else self.heard(now_s, question, answer(question), present)

    def question(
        self, now_s: float, devices: Sequence[Device], present: Layout, *, kv_tokens: float = 0.0, error: float = 0.0
    ) -> Question | None:
        """What there is to ask of the load of now; None when too little was seen of it. Asking for a view delays no decision."""
        load = self.monitor.load()
        if load is not None and load.remaining_s < self._needed_s:
            load = self.monitor.load(mixed=True)
        self.load = load
        if load is None or load.age_s < self.settings.min_age_s:
            return None
        if load.num_requests < self.settings.min_requests and not load.is_idle:
            return None
        return Question(
            now_s, self.facts, self.serving, self.settings, load, tuple(devices), present, kv_tokens,
            self.monitor.measured(self._changed_s), self._staffing, self.slowness, error,
        )  # fmt: skip

    def noted(self, now_s: float, question: Question, found: Answer) -> Plan | None:
        """Keep what was answered for whoever wants to see it; the plan, if there is one."""
        if found.plan is None:
            self._advise(now_s, "kept", found.why, (found.why,))
            return None
        if found.why:
            self._advise(now_s, "kept", found.why, (found.why.partition(" would be ")[0],))
        before = self._staffing.wanted or len(question.present.workers)
        self._staffing = found.staffing
        if found.staffing.wanted != before:
            wanted = found.staffing.wanted
            self._note(now_s, "workers", f"{wanted} workers are wanted", wanted=wanted)
        load, measured = question.load, question.measured
        self.plan, self.cost, self.workers = found.plan, found.cost, found.workers
        assert found.plan.present is not None
        self.error = Error(
            ttft_predicted_s=found.plan.present.ttft_s,
            ttft_measured_s=load.ttft_s,
            tpot_predicted_s=found.plan.present.tpot_s,
            tpot_measured_s=load.tpot_s,
            per_token_predicted_s=found.per_token_s,
            per_token_measured_s=measured.service_s_per_token,
        )
        self._verify(now_s, question.present, load)
        if measured.seconds >= self.settings.verify_s and measured.tokens >= self.settings.verify_tokens:
            self._ratio = self.error.per_token_measured_s / self.error.per_token_predicted_s
        return found.plan

    def _weigh(
        self, now_s: float, elapsed_s: float, found: Plan, devices: Sequence[Device], present: Layout
    ) -> Decision | None:
        """Add to the regret, and see whether it suffices."""
        assert self.cost is not None
        assert self.load is not None
        settings, cost = self.settings, self.cost
        price_s = cost_s(settings, cost)
        until_s, _ = self._blocked.get(found.layout.segments, (-math.inf, 0.0))
        shrinks = found.is_change and settings.elastic and len(found.layout.workers) < len(present.workers)
        if self.load.is_idle and self._staffing.wanted >= len(present.workers):
            shrinks = False  # a pause gives back no worker before it has lasted
        gain = self.worth(found)
        if shrinks:  # what it saves counts as a gain
            gain = max(gain, 1.0 - len(found.layout.workers) / len(present.workers))
        if not found.is_change or now_s < until_s:
            gain = 0.0
        self._present = present
        threshold = self.threshold(now_s, is_return=self._is_return(present, found.layout))
        self.regret_s = min(max(0.0, self.regret_s + (gain - threshold) * elapsed_s), 10 * price_s)
        if gain <= threshold or self.regret_s < price_s:
            return None
        what = f"{present.brief()} -> {found.layout.brief()}"
        lasts_s = min(settings.horizon_s, self.load.remaining_s)
        if gain * lasts_s < settings.pay_back * price_s and not shrinks:
            why = f"{what} would gain {gain:.0%}, but this load is expected to last {lasts_s:.0f} s, too short to pay"
            self._needed_s = settings.pay_back * price_s / gain
            self.regret_s = 0.0
            self._advise(now_s, "kept", why + "; planning for the mean of the last minutes", ("short",))
            return None
        why = f"{what}: {'fewer workers suffice' if shrinks else f'gain {gain:.0%}'}, cost {price_s:.1f} s of service"
        if self.mode == "advise":
            self._advise(now_s, "advice", why, (found.layout.segments,))
            return None
        if now_s - self._changed_s < settings.min_stay_s:
            return None
        decision = Decision(found.layout, found.gain, cost, why)
        before = self.monitor.measured(self._changed_s)
        old_s = self._per_token_s(devices, present, found.traffic, before)
        new_s = self._per_token_s(devices, found.layout, found.traffic, before)
        ratio = self._ratio or before.service_s_per_token / old_s
        self._pending = _Trial(decision, tuple(devices), old_s / new_s - 1.0, ratio)
        self._note(now_s, "change", why, gain=found.gain, trust=self.trust, cost_s=price_s)
        return decision

    def worth(self, found: Plan) -> float:
        """The gain as it is believed in: times trust and pressure, at most 10."""
        return min(10.0, found.gain * self.trust * self.pressure(found)) if found.gain > 0 else 0.0

    def pressure(self, found: Plan) -> float:
        """How much of a gain in capacity the load would feel, in [0, 1]. Latency is felt always, but by nobody in a pause."""
        traffic = found.traffic
        if self.load is not None and self.load.is_idle:
            return 0.0
        if self.settings.objective == "latency" or traffic.requests_per_s <= 0:
            return 1.0
        if found.present_score <= 0:
            return 1.0
        return min(1.0, traffic.requests_per_s / (self.settings.pressure_at * found.present_score)) ** 2

    # -- learning -----------------------------------------------------------------------------------------------

    def _verify(self, now_s: float, present: Layout, load: Load) -> None:
        """Compare what the last change brought with what it promised, once there is enough to see."""
        trial, settings = self._trial, self.settings
        if trial is None:
            return
        since_s = trial.committed_s + settings.settle_s
        if trial.decision.layout.segments != present.segments or any(s.now_s > since_s for s in self.monitor.shifts):
            self._trial = None
            self._note(now_s, "result", "the load moved on before the last change could be judged")
            return
        after = self.monitor.measured(since_s)
        if after.seconds < settings.verify_s or after.tokens < settings.verify_tokens:
            return
        self._trial = None
        if trial.gain < _JUDGED_FROM or trial.ratio <= 0:
            self._note(now_s, "result", "the last change is not judged: its gain would not show in the time per token")
            return
        ratio = after.service_s_per_token / self._per_token_s(trial.devices, present, load.traffic, after)
        came_true = (1.0 + trial.gain) * trial.ratio / ratio - 1.0
        share = min(max(came_true / trial.gain, 0.0), 1.5)
        self.trust = min(1.0, max(0.1, self.trust + 0.4 * (share - self.trust)))
        self._note(
            now_s,
            "result",
            f"gained {came_true:.0%} per token of a predicted {trial.gain:.0%};"
            f" predictions are now trusted to {self.trust:.0%}",
            predicted=trial.gain,
            came_true=came_true,
            trust=self.trust,
        )

    def _per_token_s(self, devices: Sequence[Device], layout: Layout, traffic: Traffic, measured: Measured) -> float:
        return per_token_s(self.facts, self.serving, devices, layout, traffic, measured)

    def news(self) -> list[Entry]:
        """Entries of the log since this was last asked."""
        count, self._num_told = self._num_logged - self._num_told, self._num_logged
        return list(self.log)[len(self.log) - min(count, len(self.log)) :]

    # -- the log ------------------------------------------------------------------------------------------------

    def _advise(self, now_s: float, kind: str, text: str, what: tuple[object, ...]) -> None:
        """Note it, unless the last advice was the same."""
        if what != self._advised:
            self._advised = what
            self._note(now_s, kind, text)

    def _note(self, now_s: float, kind: str, text: str, **numbers: float) -> None:
        self._num_logged += 1
        self.log.append(Entry(now_s, kind, text, numbers))
        self.num_entries[kind] = self.num_entries.get(kind, 0) + 1
