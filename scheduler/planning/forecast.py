"""What a layout would do under a load: throughput, TTFT, TPOT, goodput, and where its time goes. Pure.

`Pipeline` puts the cost model and the mean steps together. For N sequences in service it has the mean time of every
stage, hence the *round*, in which every microbatch goes once through the pipeline,

    round = head + max(sum of stages, steps in flight * busiest worker, the convoy behind a slow step)

(`planning.convoy`), which is also the time per output token; and the requests finished per second, requests per step * steps in flight / round
(the asymptotic bounds of a closed queueing network: Denning and Buzen, 1978). An open loop at a rate below what the
pipeline can take settles at the N whose rate it is. A request's first token takes

    ttft = wait for a place + wait for room in a step + half a period + (chunks - 1) periods + a pass

Both waits are mean waits of queues in heavy traffic, (cv_arrival^2 + cv_service^2) / 2 times that of a Poisson queue (Kingman
1961; for the N_max places with Sakasegawa's exponent, 1977). A closed loop does not wait.

Never true: a forecast is a bound or a guarantee. It is a mean, of a model, in steady state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from kvstore.ids import WorkerName
from runtime.layout import Layout
from scheduler.planning.convoy import round_seconds
from scheduler.planning.cost import Facts, Speed, UnitTimes, unit_times
from scheduler.planning.traffic import Serving, Slo, Steps, Traffic, mean_steps

_GRID = 16
"""Numbers of sequences at which a pipeline is computed; between them figures are interpolated."""


class Device(msgspec.Struct, frozen=True):
    """A worker that could serve. `memory_bytes` is what it may use for weights and KV; 0 is no limit.

    `pool_bytes` is the page pool that it already has, which a change of layout leaves as it is: its KV has no more than that,
    however much of the memory the weights leave. 0: none yet.
    """

    worker: WorkerName
    speed: Speed
    memory_bytes: int = 0
    pool_bytes: int = 0


class StageForecast(msgspec.Struct, frozen=True):
    """One hop of a layout under a load. Seconds per step: of the mean step, of one that only decodes, of one that prefills."""

    worker: WorkerName
    device: str
    layers: tuple[int, int]
    seconds: float
    decode_s: float
    prefill_s: float
    hop_s: float
    utilization: float


class Forecast(msgspec.Struct, frozen=True):
    """A layout under a load. `requests_per_s` is what it serves, `capacity_requests_per_s` the most it could.

    `saturated`: more arrives than it can take, so the waits grow without end and `ttft_s` leaves them out.
    """

    requests_per_s: float
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    num_sequences: float
    capacity_requests_per_s: float
    max_sequences: float
    limited_by: str
    saturated: bool
    bottleneck: int
    stages: tuple[StageForecast, ...]

    def request_s(self, traffic: Traffic) -> float:
        """From a request's arrival to its last token."""
        return self.ttft_s + (traffic.output_tokens - 1.0) * self.tpot_s


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The pipeline at several N, each ``[G]``, and its stages, ``[G, S]``. `ttft_s` is without waits."""

    steps: list[Steps]
    num_sequences: np.ndarray
    requests_per_s: np.ndarray
    tpot_s: np.ndarray
    ttft_s: np.ndarray
    prompt_s: np.ndarray
    mean: np.ndarray
    decode: np.ndarray
    prefill: np.ndarray
    hops: np.ndarray
    busy: np.ndarray


class Pipeline:
    """A layout on devices. `layout` may name a worker twice.

    Raises:
        ValueError: when the layout names a worker that is not among the devices.
    """

    def __init__(
        self, facts: Facts, devices: Sequence[Device], layout: Layout, traffic: Traffic, serving: Serving
    ) -> None:
        by_name = {device.worker: device for device in devices}
        for worker in layout.workers:
            if worker not in by_name:
                raise ValueError(f"the layout names worker {worker}, the devices are {', '.join(by_name)}")
        self._facts, self._layout, self._traffic, self._serving = facts, layout, traffic, serving
        self._devices = [by_name[worker] for worker in layout.workers]
        index = {worker: i for i, worker in enumerate(layout.workers)}
        self._worker_of = np.array([index[segment.worker] for segment in layout.segments])
        num_kinds = len(facts.flops)
        self._counts = np.stack([
            np.bincount(facts.kind_of_layer[s.layers.start : s.layers.stop], minlength=num_kinds)
            for s in layout.segments
        ]).astype(float)  # fmt: skip
        self._num_microbatches = serving.microbatches(layout.num_hops)
        self.max_sequences, self.limited_by = self._most_sequences()

    def forecast(self) -> Forecast:
        """Under the traffic's rate, or with its concurrency in a closed loop."""
        traffic = self._traffic
        point = self._sweep(np.array([self.max_sequences]))
        capacity = rate = float(point.requests_per_s[0])
        saturated = False
        if traffic.requests_per_s > 0:
            rates = np.maximum.accumulate(self._swept.requests_per_s)
            capacity = float(rates[-1])
            saturated = traffic.requests_per_s >= capacity
            rate = min(traffic.requests_per_s, capacity)
            if not saturated:
                point = self._sweep(np.interp([rate], rates, self._grid))
        ttft_s = float(point.ttft_s[0])
        if traffic.requests_per_s > 0 and not saturated:
            ttft_s += float(self._waits(point, np.array([rate]))[0])
        busy = point.busy[0][self._worker_of]
        return Forecast(
            requests_per_s=rate,
            tokens_per_s=rate * traffic.output_tokens,
            ttft_s=ttft_s,
            tpot_s=float(point.tpot_s[0]),
            num_sequences=float(point.num_sequences[0]) * min(1.0, rate / float(point.requests_per_s[0])),
            capacity_requests_per_s=capacity,
            max_sequences=self.max_sequences,
            limited_by=self.limited_by,
            saturated=saturated,
            bottleneck=int(np.lexsort((point.mean[0], busy))[-1]),
            stages=tuple(
                self._stage(point, hop, rate / point.steps[0].requests) for hop in range(self._layout.num_hops)
            ),
        )

    def goodput(self, slo: Slo, at_least: float = 0.0) -> tuple[float, float]:
        """The largest rate, requests/s, at which the mean request meets `slo`, and the sequences in service then.

        0 when none does. In a closed loop it is the rate of as many clients as can be served within it. What cannot reach
        `at_least` is not looked at closely.
        """
        best, at = 0.0, 1.0
        grid, swept = self._grid, self._swept
        for last_round in (False, True):
            rates = swept.requests_per_s
            ttft_s = swept.ttft_s + (self._waits(swept, rates) if self._traffic.requests_per_s > 0 else 0.0)
            good = np.flatnonzero((ttft_s <= slo.ttft_s) & (swept.tpot_s <= slo.tpot_s))
            if not len(good):
                break
            top = int(good[rates[good].argmax()])
            if rates[top] > best:
                best, at = float(rates[top]), float(grid[top])
            edge = int(good[-1])
            if last_round or edge + 1 == len(grid) or rates[edge + 1] < at_least:
                break
            grid = np.linspace(grid[edge], grid[edge + 1], 10)[1:-1]
            swept = self._sweep(grid)
        return best, at

    @cached_property
    def _grid(self) -> np.ndarray:
        """Numbers of sequences from 1 to the most."""
        if self.max_sequences <= 1:
            return np.array([1.0])
        return np.geomspace(1.0, self.max_sequences, _GRID)

    @cached_property
    def _swept(self) -> _Sweep:
        return self._sweep(self._grid)

    # -- parts ----------------------------------------------------------------------------------------------

    def _most_sequences(self) -> tuple[float, str]:
        """How many sequences can be served at once, and what limits it."""
        traffic, serving, facts = self._traffic, self._serving, self._facts
        most, limit = float(serving.max_running), "max_running"
        if 0 < traffic.concurrency <= most:
            most, limit = float(traffic.concurrency), "concurrency"
        per_sequence = serving.kv_tokens(traffic, 1.0) * facts.kv_bytes
        for worker, device in enumerate(self._devices):
            if device.memory_bytes:
                segments = [s for s, w in zip(self._layout.segments, self._worker_of, strict=True) if w == worker]
                num_layers = sum(len(s.layers) for s in segments)
                left = device.memory_bytes - weight_bytes(facts, self._layout, device.worker)
                left = min(left, device.pool_bytes) if device.pool_bytes else left
                held = left / (per_sequence * num_layers) if num_layers else math.inf
                if held < most:
                    most, limit = max(held, 0.0), f"KV memory of {device.worker}"
        return max(most, 1.0), limit

    def _sweep(self, grid: np.ndarray) -> _Sweep:
        traffic, serving, facts = self._traffic, self._serving, self._facts
        steps = [mean_steps(traffic, serving, self._num_microbatches, float(n)) for n in grid]
        works = [step.decode for step in steps] + [step.prefill for step in steps]
        times = unit_times(facts, [device.speed for device in self._devices], works)
        tokens = np.array([work.num_tokens for work in works])
        kinds = [self._devices[w].speed.kind for w in self._worker_of]
        latency = np.array([kind.link_latency_s for kind in kinds])
        per_token = np.array([facts.hidden_bytes / kind.link_bytes_per_s for kind in kinds])
        hops = latency + tokens[:, None] * per_token
        stages = self._stage_times(times)
        g = len(steps)
        decode, prefill = stages[:g], stages[g:]
        share = np.array([step.prefill_share for step in steps])[:, None]
        mean = (1 - share) * decode + share * prefill
        mean_hops = (1 - share) * hops[:g] + share * hops[g:]
        busy = self._per_worker(mean + mean_hops)
        fast, slow = self._per_worker(decode + hops[:g]), self._per_worker(prefill + hops[g:])
        in_flight = np.array([step.in_flight for step in steps])
        requests = np.array([step.requests for step in steps])
        alone = in_flight >= np.array([step.num_sequences for step in steps])
        ends = {
            "mean_busiest": busy.max(axis=1),
            "slow_sum": slow.sum(axis=1),
            "fast_sum": fast.sum(axis=1),
            "fast_busiest": fast.max(axis=1),
        }
        cycle = round_seconds(share[:, 0], in_flight, mean_sum=busy.sum(axis=1), **ends)
        # a sequence that has its steps to itself and decodes is held up by the chunks of the others only
        others = share[:, 0] * (1.0 - 1.0 / in_flight)
        only_decode = round_seconds(others, in_flight, mean_sum=ends["fast_sum"], **ends)
        period = cycle / in_flight
        round_s = serving.head_s + cycle
        one_pass = np.where(alone, ends["slow_sum"], np.maximum(ends["slow_sum"], cycle))
        chunks = np.array([step.prefill_steps for step in steps])
        chunk = np.array([step.prefill.prefill_tokens for step in steps])
        prompt_s = slow.max(axis=1) * traffic.new_tokens / chunk
        ttft_s = serving.head_s + one_pass + (chunks - 1) * slow.max(axis=1) + np.where(alone, 0.0, period / 2)
        tpot_s = np.where(alone, serving.head_s + only_decode, round_s)
        rate = requests * in_flight / round_s
        return _Sweep(steps, grid, rate, tpot_s, ttft_s, prompt_s, mean, decode, prefill, mean_hops, busy)

    def _stage_times(self, times: UnitTimes) -> np.ndarray:
        """``[K, S]``"""
        of_stage = times.layers[:, self._worker_of]
        seconds = times.fixed[self._worker_of] + (of_stage * self._counts).sum(axis=-1)
        seconds[:, -1] += times.last[:, self._worker_of[-1]]
        return seconds

    def _per_worker(self, stages: np.ndarray) -> np.ndarray:
        """Seconds ``[K, S]`` of stages summed over those of each worker, ``[K, W]``."""
        if len(self._devices) == stages.shape[1]:
            return stages
        return np.stack([stages[:, self._worker_of == w].sum(axis=1) for w in range(len(self._devices))], axis=1)

    def _waits(self, swept: _Sweep, rates: np.ndarray) -> np.ndarray:
        """Mean seconds before a request's first chunk: for one of the places, and for room in a step. May be inf."""
        traffic = self._traffic
        variability = (traffic.arrival_cv**2 + traffic.service_cv**2) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            busy = np.minimum(rates * swept.prompt_s, 1.0)
            prefill_s = np.where(busy < 1, variability * busy / (1 - busy) * swept.prompt_s, np.inf)
            places = self.max_sequences
            full = np.minimum(swept.num_sequences / places, 1.0)
            exponent = math.sqrt(2 * (places + 1)) - 1
            service_s = swept.num_sequences / rates
            place_s = np.where(full < 1, variability * full**exponent / (places * (1 - full)) * service_s, np.inf)
        return prefill_s + place_s

    def _stage(self, point: _Sweep, hop: int, steps_per_s: float) -> StageForecast:
        segment, worker = self._layout.segments[hop], int(self._worker_of[hop])
        return StageForecast(
            worker=segment.worker,
            device=self._devices[worker].speed.kind.name,
            layers=(segment.layers.start, segment.layers.stop),
            seconds=float(point.mean[0, hop]),
            decode_s=float(point.decode[0, hop]),
            prefill_s=float(point.prefill[0, hop]),
            hop_s=float(point.hops[0, hop]),
            utilization=min(1.0, steps_per_s * float(point.mean[0, hop] + point.hops[0, hop])),
        )


def weight_bytes(facts: Facts, layout: Layout, worker: WorkerName) -> float:
    """The weights that `worker` holds under `layout`; a tied LM head counts beside the embedding."""
    layers = list(layout.layers_of(worker))
    held = float(facts.layer_bytes[layers].sum()) if layers else 0.0
    held += facts.spec.embedding_bytes * (layout.embedding_worker == worker)
    return held + facts.spec.lm_head_bytes * (layout.lm_head_worker == worker)
