"""The simulator: nothing is lost, the same seed gives the same run, layouts change, and it agrees with the forecast."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from runtime.layout import Layout, layout_from_counts
from scheduler.batching import BatchingConfig, StepPrices
from scheduler.planning.autopilot import Settings
from scheduler.planning.cost import Facts
from scheduler.planning.forecast import Device, Pipeline
from scheduler.planning.traffic import Serving, Slo, Traffic
from scheduler.simulation import batcher
from scheduler.simulation.policies import Oracle, Planning, Policy
from scheduler.simulation.results import device_seconds, summarise
from scheduler.simulation.shapes import load_shape
from scheduler.simulation.simulator import Outcome, Simulation, SimulationError
from scheduler.simulation.trace import Trace, make_trace
from scheduler.simulation.worker import SimWorker
from scheduler.simulation.world import Rates, name_devices, parse_devices

SPEC = load_shape("llama-3-8b")
SHIFT = "poisson:rate=4,prompt=128,output=64,duration=20+poisson:rate=4,prompt=1500,output=4,duration=20"


class Scripted(Policy):
    """Asks for given layouts at given times (or as soon after as it may)."""

    def __init__(self, wishes: Sequence[tuple[float, Layout]]) -> None:
        self.wishes = list(wishes)
        self.failures: list[str] = []
        self.num_committed = 0

    def decide(self, now_s: float, present: Layout, *, is_free: bool) -> Layout | None:
        if self.wishes and now_s >= self.wishes[0][0] and is_free:
            return self.wishes.pop(0)[1]
        return None

    def committed(self, now_s: float, layout: Layout) -> None:
        self.num_committed += 1

    def failed(self, now_s: float, layout: Layout, why: str) -> None:
        self.failures.append(why)


def make(
    cluster: str,
    counts: Sequence[int],
    policy: Policy | None = None,
    *,
    rates: Rates | None = None,
    seed: int = 0,
    kv_bytes: int = 4 << 30,
    concurrency: int = 0,
    max_running: int = 64,
    num_microbatches: int = 0,
) -> Simulation:
    devices = name_devices(parse_devices(cluster), ())
    batching = BatchingConfig(num_microbatches or len(counts), 512, max_running, 500, 16, prefix_cache=False)
    return Simulation(
        SPEC, devices, counts, policy or Policy(), batching=batching, rates=rates or Rates(load_bytes_per_s=20e9),
        seed=seed, kv_bytes=kv_bytes, concurrency=concurrency,
    )  # fmt: skip


def run(
    cluster: str, counts: Sequence[int], trace: Trace, policy: Policy | None = None, **options: Any
) -> tuple[Simulation, Outcome]:
    simulation = make(cluster, counts, policy, **options)
    return simulation, simulation.run(trace)


def check(simulation: Simulation, outcome: Outcome, trace: Trace) -> None:
    """Every request of the trace ended with all its tokens or was refused; nothing is held for any of them."""
    head = simulation.head
    assert len(outcome.records) == len(trace)
    for record in outcome.records:
        assert record.outcome in ("length", "rejected"), record
        assert record.num_tokens == (record.output_tokens if record.outcome == "length" else 0), record
        if record.num_tokens:
            assert record.arrival_s < record.first_s <= record.last_s <= outcome.end_s, record
    assert head.batcher.counters.generated_tokens == sum(record.num_tokens for record in outcome.records)
    assert head.batcher.num_unfinished == 0
    assert head.pool.num_used == 0
    assert head.layout is not None
    for worker in simulation.workers.values():
        ends = {name for name in ("embedding", "lm_head") if getattr(head.layout, f"{name}_worker") == worker.name}
        assert worker.holds() == {*head.layout.layers_of(worker.name), *ends}
        assert worker.serves() == ([head.layout.epoch] if worker.name in head.layout.workers else [])


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_lost_whatever_changes(seed: int) -> None:
    rng = random.Random(seed)
    names = ["w0", "w1", "w2", "w3"]
    wishes = []
    for _ in range(6):
        chosen = rng.sample(names, rng.randint(1, 4))
        cuts = sorted(rng.sample(range(1, 32), len(chosen) - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, 32], strict=True)]
        wishes.append((rng.uniform(0, 40), layout_from_counts(0, chosen, counts)))
    policy = Scripted(sorted(wishes, key=lambda wish: wish[0]))
    trace = make_trace("poisson:rate=6,prompt=300,output=80,cv=1,duration=40", seed)
    kv_bytes = rng.choice([512 << 20, 1 << 30])
    rates = Rates(load_bytes_per_s=20e9, flight_s=rng.choice([0.0, 0.002]), noise=rng.choice([0.0, 0.3]))
    simulation, outcome = run("a100:2,l40s:2", (16, 16), trace, policy, kv_bytes=kv_bytes, rates=rates, seed=seed)
    check(simulation, outcome, trace)
    assert policy.num_committed + len(policy.failures) + len(policy.wishes) == 6
    assert policy.num_committed >= 1, policy.failures


def test_a_full_cache_is_no_reason_to_refuse_a_worker_more() -> None:
    """Sequences preempt each other for want of blocks, so that more are about to be used than there are: a third worker brings them."""
    policy = Scripted([(10.0, layout_from_counts(0, ["w0", "w1", "w2"], [11, 11, 10]))])
    trace = make_trace("poisson:rate=12,prompt=300,output=80,cv=1,duration=20", 0)
    simulation, outcome = run("a100:3", (16, 16), trace, policy, kv_bytes=96 << 20)
    check(simulation, outcome, trace)
    assert simulation.head.batcher.counters.preemptions > 0
    assert policy.num_committed == 1, policy.failures


def test_pages_make_room_for_the_layers_of_workers_that_are_given_back() -> None:
    """Pools take nearly all that the weights leave, and follow them: for a load that one worker carries, four are one too many."""
    trace = make_trace("poisson:rate=0.5,prompt=300,output=40,duration=240", 0)
    devices = name_devices(parse_devices("l40s:4"), ())
    simulation = Simulation(
        SPEC, devices, (8, 8, 8, 8), Policy(), batching=BatchingConfig(4, 512, 64, 500, 16, prefix_cache=False),
        rates=Rates(load_bytes_per_s=20e9), memory_fraction=0.9, autopilot="on", piloting=Settings(elastic=True),
    )  # fmt: skip
    outcome = simulation.run(trace)
    check(simulation, outcome, trace)
    assert simulation.head.layout is not None
    (left,) = simulation.head.layout.workers
    assert [change.outcome for change in outcome.changes] == ["committed"]
    worker = simulation.head.members.workers[left]
    assert 0 < worker.num_pages * worker.page_bytes <= worker.room_bytes - worker.weight_bytes


def test_the_same_seed_is_the_same_run() -> None:
    trace = make_trace(SHIFT, 3)
    wish = (5.0, layout_from_counts(0, ["w1", "w2"], [20, 12]))
    runs = [
        run("a100:2,l40s:1", (16, 16), trace, Scripted([wish]), rates=Rates(noise=0.2), seed=seed)[1]
        for seed in (7, 7, 8)
    ]
    times = [[(r.first_s, r.last_s) for r in outcome.records] for outcome in runs]
    assert times[0] == times[1]
    assert times[0] != times[2]
    assert (
        make_trace(SHIFT, 3).arrival_s.tolist() == trace.arrival_s.tolist() != make_trace(SHIFT, 4).arrival_s.tolist()
    )


@pytest.mark.parametrize("cluster", ["a100:2,l40s:1", "a100:1,l40s:2"])
def test_cohorts_change_nothing(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace("poisson:rate=8,prompt=200,output=100,cv=1,duration=30", 5)
    outcomes: list[Outcome] = []
    for least in (batcher.MIN_MEMBERS, 1 << 30):
        monkeypatch.setattr(batcher, "MIN_MEMBERS", least)
        wishes = [(8.0, layout_from_counts(0, ["w1", "w2"], [20, 12])), (20.0, layout_from_counts(0, ["w0"], [32]))]
        simulation, outcome = run(cluster, (16, 16), trace, Scripted(wishes), rates=Rates(noise=0.2), kv_bytes=1 << 30)
        check(simulation, outcome, trace)
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]


def test_a_run_that_is_cut_short_knows_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace("poisson:rate=8,prompt=200,output=400,duration=30", 5)
    outcomes: list[Outcome] = []
    for least in (batcher.MIN_MEMBERS, 1 << 30):
        monkeypatch.setattr(batcher, "MIN_MEMBERS", least)
        outcomes.append(make("a100:2", (16, 16)).run(trace, max_s=12.345))
    assert outcomes[0].unfinished
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_whole_pipeline_at_once_is_hop_by_hop(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace("poisson:rate=8,prompt=200,output=50,cv=1,duration=20", 5)
    runs = []
    for is_hop_by_hop in (False, True):
        if is_hop_by_hop:
            monkeypatch.setattr(SimWorker, "_open_passage", lambda worker, plan: False)
        rates = Rates(noise=noise, flight_s=0.001)
        simulation, outcome = run("a100:2,l40s:2,l4:1", (7, 9, 6, 6, 4), trace, rates=rates, kv_bytes=1 << 30)
        check(simulation, outcome, trace)
        runs.append([(r.first_s, r.last_s) for r in outcome.records])
        runs[-1].append((outcome.end_s, sum(outcome.busy_s.values())))
    assert np.array(runs[0]) == pytest.approx(np.array(runs[1]), rel=1e-9)


def test_a_change_of_layout_commits_and_moves_what_it_says() -> None:
    trace = make_trace("poisson:rate=4,prompt=256,output=256,duration=30", 1)
    policy = Scripted([(10.0, layout_from_counts(0, ["w0", "w2", "w1"], [10, 10, 12]))])
    simulation, outcome = run("a100:2,l40s:1", (16, 16), trace, policy, num_microbatches=3)
    check(simulation, outcome, trace)
    (report,) = outcome.changes
    assert (report.outcome, report.layers_moved) == ("committed", 10)
    assert report.weight_bytes == sum(SPEC.layer_bytes[10:20])
    assert report.sequences_flipped > 0
    assert report.snapshot_bytes > 0
    assert report.mirror_bytes > 0
    assert report.recomputed_tokens == 0
    assert 0 < report.total_s < 20
    (_, before, _), (began_s, _, during), (at_s, after, used) = outcome.layouts
    assert before.workers == ("w0", "w1")
    assert (after.workers, used, set(during)) == (("w0", "w2", "w1"), ("w0", "w2", "w1"), {"w0", "w1", "w2"})
    assert 10.0 <= began_s < at_s
    assert device_seconds(outcome)["w2"] == pytest.approx(outcome.end_s - began_s)


def test_a_change_without_room_is_aborted_and_nothing_is_lost() -> None:
    trace = make_trace("poisson:rate=2,prompt=256,output=64,duration=20", 1)
    policy = Scripted([(5.0, layout_from_counts(0, ["w1"], [32]))])
    simulation, outcome = run("a100:1,l4:1", (20, 12), trace, policy, kv_bytes=14 << 30)
    check(simulation, outcome, trace)
    assert outcome.changes[0].outcome == "aborted"
    assert "arriving units" in policy.failures[0]
    assert simulation.head.layout is not None
    assert simulation.head.layout.workers == ("w0", "w1")


def test_free_changes_take_no_time_but_the_protocols() -> None:
    trace = make_trace("poisson:rate=4,prompt=256,output=256,duration=30", 1)
    target = layout_from_counts(0, ["w1", "w0"], [16, 16])
    paid, free = (
        run(
            "a100:2", (16, 16), trace, Scripted([(10.0, target)]), rates=Rates(load_bytes_per_s=2e9, free_changes=free)
        )[1]
        for free in (False, True)
    )
    assert free.changes[0].outcome == paid.changes[0].outcome == "committed"
    assert free.changes[0].total_s < 1.0 < paid.changes[0].total_s


def test_a_saturated_accelerator_changes_at_the_pace_of_its_memory() -> None:
    """Twenty layers of 0.4 GB there, and their KV, while both devices have no idle time: 2 % of the time would be a minute and more."""
    trace = make_trace("poisson:rate=10,prompt=512,output=128,duration=60", 1)
    target = layout_from_counts(0, ["w0", "w1"], [26, 6])
    _, still = run("a100:2", (16, 16), trace, concurrency=64)
    policy = Scripted([(10.0, target), (20.0, layout_from_counts(0, ["w0", "w1"], [16, 16]))])
    simulation, outcome = run("a100:2", (16, 16), trace, policy, concurrency=64, rates=Rates(load_bytes_per_s=5e9))
    check(simulation, outcome, trace)
    assert [report.outcome for report in outcome.changes] == ["committed", "committed"]
    for report in outcome.changes:
        assert report.weight_bytes > 4e9
        assert report.total_s < 10.0
    assert simulation.workers["w0"].busy_s / outcome.end_s > 0.6
    moved = [r.tpot_s for r in outcome.records if r.first_s < 9.0]
    kept = [r.tpot_s for r in still.records if r.first_s < 9.0]
    assert sum(moved) / len(moved) < 1.1 * sum(kept) / len(kept), "those that run meanwhile hardly feel it"


def test_a_model_that_does_not_fit_is_refused() -> None:
    trace = make_trace("poisson:rate=1", 0)
    with pytest.raises(SimulationError, match="--kv-memory 12,288 MiB does not fit on w0"):
        run("l4:1", (32,), trace, kv_bytes=12 << 30)
    devices = name_devices([(label, speed, 10 << 30) for label, speed, _ in parse_devices("l4:2")], ())
    with pytest.raises(SimulationError, match="weights do not fit"):
        Simulation(SPEC, devices, (31, 1), Policy(), batching=BatchingConfig(), rates=Rates()).run(trace)


def test_the_oracle_changes_when_the_load_does() -> None:
    trace = make_trace(SHIFT.replace("=20", "=60"), 2)
    raw = parse_devices("a100:1,l40s:2")
    devices = name_devices(raw, ())
    planning = Planning.of(Facts(SPEC), devices, Serving(max_running=64), "latency", Slo())
    policy = Oracle(planning, trace, 60.0)
    simulation, outcome = run("a100:1,l40s:2", (32,), trace, policy, rates=Rates(free_changes=True), num_microbatches=3)
    check(simulation, outcome, trace)
    committed = [report for report in outcome.changes if report.outcome == "committed"]
    assert committed, policy.notes()
    assert any(59.0 <= at_s <= 63.0 for at_s, _, _ in outcome.layouts), outcome.layouts


@pytest.mark.parametrize(("clients", "prompt", "output"), [(4, 128, 128), (32, 128, 128), (24, 1024, 16)])
def test_it_agrees_with_the_forecast(clients: int, prompt: int, output: int) -> None:
    """Both rest on one cost model; what a layout makes of it they work out in quite different ways."""
    cluster, counts = "a100:1,l40s:1", (22, 10)
    trace = make_trace(f"poisson:rate=10,prompt={prompt},output={output},duration={max(20, 2 * clients)}", 0)
    simulation, outcome = run(cluster, counts, trace, concurrency=clients)
    figures = summarise(outcome, simulation.devices, Slo())
    devices = [Device(d.worker, d.speed) for d in simulation.devices]
    layout = layout_from_counts(1, ["w0", "w1"], counts)
    traffic = Traffic(prompt_tokens=prompt, output_tokens=output, concurrency=clients)
    forecast = Pipeline(Facts(SPEC), devices, layout, traffic, Serving(max_running=64)).forecast()
    assert figures["requests_per_s"] == pytest.approx(forecast.requests_per_s, rel=0.15)
    assert figures["tpot_s"]["mean"] == pytest.approx(forecast.tpot_s, rel=0.2)


def test_prompts_in_pieces_keep_a_deep_pipeline_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts make convoys: behind each of them every stage waits."""
    cluster, counts, clients = "a100:8", (4,) * 8, 128
    rng = np.random.default_rng(1)
    outputs = np.full(3 * clients, 128)
    outputs[:clients] = rng.integers(1, 129, clients)  # so that they do not end together
    trace = Trace("", np.zeros(3 * clients), np.full(3 * clients, 512), outputs)

    def rate() -> float:
        simulation, outcome = run(cluster, counts, trace, concurrency=clients, max_running=clients, kv_bytes=16 << 30)
        check(simulation, outcome, trace)
        return summarise(outcome, simulation.devices, Slo())["requests_per_s"]

    in_pieces = rate()
    devices = [Device(d.worker, d.speed) for d in name_devices(parse_devices(cluster), ())]
    layout = layout_from_counts(1, [d.worker for d in devices], counts)
    traffic = Traffic(prompt_tokens=512, output_tokens=128, concurrency=clients)
    forecast = Pipeline(Facts(SPEC), devices, layout, traffic, Serving(max_running=clients)).forecast()
    assert in_pieces == pytest.approx(forecast.requests_per_s, rel=0.15)
    monkeypatch.setattr(StepPrices, "piece", lambda self, unread, num_stages, in_flight: unread)
    assert in_pieces > 1.2 * rate()


