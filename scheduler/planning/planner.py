"""Which layout to serve with: the best split for every number of stages, the best of these, and why. Pure.

`plan` looks at each number of stages k in turn, because k decides how many microbatches the running sequences are
divided among and so what a step is. For each k the stages' times are sums of unit times of the mean steps, memory limits
what a device may hold (weights and the KV of the load; if that does not fit anywhere, of fewer sequences; where devices have
their page pools already, the weights beside those), and
`planning.search` gives the best split over all orders and choices of k devices; for the throughput of few devices `planning.exact` does,
by the forecast's own round. The numbers of stages are then compared:

    throughput   requests per second with as many sequences in service as there may be
    latency      mean seconds from a request's arrival to its end, at the load given
    goodput      the largest rate at which the mean request still meets the SLO

Beyond `_EVERY_K` devices not every k is tried, but a spread of them and then the neighbours of the best (bounded, not exact).
The present layout wins ties: what is proposed must be better by more than rounding, and by more than `error`, the relative
error that the model itself is known to have. An order of workers other than the present one is held to the same mark,
against the best cuts of the present order: two alike workers, measured a little differently, do not change places.

Never true: a plan needs a clock, or tells when to act on it; what a change costs is `cost.migration_cost`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from kvstore.ids import WorkerName
from runtime.layout import Layout, layout_from_counts
from scheduler.planning.cost import Facts, unit_times
from scheduler.planning.exact import MOST_DEVICES, FewDevices
from scheduler.planning.forecast import Cluster, Device, Forecast, Pipeline
from scheduler.planning.rounds import FEW, Rounds, StepTimes, even_rounds, even_steps, round_bounds
from scheduler.planning.search import Solver
from scheduler.planning.splits import SLACK, Problem, Split, make_split, split_near, split_order
from scheduler.planning.traffic import Objective, Serving, Slo, Steps, Traffic, mean_steps
from scheduler.planning.uniform import Uniform, memory_caps, most_layers_bound

SERVING, SLO = Serving(), Slo()
_EVERY_K = 12
_TIE = 1e-6
_NEAR = 0.25
_NUMBERS, _CLOSER = 6, 2
_TOGETHER = 4
"""So many numbers of stages have their least bottlenecks found together."""
_EXPECTED = 1.05
_AGAIN = 4
"""Numbers of stages that are worse than the best by more than `_NEAR`, or not among the `_AGAIN` best, are not planned again at
the load they settle at."""


class NoPlan(ValueError):
    """The model does not fit on the devices; the message says what is missing."""


class Candidate(msgspec.Struct, frozen=True):
    """The best split with a given number of stages. `score` is the objective's figure: higher is better, -inf for none.

    `workers` and `layers` are empty where a bound on the score sufficed to see that it loses.
    """

    num_stages: int
    workers: tuple[WorkerName, ...]
    layers: tuple[int, ...]
    score: float
    why_not: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What the planner proposes, and the reasons. `gain` is the relative gain in the objective over the present layout.

    The scores are requests per second for throughput and goodput, and seconds with a minus sign for latency.
    """

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
        lines = [f"objective {self.objective}: {_amount(self.objective, self.score)}"]
        if self.is_change:
            lines.append(f"proposed  {self.layout.brief()}")
            lines += _describe(self.forecast)
        if self.present is not None:
            head = "present" if self.is_change else "present, kept"
            lines.append(f"{head}: {_amount(self.objective, self.present_score)}; the proposal gains {self.gain:.1%}")
            lines += _describe(self.present)
        if self.within_error:
            lines.append(
                f"not proposed, as it is within the model's own error of {self.error:.1%}: {self.within_error}"
            )
        lines += [f"{c.num_stages} stages {list(c.layers) or ''}: {c.why_not}" for c in self.candidates if c.why_not]
        if self.unused:
            lines.append(f"not used: {', '.join(self.unused)}")
        return "\n".join(lines)


