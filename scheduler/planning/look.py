"""One look at the load: a question to the planner with all that it needs, and its answer, as values. Pure.

A look is several plans (any layout, the present order of workers, how many workers would do) and takes milliseconds for a
few devices, tens of them for many, so whoever has something better to do lets another thread answer: `answer` touches
nothing but its argument. What became of the load meanwhile is for `Autopilot.heard` to judge.

Never true: a question holds anything that changes after it was asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from runtime.layout import Layout
from scheduler.planning.cost import Facts, MigrationCost, migration_cost
from scheduler.planning.forecast import Device, Pipeline
from scheduler.planning.monitor import Load, Measured
from scheduler.planning.planner import plan
from scheduler.planning.plans import NoPlan, Plan, gained, relative_gain
from scheduler.planning.settings import Settings
from scheduler.planning.sizing import Workers, num_wanted
from scheduler.planning.traffic import Serving, Traffic

_SOON, _MOST_REGRETS = 10.0, 3
"""Workers that are wanted again within so many times as long as it took to give them back were given back too soon; how often that counts."""


@dataclass(frozen=True, slots=True)
class Staffing:
    """How many workers are wanted, and what the last looks said: the number if it was more, since when and what if fewer.

    `shrunk_s` is when fewer were wanted last, `regrets` how often lately that did not last.
    """

    wanted: int = 0
    more: int = 0
    less: tuple[float, int] | None = None
    shrunk_s: float = -math.inf
    regrets: int = 0

    def after(self, now_s: float, raw: int, num_serving: int, shrink_after_s: float) -> "Staffing":
        """More when it was more twice in a row, fewer when it was fewer for long: twice as long each time that more were wanted again soon."""
        before, known = self.wanted or num_serving, (self.shrunk_s, self.regrets)
        if raw > before:
            if self.more <= before:
                return Staffing(before, raw, None, *known)
            is_soon = now_s - self.shrunk_s < _SOON * shrink_after_s
            regrets = min(self.regrets + 1, _MOST_REGRETS) if is_soon else 0
            return Staffing(min(raw, self.more), raw, None, self.shrunk_s, regrets)
        if raw == before:
            return Staffing(before, 0, None, *known)
        since_s, most = self.less or (now_s, 0)
        if now_s - since_s >= shrink_after_s * 2**self.regrets:
            return Staffing(max(most, raw), 0, None, now_s, self.regrets)
        return Staffing(before, 0, (since_s, max(most, raw)), *known)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. `error` is the model's own, `slowness` how long changes take beyond the table of speeds."""

    asked_s: float
    facts: Facts
    serving: Serving
    settings: Settings
    load: Load
    devices: tuple[Device, ...]
    present: Layout
    kv_tokens: float
    measured: Measured
    staffing: Staffing
    slowness: float
    error: float


@dataclass(frozen=True, slots=True)
class Answer:
    """`plan` is None where nothing fits, or keeps the present layout where a better one cannot be got to; `why` says it.
    `per_token_s` is predicted for what was `measured`."""

    plan: Plan | None
    why: str = ""
    cost: MigrationCost | None = None
    workers: Workers | None = None
    staffing: Staffing = Staffing()
    per_token_s: float = 0.0


def answer(question: Question) -> Answer:
    """The plan for the load: the best layout, or the best one with the present order of workers when that pays better."""
    present = question.present
    try:
        found, workers, staffing = _planned(question)
    except NoPlan as error:
        return Answer(None, str(error))
    cost = _migration(question, found.layout)
    is_shrinking = question.settings.elastic and staffing.wanted < len(present.workers)
    if found.is_change and found.gain > 0 and len(present.workers) == present.num_hops and not is_shrinking:
        found, cost = _or_nearer(question, found, cost)
    if found.is_change and (short := without_room(question, found.layout)):
        return Answer(_kept(found, present), f"{found.layout.brief()} would be better: it {gained(found.gain)}, but {short}",
                      _migration(question, present), workers, staffing, _per_token(question))  # fmt: skip
    return Answer(found, "", cost, workers, staffing, _per_token(question))


def without_room(question: Question, layout: Layout) -> str:
    """Who has no memory for such a change, if anybody: what arrives is held beside what leaves until all is over."""
    facts, spec, present = question.facts, question.facts.spec, question.present
    for device in question.devices:
        worker = device.worker
        held = set(present.layers_of(worker)) | set(layout.layers_of(worker))
        needed = float(facts.layer_bytes[sorted(held)].sum()) if held else 0.0
        needed += spec.embedding_bytes * (worker in (present.embedding_worker, layout.embedding_worker))
        needed += spec.lm_head_bytes * (worker in (present.lm_head_worker, layout.lm_head_worker))
        if device.memory_bytes and worker in layout.workers and needed + device.pool_bytes > device.memory_bytes:
            return (
                f"{worker} has {device.memory_bytes / 1e9:.1f} GB for {needed / 1e9:.1f} GB of weights, old and new,"
                f" and {device.pool_bytes / 1e9:.1f} GB of KV pages"
            )
    return ""


