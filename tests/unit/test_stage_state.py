"""A worker's memory of sequences: what a plan becomes, and what it refuses."""

import pytest

from runtime.messages import Row, Sampling, SequenceStart, StepPlan
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
