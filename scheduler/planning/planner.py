"""Which layout to serve with: the best split for every number of stages, the best of these, and why. Pure.

`plan` looks at each number of stages k in turn, because k decides how many microbatches the running sequences are
divided among and so what a step is (`planning.points`). For each k the stages' times are sums of unit times of the mean steps, memory limits
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

Never true: a plan needs a clock, or the search runs in an event loop without `compiled` having been prepared: it compiles on first use.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.layout import Layout, layout_from_counts
from scheduler.planning.cost import Facts, unit_times
from scheduler.planning.exact import MOST_DEVICES, FewDevices
from scheduler.planning.forecast import Cluster, Device, Forecast, Pipeline
from scheduler.planning.plans import Candidate, NoPlan, Plan, relative_gain, why_not
from scheduler.planning.points import Point, Points, Setting
from scheduler.planning.rounds import FEW
from scheduler.planning.splits import SLACK, Problem, Split, split_near, split_order
from scheduler.planning.traffic import Objective, Serving, Slo, Traffic, mean_steps

SERVING, SLO = Serving(), Slo()
_EVERY_K = 12
_TIE = 1e-6
_AS_LARGE = 0.99
_EXPECTED = 1.05
"""What is looked for at first takes a round so much longer than even stages would."""
_NEAR, _AGAIN = 0.25, 4
"""Numbers of stages that are worse than the best by more than `_NEAR`, or not among the `_AGAIN` best, are not planned again at
the load they settle at."""
_SHARES = 1.0, 0.8
"""Of that load they are planned for so much: with a little less of it, memory is less short."""


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
    if keep_order:
        if present is None or len(present.workers) != present.num_hops:
            raise ValueError("only the order of a present layout that names no worker twice can be kept")
        num_stages = present.num_hops
    setting = Setting(facts, devices, traffic, serving, headroom)
    return _Planning(setting, objective, slo, present, keep_order, error).run(num_stages)


def default_counts(facts: Facts, devices: Sequence[Device], serving: Serving = SERVING) -> tuple[int, ...]:
    """Layers per stage for these devices in this order: the layout to start with, before any traffic was seen.

    It is the answer for 128 tokens in and out and 16 sequences a stage. Every stage gets a layer at least. Nothing is compiled for it.

    Raises:
        ValueError: when there are more devices than layers.
    """
    k = len(devices)
    if not 1 <= k <= facts.num_layers:
        raise ValueError(f"{k} stages for {facts.num_layers} layers; between 1 and {facts.num_layers} are possible")
    traffic = Traffic(prompt_tokens=128, output_tokens=128, concurrency=16 * k)
    cluster = Cluster(facts, devices)
    in_service = min(traffic.concurrency, float(serving.max_running))
    steps = mean_steps(traffic, serving, cluster.pieces, k, serving.microbatches(k), in_service)
    times, share = unit_times(facts, cluster.speeds, steps.works), float(steps.prefill_share[0])
    mean = np.array([1.0 - share, share])
    problem = Problem(
        stage=mean @ (times.fixed + cluster.hops(steps.works)),
        layers=np.tensordot(mean, times.layers, axes=1)[:, facts.kind_of_layer],
        last=mean @ times.last,
        room=np.where(cluster.memory > 0.0, cluster.memory, np.inf),
        layer_bytes=facts.layer_bytes,
        first_bytes=float(facts.spec.embedding_bytes),
        last_bytes=float(facts.spec.lm_head_bytes),
        in_flight=float(steps.in_flight[0]),
    )
    order = range(k)
    split = split_order(problem, order, empty_ends=False)
    assert split is not None, "devices without limits hold any model"
    room = split.largest - problem.stage
    room[-1] -= problem.last[-1]
    shares = np.cumsum(np.maximum(room, 0.0) / problem.layers.mean(axis=1))
    even = shares[:-1] / shares[-1] * facts.num_layers
    return (split_near(problem, order, split.largest, even, empty_ends=False) or split).counts


@dataclass(slots=True)
class _Option:
    """A number of stages that was looked at: its split, or None and a bound on the score."""

    split: Split | None
    score: float
    num_sequences: float = 1.0
    point: Point | None = None


@dataclass(frozen=True, slots=True)
class _Proposal:
    """A split with all that a plan says of it."""

    split: Split
    score: float
    layout: Layout
    forecast: Forecast


class _Planning:
    """One call of `plan`."""

    def __init__(
        self,
        setting: Setting,
        objective: Objective,
        slo: Slo,
        present: Layout | None,
        keeps_order: bool,
        error: float,
    ) -> None:
        self.setting, self.slo = setting, slo
        self.objective: Objective = objective
        self.present, self.keeps_order, self.error = present, keeps_order, error
        self.is_few = len(setting.devices) <= FEW
        self.is_exact = (
            objective == "throughput"
            and setting.is_uniform
            and len(setting.devices) <= MOST_DEVICES
            and not keeps_order
        )
        self.present_forecast: Forecast | None = None
        self.present_score = -math.inf
        if present is not None:
            self.present_forecast, self.present_score = self._forecast(present)

    def run(self, num_stages: int) -> Plan:
        most = min(len(self.setting.devices), self.setting.facts.num_layers)
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
        for share in () if self.objective == "throughput" else _SHARES:
            self._look_again(options, share)
        k, option = max(options.items(), key=lambda item: (item[1].score, item[1].split is not None, -item[0]))
        if option.split is None:
            raise NoPlan(self.setting.why_nothing_fits(most))
        best = self._improved(option)
        steady = self._in_present_order(k, best, option.num_sequences)
        return self._result(k, steady or self._at_home(best), options, best if steady else None)

    # -- one number of stages ---------------------------------------------------------------------------------

    def _look_at(self, ks: list[int], options: dict[int, _Option]) -> None:
        """Add to `options` what these numbers of stages give; for those that cannot win, a bound on their score."""
        if not ks:
            return
        points = self.setting.points(ks, self._wanted_in_service())
        if self.is_exact:
            self._look_exactly(points, options)
            return
        ceilings = self._ceilings(points)
        for row in np.argsort(-ceilings, kind="stable").tolist():
            ceiling = float(ceilings[row])
            loses = self._loses(ceiling, options)
            options[ks[row]] = _Option(None, ceiling) if loses else self._weighed(self.setting.point(points, row))

    def _look_again(self, options: dict[int, _Option], share: float) -> None:
        """At the best numbers of stages with a share of the load that they settle at."""
        good = max(option.score for option in options.values())
        again = [
            k
            for k, option in sorted(options.items())
            if option.split is not None and relative_gain(self.objective, option.score, good) < _NEAR
        ]
        again = sorted(again, key=lambda k: -options[k].score)[:_AGAIN]
        if again:
            points = self.setting.points(again, [share * options[k].num_sequences for k in again])
            for row, k in enumerate(again):
                option = self._weighed(self.setting.point(points, row), options[k])
                if option.score > options[k].score:
                    options[k] = option

    def _look_exactly(self, points: Points, options: dict[int, _Option]) -> None:
        """The same for the throughput of few devices: the best of all splits, where steps enough are in flight (`planning.exact`)."""
        ks, served, head_s = points.ks.tolist(), points.served, self.setting.serving.head_s
        expected = _EXPECTED * points.even_rounds_s
        order = np.argsort(expected / served, kind="stable").tolist()
        is_full = (points.in_flight >= points.ks).tolist()
        known, lost = 0.0, list[int]()
        for row in [row for row in order if is_full[row]]:
            limit = float(served[row]) / known - head_s if known else math.inf
            found = self._exactly(points, row, min(limit, float(expected[row])), limit)
            if found is None:
                lost.append(row)
            else:
                options[ks[row]] = found
                known = max(known, found.score)
        others = [row for row in order if not is_full[row]]
        bounds_s = np.zeros(len(ks))
        if known and (others or lost):
            bounds_s = points.round_bounds_s(served / known - head_s)
            if not self.is_few:
                bounds_s = np.where(is_full, bounds_s, np.maximum(bounds_s, points.even_rounds_s))
        ceilings = (served / (head_s + bounds_s)).tolist()
        for row in lost:
            options[ks[row]] = _Option(None, min(ceilings[row], known * (1 - _TIE)))
        for row in others:
            ceiling = ceilings[row]
            loses = self._loses(ceiling, options)
            options[ks[row]] = _Option(None, ceiling) if loses else self._weighed(self.setting.point(points, row))

    def _exactly(self, points: Points, row: int, *belows: float) -> _Option | None:
        """The split with the shortest round, of less than the first of `belows`, in seconds, for which there is one; None: there is none.

        Where the memory allows none at all, what there is with fewer sequences.
        """
        assert points.memory is not None, "layers are alike"
        few = FewDevices(
            points.times(row), float(points.share[row]), float(points.in_flight[row]), int(points.ks[row]),
            points.num_layers, points.memory[row],
        )  # fmt: skip
        found = next(filter(None, map(few.best, dict.fromkeys(belows))), None)
        if found is None:
            return None if few.has_room else self._with_fewer(points, row)
        point = self.setting.point(points, row)
        return _Option(point.split(found.order, found.counts), self._rate(point, found.seconds), point=point)

    def _with_fewer(self, points: Points, row: int) -> _Option:
        k, num_sequences = int(points.ks[row]), float(points.in_service[row]) / 2
        if num_sequences < 0.5 + SLACK:
            return _Option(None, -math.inf)
        fewer = self.setting.points([k], num_sequences)
        if fewer.in_flight[0] < k:
            return self._weighed(self.setting.point(fewer, 0))
        return self._exactly(fewer, 0, math.inf) or _Option(None, -math.inf)

    def _loses(self, ceiling: float, options: dict[int, _Option]) -> bool:
        if ceiling == math.inf:
            return False
        best = max((option.score for option in options.values()), default=-math.inf)
        return math.isfinite(best) and ceiling < best - _TIE * abs(best)

    def _ceilings(self, points: Points) -> np.ndarray:
        """``[R]``: no split into so many stages is expected to score better; inf where nothing cheap is known."""
        if not self.setting.is_uniform or self.objective == "goodput":
            return np.full(len(points.ks), np.inf)
        if self.objective == "throughput":
            return points.served / (self.setting.serving.head_s + points.even_rounds_s)
        # at the load that is planned for; of few devices another k may be better at the one that it settles at
        rounds_s = points.in_flight * points.busiest_s if self.is_few else points.even_rounds_s
        return -(self.setting.traffic.output_tokens - 1.0) * (self.setting.serving.head_s + rounds_s)

    def _weighed(self, point: Point, known: _Option | None = None) -> _Option:
        """The best split at this operating point and its score; `known` if it is that split again."""
        point, begun = self._solve(point)
        if begun is None:
            return _Option(None, -math.inf)
        if self.objective == "throughput":
            split, cycle_s = point.rounds.improve(begun, keep_order=self.keeps_order)
            return _Option(split, self._rate(point, cycle_s), point=point)
        splits = [begun]
        if self.is_few:  # a shorter round at this load is not all that counts
            split, _ = point.rounds.improve(begun, keep_order=self.keeps_order)
            splits += [split] if split != begun else []
        options = [
            known if known is not None and known.split == each else self._scored(each, point)
            for each in reversed(splits)
        ]
        return max(options, key=lambda option: option.score)

    def _solve(self, point: Point) -> tuple[Point, Split | None]:
        """The best split for mean steps; where memory allows none, with fewer sequences until it does."""
        while True:
            wanted, cuts = self._wanted(point.k)
            split = split_order(point.problem, wanted) if self.keeps_order else point.solver.best(wanted, cuts)
            if split is not None or point.num_sequences <= 1:
                return point, split
            point = self.setting.alone(point.k, point.num_sequences / 2)

    def _rate(self, point: Point, cycle_s: float) -> float:
        return point.served / (self.setting.serving.head_s + cycle_s)

    def _scored(self, split: Split, point: Point) -> _Option:
        """By the forecast, for latency or goodput."""
        forecaster = self.setting.forecaster
        if self.objective == "latency":
            seconds, num_sequences = forecaster.request_s(split.order, split.counts)
            return _Option(split, -seconds, num_sequences, point)
        score, num_sequences = forecaster.goodput(split.order, split.counts, self.slo)
        return _Option(split, score, num_sequences, point)

    # -- the best one -------------------------------------------------------------------------------------------

    def _improved(self, option: _Option) -> _Proposal:
        """With what single moves still gain, which was not tried for every number of stages (`_weighed`)."""
        assert option.split is not None, "there is one"
        best = self._proposal(option.split)
        if option.point is None or self.is_few or self.objective == "throughput":
            return best
        split, _ = option.point.rounds.improve(option.split, keep_order=self.keeps_order)
        if split is option.split:
            return best
        better = self._proposal(split)
        return better if better.score > best.score else best

    def _proposal(self, split: Split) -> _Proposal:
        epoch = self.present.epoch if self.present is not None else 0
        layout = layout_from_counts(epoch, [self.setting.names[d] for d in split.order], split.counts)
        forecast, score = self._forecast(layout)
        return _Proposal(split, score, layout, forecast)

    def _forecast(self, layout: Layout) -> tuple[Forecast, float]:
        """A layout's forecast and its score."""
        setting = self.setting
        pipeline = Pipeline(
            setting.facts, setting.cluster, layout, setting.traffic, setting.serving, setting.forecaster
        )
        forecast = pipeline.forecast()
        if self.objective == "throughput":
            return forecast, forecast.capacity_requests_per_s
        if self.objective == "latency":
            return forecast, -math.inf if forecast.saturated else -forecast.request_s(setting.traffic)
        return forecast, pipeline.goodput(self.slo)[0]

    def _at_home(self, best: _Proposal) -> _Proposal:
        """The same cuts on devices of the same kinds that hold most of it already, where that is worse by no more than the model's error:
        the search takes whichever of alike devices comes first."""
        present, devices = self.present, self.setting.devices
        if present is None or self.keeps_order:
            return best
        index = {device.worker: d for d, device in enumerate(devices)}
        spec, owners = self.setting.facts.spec, present.owners()
        kept = [Counter[int]() for _ in best.layout.segments]
        for held, segment in zip(kept, best.layout.segments, strict=True):
            for layer in segment.layers:
                held[index[owners[layer]]] += spec.layer_bytes[layer]
        kept[0][index[present.embedding_worker]] += spec.embedding_bytes
        kept[-1][index[present.lm_head_worker]] += spec.lm_head_bytes
        pairs = sorted((-size, d != o, i, d) for i, o in enumerate(best.split.order) for d, size in kept[i].items())
        chosen, taken = dict[int, int](), set[int]()
        for _, _, i, d in pairs:
            if i not in chosen and d not in taken and self._can_stand_in(d, best.split.order[i]):
                chosen[i] = d
                taken.add(d)
        for i, o in enumerate(best.split.order):
            if i not in chosen:
                free = (
                    d
                    for d in (o, *best.split.order, *range(len(devices)))
                    if d not in taken and self._can_stand_in(d, o)
                )
                chosen[i] = next(free, o)
                taken.add(chosen[i])
        order = tuple(chosen[i] for i in range(len(chosen)))
        if order == best.split.order or len(set(order)) < len(order):
            return best
        other = self._proposal(replace(best.split, order=order))
        return best if relative_gain(self.objective, other.score, best.score) > max(_TIE, self.error) else other

    def _can_stand_in(self, d: int, o: int) -> bool:
        """Whether device `d` is one like `o`, and has no less memory."""
        there, here = self.setting.devices[d], self.setting.devices[o]
        is_as_large = not there.memory_bytes or there.memory_bytes >= _AS_LARGE * here.memory_bytes
        return there.speed.kind == here.speed.kind and is_as_large

    def _in_present_order(self, k: int, best: _Proposal, num_sequences: float) -> _Proposal | None:
        """The best cuts of the present order of workers, where another order is better by no more than the model's error."""
        present = self.present
        if present is None or not self.error or self.keeps_order or k != present.num_hops:
            return None
        order = [self.setting.names.index(worker) for worker in present.workers]
        if len(order) != k or tuple(order) == best.split.order:
            return None
        point = self.setting.alone(k, num_sequences)
        split = split_order(point.problem, order)
        if split is None:
            return None
        cuts = [segment.layers.stop for segment in present.segments[:-1]]
        near = split_near(point.problem, order, split.largest * (1 + self.error), cuts) or split
        split, _ = point.rounds.improve(split, keep_order=True)
        for proposal in (self._proposal(near), self._proposal(split)):
            if relative_gain(self.objective, proposal.score, best.score) <= self.error:
                return proposal
        return None

    def _wanted_in_service(self) -> float:
        """Sequences in service to plan for at first."""
        setting = self.setting
        wanted = setting.forecaster.most_in_service
        if self.objective == "latency" and setting.traffic.requests_per_s > 0:
            forecast = self.present_forecast
            wanted = min(wanted, max(1.0, forecast.num_sequences)) if forecast and not forecast.saturated else 1.0
        return wanted

    def _wanted(self, k: int) -> tuple[list[int], list[int]]:
        """The devices of the present layout in its order, and its boundaries if it has k stages."""
        names = self.setting.names
        if self.present is None:
            return ([], []) if k < len(names) else (list(range(k)), [])
        wanted = [names.index(worker) for worker in self.present.workers]
        if k != self.present.num_hops:
            return wanted, []
        return wanted, [segment.layers.stop for segment in self.present.segments[:-1]]

    # -- the answer ---------------------------------------------------------------------------------------------

    def _result(self, k: int, best: _Proposal, options: dict[int, _Option], passed_over: _Proposal | None) -> Plan:
        present, before, names = self.present, self.present_score, self.setting.names
        score, layout, forecast = best.score, best.layout, best.forecast
        gain, within = 0.0, ""
        if passed_over is not None:
            within = f"{passed_over.layout.brief()}, {relative_gain(self.objective, score, passed_over.score):+.1%}"
        if present is not None:
            gain = relative_gain(self.objective, before, score)
            if gain <= max(_TIE, self.error) or layout.segments == present.segments:
                assert self.present_forecast is not None
                if gain > _TIE and layout.segments != present.segments:
                    within = f"{layout.brief()}, {gain:+.1%}"
                gain, score, layout, forecast = 0.0, before, present, self.present_forecast
        used = set(layout.workers)
        return Plan(
            objective=self.objective,
            traffic=self.setting.traffic,
            slo=self.slo,
            layout=layout,
            forecast=forecast,
            score=score,
            present=self.present_forecast,
            present_score=before,
            gain=gain,
            is_change=present is None or layout.segments != present.segments,
            candidates=tuple(self._candidate(n, option, k, best.score) for n, option in sorted(options.items())),
            unused=tuple(name for name in names if name not in used),
            error=self.error,
            within_error=within,
        )

    def _candidate(self, k: int, option: _Option, winner: int, best: float) -> Candidate:
        split = option.split
        why = "" if k == winner else why_not(self.objective, option.score, best, split is not None)
        if split is None:
            return Candidate(k, (), (), option.score, why)
        return Candidate(k, tuple(self.setting.names[d] for d in split.order), split.counts, option.score, why)