def plan(
    facts: Facts,
    devices: Sequence[Device],
    traffic: Traffic,
    *,
    serving: Serving = SERVING,
    objective: Objective = "throughput",
    slo: Slo = SLO,
    present: Layout | None = None,
    num_stages: int = 0,
    headroom: float = 0.1,
    keep_order: bool = False,
    error: float = 0.0,
) -> Plan:
    """The best layout over `devices` for `traffic`.

    `num_stages` 0 leaves their number free; with `keep_order` only the cuts of `present` are, which must name no worker
    twice. Gains up to `error` (relative) over the present layout count for nothing. `headroom` is the share of each device's memory that is planned to stay empty, where pools are yet to be made. The
    layout's epoch is that of `present`, or 0: a transition gives it a new one.

    Raises:
        ValueError: no device, two of one name, or a present layout that does not belong to them or to the model.
        NoPlan: the model does not fit on the devices.
    """
    names = [device.worker for device in devices]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a plan needs devices, each once; got {names}")
    if present is not None and present.num_layers != facts.num_layers:
        raise ValueError(f"the present layout has {present.num_layers} layers, the model has {facts.num_layers}")
    if num_stages < 0 or num_stages > min(len(names), facts.num_layers):
        raise ValueError(
            f"{num_stages} stages for {len(names)} devices and {facts.num_layers} layers;"
            f" between 1 and {min(len(names), facts.num_layers)} are possible"
        )
    planning = _Planning(facts, tuple(devices), traffic, serving, objective, slo, present, headroom)
    if keep_order:
        if present is None or len(present.workers) != present.num_hops:
            raise ValueError("only the order of a present layout that names no worker twice can be kept")
        planning.keeps_order, num_stages = True, present.num_hops
        planning.is_exact = False
    planning.error = error
    return planning.run(num_stages)


def default_counts(facts: Facts, devices: Sequence[Device], serving: Serving = SERVING) -> tuple[int, ...]:
    """Layers per stage for these devices in this order: the layout to start with, before any traffic was seen.

    It is the answer for 128 tokens in and out and 16 sequences a stage. Every stage gets a layer at least.

    Raises:
        ValueError: when there are more devices than layers.
    """
    if not 1 <= len(devices) <= facts.num_layers:
        raise ValueError(
            f"{len(devices)} stages for {facts.num_layers} layers; between 1 and {facts.num_layers} are possible"
        )
    traffic = Traffic(prompt_tokens=128, output_tokens=128, concurrency=16 * len(devices))
    planning = _Planning(facts, tuple(devices), traffic, serving, "throughput", SLO, None, 0.0)
    posed = planning._posed(planning._load(np.array([len(devices)]), traffic.concurrency), 0)
    order = range(len(devices))
    split = split_order(posed.problem, order, empty_ends=False)
    assert split is not None, "devices without limits hold any model"
    room = split.largest - posed.problem.stage
    room[-1] -= posed.problem.last[-1]
    shares = np.cumsum(np.maximum(room, 0.0) / posed.problem.layers.mean(axis=1))
    even = shares[:-1] / shares[-1] * facts.num_layers
    return (split_near(posed.problem, order, split.largest, even, empty_ends=False) or split).counts


@dataclass(slots=True)
class _Option:
    """A number of stages that was looked at."""

    split: Split | None
    score: float
    num_sequences: float = 1.0
    layout: Layout | None = None
    forecast: Forecast | None = None
    posed: "_Posed | None" = None


@dataclass(frozen=True, slots=True)
class _Load:
    """R numbers of stages ``ks [R]``, each with so many sequences in service: its steps, and what units cost in each of them."""

    ks: np.ndarray
    in_service: np.ndarray
    steps: Steps
    mean: StepTimes
    times: StepTimes
    """``[2 R]`` rows: steps that only decode, then those that also prefill."""
    uniform: Uniform | None
    """Where layers are alike, R problems of mean steps, then R of `even_steps`, then of few devices R of fast steps."""

    @property
    def fast(self) -> StepTimes:
        return self.times[: len(self.ks)]

    @property
    def slow(self) -> StepTimes:
        return self.times[len(self.ks) :]


@dataclass(frozen=True, slots=True)
class _Posed:
    """The problem for k stages with so many sequences in service."""

    k: int
    num_sequences: float
    requests: float
    problem: Problem
    solver: Solver
    rounds: Rounds


