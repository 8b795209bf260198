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

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvstore.ids import WorkerName
from runtime.layout import Layout
from scheduler.planning import compiled
from scheduler.planning.cost import Facts, Speed, Speeds, Works
from scheduler.planning.traffic import Pieces, Serving, Slo, Traffic

if TYPE_CHECKING:
    from scheduler.planning.compiled.forecasts import Chain, Limits
    from scheduler.planning.compiled.steps import Law


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
    """Devices as columns ``[n]``, in their order: made once for any number of layouts and loads. Seconds, bytes."""

    def __init__(self, facts: Facts, devices: Sequence[Device]) -> None:
        self.devices = tuple(devices)
        self.index = {device.worker: index for index, device in enumerate(devices)}
        self.speeds = Speeds.of([device.speed for device in devices])
        kinds = [device.speed.kind for device in devices]
        self._latency = np.array([kind.link_latency_s for kind in kinds])
        self._per_token = np.array([facts.hidden_bytes / kind.link_bytes_per_s for kind in kinds])
        self.memory, self.pools = np.array(
            [(device.memory_bytes, device.pool_bytes) for device in devices], dtype=float
        ).T.copy()
        self.machine = np.stack([*self.speeds, self._latency, self._per_token], axis=1)
        """``[n, 12]``: all of it, for `planning.compiled.steps`."""
        self.pieces = pieces_of(facts, self.speeds)

    def hops(self, works: Works) -> np.ndarray:
        """``[K, n]``: a hop out of every device."""
        return self._latency + works.num_tokens[:, None] * self._per_token


class Forecaster:
    """A model, devices and a load, for any number of layouts: what a layout does in numbers, without its explanation."""

    def __init__(self, facts: Facts, cluster: Cluster, traffic: Traffic, serving: Serving) -> None:
        self._serving = serving
        self.law: Law = compiled.steps.Law(
            load_columns(traffic, serving, cluster.pieces), cluster.machine, facts.kinds, facts.model, facts.until
        )
        self.most_in_service, self.limited_by = float(serving.max_running), "max_running"
        if 0 < traffic.concurrency <= self.most_in_service:
            self.most_in_service, self.limited_by = float(traffic.concurrency), "concurrency"
        self.limits: Limits = compiled.forecasts.Limits(
            self.most_in_service,
            float(serving.kv_tokens(traffic, 1.0) * facts.kv_bytes),
            float(facts.spec.embedding_bytes),
            float(facts.spec.lm_head_bytes),
            cluster.memory,
            cluster.pools,
        )

    def chain(self, devices: Sequence[int], counts: Sequence[int], workers: Sequence[int] = ()) -> "Chain":
        """Stages with so many layers on these devices; `workers` are 0, 1, ... for the first, second, ... device where one has several stages."""
        return compiled.forecasts.Chain(
            np.array(devices, dtype=np.int64),
            np.array(workers, dtype=np.int64) if workers else np.arange(len(devices)),
            np.array(counts, dtype=np.int64),
            float(self._serving.microbatches(len(devices))),
        )

    def request_s(self, devices: Sequence[int], counts: Sequence[int]) -> tuple[float, float]:
        """Mean seconds of a request with one stage on each device, inf where more arrive than can be served; and sequences in service."""
        return compiled.forecasts.request_seconds(self.law, self.chain(devices, counts), self.limits)

    def goodput(self, devices: Sequence[int], counts: Sequence[int], slo: Slo) -> tuple[float, float]:
        """`Pipeline.goodput` with one stage on each device."""
        chain = self.chain(devices, counts)
        return compiled.forecasts.goodput(self.law, chain, self.limits, slo.ttft_s, slo.tpot_s)


