"""Which layout to serve with: the best split for every number of stages, the best of these, and why. Pure.

`plan` looks at each number of stages k in turn, because k decides how many microbatches the running sequences are
divided among and so what a step is. For each k the stages' times are sums of unit times of the mean steps, memory limits
what a device may hold (weights and the KV of the load; if that does not fit anywhere, of fewer sequences; where devices have
their page pools already, the weights beside those), and
`planning.search` gives the best split over all orders and choices of k devices. The numbers of stages are then compared:

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
from dataclasses import dataclass

import msgspec
import numpy as np

from kvstore.ids import WorkerName
from runtime.layout import Layout, layout_from_counts
from scheduler.planning.cost import Facts, unit_times
from scheduler.planning.forecast import Device, Forecast, Pipeline
from scheduler.planning.rounds import FEW, Rounds
from scheduler.planning.search import Solver
from scheduler.planning.splits import Problem, Split, split_near, split_order
from scheduler.planning.traffic import Objective, Serving, Slo, Steps, Traffic, mean_steps

SERVING, SLO = Serving(), Slo()
_EVERY_K = 12
_TIE = 1e-6
_NEAR = 0.25
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
    (posed,) = planning._pose([len(devices)], [traffic.concurrency])
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
class _Posed:
    """The problem for k stages with so many sequences in service; no split has a cycle shorter than `bound_s`."""

    k: int
    num_sequences: float
    steps: Steps
    problem: Problem
    solver: Solver
    rounds: Rounds
    bound_s: float


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
        self.has_pools = all(d.pool_bytes for d in devices)
        if self.has_pools:  # what is to grow has grown: the pools are the worker's to keep, beside what it leaves alone
            headroom = 0.0
        pools = [d.pool_bytes if self.has_pools else 0 for d in devices]
        rooms = [
            d.memory_bytes * (1 - headroom) - pool if d.memory_bytes else math.inf
            for d, pool in zip(devices, pools, strict=True)
        ]
        self.rooms = np.array(rooms)
        self.names = [device.worker for device in devices]
        self.speeds = [device.speed for device in devices]
        self.hop_latency = np.array([speed.kind.link_latency_s for speed in self.speeds])
        self.hop_per_token = np.array([facts.hidden_bytes / speed.kind.link_bytes_per_s for speed in self.speeds])
        self.present_forecast: Forecast | None = None
        self.present_score = -math.inf
        if present is not None:
            pipeline = Pipeline(facts, devices, present, traffic, serving)
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
        k, best = max(options.items(), key=lambda item: (item[1].score, -item[0]))
        if best.split is None:
            raise NoPlan(self._why_nothing_fits(most))
        best = self._shown(self._improved(best))
        steady = self._in_present_order(k, best)
        return self._result(k, steady or best, options, best if steady else None)

    # -- one number of stages ---------------------------------------------------------------------------------

    def _look_at(self, ks: list[int], options: dict[int, _Option]) -> None:
        """Add to `options` what these numbers of stages give; for those that cannot win, a bound on their score."""
        posed = self._pose(ks, [self._in_service(k) for k in ks])
        if self.objective == "throughput":
            for one in sorted(posed, key=lambda one: -self._rate(one.steps, one.bound_s)):
                options[one.k] = self._fastest(one, options)
            return
        for one in sorted(posed, key=lambda one: -self._highest(one)):
            highest, best = self._highest(one), max((option.score for option in options.values()), default=-math.inf)
            options[one.k] = _Option(None, highest) if highest < best else self._weighed(one)
        good = max(option.score for option in options.values())
        again = [
            k for k in ks if options[k].layout is not None and _gain(self.objective, options[k].score, good) < _NEAR
        ]
        again = sorted(again, key=lambda k: -options[k].score)[:_AGAIN]
        for one in self._pose(again, [max(1.0, options[k].num_sequences) for k in again]):
            option = self._weighed(one)
            if option.score > options[one.k].score:
                options[one.k] = option

    def _fastest(self, one: _Posed, options: dict[int, _Option]) -> _Option:
        """The best split for the throughput, unless another number of stages is better than it can possibly be."""
        best = max((option.score for option in options.values()), default=-math.inf)
        highest = self._rate(one.steps, one.bound_s) if one.bound_s else math.inf
        if highest < best * (1 + _TIE):
            return _Option(None, highest)
        one, split, round_s = self._solve(one)
        return _Option(split, self._rate(one.steps, round_s) if split else -math.inf, posed=one)

    def _highest(self, one: _Posed) -> float:
        """No split scores better at this operating point; inf where nothing cheap is known."""
        if not one.bound_s:
            return math.inf
        if self.objective == "latency":
            return -(self.traffic.output_tokens - 1.0) * (self.serving.head_s + one.bound_s)
        return self._rate(one.steps, one.bound_s)

    def _weighed(self, one: _Posed) -> _Option:
        """The best split at this operating point, with its forecast and score."""
        one, split, _ = self._solve(one)
        if split is None:
            return _Option(None, -math.inf)
        option = self._shown(_Option(split, 0.0), in_full=False)
        option.posed = one
        return option

    def _solve(self, one: _Posed) -> tuple[_Posed, Split | None, float]:
        """A split and its round in seconds, the best one of `FEW` devices; where memory allows none, with fewer sequences until
        it does."""
        while True:
            wanted = self._wanted(one.k)
            split = split_order(one.problem, wanted[0]) if self.keeps_order else one.solver.best(*wanted)
            if split is not None and len(self.devices) <= FEW:
                return one, *one.rounds.improve(one.problem, split, keep_order=self.keeps_order)
            if split is not None:
                return one, split, one.rounds.of(split)
            if one.num_sequences <= 1:
                return one, None, math.inf
            (one,) = self._pose([one.k], [max(1.0, one.num_sequences / 2)])

    def _improved(self, best: _Option) -> _Option:
        """With what single exchanges still gain, which was not tried for every number of stages (`_solve`)."""
        if best.split is None or best.posed is None or len(self.devices) <= FEW:
            return best
        split, _ = best.posed.rounds.improve(best.posed.problem, best.split, keep_order=self.keeps_order)
        if split is best.split:
            return best
        if best.forecast is None and best.layout is None:
            return _Option(split, 0.0, posed=best.posed)
        better = self._shown(_Option(split, 0.0))
        return better if better.score > best.score else best

    def _rate(self, steps: Steps, cycle_s: float) -> float:
        return steps.requests * steps.in_flight / (self.serving.head_s + cycle_s)

    def _shown(self, option: _Option, *, in_full: bool = True) -> _Option:
        """With its layout, its forecast (only if `in_full`, where the score can be had without it), and its score."""
        if option.forecast is not None:
            return option
        assert option.split is not None
        epoch = self.present.epoch if self.present is not None else 0
        workers = [self.names[d] for d in option.split.order]
        layout = layout_from_counts(epoch, workers, option.split.counts)
        pipeline = Pipeline(self.facts, self.devices, layout, self.traffic, self.serving)
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
        (one,) = self._pose([k], [max(1.0, best.num_sequences)])
        split = split_order(one.problem, order)
        if split is None:
            return None
        cuts = [segment.layers.stop for segment in present.segments[:-1]]
        near = split_near(one.problem, order, split.largest * (1 + self.error), cuts) or split
        split, _ = one.rounds.improve(one.problem, split, keep_order=True)
        for option in (self._shown(_Option(near, 0.0)), self._shown(_Option(split, 0.0))):
            if _gain(self.objective, option.score, best.score) <= self.error:
                return option
        return None

    # -- the problem ------------------------------------------------------------------------------------------

    def _in_service(self, k: int) -> float:
        """Sequences in service to plan for at first; fewer where their KV plainly has no room on k devices."""
        wanted = float(self.serving.max_running)
        if 0 < self.traffic.concurrency < wanted:
            wanted = float(self.traffic.concurrency)
        if self.objective == "latency" and self.traffic.requests_per_s > 0:
            forecast = self.present_forecast
            wanted = min(wanted, max(1.0, forecast.num_sequences)) if forecast and not forecast.saturated else 1.0
        room = float(np.sort(self.rooms)[-k:].sum())
        while wanted > 1 and self._bytes(wanted) > room:
            wanted = max(1.0, wanted / 2)
        return wanted

    def _bytes(self, num_sequences: float) -> float:
        """Weights and KV of everything."""
        spec, kv = self.facts.spec, self._kv_bytes(num_sequences)
        return float(self.facts.layer_bytes.sum()) + kv * spec.num_layers + spec.embedding_bytes + spec.lm_head_bytes

    def _kv_bytes(self, num_sequences: float) -> float:
        """What so many sequences need in each layer, beside its weights; nothing where the pools are there already."""
        return 0.0 if self.has_pools else self.serving.kv_tokens(self.traffic, num_sequences) * self.facts.kv_bytes

    def _pose(self, ks: list[int], in_service: list[float]) -> list[_Posed]:
        """The problem of each number of stages, with so many sequences in service."""
        if not ks:
            return []
        facts, spec, serving, traffic = self.facts, self.facts.spec, self.serving, self.traffic
        steps = [mean_steps(traffic, serving, serving.microbatches(k), n) for k, n in zip(ks, in_service, strict=True)]
        times = unit_times(facts, self.speeds, [s.decode for s in steps] + [s.prefill for s in steps])
        half, share = len(steps), np.array([s.prefill_share for s in steps])
        tokens = np.array([work.num_tokens for s in steps for work in (s.decode, s.prefill)]).reshape(half, 2, 1)
        stage = times.fixed + self.hop_latency + tokens * self.hop_per_token
        kinds, last = (np.stack([part[:half], part[half:]], axis=1) for part in (times.layers, times.last))
        mean_stage, mean_last = (_weighted(share[:, None], part[:, 0], part[:, 1]) for part in (stage, last))
        mean = _weighted(share[:, None, None], kinds[:, 0], kinds[:, 1])
        posed = []
        for row, (k, step) in enumerate(zip(ks, steps, strict=True)):
            problem = Problem(
                stage=mean_stage[row],
                layers=mean[row][:, facts.kind_of_layer],
                last=mean_last[row],
                room=self.rooms,
                layer_bytes=facts.layer_bytes + self._kv_bytes(in_service[row]),
                first_bytes=float(spec.embedding_bytes),
                last_bytes=float(spec.lm_head_bytes),
                in_flight=step.in_flight,
            )
            rounds = Rounds(stage[row], kinds[row], last[row], facts.kind_of_layer, share[row], step.in_flight)
            bound_s = rounds.bound_s(problem, k)
            posed.append(_Posed(k, in_service[row], step, problem, Solver(problem, k), rounds, bound_s))
        return posed

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
        need, room = self._bytes(1.0), float(np.sort(self.rooms)[::-1][:most].sum())
        return (
            f"{self.facts.spec.name} needs {need / 1e9:.1f} GB for its weights and the KV of one sequence of"
            f" {self.traffic.mean_context:.0f} tokens, in pieces of whole layers; the devices have {room / 1e9:.1f} GB"
            f" ({', '.join(f'{name} {bytes_ / 1e9:.1f}' for name, bytes_ in zip(self.names, self.rooms, strict=True))})."
            " Add devices, or lower the headroom"
        )


def _weighted(share: np.ndarray, fast: np.ndarray, slow: np.ndarray) -> np.ndarray:
    return (1.0 - share) * fast + share * slow


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