def _kept(found: Plan, present: Layout) -> Plan:
    """The same plan with the present layout for an answer."""
    assert found.present is not None
    return msgspec.structs.replace(
        found, layout=present, forecast=found.present, score=found.present_score, gain=0.0, is_change=False,
        within_error="",
    )  # fmt: skip


def _per_token(question: Question) -> float:
    traffic, measured = question.load.traffic, question.measured
    return per_token_s(question.facts, question.serving, question.devices, question.present, traffic, measured)


def per_token_s(
    facts: Facts, serving: Serving, devices: Sequence[Device], layout: Layout, traffic: Traffic, measured: Measured
) -> float:
    """What the model says of a request's time per token, with as many in service as there were."""
    running = max(1.0, measured.service_s / measured.seconds) if measured.seconds > 0 else traffic.concurrency
    at = msgspec.structs.replace(traffic, requests_per_s=0.0, concurrency=running)
    forecast = Pipeline(facts, devices, layout, at, serving).forecast()
    return forecast.num_sequences / forecast.tokens_per_s


def cost_s(settings: Settings, cost: MigrationCost) -> float:
    """What a change takes, in seconds of service."""
    return cost.seconds * settings.overhead + settings.change_s + cost.num_layers * settings.layer_s


def _ask(
    question: Question,
    devices: Sequence[Device],
    num_stages: int,
    present: Layout | None,
    traffic: Traffic,
    *,
    keep_order: bool = False,
) -> Plan:
    settings = question.settings
    return plan(
        question.facts, devices, traffic, serving=question.serving, objective=settings.objective, slo=settings.slo,
        present=present, num_stages=num_stages, headroom=settings.headroom, keep_order=keep_order, error=question.error,
    )  # fmt: skip


def _planned(question: Question) -> tuple[Plan, Workers, Staffing]:
    """The planner's answer; with `elastic` over no more workers than it takes."""
    settings, load, devices, present = question.settings, question.load, question.devices, question.present
    found = _ask(question, devices, 0, present, load.traffic)
    anyhow = load.traffic if load.is_closed else msgspec.structs.replace(load.traffic, concurrency=0.0)
    num_serving = len(present.workers)
    raw = num_wanted(
        lambda devices, k: _ask(question, devices, k, None, anyhow),
        devices,
        question.facts.num_layers,
        settings.slo,
        num_serving,
    )
    staffing = question.staffing.after(question.asked_s, raw, num_serving, settings.shrink_after_s)
    if settings.elastic and staffing.wanted < len(found.layout.workers):
        start = present if num_serving == staffing.wanted else None  # else the planner would rather keep it
        fewer = _ask(question, devices, staffing.wanted, start, load.traffic)
        found = msgspec.structs.replace(
            fewer,
            present=found.present,
            present_score=found.present_score,
            gain=_gain_of_more(question, found, fewer) if staffing.wanted > num_serving else fewer.gain,
            is_change=fewer.layout.segments != present.segments,
        )
    used = set(found.layout.workers)
    spare = tuple(device.worker for device in devices if device.worker not in used | set(present.workers))
    return found, Workers(len(devices), len(used), staffing.wanted, spare), staffing


def _gain_of_more(question: Question, found: Plan, chosen: Plan) -> float:
    """What `chosen` gains over the present layout, if that is more than the model's error."""
    gain = relative_gain(found.objective, found.present_score, chosen.score)
    return gain if gain > question.error else 0.0


def _or_nearer(question: Question, found: Plan, cost: MigrationCost) -> tuple[Plan, MigrationCost]:
    """`found`, or the best with the present order of workers when that pays better: it moves fewer layers."""
    settings = question.settings
    near = _ask(question, question.devices, 0, question.present, found.traffic, keep_order=True)
    if not near.is_change or near.layout.segments == found.layout.segments or without_room(question, near.layout):
        return found, cost
    near_cost = _migration(question, near.layout)
    lasts_s = min(settings.nearer_s, question.load.remaining_s)
    worth = min(found.gain, 10.0) * lasts_s - cost_s(settings, cost)
    if min(near.gain, 10.0) * lasts_s - cost_s(settings, near_cost) < worth and not without_room(
        question, found.layout
    ):
        return found, cost
    return msgspec.structs.replace(near, candidates=found.candidates), near_cost


def _migration(question: Question, layout: Layout) -> MigrationCost:
    settings = question.settings
    return migration_cost(
        question.facts,
        question.present,
        layout,
        kv_tokens=question.kv_tokens,
        kv_bytes_per_s=settings.kv_bytes_per_s / question.slowness,
        load_bytes_per_s=settings.load_bytes_per_s / question.slowness,
    )
