"""Step prices: a line through the cost model at the load at hand, for the worker that sets the pace."""

import random

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from scheduler.batching import BatchingConfig
from scheduler.lanes import BatchLoad, StepPrices
from scheduler.planning.cost import Facts, Work, stage_seconds
from scheduler.planning.emulation import speed_of_make
from scheduler.prices import step_prices
from tests.planning_harness import make_spec
from tests.sim.cluster import NUM_LAYERS, SimCluster

FACTS = Facts(make_spec())
SPEED = speed_of_make(FACTS.spec, "cpu", "AMD EPYC", 1, None)


def make_layout(*counts: int) -> Layout:
    segments, start = [], 0
    for index, count in enumerate(counts):
        segments.append(Segment(f"w{index}", LayerRange(start, start + count)))
        start += count
    return Layout(epoch=1, segments=tuple(segments), num_layers=30)


def price(layout: Layout, load: BatchLoad):
    return step_prices(FACTS, layout, dict.fromkeys(layout.workers, SPEED), load)


@pytest.mark.parametrize("rows", [1.0, 16.0, 200.0])
@pytest.mark.parametrize("context", [16.0, 4000.0])
def test_the_line_goes_through_the_predicted_time_and_never_above_it_for_fewer_rows(
    rows: float, context: float
) -> None:
    prices = price(make_layout(30), BatchLoad(rows, context, 500.0))

    def predicted(count: float) -> float:
        return stage_seconds(FACTS, SPEED, Work(count, context, 0.0, 0.0, count), range(30), True)

    line = prices.step_s + prices.decode_s(round(rows), round(rows * context))
    assert line == pytest.approx(predicted(rows), rel=1e-6)
    assert prices.step_s + prices.decode_s(1, round(context)) <= predicted(1.0) * (1 + 1e-9)
    assert min(prices.step_s, prices.context_s) >= 0.0
    assert min(prices.row_s, prices.prefill_s) > 0.0


def test_the_slowest_worker_sets_the_prices() -> None:
    load = BatchLoad(16.0, 200.0, 100.0)
    even, long_first = price(make_layout(15, 15), load), price(make_layout(29, 1), load)
    assert long_first.prefill_s > 1.5 * even.prefill_s
    alone = stage_seconds(FACTS, SPEED, Work(16.0, 200.0, 0.0, 0.0, 16.0), range(29), False)
    assert long_first.step_s + long_first.decode_s(16, 3200) == pytest.approx(alone, rel=1e-6)


def test_a_worker_with_two_segments_pays_for_both() -> None:
    load = BatchLoad(8.0, 100.0, 0.0)
    parts = [Segment("w0", LayerRange(0, 10)), Segment("w1", LayerRange(10, 12)), Segment("w0", LayerRange(12, 30))]
    both = price(Layout(epoch=1, segments=tuple(parts), num_layers=30), load)
    less = price(make_layout(28, 2), load)
    assert both.step_s + both.decode_s(8, 800) > less.step_s + less.decode_s(8, 800)


def test_a_long_prompt_costs_more_a_token() -> None:
    load = BatchLoad(8.0, 100.0, 64.0)
    longer = BatchLoad(8.0, 100.0, 4000.0)
    assert price(make_layout(15, 15), longer).prefill_s > price(make_layout(15, 15), load).prefill_s


def test_steps_with_a_prompt_are_priced_as_the_model_has_them() -> None:
    load = BatchLoad(16.0, 200.0, 1000.0)
    prices = price(make_layout(17, 13), load)
    for tokens, seconds in prices.with_prompt:
        work = Work(16.0, 200.0, tokens, max(1000.0, tokens / 2), 16.0)
        stages = [
            stage_seconds(FACTS, SPEED, work, range(17), False),
            stage_seconds(FACTS, SPEED, work, range(17, 30), True),
        ]
        assert seconds == pytest.approx(max(stages), rel=1e-6)


@pytest.mark.parametrize(("num_stages", "in_flight"), [(2, 2), (2, 3), (3, 3), (8, 8), (8, 2), (8, 1), (40, 40)])
@pytest.mark.parametrize("unread", [1, 15, 17, 100, 513, 4000, 100_000])
def test_pieces_are_through_nearly_as_soon_as_any(unread: int, num_stages: int, in_flight: int) -> None:
    rng = random.Random(unread * num_stages)
    sizes = [1 << exponent for exponent in range(4, 14)]
    for _ in range(20):
        law = rng.uniform(1, 50), rng.uniform(0.01, 2.0), rng.choice([1.0, 1.5, 4.0])
        prices = StepPrices(with_prompt=tuple((n, step_s(n, *law)) for n in sizes))
        piece = prices.piece(unread, num_stages, in_flight)
        assert 1 <= piece <= unread
        soonest = min(through_s(unread, n, num_stages, in_flight, *law) for n in sizes)
        # the last piece may not be full, and a piece may be a little larger than it was priced
        assert through_s(unread, piece, num_stages, in_flight, *law) <= soonest * 1.25


def step_s(tokens: int, flat_s: float, token_s: float, sharpness: float) -> float:
    return (flat_s**sharpness + (tokens * token_s) ** sharpness) ** (1 / sharpness)


def through_s(unread: int, tokens: int, num_stages: int, in_flight: int, *law: float) -> float:
    """When the last of pieces of so many tokens leaves stages that take alike, each as long as a piece takes; at most so many are in between."""
    ends: list[float] = []
    stage_free = 0.0
    seconds = step_s(min(tokens, unread), *law)
    for number in range(-(-unread // tokens)):
        begun = max(stage_free, ends[number - in_flight] if number >= in_flight else 0.0)
        stage_free = begun + seconds
        ends.append(begun + num_stages * seconds)
    return ends[-1]


def test_a_single_stage_or_prices_that_are_not_known_cut_nothing() -> None:
    known = StepPrices(with_prompt=((16, 1.0), (32, 1.1)))
    assert known.piece(500, 1, 2) == 500
    assert StepPrices().piece(500, 8, 8) == 500
    assert known.piece(0, 8, 8) == 0


def test_the_first_prompts_of_a_layout_find_prices_though_nothing_decodes_yet() -> None:
    cluster = SimCluster(0, num_stages=2, batching=BatchingConfig(), num_blocks=64, num_spares=1)
    batcher = cluster.head.batcher
    assert not batcher.prices.with_prompt
    for index in range(1, 40):
        cluster.at(0.1 * index, cluster.tick)
    cluster.run(until=0.55)
    first = batcher.prices
    assert first.with_prompt, "the workers have joined, and nobody has asked anything"
    cluster.run(until=0.95)
    assert batcher.prices is first, "nothing has changed"
    segments = (Segment("w0", LayerRange(0, 1)), Segment("w2", LayerRange(1, NUM_LAYERS)))
    cluster.at(1.0, lambda: cluster.change(Layout(0, NUM_LAYERS, segments)))
    cluster.run(until=4.0)
    (report,) = cluster.head.reconfiguration.reports.values()
    assert report.outcome == "committed"
    assert batcher.prices is not first