class Pipeline:
    """A layout on devices. `layout` may name a worker twice.

    Raises:
        ValueError: when the layout names a worker that is not among the devices.
    """

    def __init__(
        self,
        facts: Facts,
        devices: Sequence[Device] | Cluster,
        layout: Layout,
        traffic: Traffic,
        serving: Serving,
        forecaster: Forecaster | None = None,
    ) -> None:
        """`forecaster`, where there is one of these devices and this load already."""
        self._cluster = cluster = devices if isinstance(devices, Cluster) else Cluster(facts, devices)
        for worker in layout.workers:
            if worker not in cluster.index:
                raise ValueError(f"the layout names worker {worker}, the devices are {', '.join(cluster.index)}")
        self._layout, self._traffic = layout, traffic
        self._forecaster = forecaster or Forecaster(facts, cluster, traffic, serving)
        index = {worker: i for i, worker in enumerate(layout.workers)}
        workers, counts = [index[segment.worker] for segment in layout.segments], layout.counts()
        devices_ = [cluster.index[segment.worker] for segment in layout.segments]
        self._chain = self._forecaster.chain(devices_, counts, workers)
        self.max_sequences, worker = compiled.forecasts.most_in_service(
            self._forecaster.law, self._chain, self._forecaster.limits
        )
        self.limited_by = self._forecaster.limited_by if worker < 0 else f"KV memory of {layout.workers[worker]}"

    def forecast(self) -> Forecast:
        """Under the traffic's rate, or with its concurrency in a closed loop."""
        kernels, num_hops = compiled.forecasts, self._layout.num_hops
        point, stages = np.empty(6), np.empty((5, num_hops))
        capacity, rate, saturated, wait_s = kernels.settle(
            self._forecaster.law, self._chain, self.max_sequences, point, stages
        )
        in_service, most_here, tpot_s, ttft_s, _, requests = point.tolist()
        mean, fast, slow, hops, busy = stages.tolist()
        return Forecast(
            requests_per_s=rate,
            tokens_per_s=rate * self._traffic.output_tokens,
            ttft_s=ttft_s + wait_s,
            tpot_s=tpot_s,
            num_sequences=in_service * min(1.0, rate / most_here),
            capacity_requests_per_s=capacity,
            max_sequences=self.max_sequences,
            limited_by=self.limited_by,
            saturated=saturated,
            bottleneck=max(range(num_hops), key=lambda hop: (busy[hop], mean[hop], hop)),
            stages=tuple(
                StageForecast(
                    worker=segment.worker,
                    device=self._cluster.devices[self._cluster.index[segment.worker]].speed.kind.name,
                    layers=(segment.layers.start, segment.layers.stop),
                    seconds=mean[hop],
                    decode_s=fast[hop],
                    prefill_s=slow[hop],
                    hop_s=hops[hop],
                    utilization=min(1.0, rate / requests * (mean[hop] + hops[hop])),
                )
                for hop, segment in enumerate(self._layout.segments)
            ),
        )

    def goodput(self, slo: Slo) -> tuple[float, float]:
        """The largest rate, requests/s, at which the mean request meets `slo`, and the sequences in service then.

        0 when none does. In a closed loop it is the rate of as many clients as can be served within it.
        """
        return compiled.forecasts.goodput(
            self._forecaster.law, self._chain, self._forecaster.limits, slo.ttft_s, slo.tpot_s
        )


def pieces_of(facts: Facts, speeds: Speeds) -> Pieces:
    """How prompts are cut for pipelines of such devices, in mean."""
    reading = speeds.layer[:, None] + (facts.dense_bytes + facts.expert_bytes) * speeds.weights[:, None]
    arithmetic = facts.flops * speeds.products[:, None]
    of_each = facts.until[-1, :-1]
    token_s = arithmetic @ of_each
    return Pieces(
        even=float(np.mean(reading @ of_each / token_s)),
        fixed=float(np.mean(speeds.step / token_s)),
        sharpness=float(np.mean(speeds.sharpness)),
    )


def load_columns(traffic: Traffic, serving: Serving, pieces: Pieces) -> np.ndarray:
    """``[11]``: the load as `planning.compiled.steps` has it."""
    return np.array(
        [
            traffic.new_tokens,
            traffic.output_tokens,
            serving.max_step_tokens,
            traffic.mean_context,
            traffic.prefill_context,
            traffic.requests_per_s,
            (traffic.arrival_cv**2 + traffic.service_cv**2) / 2,
            serving.head_s,
            *pieces,
        ],
        dtype=float,
    )