class _Planning:
    """One call of `plan`."""

    def __init__(
        self,
        facts: Facts,
        devices: tuple[Device, ...],
        traffic: Traffic,
        serving: Serving,
        objective: Objective,
        slo: Slo,
        present: Layout | None,
        headroom: float,
    ) -> None:
        self.facts, self.devices, self.traffic, self.serving = facts, devices, traffic, serving
        self.objective: Objective = objective
        self.slo, self.present = slo, present
        self.keeps_order = False
        self.error = self.best_goodput = 0.0
        self.is_uniform = len(facts.flops) == 1
        self.is_exact = objective == "throughput" and self.is_uniform and len(devices) <= MOST_DEVICES
        self.has_pools = all(d.pool_bytes for d in devices)
        if self.has_pools:  # what is to grow has grown: the pools are the worker's to keep, beside what it leaves alone
            headroom = 0.0
        pools = [d.pool_bytes if self.has_pools else 0 for d in devices]
        rooms = [
            d.memory_bytes * (1 - headroom) - pool if d.memory_bytes else math.inf
            for d, pool in zip(devices, pools, strict=True)
        ]
        self.rooms = np.array(rooms)
        self.kv_per_sequence = 0.0 if self.has_pools else serving.kv_tokens(traffic, 1.0) * facts.kv_bytes
        self.has_room = bool(np.isinf(self.rooms).all())
        self.names = [device.worker for device in devices]
        self.cluster = Cluster(facts, devices)
        self.present_forecast: Forecast | None = None
        self.present_score = -math.inf
        if present is not None:
            pipeline = Pipeline(facts, self.cluster, present, traffic, serving)
            self.present_forecast = pipeline.forecast()
            self.present_score, _ = self._score(pipeline, self.present_forecast)

    def run(self, num_stages: int) -> Plan:
        most = min(len(self.devices), self.facts.num_layers)
        options: dict[int, _Option] = {}
        if num_stages:
            self._look_at([num_stages], options)
        elif most <= _EVERY_K:
            self._look_at(list(range(1, most + 1)), options)
        else:
            spread = sorted({round(k) for k in np.geomspace(1, most, _EVERY_K - 2)})
            self._look_at(spread, options)
            best = max(options, key=lambda k: options[k].score)
            near = sorted({k for d in (1, 2, 3) for k in (best - d, best + d)} - set(options))
            self._look_at([k for k in near if 1 <= k <= most], options)
        if self.objective != "throughput":
            self._look_again(options)
        k, best = max(options.items(), key=lambda item: (item[1].score, -item[0]))
        if best.split is None:
            raise NoPlan(self._why_nothing_fits(most))
        best = self._shown(self._improved(best))
        steady = self._in_present_order(k, best)
        return self._result(k, steady or best, options, best if steady else None)

    # -- one number of stages ---------------------------------------------------------------------------------

    def _look_at(self, ks: list[int], options: dict[int, _Option]) -> None:
        """Add to `options` what these numbers of stages give; for those that cannot win, a bound on their score."""
        if not ks:
            return
        load = self._load(np.array(ks), self._wanted_in_service())
        if self.is_exact:
            self._look_exactly(load, options)
            return
        ceilings = self._ceilings(load)
        order = np.argsort(-ceilings, kind="stable")
        for rows in np.split(order, range(_TOGETHER, len(ks), _TOGETHER)):
            if load.uniform is not None and not self._loses(float(ceilings[rows[0]]), options):
                ceilings[rows] = np.minimum(ceilings[rows], self._lower_ceilings(load, rows))
            for row in rows[np.argsort(-ceilings[rows], kind="stable")].tolist():
                loses = self._loses(float(ceilings[row]), options)
                options[ks[row]] = (
                    _Option(None, float(ceilings[row])) if loses else self._weighed(self._posed(load, row))
                )

    def _look_again(self, options: dict[int, _Option]) -> None:
        """At the best numbers of stages with the load that they settle at."""
        good = max(option.score for option in options.values())
        again = [
            k
            for k in sorted(options)
            if options[k].layout is not None and _gain(self.objective, options[k].score, good) < _NEAR
        ]
        again = sorted(again, key=lambda k: -options[k].score)[:_AGAIN]
        if again:
            load = self._load(np.array(again), [options[k].num_sequences for k in again])
            for row, k in enumerate(again):
                option = self._weighed(self._posed(load, row), options[k])
                if option.score > options[k].score:
                    options[k] = option

    def _look_exactly(self, load: _Load, options: dict[int, _Option]) -> None:
        """The same for the throughput of few devices: the best of all splits, where steps enough are in flight (`planning.exact`)."""
        assert load.uniform is not None, "layers are alike"
        steps, ks, head_s = load.steps, load.ks.tolist(), self.serving.head_s
        requests, is_full = steps.requests * steps.in_flight, (steps.in_flight >= load.ks).tolist()
        busiest, evenly, _ = load.uniform.relaxed.bounds.reshape(3, -1)
        expected = _EXPECTED * even_rounds(busiest, evenly, steps.in_flight)
        order = np.argsort(expected / requests, kind="stable").tolist()
        # the first that keeps what is expected sets a mark for the others; where memory is short, none may
        few: dict[int, FewDevices] = {}
        for row in order:
            if is_full[row]:
                few[row] = self._few(load, row)
                found = self._exactly(load, row, few[row], float(expected[row]))
                if found is not None:
                    options[ks[row]] = found
                    break
        ceilings, known = np.full(len(ks), np.inf), 0.0
        for row in order:
            best = max((option.score for option in options.values()), default=-math.inf)
            if best > known:
                bounds_s = self._bounds_s(load, requests / best - head_s)
                if len(self.devices) > FEW:
                    bounds_s = np.where(is_full, bounds_s, np.maximum(bounds_s, expected / _EXPECTED))
                known, ceilings = best, requests / (head_s + bounds_s)
            if ks[row] not in options:
                found = _Option(None, float(ceilings[row]))
                if not self._loses(found.score, options):
                    limit = float(requests[row]) / known - head_s if known else math.inf
                    if is_full[row]:
                        found = self._exactly(
                            load, row, few.get(row) or self._few(load, row), min(limit, float(expected[row])), limit
                        )
                    else:
                        found = self._weighed(self._posed(load, row))
                if found is None and known:
                    found = _Option(None, known * (1 - _TIE))
                assert found is not None, "a split of any length was allowed"
                options[ks[row]] = found

    def _exactly(self, load: _Load, row: int, few: FewDevices, *belows: float) -> _Option | None:
        """The split with the shortest round, of less than the first of `belows`, in seconds, for which there is one; None: there is none.

        Where the memory allows none at all, what there is with fewer sequences.
        """
        found = next(filter(None, map(few.best, belows)), None)
        if found is None:
            return None if few.has_room else self._with_fewer(load, row)
        posed = self._posed(load, row)
        return _Option(
            make_split(posed.problem, found.order, found.counts), self._rate(posed, found.seconds), posed=posed
        )

    def _with_fewer(self, load: _Load, row: int) -> _Option:
        k, num_sequences = load.ks[[row]], float(load.in_service[row]) / 2
        if num_sequences < 0.5 + SLACK:
            return _Option(None, -math.inf)
        fewer = self._load(k, num_sequences)
        if fewer.steps.in_flight[0] < k[0]:
            return self._weighed(self._posed(fewer, 0))
        return self._exactly(fewer, 0, self._few(fewer, 0), math.inf) or _Option(None, -math.inf)

    def _few(self, load: _Load, row: int) -> FewDevices:
        assert load.uniform is not None, "layers are alike"
        return FewDevices(
            load.times[row :: len(load.ks)], float(load.steps.prefill_share[row]), float(load.steps.in_flight[row]),
            int(load.ks[row]), self.facts.num_layers, load.uniform.memory_caps(row),
        )  # fmt: skip

    def _loses(self, ceiling: float, options: dict[int, _Option]) -> bool:
        best = max((option.score for option in options.values()), default=-math.inf)
        return math.isfinite(best) and ceiling < best - _TIE * abs(best)

    def _ceilings(self, load: _Load) -> np.ndarray:
        """``[R]``: no split into so many stages is expected to score better; inf where nothing cheap is known."""
        if load.uniform is None:
            return np.full(len(load.ks), np.inf)
        if self.objective != "goodput":
            return self._score_in(load, slice(None), self._bounds_s(load))
        low, high = np.ones(len(load.ks)), np.full(len(load.ks), max(1.0, self._wanted_in_service()))
        best = np.zeros(len(load.ks))
        for _ in range(_CLOSER):
            low, high, best = self._good_numbers(load.ks, low, high)
        return best

    def _good_numbers(
        self, ks: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Between which numbers of sequences in service, from ``low [R]`` to ``high [R]``, the SLO is met no longer, and what is served
        at most there: the more are in service, the more is served and the slower."""
        shape, rows = (len(ks), _NUMBERS), np.arange(len(ks))
        numbers = low[:, None] * (high / low)[:, None] ** np.linspace(0.0, 1.0, _NUMBERS)
        many = self._load(np.repeat(ks, _NUMBERS), numbers.ravel(), fitting=False)
        steps = many.steps
        round_s = (self.serving.head_s + self._bounds_s(many)).reshape(shape)
        good = (round_s <= self.slo.tpot_s) | (steps.num_sequences <= steps.in_flight).reshape(shape)
        finished = np.maximum.accumulate((steps.requests * steps.in_flight).reshape(shape), axis=1)
        last = _NUMBERS - 1 - good[:, ::-1].argmax(axis=1)
        after = np.minimum(last + 1, _NUMBERS - 1)
        most = np.where(good.any(axis=1), finished[rows, after] / round_s[rows, last], 0.0)
        return numbers[rows, last], numbers[rows, after], most

    def _lower_ceilings(self, load: _Load, rows: np.ndarray) -> np.ndarray:
        """Of these rows: what the least bottleneck of whole layers, within the memory, allows; -inf where nothing fits."""
        assert load.uniform is not None, "layers are alike"
        floors = load.uniform.floors(rows)
        # the load that a latency settles at is another one: there the least bottleneck says no more than the relaxed one
        is_known = self.objective == "throughput"
        scores = self._score_in(load, rows, load.steps.in_flight[rows] * floors) if is_known else np.inf
        return np.where(floors < np.inf, scores, -np.inf)

    def _score_in(self, load: _Load, rows: Any, cycle_s: np.ndarray) -> np.ndarray:
        """The throughput, or at best the latency, of these rows with a round of so many seconds."""
        round_s = self.serving.head_s + cycle_s
        if self.objective == "latency":
            return -(self.traffic.output_tokens - 1.0) * round_s
        return load.steps.requests[rows] * load.steps.in_flight[rows] / round_s

    def _bounds_s(self, load: _Load, limits: np.ndarray | None = None) -> np.ndarray:
        """``[R]``: rounds that none is expected to go below, in seconds. Of few devices none below its ``limits [R]`` does."""
        assert load.uniform is not None, "layers are alike"
        steps = load.steps
        busiest, evenly, *fastest = load.uniform.relaxed.bounds.reshape(-1, len(load.ks))
        if not fastest:
            return even_rounds(busiest, evenly, steps.in_flight)
        if (
            self.objective == "latency"
        ):  # a bound at the load that is planned for; at the one that it settles at, another k may be better
            return steps.in_flight * busiest
        return round_bounds(
            load.mean, load.slow, busiest, fastest[0], steps.prefill_share, steps.in_flight, load.ks,
            self.facts.num_layers, limits if limits is not None else np.full(len(load.ks), np.inf),
        )  # fmt: skip

    def _weighed(self, one: _Posed, known: _Option | None = None) -> _Option:
        """The best split at this operating point and its score; `known` if it is that split again."""
        one, begun = self._solve(one)
        if begun is None:
            return _Option(None, -math.inf)
        if self.objective == "throughput":
            split, cycle_s = one.rounds.improve(begun, keep_order=self.keeps_order)
            return _Option(split, self._rate(one, cycle_s), posed=one)
        splits = [begun]
        if len(self.devices) <= FEW:  # a shorter round at this load is not all that counts
            split, _ = one.rounds.improve(begun, keep_order=self.keeps_order)
            splits += [split] if split != begun else []
        options = [
            known if known is not None and known.split == each else self._shown(_Option(each, 0.0), in_full=False)
            for each in reversed(splits)
        ]
        best = max(options, key=lambda option: option.score)
        best.posed = one
        return best

    def _solve(self, one: _Posed) -> tuple[_Posed, Split | None]:
        """The best split for mean steps; where memory allows none, with fewer sequences until it does."""
        while True:
            wanted = self._wanted(one.k)
            split = split_order(one.problem, wanted[0]) if self.keeps_order else one.solver.best(*wanted)
            if split is not None or one.num_sequences <= 1:
                return one, split
            one = self._posed(self._load(np.array([one.k]), one.num_sequences / 2), 0)

    def _improved(self, best: _Option) -> _Option:
        """With what single moves still gain, which was not tried for every number of stages (`_weighed`)."""
        if best.split is None or best.posed is None or len(self.devices) <= FEW or self.objective == "throughput":
            return best
        split, _ = best.posed.rounds.improve(best.split, keep_order=self.keeps_order)
        if split is best.split:
            return best
        better = self._shown(_Option(split, 0.0))
        return better if better.score > best.score else best

    def _rate(self, one: _Posed, cycle_s: float) -> float:
        return one.requests * one.problem.in_flight / (self.serving.head_s + cycle_s)

    def _shown(self, option: _Option, *, in_full: bool = True) -> _Option:
        """With its layout, its forecast (only if `in_full`, where the score can be had without it), and its score."""
        if option.forecast is not None:
            return option
        assert option.split is not None
        epoch = self.present.epoch if self.present is not None else 0
        workers = [self.names[d] for d in option.split.order]
        layout = layout_from_counts(epoch, workers, option.split.counts)
        pipeline = Pipeline(self.facts, self.cluster, layout, self.traffic, self.serving)
        if not in_full and self.objective == "goodput":
            score, num_sequences = pipeline.goodput(self.slo, self.best_goodput)
            self.best_goodput = max(self.best_goodput, score)
            return _Option(option.split, score, num_sequences, layout)
        forecast = pipeline.forecast()
        score, num_sequences = self._score(pipeline, forecast)
        return _Option(option.split, score, num_sequences, layout, forecast)

    def _score(self, pipeline: Pipeline, forecast: Forecast) -> tuple[float, float]:
        """The objective's figure, and with how many sequences in service it is reached."""
        if self.objective == "throughput":
            return forecast.capacity_requests_per_s, forecast.max_sequences
        if self.objective == "latency":
            score = -math.inf if forecast.saturated else -forecast.request_s(self.traffic)
            return score, forecast.num_sequences
        return pipeline.goodput(self.slo)

    def _in_present_order(self, k: int, best: _Option) -> _Option | None:
        """The best cuts of the present order of workers, where another order is better by no more than the model's error."""
        present = self.present
        if present is None or not self.error or self.keeps_order or k != present.num_hops:
            return None
        order = [self.names.index(worker) for worker in present.workers]
        if best.split is None or len(order) != k or tuple(order) == best.split.order:
            return None
        one = self._posed(self._load(np.array([k]), best.num_sequences), 0)
        split = split_order(one.problem, order)
        if split is None:
            return None
        cuts = [segment.layers.stop for segment in present.segments[:-1]]
        near = split_near(one.problem, order, split.largest * (1 + self.error), cuts) or split
        split, _ = one.rounds.improve(split, keep_order=True)
        for option in (self._shown(_Option(near, 0.0)), self._shown(_Option(split, 0.0))):
            if _gain(self.objective, option.score, best.score) <= self.error:
                return option
        return None

    # -- the problem ------------------------------------------------------------------------------------------

    def _wanted_in_service(self) -> float:
        """Sequences in service to plan for at first."""
        wanted = float(self.serving.max_running)
        if 0 < self.traffic.concurrency < wanted:
            wanted = float(self.traffic.concurrency)
        if self.objective == "latency" and self.traffic.requests_per_s > 0:
            forecast = self.present_forecast
            wanted = min(wanted, max(1.0, forecast.num_sequences)) if forecast and not forecast.saturated else 1.0
        return wanted

    def _with_room(self, ks: np.ndarray, in_service: np.ndarray) -> np.ndarray:
        """``[R]``: the sequences in service, halved until the KV of so many has room on some ``ks [R]`` of the devices; 1 at least."""
        if self.has_room or (in_service <= 1.0).all():
            return np.maximum(1.0, in_service)
        loads = np.maximum(1.0, in_service[:, None] / 2.0 ** np.arange(math.ceil(math.log2(in_service.max())) + 1))
        kv, spec = self._kv_bytes(loads), self.facts.spec
        if self.is_uniform:
            layer_bytes = self.facts.layer_bytes[0] + kv
            caps = memory_caps(self.rooms, spec.embedding_bytes, spec.lm_head_bytes, layer_bytes, spec.num_layers)
            fits = most_layers_bound(caps.transpose(0, 2, 3, 1), ks) >= spec.num_layers
        else:
            fits = self._bytes(kv) <= np.sort(self.rooms)[::-1].cumsum()[ks - 1, None]
        fits[:, -1] = True
        return loads[np.arange(len(ks)), fits.argmax(axis=1)]

    def _bytes(self, kv: Any) -> Any:
        """Weights and KV of everything, with so many bytes of KV in each layer."""
        spec = self.facts.spec
        return float(self.facts.layer_bytes.sum()) + kv * spec.num_layers + spec.embedding_bytes + spec.lm_head_bytes

    def _kv_bytes(self, num_sequences: Any) -> Any:
        """What so many sequences need in each layer, beside its weights; nothing where the pools are there already."""
        return num_sequences * self.kv_per_sequence

    def _load(self, ks: np.ndarray, in_service: Any, *, fitting: bool = True) -> _Load:
        """What units cost with each of ``ks [R]`` stages and so many sequences in service, or fewer where they have no room."""
        in_service = np.broadcast_to(np.asarray(in_service, dtype=float), len(ks))
        in_service = self._with_room(ks, in_service) if fitting else in_service
        microbatches = np.maximum(self.serving.num_microbatches, ks)
        steps = mean_steps(self.traffic, self.serving, microbatches, in_service)
        units = unit_times(self.facts, self.cluster.speeds, steps.works)
        times = StepTimes(units.fixed + self.cluster.hops(steps.works), units.layers, units.last)
        mean = times[: len(ks)].weighted(steps.prefill_share, times[len(ks) :])
        load = _Load(ks, in_service, steps, mean, times, None)
        return replace(load, uniform=self._uniform(load)) if self.is_uniform else load

    def _uniform(self, load: _Load) -> Uniform:
        spec, steps, mean, ks = self.facts.spec, load.steps, load.mean, load.ks
        even = even_steps(load.fast, load.slow, steps.prefill_share, steps.in_flight, ks)
        layer_bytes = self.facts.layer_bytes[0] + self._kv_bytes(load.in_service)
        kinds = [mean, even, load.fast] if self.is_exact or len(self.devices) <= FEW else [mean, even]
        return Uniform(
            np.concatenate([kind.stage for kind in kinds]),
            np.concatenate([kind.layers for kind in kinds])[:, :, 0],
            np.concatenate([kind.last for kind in kinds]),
            np.concatenate([layer_bytes] * len(kinds)),
            np.concatenate([ks] * len(kinds)),
            num_layers=spec.num_layers,
            room=self.rooms,
            first_bytes=float(spec.embedding_bytes),
            last_bytes=float(spec.lm_head_bytes),
        )

    def _posed(self, load: _Load, row: int) -> _Posed:
        """The problem of one of the numbers of stages under its load."""
        facts, spec, mean, k = self.facts, self.facts.spec, load.mean, int(load.ks[row])
        num_sequences = float(load.in_service[row])
        layers = mean.layers[row]
        problem = Problem(
            stage=mean.stage[row],
            layers=np.broadcast_to(layers, (len(layers), facts.num_layers))
            if self.is_uniform
            else layers[:, facts.kind_of_layer],
            last=mean.last[row],
            room=self.rooms,
            layer_bytes=facts.layer_bytes + self._kv_bytes(num_sequences),
            first_bytes=float(spec.embedding_bytes),
            last_bytes=float(spec.lm_head_bytes),
            in_flight=float(load.steps.in_flight[row]),
        )
        return _Posed(
            k=k,
            num_sequences=num_sequences,
            requests=float(load.steps.requests[row]),
            problem=problem,
            solver=Solver(problem, k, load.uniform, row),
            rounds=Rounds(
                problem, load.times[row :: len(load.ks)], facts.kind_of_layer, float(load.steps.prefill_share[row])
            ),
        )

    def _wanted(self, k: int) -> tuple[list[int], list[int]]:
        """The devices of the present layout in its order, and its boundaries if it has k stages."""
        if self.present is None:
            return ([], []) if k < len(self.devices) else (list(range(k)), [])
        wanted = [self.names.index(worker) for worker in self.present.workers]
        if k != self.present.num_hops:
            return wanted, []
        return wanted, [segment.layers.stop for segment in self.present.segments[:-1]]

    # -- the answer ---------------------------------------------------------------------------------------------

    def _result(self, k: int, best: _Option, options: dict[int, _Option], passed_over: _Option | None) -> Plan:
        assert best.layout is not None, "the best option was not shown"
        assert best.forecast is not None, "the best option was not shown"
        present, before = self.present, self.present_score
        score, layout, forecast = best.score, best.layout, best.forecast
        gain, within = 0.0, ""
        if passed_over is not None and passed_over.layout is not None:
            within = f"{passed_over.layout.brief()}, {_gain(self.objective, score, passed_over.score):+.1%}"
        if present is not None:
            gain = _gain(self.objective, before, score)
            if gain <= max(_TIE, self.error) or layout.segments == present.segments:
                assert self.present_forecast is not None
                if gain > _TIE and layout.segments != present.segments:
                    within = f"{layout.brief()}, {gain:+.1%}"
                gain, score, layout, forecast = 0.0, before, present, self.present_forecast
        used = set(layout.workers)
        return Plan(
            objective=self.objective,
            traffic=self.traffic,
            slo=self.slo,
            layout=layout,
            forecast=forecast,
            score=score,
            present=self.present_forecast,
            present_score=before,
            gain=gain,
            is_change=present is None or layout.segments != present.segments,
            candidates=tuple(self._candidate(n, option, k, best.score) for n, option in sorted(options.items())),
            unused=tuple(name for name in self.names if name not in used),
            error=self.error,
            within_error=within,
        )

    def _candidate(self, k: int, option: _Option, winner: int, best: float) -> Candidate:
        workers = tuple(self.names[d] for d in option.split.order) if option.split else ()
        counts = option.split.counts if option.split else ()
        if k == winner:
            why = ""
        elif option.score == -math.inf and option.split is None:
            why = "the weights do not fit on so few devices"
        elif option.score == -math.inf:
            why = "it cannot take the load"
        else:
            bound = "" if option.split else "at best "
            why = f"{bound}{_amount(self.objective, option.score)}, {_gain(self.objective, best, option.score):+.1%}"
        return Candidate(k, workers, counts, option.score, why)

    def _why_nothing_fits(self, most: int) -> str:
        need, room = self._bytes(self._kv_bytes(1.0)), float(np.sort(self.rooms)[::-1][:most].sum())
        return (
            f"{self.facts.spec.name} needs {need / 1e9:.1f} GB for its weights and the KV of one sequence of"
            f" {self.traffic.mean_context:.0f} tokens, in pieces of whole layers; the devices have {room / 1e9:.1f} GB"
            f" ({', '.join(f'{name} {bytes_ / 1e9:.1f}' for name, bytes_ in zip(self.names, self.rooms, strict=True))})."
            " Add devices, or lower the headroom"
        )


def _gain(objective: Objective, before: float, after: float) -> float:
    """Relative: how much better `after` is than `before`."""
    if before == after:
        return 0.0
    if objective == "latency":
        return math.inf if before == -math.inf else before / after - 1.0 if after > -math.inf else -1.0
    return after / before - 1.0 if before > 0 else math.inf


def _amount(objective: Objective, score: float) -> str:
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
