"""What ``GET /metrics`` shows: histograms observed here per request, and the engine's own counts read at the scrape.

The histograms are plain lists, not `prometheus_client`'s: one is observed per generated token, and a bisection and two
additions are all it may cost. Nothing here is shared between threads: scrapes run on the event loop too.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from api.pilot_metrics import pilot_families
from scheduler.request import Engine, EngineStats

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram:
    """Counts per bucket and a sum; `observe` takes seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, help: str) -> HistogramMetricFamily:
        buckets, count = [], 0
        for bound, here in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            count += here
            buckets.append((bound, count))
        return HistogramMetricFamily(name, help, buckets=buckets, sum_value=self.total)


class TransitionSums:
    """What changes of layout did since the start, added up from their reports as they end."""

    _KINDS = ("weight", "snapshot", "mirror")

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(("committed", "aborted", "refused"), 0)
        self.num_bytes = dict.fromkeys(self._KINDS, 0)
        self.sequences_flipped = 0
        self.recomputed_tokens = 0
        self.dropped_requests = 0
        self.fence_waits = 0
        self.fence_wait_s = 0.0
        self.last: dict[str, Any] | None = None

    def on_event(self, event: dict[str, Any]) -> None:
        if event["type"] != "report":
            return
        report = self.last = event["report"]
        self.outcomes[report["outcome"]] = self.outcomes.get(report["outcome"], 0) + 1
        for kind in self._KINDS:
            self.num_bytes[kind] += report[f"{kind}_bytes"]
        self.sequences_flipped += report["sequences_flipped"]
        self.recomputed_tokens += report["recomputed_tokens"]
        self.dropped_requests += report["dropped_requests"]
        self.fence_waits += report["fence_waits"]
        self.fence_wait_s += report["fence_wait_ms"] / 1e3

    def families(self) -> Iterator[Metric]:
        text = "Changes of layout that ended; refused are those that had been queued, not what was answered with 409 at once"
        outcomes = CounterMetricFamily("midflight_transitions", text, labels=["outcome"])
        for outcome, count in self.outcomes.items():
            outcomes.add_metric([outcome], count)
        yield outcomes
        num_bytes = CounterMetricFamily("midflight_transition_bytes", "Bytes moved by changes", labels=["kind"])
        for kind, count in self.num_bytes.items():
            num_bytes.add_metric([kind], count)
        yield num_bytes
        yield _counter("midflight_transition_sequences_flipped", "Running sequences taken over", self.sequences_flipped)
        yield _counter("midflight_transition_recomputed_tokens", "Computed again by changes", self.recomputed_tokens)
        yield _counter("midflight_transition_dropped_requests", "Dropped by changes: none", self.dropped_requests)
        yield _counter("midflight_transition_fence_waits", "Steps that waited for mirrored rows", self.fence_waits)
        yield _counter("midflight_transition_fence_wait_seconds", "How long they waited", self.fence_wait_s)
        if self.last is not None:
            yield _gauge("midflight_last_transition_seconds", "Duration of the last change", self.last["total_s"])
            pauses = GaugeMetricFamily(
                "midflight_last_transition_pause_seconds", "Engine pause of the last change", labels=["statistic"]
            )
            for statistic in ("p50", "p99", "max"):
                if statistic in self.last["engine_pause_ms"]:
                    pauses.add_metric([statistic], self.last["engine_pause_ms"][statistic] / 1e3)
            yield pauses
            phases = GaugeMetricFamily(
                "midflight_last_transition_phase_seconds", "Time in each phase of the last change", labels=["phase"]
            )
            for phase, spent_s in self.last["phases_s"].items():
                phases.add_metric([phase], spent_s)
            yield phases


class Metrics:
    """The API's own observations, and the text of a scrape."""

    def __init__(self, engine: Engine):
        self.queue = Histogram(_LATENCY_S)
        self.first_token = Histogram(_LATENCY_S)
        self.inter_token = Histogram(_INTER_TOKEN_S)
        self.request = Histogram(_LATENCY_S)
        self.responses: dict[tuple[str, int], int] = {}
        self.client_disconnects = 0
        self.slow_readers = 0
        self.transitions = TransitionSums()
        engine.listen(self.transitions.on_event)
        self._engine = engine
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(self))
        PlatformCollector(registry=self._registry)
        ProcessCollector(registry=self._registry)

    def count_response(self, route: str, status: int) -> None:
        key = (route, status)
        self.responses[key] = self.responses.get(key, 0) + 1

    def render(self) -> bytes:
        """The scrape in Prometheus' text format."""
        return generate_latest(self._registry)

    def families(self) -> Iterator[Metric]:
        yield self.queue.family(
            "midflight_queue_seconds", "From arrival until the first step that computes the request"
        )
        yield self.first_token.family("midflight_time_to_first_token_seconds", "From arrival to the first token")
        yield self.inter_token.family("midflight_inter_token_seconds", "Between two tokens of a sequence")
        yield self.request.family("midflight_request_seconds", "From arrival to the last token")
        responses = CounterMetricFamily("midflight_http_responses", "HTTP responses", labels=["route", "status"])
        for (route, status), count in sorted(self.responses.items()):
            responses.add_metric([route, str(status)], count)
        yield responses
        yield _counter("midflight_client_disconnects", "Requests whose client went away", self.client_disconnects)
        yield _counter("midflight_slow_readers", "Streams aborted because nobody read them", self.slow_readers)
        yield from _health_families(self._engine)
        yield from _engine_families(self._engine.stats())
        yield from _layout_families(self._engine.layout_view())
        yield from _worker_families(self._engine.workers_view())
        yield from self.transitions.families()
        yield from pilot_families(self._engine.pilot_stats())


