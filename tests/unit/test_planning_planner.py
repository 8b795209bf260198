"""Plans: the best of all layouts by the planner's own forecast, memory, ties, objectives, and what a forecast adds up to."""

import math

import msgspec
import numpy as np
import pytest

from runtime.layout import Layout, layout_from_counts
from scheduler.batching import MIN_CHUNK_TOKENS
from scheduler.lanes import BatchLoad
from scheduler.planning.cost import TERMS, Facts, Speed, corner
from scheduler.planning.devices import lookup
from scheduler.planning.forecast import Cluster, Device, Pipeline
from scheduler.planning.planner import default_counts, plan
from scheduler.planning.plans import NoPlan, Plan
from scheduler.planning.traffic import Objective, Pieces, Serving, Slo, Traffic, mean_steps, piece_of
from scheduler.prices import step_prices
from tests.planning_harness import every_split, llama_70b, make_spec

SERVING = Serving()
WHOLE = Pieces(1e12, 0.0, 1.0)
"""Nothing is cut but by the size of a step."""


def device(name: str, kind: str, *, slow: float = 1.0, memory: int = 0) -> Device:
    return Device(name, Speed(lookup(kind), (slow,) * len(TERMS)), memory)


def cpus(*slow: float) -> list[Device]:
    return [device(f"w{index}", "cpu", slow=factor) for index, factor in enumerate(slow)]


def score(facts: Facts, devices: list[Device], layout: Layout, traffic: Traffic, objective: Objective) -> float:
    pipeline = Pipeline(facts, devices, layout, traffic, SERVING)
    forecast = pipeline.forecast()
    if objective == "throughput":
        return forecast.capacity_requests_per_s
    return -forecast.request_s(traffic)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("concurrency", [1, 2, 40])
@pytest.mark.parametrize("slow", [(1.0, 1.0, 1.0), (1.0, 3.0, 1.5), (2.0, 1.0, 8.0)])
def test_no_layout_is_better(objective: Objective, concurrency: int, slow: tuple[float, ...]) -> None:
    facts, devices = Facts(make_spec(num_layers=6, vocab=8192)), cpus(*slow)
    traffic = Traffic(prompt_tokens=60, output_tokens=20, concurrency=concurrency)
    best = max(
        score(facts, devices, layout_from_counts(0, [devices[d].worker for d in order], counts), traffic, objective)
        for k in range(1, 4)
        for order, counts in every_split(3, 6, k)
    )
    found = plan(facts, devices, traffic, objective=objective)
    assert found.score == pytest.approx(best, rel=1e-6)
    assert score(facts, devices, found.layout, traffic, objective) == pytest.approx(best, rel=1e-6)


def test_the_start_on_two_cores() -> None:
    facts = Facts(make_spec())
    assert default_counts(facts, cpus(1.0, 1.0)) == (17, 13)
    assert sum(default_counts(facts, cpus(*[1.0] * 8))) == 30
    assert min(default_counts(facts, cpus(*[1.0] * 12))) >= 1
    fast, slow = default_counts(facts, cpus(1.0, 2.0))
    assert fast > 1.5 * slow
    with pytest.raises(ValueError, match="31 stages for 30 layers"):
        default_counts(facts, cpus(*[1.0] * 31))


def test_the_present_layout_wins_ties() -> None:
    facts, devices, traffic = Facts(make_spec()), cpus(1.0, 1.0, 1.0), Traffic()
    first = plan(facts, devices, traffic)
    names = [segment.worker for segment in first.layout.segments]
    swapped = layout_from_counts(7, names[::-1], first.layout.counts())
    again = plan(facts, devices, traffic, present=swapped)
    assert not again.is_change
    assert again.layout == swapped
    assert again.gain == 0.0
    worse = plan(facts, devices, traffic, present=layout_from_counts(7, names, [2, 2, 26]))
    assert worse.is_change
    assert worse.gain > 0.5
    assert worse.layout.workers == tuple(names)  # the order is kept where it does not matter
    assert worse.layout.epoch == 7


