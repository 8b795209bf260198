"""Step prices: a line through the cost model at the load at hand, for the worker that sets the pace."""

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from scheduler.lanes import BatchLoad
from scheduler.planning.cost import Facts, Work, stage_seconds
from scheduler.planning.emulation import speed_of_make
from scheduler.prices import step_prices
from tests.planning_harness import make_spec

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
