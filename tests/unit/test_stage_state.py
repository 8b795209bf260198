"""A worker's memory of sequences: what a plan becomes, and what it refuses."""

import math

import pytest

from runtime.messages import AHEAD, Row, Sampling, SequenceStart, StepPlan, Tokens
from runtime.stage_state import PlanError, StageState, StepOrder

GREEDY = Sampling(temperature=0.0)


def plan(ordinal: int, rows: list[Row], released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(1, ordinal, 0, rows, list(released))


def begin(blocks: list[int], num_prompt: int = 5) -> SequenceStart:
    return SequenceStart(num_prompt, GREEDY, blocks, [])


def test_a_ragged_batch_of_chunks_and_decodes() -> None:
    state = StageState(block_size=4, num_hops_here=1)
    state.plan_batch(plan(0, [Row(1, 0, [11, 12, 13, 14, 15], [], True, begin([9, 8]))]))
    batch = state.plan_batch(
        plan(1, [Row(1, 5, [16], [], True), Row(2, 4, [21, 22, 23], [], False, begin([3, 5, 6], 12))])
    )
    assert batch.positions.tolist() == [5, 4, 5, 6]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert batch.context_lens.tolist() == [6, 7]
    assert batch.block_tables.tolist() == [[9, 8, 0], [3, 5, 6]]
    assert batch.tokens.tolist() == [16, 21, 22, 23]
    assert batch.new_blocks == [3, 5, 6]
    state.check_integrity()


def test_block_tables_grow() -> None:
    state = StageState(block_size=1, num_hops_here=1)
    state.plan_batch(plan(0, [Row(1, 0, [1], [], True, begin([0]))]))
    for position in range(1, 40):
        batch = state.plan_batch(plan(position, [Row(1, position, [1], [position], True)]))
    assert batch.block_tables.tolist() == [list(range(40))]


def test_a_worker_with_two_hops_applies_a_plan_once() -> None:
    state = StageState(block_size=4, num_hops_here=2)
    first = plan(0, [Row(1, 0, [1, 2], [], True, begin([0]))])
    batch = state.plan_batch(first)
    state.plan_batch(plan(1, [], released=(1,)))
    assert state.plan_batch(first) is batch
    assert batch.sequences[0].num_tokens == 2


@pytest.mark.parametrize(
    ("row", "story"),
    [
        (Row(7, 0, [1], [], True), "never began"),
        (Row(1, 3, [1], [], True), "continues at 3"),
        (Row(1, 2, [1, 2, 3], [], True), "needs room for 5 tokens"),
    ],
)
def test_what_cannot_be_is_refused(row: Row, story: str) -> None:
    state = StageState(block_size=4, num_hops_here=1)
    state.plan_batch(plan(0, [Row(1, 0, [1, 2], [], True, begin([0]))]))
    with pytest.raises(PlanError, match=story):
        state.plan_batch(plan(1, [row]))


def test_plans_out_of_order_are_refused() -> None:
    with pytest.raises(PlanError, match="step 1 of epoch 1 came when 0 was due"):
        StageState(block_size=4, num_hops_here=1).plan_batch(plan(1, []))


def test_order_is_restored_and_duplicates_dropped() -> None:
    order: StepOrder[str] = StepOrder()
    assert order.push(1, "b")
    assert order.pop() is None
    assert order.push(0, "a")
    assert not order.push(1, "b again")
    assert [order.pop(), order.pop(), order.pop()] == ["a", "b", None]
    assert not order.push(0, "a again")


def test_only_what_the_head_has_is_kept() -> None:
    state = StageState(block_size=4, num_hops_here=1)
    rows = [Row(s, 0, [1], [], True, begin([s])) for s in (1, 2, 3)]
    state.plan_batch(plan(0, rows))
    state.retain_only([2], newest=2)
    assert state.num_sequences == 2, "3 began after the list was made"


def test_a_step_ahead_of_its_tokens_gets_them_whatever_comes_first() -> None:
    state = StageState(block_size=4, num_hops_here=1)
    rows = [Row(1, 0, [11, 12], [], True, begin([9], 2)), Row(2, 0, [21], [], True, begin([3], 1))]
    state.plan_batch(plan(0, rows))
    ahead = StepPlan(
        1,
        1,
        0,
        [Row(3, 0, [31, 32], [], True, begin([4], 2)), Row(2, 1, [AHEAD], [], True)],
        [],
        oldest=0,
        is_ahead=True,
    )
    assert state.fed_s(plan(1, [])) == -math.inf
    assert state.fed_s(ahead) is None
    state.sampled(Tokens(1, 0, [1, 2], [13, 22]), 5.0)
    state.sampled(Tokens(1, 0, [1, 2], [13, 22]), 7.0)
    assert state.fed_s(ahead) == 5.0
    batch = state.plan_batch(ahead)
    state.feed(batch)
    assert batch.tokens.tolist() == [31, 32, 22]
    assert batch.context_lens.tolist() == [2, 2]
    state.plan_batch(StepPlan(1, 2, 0, [], [], oldest=1))
    assert state.fed_s(ahead) is None, "what nobody can want any more is forgotten"


def test_a_step_cannot_go_on_with_what_was_never_sampled() -> None:
    state = StageState(block_size=4, num_hops_here=1)
    state.plan_batch(plan(0, [Row(1, 0, [11], [], True, begin([9], 1))]))
    state.sampled(Tokens(1, 0, [], []), 5.0)
    batch = state.plan_batch(StepPlan(1, 1, 0, [Row(1, 1, [AHEAD], [], True)], [], oldest=0, is_ahead=True))
    with pytest.raises(PlanError, match="did not sample"):
        state.feed(batch)