def test_layers_that_differ_need_no_present_layout() -> None:
    """The order of the devices is preferred among equals, but there are no present cuts to stay near to."""
    facts = Facts(make_spec(num_layers=6, windows=(64, None) * 3))
    traffic = Traffic(prompt_tokens=400, concurrency=32)
    found = plan(facts, cpus(1.0, 1.5, 1.0), traffic, num_stages=3)
    assert found.layout.num_hops == 3
    present = layout_from_counts(0, found.layout.workers, found.layout.counts())
    assert not plan(facts, cpus(1.0, 1.5, 1.0), traffic, num_stages=3, present=present).is_change


def test_decoding_and_prefill_want_different_splits() -> None:
    facts = Facts(llama_70b())
    devices = [device(f"w{i}", kind, memory=200 * 10**9) for i, kind in enumerate(["a100", "l40s"])]
    prefill = plan(facts, devices, Traffic(prompt_tokens=2000, output_tokens=2, concurrency=64), num_stages=2)
    decode = plan(facts, devices, Traffic(prompt_tokens=16, output_tokens=800, concurrency=16), num_stages=2)
    of_a100 = [len(p.layout.layers_of("w0")) for p in (prefill, decode)]
    assert 36 <= of_a100[0] <= 46
    assert 52 <= of_a100[1] <= 60


def test_a_device_that_costs_more_than_it_brings_is_left_out() -> None:
    facts, devices = Facts(make_spec(num_layers=8)), cpus(1.0, 20.0)
    alone = plan(facts, devices, Traffic(concurrency=1), objective="latency")
    assert alone.layout.workers == ("w0",)
    assert alone.unused == ("w1",)
    assert [c.why_not != "" for c in alone.candidates] == [False, True]
    assert plan(facts, cpus(1.0, 1.0), Traffic(concurrency=32)).layout.num_hops == 2


def test_memory_decides_how_many_stages_there_must_be() -> None:
    facts = Facts(llama_70b())
    few = [device(f"w{i}", "a100", memory=80 * 10**9) for i in range(4)]
    traffic = Traffic(prompt_tokens=1000, output_tokens=200, concurrency=32)
    found = plan(facts, few, traffic, num_stages=0, objective="throughput")
    assert found.layout.num_hops >= 3
    for name in found.layout.workers:
        held = len(found.layout.layers_of(name)) * facts.layer_bytes[0]
        held += len(found.layout.layers_of(name)) * 32 * 1104 * facts.kv_bytes
        assert held <= 0.9 * 80e9
    with pytest.raises(NoPlan, match=r"llama-3-70b needs 14.*the devices have 72.0 GB \(w0 72.0\)"):
        plan(facts, few[:1], traffic)
    tight = plan(facts, few[:3], Traffic(prompt_tokens=6000, output_tokens=200, concurrency=200))
    assert tight.forecast.limited_by.startswith("KV memory of w")
    assert 1 <= tight.forecast.max_sequences < 200


def test_an_overload_is_no_want_of_memory() -> None:
    """No layout can take it, so the latency of all is endless; those that fit are still plans."""
    facts = Facts(llama_70b())
    devices = [device(f"w{i}", "a100", memory=80 * 10**9) for i in range(4)]
    traffic = Traffic(requests_per_s=1000.0, prompt_tokens=512, output_tokens=128, concurrency=0.0)
    present = layout_from_counts(0, [d.worker for d in devices], [20] * 4)
    found = plan(facts, devices, traffic, objective="latency", present=present)
    assert not found.is_change
    assert found.forecast.saturated
    assert plan(facts, devices, traffic, objective="latency").layout.num_hops >= 2


def test_a_gain_over_nothing_is_said_in_words() -> None:
    facts, devices = Facts(llama_70b()), [device("fast", "a100"), device("slow", "l4")]
    present = layout_from_counts(0, ["slow", "fast"], [78, 2])
    traffic = Traffic(requests_per_s=0.5, prompt_tokens=512, output_tokens=128, concurrency=0.0)
    found = plan(facts, devices, traffic, objective="goodput", present=present, slo=Slo(5.0, 0.2))
    assert found.present_score == 0.0 < found.score
    assert "the proposal can, the present layout cannot" in found.explain()
    assert "inf" not in found.explain()