@pytest.mark.parametrize(
    ("cluster", "counts", "rate", "prompt", "output"),
    [("a100:8", (4,) * 8, 90, 512, 32), ("a100:8", (4,) * 8, 20, 2000, 64), ("a100:2", (16, 16), 15, 512, 64)],
)
def test_the_first_token_comes_when_the_forecast_says(
    cluster: str, counts: Sequence[int], rate: float, prompt: int, output: int
) -> None:
    """Requests arrive at a rate below what is sustained, and prompts are read in pieces that are smaller than a step's room."""
    trace = make_trace(f"poisson:rate={rate},prompt={prompt},output={output},duration=30", 0)
    simulation, outcome = run(cluster, counts, trace, max_running=256, kv_bytes=16 << 30)
    figures = summarise(outcome, simulation.devices, Slo())
    devices = [Device(d.worker, d.speed) for d in simulation.devices]
    layout = layout_from_counts(1, [d.worker for d in devices], counts)
    traffic = Traffic(requests_per_s=rate, prompt_tokens=prompt, output_tokens=output, concurrency=0)
    forecast = Pipeline(Facts(SPEC), devices, layout, traffic, Serving(max_running=256)).forecast()
    assert not forecast.saturated
    assert forecast.ttft_s == pytest.approx(figures["ttft_s"]["mean"], rel=0.3)
    assert forecast.tpot_s == pytest.approx(figures["tpot_s"]["mean"], rel=0.2)
