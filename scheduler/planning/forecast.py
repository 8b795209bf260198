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
from scheduler.planning.convoy import round_seconds, weighted
from scheduler.planning.cost import Facts, Speed, Speeds, UnitTimes, Works, unit_times
from scheduler.planning.traffic import Serving, Slo, Steps, Traffic, mean_steps

_GRID, _CLOSER = np.linspace(0.0, 1.0, 16), np.arange(1, 9) / 9
"""Numbers of sequences at which a pipeline is computed, as exponents of the most; between them figures are interpolated."""


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


class Cluster:
    """Devices as columns ``[n]``, in their order: made once for any number of layouts and loads. Seconds."""

    def __init__(self, facts: Facts, devices: Sequence[Device]) -> None:
        self.devices = tuple(devices)
        self.index = {device.worker: index for index, device in enumerate(devices)}
        self.speeds = Speeds.of([device.speed for device in devices])
        kinds = [device.speed.kind for device in devices]
        self._latency = np.array([kind.link_latency_s for kind in kinds])
        self._per_token = np.array([facts.hidden_bytes / kind.link_bytes_per_s for kind in kinds])

    def hops(self, works: Works) -> np.ndarray:
        """``[K, n]``: a hop out of every device."""
        return self._latency + works.num_tokens[:, None] * self._per_token


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The pipeline at several N, each ``[G]``, and its stages, ``[G, S]``. `ttft_s` is without waits."""

    steps: Steps
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
        self, facts: Facts, devices: Sequence[Device] | Cluster, layout: Layout, traffic: Traffic, serving: Serving
    ) -> None:
        self._cluster = cluster = devices if isinstance(devices, Cluster) else Cluster(facts, devices)
        for worker in layout.workers:
            if worker not in cluster.index:
                raise ValueError(f"the layout names worker {worker}, the devices are {', '.join(cluster.index)}")
        self._facts, self._layout, self._traffic, self._serving = facts, layout, traffic, serving
        self._chosen = np.array([cluster.index[worker] for worker in layout.workers])
        index = {worker: i for i, worker in enumerate(layout.workers)}
        self._worker_of = np.array([index[segment.worker] for segment in layout.segments])
        until = facts.kinds_until[[0, *(segment.layers.stop for segment in layout.segments)]]
        self._counts = until[1:] - until[:-1]
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
                self._stage(point, hop, rate / float(point.steps.requests[0])) for hop in range(self._layout.num_hops)
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
            grid = grid[edge] + (grid[edge + 1] - grid[edge]) * _CLOSER
            swept = self._sweep(grid)
        return best, at

    @cached_property
    def _grid(self) -> np.ndarray:
        """Numbers of sequences from 1 to the most."""
        if self.max_sequences <= 1:
            return np.array([1.0])
        return self.max_sequences**_GRID

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
        num_layers = dict.fromkeys(self._layout.workers, 0)
        weights = dict.fromkeys(self._layout.workers, 0.0)
        weights[self._layout.embedding_worker] += facts.spec.embedding_bytes
        weights[self._layout.lm_head_worker] += facts.spec.lm_head_bytes
        for segment in self._layout.segments:
            start, stop = segment.layers.start, segment.layers.stop
            num_layers[segment.worker] += stop - start
            weights[segment.worker] += facts.bytes_until[stop] - facts.bytes_until[start]
        for worker, count in num_layers.items():
            device = self._cluster.devices[self._cluster.index[worker]]
            if device.memory_bytes and count:
                left = device.memory_bytes - weights[worker]
                left = min(left, device.pool_bytes) if device.pool_bytes else left
                held = left / (per_sequence * count)
                if held < most:
                    most, limit = max(held, 0.0), f"KV memory of {worker}"
        return max(most, 1.0), limit

    def _sweep(self, grid: np.ndarray) -> _Sweep:
        traffic, serving, cluster = self._traffic, self._serving, self._cluster
        steps = mean_steps(traffic, serving, self._num_microbatches, grid)
        times = unit_times(self._facts, cluster.speeds.of_devices(self._chosen), steps.works)
        hops = cluster.hops(steps.works)[:, self._chosen[self._worker_of]]
        stages = self._stage_times(times)
        g, share, in_flight = len(grid), steps.prefill_share, steps.in_flight
        decode, prefill = stages[:g], stages[g:]
        mean, mean_hops = (weighted(share[:, None], part[:g], part[g:]) for part in (stages, hops))
        busy = self._per_worker(mean + mean_hops)
        both = self._per_worker(stages + hops)
        fast, slow = both[:g], both[g:]
        alone = in_flight >= steps.num_sequences
        slowest = slow.max(axis=1)
        ends = {
            "mean_busiest": busy.max(axis=1),
            "slow_sum": slow.sum(axis=1),
            "fast_sum": fast.sum(axis=1),
            "fast_busiest": fast.max(axis=1),
        }
        cycle = round_seconds(share, in_flight, mean_sum=busy.sum(axis=1), **ends)
        round_s = tpot_s = serving.head_s + cycle
        one_pass = ends["slow_sum"]
        if alone.any():
            # a sequence that has its steps to itself and decodes is held up by the chunks of the others only
            others = share * (1.0 - 1.0 / in_flight)
            only_decode = round_seconds(others, in_flight, mean_sum=ends["fast_sum"], **ends)
            tpot_s = np.where(alone, serving.head_s + only_decode, round_s)
        one_pass = np.where(alone, one_pass, np.maximum(one_pass, cycle) + cycle / in_flight / 2)
        chunk = steps.works.prefill_tokens[g:]
        prompt_s = slowest * traffic.new_tokens / chunk
        ttft_s = serving.head_s + one_pass + (steps.prefill_steps - 1) * slowest
        rate = steps.requests * in_flight / round_s
        return _Sweep(steps, grid, rate, tpot_s, ttft_s, prompt_s, mean, decode, prefill, mean_hops, busy)

    def _stage_times(self, times: UnitTimes) -> np.ndarray:
        """``[K, S]``"""
        of_stage = times.layers[:, self._worker_of]
        seconds = times.fixed[self._worker_of] + np.einsum("ksu,su->ks", of_stage, self._counts)
        seconds[:, -1] += times.last[:, self._worker_of[-1]]
        return seconds

    def _per_worker(self, stages: np.ndarray) -> np.ndarray:
        """Seconds ``[K, S]`` of stages summed over those of each worker, ``[K, W]``."""
        if len(self._chosen) == stages.shape[1]:
            return stages
        return np.stack([stages[:, self._worker_of == w].sum(axis=1) for w in range(len(self._chosen))], axis=1)

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
            device=self._cluster.devices[self._chosen[worker]].speed.kind.name,
            layers=(segment.layers.start, segment.layers.stop),
            seconds=float(point.mean[0, hop]),
            decode_s=float(point.decode[0, hop]),
            prefill_s=float(point.prefill[0, hop]),
            hop_s=float(point.hops[0, hop]),
            utilization=min(1.0, steps_per_s * float(point.mean[0, hop] + point.hops[0, hop])),
        )