def test_goodput_meets_the_slo() -> None:
    facts = Facts(llama_70b())
    devices = [device(f"w{i}", "a100", memory=80 * 10**9) for i in range(4)]
    slo = Slo(ttft_s=2.0, tpot_s=0.15)
    traffic = Traffic(requests_per_s=1.0, prompt_tokens=500, output_tokens=100, concurrency=256)
    found = plan(facts, devices, traffic, objective="goodput", slo=slo)
    assert found.score > 0
    at = msgspec.structs.replace(traffic, requests_per_s=0.97 * found.score)
    forecast = Pipeline(facts, devices, found.layout, at, SERVING).forecast()
    assert forecast.ttft_s <= slo.ttft_s
    assert forecast.tpot_s <= slo.tpot_s
    beyond = msgspec.structs.replace(traffic, requests_per_s=1.1 * found.score)
    over = Pipeline(facts, devices, found.layout, beyond, SERVING).forecast()
    assert over.saturated or over.ttft_s > slo.ttft_s or over.tpot_s > slo.tpot_s
    impossible = plan(facts, devices, traffic, objective="goodput", slo=Slo(ttft_s=0.001, tpot_s=0.001))
    assert impossible.score == 0


def test_a_plan_can_be_printed_and_sent() -> None:
    facts, devices = Facts(make_spec()), cpus(1.0, 2.0)
    present = layout_from_counts(3, ["w0", "w1"], [15, 15])
    found = plan(facts, devices, Traffic(requests_per_s=1.0), present=present)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Plan).layout == found.layout
    text = found.explain()
    assert "bottleneck" in text
    assert "present" in text
    assert "proposed" in text


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_stages": 3}, "3 stages for 2 devices and 30 layers"),
        ({"present": layout_from_counts(0, ["w0"], [29])}, "29 layers, the model has 30"),
        ({"present": layout_from_counts(0, ["w9"], [30])}, "names worker w9"),
    ],
)
def test_nonsense_is_refused(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan(Facts(make_spec()), cpus(1.0, 1.0), Traffic(), **kwargs)


def test_traffic_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 of each"):
        Traffic(output_tokens=0)
    with pytest.raises(ValueError, match="concurrency"):
        Traffic(concurrency=0)


# -- the mean step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [WHOLE, Pieces(100.0, 5.0, 4.0), Pieces(12.0, 1.0, 1.5)])
@pytest.mark.parametrize("num_sequences", [1, 2, 3.5, 16, 200])
@pytest.mark.parametrize(("prompt", "output"), [(128, 128), (1469, 13), (16, 256), (4000, 1), (1, 1)])
def test_steps_carry_what_requests_need(num_sequences: float, prompt: int, output: int, pieces: Pieces) -> None:
    traffic = Traffic(prompt_tokens=prompt, output_tokens=output)
    steps = mean_steps(traffic, SERVING, pieces, 4, 4, num_sequences)
    (share,), (requests,), works = steps.prefill_share, steps.requests, steps.works
    decoded = (1 - share) * works.decode_rows[0] + share * works.decode_rows[1]
    assert works.prefill_tokens[0] == 0
    assert share * works.prefill_tokens[1] == pytest.approx(requests * prompt, rel=1e-6)
    if share != 1.0 or num_sequences > 4:
        assert decoded == pytest.approx(requests * (output - 1), rel=1e-6, abs=1e-9)
    assert steps.num_tokens[0] <= SERVING.max_step_tokens * (1 + 1e-9)
    assert works.num_tokens[1] <= SERVING.max_step_tokens * (1 + 1e-9)
    # Little's law, unless the steps are full
    rounds = steps.in_flight[0] * output + steps.prefill_steps[0] - 1
    assert requests * rounds <= num_sequences * (1 + 1e-9)
    if num_sequences > 4 and steps.num_tokens[0] < 0.99 * SERVING.max_step_tokens:
        assert requests * rounds == pytest.approx(max(1, num_sequences))


@pytest.mark.parametrize(("kind", "rows"), [("a100", 1.0), ("a100", 32.0), ("l4", 8.0), ("cpu", 1.0), ("cpu", 16.0)])
@pytest.mark.parametrize("num_stages", [2, 4, 10])
@pytest.mark.parametrize("prompt", [128, 512, 4000])
def test_the_mean_piece_is_the_batchers(prompt: int, num_stages: int, kind: str, rows: float) -> None:
    facts = Facts(make_spec() if kind == "cpu" else llama_70b())
    devices = [device(f"w{index}", kind) for index in range(num_stages)]
    layout = layout_from_counts(1, [d.worker for d in devices], [facts.num_layers // num_stages] * num_stages)
    load = BatchLoad(rows, 200.0, prompt / 2)
    prices = step_prices(facts, layout, {d.worker: d.speed for d in devices}, load)
    left, count = prompt, 0
    while left:
        piece = max(MIN_CHUNK_TOKENS, prices.piece(left, num_stages, num_stages))
        left, count = max(0, left - piece), count + 1
    pieces = Cluster(facts, devices).pieces
    even = corner(pieces.even + num_stages * pieces.fixed, rows, pieces.sharpness)
    assert 0.5 < float(piece_of(prompt, even, pieces.sharpness, num_stages)) / (prompt / count) < 1.8


def test_one_stage_reads_whole_prompts() -> None:
    for sharpness in (1.0, 4.0):
        assert piece_of(4000.0, 12.5, sharpness, 1.0) == 4000.0


def test_steps_of_many_loads_are_those_of_each() -> None:
    traffic, numbers, stages = Traffic(prompt_tokens=700, output_tokens=40), [1.0, 3.0, 17.0, 240.0], [1, 4, 8, 8]
    pieces = Pieces(100.0, 5.0, 4.0)
    together = mean_steps(traffic, SERVING, pieces, np.array(stages), np.array(stages), np.array(numbers))
    for row, (number, k) in enumerate(zip(numbers, stages, strict=True)):
        alone = mean_steps(traffic, SERVING, pieces, k, k, number)
        assert together.requests[row] == alone.requests[0]
        assert together.works.samples[[row, row + 4]].tolist() == alone.works.samples.tolist()


def test_a_forecast_adds_up() -> None:
    facts, devices = Facts(make_spec()), cpus(1.0, 1.0)
    traffic = Traffic(output_tokens=512, concurrency=32)
    forecast = Pipeline(facts, devices, layout_from_counts(0, ["w0", "w1"], [20, 10]), traffic, SERVING).forecast()
    assert forecast.bottleneck == 0
    assert forecast.stages[0].utilization > forecast.stages[1].utilization
    assert 0.8 < forecast.stages[0].utilization < 0.99, "it waits for what is held up behind a piece of a prompt"
    assert forecast.tokens_per_s == pytest.approx(512 * forecast.requests_per_s)
    # each of the 32 streams gets a token per round, and spends a few more on its prompt
    assert forecast.requests_per_s == pytest.approx(32 / (512 * forecast.tpot_s), rel=0.02)
    open_ = msgspec.structs.replace(traffic, requests_per_s=forecast.capacity_requests_per_s / 2)
    half = Pipeline(facts, devices, layout_from_counts(0, ["w0", "w1"], [20, 10]), open_, SERVING).forecast()
    assert not half.saturated
    assert half.tpot_s < forecast.tpot_s
    assert half.num_sequences < forecast.num_sequences
    flood = msgspec.structs.replace(traffic, requests_per_s=2 * forecast.capacity_requests_per_s)
    assert Pipeline(facts, devices, layout_from_counts(0, ["w0", "w1"], [20, 10]), flood, SERVING).forecast().saturated


def test_burstier_arrivals_wait_longer() -> None:
    facts, devices, layout = Facts(make_spec()), cpus(1.0, 1.0), layout_from_counts(0, ["w0", "w1"], [17, 13])
    rates = [
        Pipeline(facts, devices, layout, Traffic(requests_per_s=6.0, concurrency=64, arrival_cv=cv), SERVING)
        .forecast()
        .ttft_s
        for cv in (0.5, 1.0, 3.0)
    ]
    assert rates[0] < rates[1] < rates[2]
    assert math.isfinite(rates[2])


def test_a_worker_with_two_segments_does_both() -> None:
    facts, devices, traffic = Facts(make_spec()), cpus(1.0, 1.0), Traffic(concurrency=32)
    twice = layout_from_counts(0, ["w0", "w1", "w0"], [10, 10, 10])
    forecast = Pipeline(facts, devices, twice, traffic, SERVING).forecast()
    once = Pipeline(facts, devices, layout_from_counts(0, ["w0", "w1"], [20, 10]), traffic, SERVING).forecast()
    assert forecast.capacity_requests_per_s < once.capacity_requests_per_s
    assert forecast.stages[0].worker == forecast.stages[2].worker == "w0"
    assert forecast.bottleneck in (0, 2)


def test_of_alike_workers_those_are_taken_that_hold_the_layers_already() -> None:
    """From eight stages to three, and back to eight: everybody who serves had some of it, or serves nothing that another had."""
    facts, devices, traffic = Facts(make_spec()), cpus(*[1.0] * 8), Traffic()
    present = layout_from_counts(3, ["w4", "w2", "w7", "w0", "w5", "w1", "w3", "w6"], [4, 4, 4, 4, 4, 4, 4, 2])
    few = plan(facts, devices, Traffic(concurrency=6), present=present, num_stages=3).layout
    assert few.num_hops == 3
    assert all(set(few.layers_of(worker)) & set(present.layers_of(worker)) for worker in few.workers)
    assert few.embedding_worker == "w4"
    assert few.lm_head_worker == "w6"
    many = plan(facts, devices, traffic, present=few, num_stages=8).layout
    kept = {worker for worker in few.workers if set(few.layers_of(worker)) & set(many.layers_of(worker))}
    assert kept | {many.lm_head_worker} == set(few.workers)


def test_alike_workers_do_not_change_places_for_noise() -> None:
    """One of two is 2 % slower, and the LM head makes the last stage the larger one: by itself that is worth a swap."""
    facts, devices = Facts(make_spec(num_layers=12, vocab=40_000)), cpus(1.0, 1.02)
    traffic = Traffic(prompt_tokens=64, output_tokens=64, concurrency=32)
    free = plan(facts, devices, traffic)
    swapped = layout_from_counts(3, free.layout.workers[::-1], free.layout.counts())
    eager = plan(facts, devices, traffic, present=swapped)
    assert eager.is_change, "without an error it is a gain like any other"
    calm = plan(facts, devices, traffic, present=swapped, error=0.05)
    assert not calm.is_change
    assert calm.gain == 0.0
    assert "within the model's own error of 5.0%" in calm.explain()
    bad = layout_from_counts(3, swapped.workers, [3, 9])
    mended = plan(facts, devices, traffic, present=bad, error=0.05)
    assert mended.is_change, "a gain beyond the error is proposed"
    assert mended.layout.workers == bad.workers, "with the order that there is"


def test_a_better_order_is_proposed_where_it_is_more_than_noise() -> None:
    facts, devices = Facts(make_spec(num_layers=12, vocab=200_000)), cpus(1.0, 4.0)
    traffic = Traffic(prompt_tokens=16, output_tokens=64, concurrency=8)
    free = plan(facts, devices, traffic)
    assert free.layout.num_hops == 2 or len(free.layout.workers) == 1
    backwards = layout_from_counts(3, ["w0", "w1"], [11, 1])
    found = plan(facts, devices, traffic, present=backwards, error=0.02, num_stages=2)
    assert found.is_change
    assert found.layout.workers == ("w1", "w0"), "the LM head belongs on the fast one"