class _Families(Collector):
    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.families()

    def describe(self) -> Iterable[Metric]:
        return ()


def _health_families(engine: Engine) -> Iterator[Metric]:
    health = engine.health()
    yield _gauge("midflight_serving", "1 when requests are taken", health.status == "serving")
    yield _gauge("midflight_workers_joined", "Workers that are members", health.workers_joined)
    yield _gauge("midflight_workers_wanted", "Workers that the layout needs", health.workers_wanted)


def _engine_families(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("midflight_requests_waiting", "Sequences in the queue", stats.waiting)
    yield _gauge("midflight_requests_running", "Sequences being computed", stats.running)
    blocks = GaugeMetricFamily("midflight_kv_blocks", "KV blocks by state", labels=["state"])
    blocks.add_metric(["total"], stats.kv_blocks_total)
    blocks.add_metric(["used"], stats.kv_blocks_used)
    blocks.add_metric(["cached"], stats.kv_blocks_cached)
    yield blocks
    yield _gauge(
        "midflight_kv_used_ratio", "KV blocks in use, of all", stats.kv_blocks_used / max(1, stats.kv_blocks_total)
    )
    yield _counter("midflight_prefix_cache_query_tokens", "Prompt tokens looked up", stats.prefix_queries_tokens)
    yield _counter(
        "midflight_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens
    )
    yield _counter("midflight_prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
    yield _counter("midflight_generated_tokens", "Tokens generated", stats.generated_tokens)
    yield _counter("midflight_steps", "Steps sent through the pipeline", stats.steps)
    yield _counter("midflight_steps_ahead", "Those sent before what they read was sampled", stats.steps_ahead)
    yield _counter("midflight_discarded_tokens", "Sampled after a sequence's end", stats.discarded_tokens)
    yield _counter("midflight_preemptions", "Sequences put back to be computed again", stats.preemptions)
    finished = CounterMetricFamily("midflight_requests_finished", "Sequences that ended", labels=["reason"])
    for reason, count in sorted(stats.finished.items()):
        finished.add_metric([reason], count)
    yield finished
    yield _counter("midflight_requests_rejected", "Requests refused at admission", stats.rejected)
    yield _counter("midflight_stale_results", "Results of an older epoch, dropped", stats.stale_results)
    yield _counter("midflight_workers_lost", "Workers that died or left", stats.workers_lost)
    yield from _stage_families(stats)


def _layout_families(layout: dict[str, Any]) -> Iterator[Metric]:
    yield _gauge("midflight_layout_epoch", "Grows at every new layout, and at every try at one", layout["epoch"] or 0)
    yield _gauge("midflight_transition_active", "1 while a change of layout is under way", bool(layout["transition"]))
    counts: dict[str, int] = {}
    for stage in layout["stages"]:
        start, stop = stage["layers"]
        counts[stage["worker"]] = counts.get(stage["worker"], 0) + stop - start
    layers = GaugeMetricFamily("midflight_worker_layers", "Layers that a worker serves", labels=["worker"])
    for worker, count in counts.items():
        layers.add_metric([worker], count)
    yield layers


def _worker_families(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["worker", "device", "device_name", "emulation"]
    info = GaugeMetricFamily("midflight_worker_info", "1; emulation is empty, or what slows the worker", labels=labels)
    for worker in workers:
        pace, roofline = worker.get("pace"), worker.get("roofline")
        emulation = f"prefill={pace[0]:.4g},decode={pace[1]:.4g}" if pace else ""
        emulation = f"read={roofline[0]:.4g},token={roofline[1]:.4g}" if roofline else emulation
        names = (str(worker.get(key, "")) for key in labels[:3] if key != "worker")
        info.add_metric([worker["name"], *names, emulation], 1.0)
    yield info


def _stage_families(stats: EngineStats) -> Iterator[Metric]:
    labels = ["hop", "worker"]
    steps = CounterMetricFamily("midflight_stage_steps", "Steps that a stage ran", labels=labels)
    times = CounterMetricFamily(
        "midflight_stage_seconds", "Where a stage's time went; idle is the bubble", labels=[*labels, "activity"]
    )
    for stage in stats.stages:
        where = [str(stage.hop), stage.worker]
        steps.add_metric(where, stage.steps)
        times.add_metric([*where, "idle"], stage.idle_s)
        times.add_metric([*where, "queued"], stage.queued_s)
        times.add_metric([*where, "compute"], stage.compute_s)
        times.add_metric([*where, "sample"], stage.sample_s)
    yield steps
    yield times


def _counter(name: str, help: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, help, value=value)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=float(value))
