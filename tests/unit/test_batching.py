"""The batcher by itself: what goes into a step, who waits, who is preempted, what is refused."""

import math

import pytest

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import LayerRange
from runtime.messages import AHEAD, Row, Sampling, StepPlan, StepResult, TokenLogprobs
from scheduler.batching import (
    FLIP_CHUNK_TOKENS,
    MIN_CHUNK_TOKENS,
    NEAR_S,
    Batcher,
    BatchingConfig,
    Output,
    StepPrices,
)
from scheduler.lanes import Opening
from scheduler.request import AdmissionError, Request
from scheduler.transition import Snapshot

GREEDY = Sampling(temperature=0.0)


def make_batcher(num_blocks: int = 64, **options: object) -> Batcher:
    config = BatchingConfig(**{"block_size": 4, "max_step_tokens": 16, **options})  # type: ignore[arg-type]
    pool, directory = BlockPool(0, config.block_size), Directory()
    batcher = Batcher(config, pool, directory)
    directory.open_epoch(1, (("w0", LayerRange(0, 2)),))
    batcher.open_epoch(1, num_blocks, max_context=1000)
    return batcher


def make_request(num_prompt: int, max_tokens: int = 4, first: int = 0, **options: object) -> Request:
    prompt = list(range(first, first + num_prompt))
    return Request(request_id="r", prompt=prompt, sampling=GREEDY, max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def step(batcher: Batcher) -> StepPlan:
    plan = batcher.next_step(0.0)
    assert plan is not None
    return plan


def result_of(plan: StepPlan, token: int = 7) -> StepResult:
    tokens = [token for row in plan.rows if row.sample]
    return StepResult(plan.epoch, plan.ordinal, plan.microbatch, tokens, [], [], [])


def answer(batcher: Batcher, plan: StepPlan, token: int = 7) -> list[Output]:
    outputs = batcher.complete(result_of(plan, token))
    batcher.check_integrity()
    return outputs


def open_second(batcher: Batcher, snapshot: Snapshot, num_stages: int = 1) -> None:
    batcher._directory.open_epoch(2, (("w1", LayerRange(0, 2)),))
    batcher.open_next(Opening(2, snapshot, num_stages))


def test_a_prompt_is_read_in_chunks_that_follow_each_other_without_waiting() -> None:
    batcher = make_batcher(num_microbatches=3)
    batcher.submit(1, make_request(40), 0.0)
    plans = [step(batcher) for _ in range(3)]
    assert [(p.rows[0].start, len(p.rows[0].tokens)) for p in plans] == [(0, 16), (16, 16), (32, 8)]
    assert [p.rows[0].sample for p in plans] == [False, False, True]
    assert plans[0].rows[0].begin is not None
    assert plans[1].rows[0].begin is None
    assert batcher.next_step(0.0) is None
    assert answer(batcher, plans[0]) == []
    assert batcher.next_step(0.0) is None, "everything of this sequence is in flight"


def test_decode_rows_go_first_and_share_the_step_with_a_chunk() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(4), 0.0)
    answer(batcher, step(batcher))
    batcher.submit(2, make_request(30, first=100), 0.0)
    plan = step(batcher)
    assert [(row.sequence, len(row.tokens)) for row in plan.rows] == [(1, 1), (2, 15)]
    assert plan.rows[0].tokens == [7]
    assert plan.rows[0].start == 4
    assert plan.rows[0].new_blocks, "position 4 needs a second block of 4"


def test_microbatches_share_the_decoding_sequences_evenly() -> None:
    batcher = make_batcher(num_microbatches=2, max_step_tokens=64)
    for sequence in range(1, 7):
        batcher.submit(sequence, make_request(4, max_tokens=50, first=10 * sequence), 0.0)
    answer(batcher, step(batcher))
    first, second = step(batcher), step(batcher)
    assert [len(first.rows), len(second.rows)] == [3, 3]
    assert {row.sequence for plan in (first, second) for row in plan.rows} == set(range(1, 7))


def test_microbatches_share_by_what_sequences_cost_not_by_their_number() -> None:
    batcher = make_batcher(num_microbatches=2, max_step_tokens=128)
    batcher.prices = StepPrices(row_s=1.0, context_s=0.1)
    batcher.submit(1, make_request(60, max_tokens=50), 0.0)
    for sequence in range(2, 8):
        batcher.submit(sequence, make_request(4, max_tokens=50, first=10 * sequence), 0.0)
    answer(batcher, step(batcher))
    first, second = step(batcher), step(batcher)
    assert [[row.sequence for row in plan.rows] for plan in (first, second)] == [[1, 2], [3, 4, 5, 6, 7]]


def test_two_unequal_sequences_are_not_put_into_one_step() -> None:
    batcher = make_batcher(num_microbatches=2, max_step_tokens=128)
    batcher.prices = StepPrices(row_s=1.0, context_s=0.1)
    batcher.submit(1, make_request(4, max_tokens=50), 0.0)
    batcher.submit(2, make_request(60, max_tokens=50, first=100), 0.0)
    answer(batcher, step(batcher))
    first, second = step(batcher), step(batcher)
    assert [[row.sequence for row in plan.rows] for plan in (first, second)] == [[1], [2]]


@pytest.mark.parametrize("row_s", [0.1, 1 / 3, 1e-7, 0.7])
def test_equal_sequences_are_shared_evenly_whatever_the_rounding(row_s: float) -> None:
    batcher = make_batcher(512, num_microbatches=2, max_step_tokens=256, prefix_cache=False)
    batcher.prices = StepPrices(row_s=row_s, context_s=row_s / 7)
    for sequence in range(1, 33):
        batcher.submit(sequence, make_request(4, max_tokens=50, first=10 * sequence), 0.0)
    answer(batcher, step(batcher))
    for _ in range(5):
        plans = [step(batcher), step(batcher)]
        assert [len(plan.rows) for plan in plans] == [16, 16]
        for plan in plans:
            answer(batcher, plan)


def test_prompts_are_cut_for_the_sake_of_the_goal() -> None:
    batcher = make_batcher(num_microbatches=2, max_step_tokens=128, tpot_goal_s=0.1)
    batcher.submit(1, make_request(100, max_tokens=50), 0.0)
    batcher.prices = StepPrices(step_s=0.005, row_s=0.01, context_s=0.0001, prefill_s=0.001)
    plan = step(batcher)
    assert len(plan.rows[0].tokens) == 100, "nobody decodes yet, so nobody is delayed"
    answer(batcher, plan)
    batcher.submit(2, make_request(100, max_tokens=50, first=30), 0.0)
    with_decode = step(batcher)
    room_s = 0.1 / 2 - 0.005 - 0.01 - 101 * 0.0001
    assert [len(row.tokens) for row in with_decode.rows] == [1, int(room_s / 0.001)]
    assert [len(row.tokens) for row in step(batcher).rows] == [int((0.1 / 2 - 0.005) / 0.001)]


def test_a_goal_that_cannot_be_met_does_not_stop_prompts() -> None:
    batcher = make_batcher(num_microbatches=1, max_step_tokens=128, tpot_goal_s=0.01)
    batcher.prices = StepPrices(step_s=0.02, row_s=0.01, prefill_s=0.001)
    batcher.submit(1, make_request(8, max_tokens=50), 0.0)
    answer(batcher, step(batcher))
    batcher.submit(2, make_request(100, max_tokens=50, first=30), 0.0)
    assert [len(row.tokens) for row in step(batcher).rows] == [1, MIN_CHUNK_TOKENS]


def test_a_pipeline_reads_a_prompt_in_pieces_and_one_stage_reads_it_whole() -> None:
    for num_stages, sizes in ((1, [96]), (4, [32, 32, 32])):
        batcher = make_batcher(num_microbatches=4, max_step_tokens=512, look_ahead="never")
        batcher.num_stages = num_stages
        batcher.prices = StepPrices(with_prompt=((16, 1.0), (32, 1.1), (64, 2.0), (128, 4.0)))
        batcher.submit(1, make_request(96, max_tokens=50), 0.0)
        assert [len(step(batcher).rows[0].tokens) for _ in sizes] == sizes
        assert batcher.next_step(0.0) is None


PIPELINE = StepPrices(with_prompt=((16, 1.0), (32, 1.5), (64, 2.8), (128, 5.4), (256, 10.6)))


def first_piece(num_waiting: int, num_blocks: int = 4000, **options: object) -> int:
    """Tokens of the first step on two stages, with so many prompts of 96 tokens."""
    batcher = make_batcher(num_blocks, **{"num_microbatches": 2, "max_step_tokens": 512, **options})
    batcher.num_stages, batcher.prices = 2, PIPELINE
    for sequence in range(num_waiting):
        batcher.submit(sequence, make_request(96, max_tokens=4, first=100 * sequence), 0.0)
    return sum(len(row.tokens) for row in step(batcher).rows)


def test_who_waits_makes_the_pieces_larger_as_far_as_there_is_room() -> None:
    assert [first_piece(n) for n in (1, 6, 60)] == [32, 64, 128]
    assert first_piece(6, num_blocks=25) == 34, "whom the pool, of 100 tokens, cannot hold yet is not read soon"
    assert first_piece(6, max_running=2) == first_piece(2), "nor whom there is no place for"


def test_a_piece_is_no_larger_than_a_step_or_a_goal_has_it() -> None:
    assert first_piece(60, max_step_tokens=100) == 100
    batcher = make_batcher(400, num_microbatches=2, max_step_tokens=512, tpot_goal_s=0.1)
    batcher.num_stages = 2
    batcher.submit(1, make_request(4, max_tokens=50), 0.0)
    answer(batcher, step(batcher))
    for sequence in range(2, 8):
        batcher.submit(sequence, make_request(96, max_tokens=4, first=100 * sequence), 0.0)
    batcher.prices = StepPrices(step_s=0.005, row_s=0.01, prefill_s=0.001, with_prompt=PIPELINE.with_prompt)
    assert sum(len(row.tokens) for row in step(batcher).rows) == 1 + 35


def test_many_short_prompts_are_taken_together_by_one_stage() -> None:
    batcher = make_batcher(400, num_microbatches=1, max_step_tokens=512)
    batcher.prices = PIPELINE
    for sequence in range(200):
        batcher.submit(sequence, make_request(3, max_tokens=4, first=10 * sequence), 0.0)
    assert len(step(batcher).rows) == 171, "of the last one two tokens"


def test_a_long_prompt_that_runs_is_cut_though_no_block_is_free() -> None:
    batcher = make_batcher(24, num_microbatches=4, max_step_tokens=512, prefix_cache=False)
    batcher.num_stages, batcher.prices = 2, PIPELINE
    for sequence in (1, 2):
        batcher.submit(sequence, make_request(92, max_tokens=4, first=100 * sequence), 0.0)
    assert [sum(len(row.tokens) for row in step(batcher).rows) for _ in range(3)] == [32, 32, 16]


def test_a_step_in_flight_is_never_sent_twice_and_the_number_in_flight_is_bounded() -> None:
    batcher = make_batcher(num_microbatches=2)
    for sequence in (1, 2, 3):
        batcher.submit(sequence, make_request(16, first=100 * sequence), 0.0)
    plans = [step(batcher), step(batcher), step(batcher)]
    assert [p.ordinal for p in plans] == [0, 1, 2]
    assert [[row.sequence for row in p.rows] for p in plans] == [[1], [2], [1, 3]]
    assert batcher.next_step(0.0) is None
    answer(batcher, plans[0])
    assert step(batcher).ordinal == 3
    assert batcher.next_step(0.0) is None


def test_without_looking_ahead_no_more_than_the_microbatches_are_in_flight() -> None:
    batcher = make_batcher(num_microbatches=2, look_ahead="never")
    for sequence in (1, 2, 3):
        batcher.submit(sequence, make_request(16, first=100 * sequence), 0.0)
    plans = [step(batcher), step(batcher)]
    assert not any(p.is_followed or p.is_ahead for p in plans)
    assert batcher.next_step(0.0) is None
    answer(batcher, plans[0])
    assert step(batcher).ordinal == 2


def test_a_step_is_formed_ahead_of_the_token_it_reads() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(6, max_tokens=3), 0.0)
    first, second = step(batcher), step(batcher)
    assert first.is_followed
    assert not first.is_ahead
    assert (second.is_ahead, second.oldest) == (True, first.ordinal)
    assert second.rows == [Row(1, 6, [AHEAD], [], True)]
    assert batcher.next_step(0.0) is None
    assert [o.tokens for _, o in answer(batcher, first, 11)] == [[11]]
    third = step(batcher)
    assert third.rows[0].start == 7
    assert [o.tokens for _, o in answer(batcher, second, 12)] == [[12]]
    assert batcher.next_step(0.0) is None, "the last token needs no step behind it"
    assert [(o.tokens, o.finish_reason) for _, o in answer(batcher, third, 13)] == [([13], "length")]
    assert batcher.counters.discarded_tokens == 0


def test_what_was_computed_beyond_a_sequences_end_is_dropped() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(6, max_tokens=30, stop_token_ids=frozenset([9])), 0.0)
    batcher.submit(2, make_request(6, max_tokens=30, first=50), 0.0)
    first, second = step(batcher), step(batcher)
    assert [row.sequence for row in second.rows] == [1, 2]
    outputs = batcher.complete(StepResult(1, first.ordinal, 0, [9, 12], [], [], []))
    assert [(s, o.finish_reason) for s, o in outputs] == [(1, "stop"), (2, None)]
    third = step(batcher)
    assert [row.sequence for row in third.rows] == [2]
    assert third.released == [1], "behind the step that is still on its way"
    assert [(s, o.tokens) for s, o in answer(batcher, second, 13)] == [(2, [13])]
    assert batcher.counters.discarded_tokens == 1
    assert batcher.num_running == 1


def test_results_that_overtake_others_wait_for_them() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(6, max_tokens=30), 0.0)
    first, second = step(batcher), step(batcher)
    assert answer(batcher, second, 12) == []
    assert answer(batcher, second, 12) == []
    assert batcher.counters.stale_results == 1
    assert [o.tokens for _, o in answer(batcher, first, 11)] == [[11], [12]]
    assert step(batcher).rows[0].tokens == [12]


def test_a_block_is_published_when_all_its_tokens_are_known() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(7, max_tokens=30), 0.0)
    first, _ = step(batcher), step(batcher)
    batcher.submit(2, Request("r", [*range(7), 11, 99], GREEDY, 1), 0.0)
    assert batcher._pool.num_cached + len(batcher._sequences[1].digests) == 1, (
        "the second block ends with a token to come"
    )
    answer(batcher, first, 11)
    third = step(batcher)
    assert [(row.sequence, row.start) for row in third.rows] == [(1, 8), (2, 8)], "both of its blocks are found"


def test_nobody_is_preempted_for_a_step_ahead() -> None:
    batcher = make_batcher(num_blocks=4, num_microbatches=1, prefix_cache=False, max_step_tokens=64)
    batcher.submit(1, make_request(8, max_tokens=8), 0.0)
    batcher.submit(2, make_request(7, max_tokens=8, first=50), 0.0)
    first, second = step(batcher), step(batcher)
    assert [row.sequence for row in second.rows] == [2], "the other one has no room yet"
    answer(batcher, first)
    assert batcher.counters.preemptions == 0
    third = step(batcher)
    assert batcher.counters.preemptions == 1
    assert [row.sequence for row in third.rows] == [1]
    assert answer(batcher, second) == []


def test_nothing_is_formed_ahead_while_sequences_flip() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(6, max_tokens=30), 0.0)
    first, second = step(batcher), step(batcher)
    batcher.guard(1)
    open_second(batcher, Snapshot([], 0))
    answer(batcher, first)
    assert batcher.next_step(0.0) is None
    answer(batcher, second)
    flipped = step(batcher)
    assert (flipped.epoch, flipped.is_ahead) == (2, False)
    ahead = step(batcher)
    assert (ahead.epoch, ahead.is_ahead) == (2, True), "all have gone over, though cached blocks are yet to come"
    batcher.retire_old()
    answer(batcher, flipped)
    answer(batcher, ahead)
    assert [step(batcher).is_ahead, step(batcher).is_ahead] == [False, True]


def test_once_all_have_gone_over_there_are_as_many_microbatches_as_the_next_layout_has_stages() -> None:
    """However long the rest of the cache is copied: on two stages three would only be smaller."""
    batcher = make_batcher(num_microbatches=0, look_ahead="never")
    batcher.num_stages = 3
    for index in range(6):
        batcher.submit(1 + index, make_request(2, max_tokens=30, first=10 * index), 0.0)
    plans = [step(batcher), *filter(None, [batcher.next_step(0.0)])]
    batcher.guard(1)
    open_second(batcher, Snapshot([], 0), num_stages=2)
    assert batcher.num_microbatches == 3
    for plan in plans:
        answer(batcher, plan)
    flying = [step(batcher), step(batcher)]
    while any(sequence.epoch == 1 for sequence in batcher._sequences.values()):
        answer(batcher, flying.pop(0))
        flying.append(step(batcher))
    assert batcher.num_microbatches == 2
    assert {plan.epoch for plan in flying} == {2}


def test_first_come_first_served_even_when_a_later_one_would_fit() -> None:
    batcher = make_batcher(num_blocks=5, num_microbatches=1)
    batcher.submit(1, make_request(12, max_tokens=2), 0.0)
    plan = step(batcher)
    batcher.submit(2, make_request(16, max_tokens=2, first=50), 0.0)
    batcher.submit(3, make_request(4, max_tokens=2, first=90), 0.0)
    answer(batcher, plan)
    assert [row.sequence for row in step(batcher).rows] == [1]
    assert batcher.num_waiting == 2


def test_the_youngest_is_preempted_and_comes_back_with_all_its_tokens() -> None:
    batcher = make_batcher(num_blocks=4, num_microbatches=1, prefix_cache=False, max_step_tokens=64)
    batcher.submit(1, make_request(7, max_tokens=8), 0.0)
    batcher.submit(2, make_request(7, max_tokens=8, first=50), 0.0)
    outputs = []
    tokens: dict[int, list[int]] = {1: [], 2: []}
    for token in range(20, 60):
        plan = batcher.next_step(0.0)
        if plan is None:
            break
        outputs = answer(batcher, plan, token)
        for sequence, output in outputs:
            tokens[sequence] += output.tokens
    assert batcher.counters.preemptions >= 1
    assert batcher.num_unfinished == 0
    assert len(tokens[1]) == len(tokens[2]) == 8
    assert batcher.counters.finished == {"length": 2}


@pytest.mark.parametrize("is_squeezed", [True, False])
def test_nobody_is_admitted_to_the_room_that_running_ones_grow_into_during_a_change(is_squeezed: bool) -> None:
    """Else the change would cost its tokens twice: the newcomer is the one that is preempted."""
    batcher = make_batcher(num_blocks=7, num_microbatches=1, prefix_cache=False, max_step_tokens=64)
    batcher.submit(1, make_request(8, max_tokens=8), 0.0)
    answer(batcher, step(batcher))
    batcher.submit(2, make_request(8, max_tokens=8, first=50), 0.0)
    batcher.is_squeezed = is_squeezed
    running = [len({row.sequence for row in step.rows}) for step in drained(batcher)]
    assert max(running) == (1 if is_squeezed else 2)
    assert batcher.counters.preemptions == (0 if is_squeezed else 1)
    assert batcher.counters.finished == {"length": 2}


def test_what_the_pool_cannot_hold_during_a_change_lets_others_pass_and_comes_at_its_end() -> None:
    batcher = make_batcher(num_blocks=8, num_microbatches=1, prefix_cache=False, max_step_tokens=64)
    batcher.guard(1)
    batcher._pool.resize(4)
    batcher.is_squeezed = True
    batcher.submit(1, make_request(24, max_tokens=8), 0.0)
    batcher.submit(2, make_request(8, max_tokens=4, first=50), 0.0)
    assert [{row.sequence for row in step.rows} for step in drained(batcher)] == [{2}] * 4
    assert batcher.num_waiting == 1
    batcher._pool.resize(8)
    batcher.is_squeezed = False
    batcher.unguard()
    assert [{row.sequence for row in step.rows} for step in drained(batcher)] == [{1}] * 8
    assert (batcher.counters.preemptions, batcher.num_unfinished) == (0, 0)


def test_a_limit_that_falls_ends_what_would_pass_it() -> None:
    batcher = make_batcher(num_blocks=8, num_microbatches=1)
    batcher.submit(1, make_request(24, max_tokens=8), 0.0)
    batcher.submit(2, make_request(8, max_tokens=4, first=50), 0.0)
    plan = step(batcher)
    ((sequence, output),) = batcher.set_limit(7, 1 << 20)
    assert (sequence, output.finish_reason) == (1, "error")
    assert output.error == "the KV cache has shrunk to 28 tokens, and this request needs 32"
    with pytest.raises(AdmissionError, match="at most 28 are possible here"):
        batcher.submit(3, make_request(24, max_tokens=8), 0.0)
    answer(batcher, plan)
    assert {row.sequence for step in drained(batcher) for row in step.rows} == {2}


def test_who_runs_may_end_under_a_limit_that_falls() -> None:
    """What waits then ends, what comes later is refused, and who is preempted comes back although nobody is admitted."""
    batcher = make_batcher(num_blocks=10, num_microbatches=1, prefix_cache=False, max_step_tokens=64)
    batcher.submit(1, make_request(16, max_tokens=16), 0.0)
    batcher.submit(2, make_request(15, max_tokens=17, first=50), 0.0)
    answer(batcher, step(batcher))
    batcher.submit(3, make_request(30, max_tokens=2), 0.0)
    batcher.submit(4, make_request(3, max_tokens=2), 0.0)
    batcher.admits = False
    ((sequence, output),) = batcher.set_limit(5, 1 << 20, spares_running=True)
    assert (sequence, output.finish_reason) == (3, "error")
    with pytest.raises(AdmissionError, match="at most 20 are possible here"):
        batcher.submit(5, make_request(16, max_tokens=16), 0.0)
    rows = [row.sequence for plan in drained(batcher) for row in plan.rows]
    assert batcher.counters.preemptions, "there was room for both"
    assert set(rows) == {1, 2}
    assert batcher.counters.finished == {"error": 1, "length": 2}
    assert batcher.is_drained()
    batcher.admits = True
    assert {row.sequence for plan in drained(batcher) for row in plan.rows} == {4}


def drained(batcher: Batcher) -> list[StepPlan]:
    """The steps until nothing is left to do."""
    plans = []
    while (plan := batcher.next_step(0.0)) is not None:
        plans.append(plan)
        answer(batcher, plan)
    return plans


def test_a_result_for_a_preempted_attempt_is_dropped() -> None:
    batcher = make_batcher(num_microbatches=2)
    batcher.submit(1, make_request(4), 0.0)
    plan = step(batcher)
    batcher.close_epoch()
    batcher._directory.close_epoch(1)
    batcher._directory.open_epoch(2, (("w0", LayerRange(0, 2)),))
    batcher.open_epoch(2, 64, 1000)
    again = step(batcher)
    assert again.epoch == 2
    assert again.rows[0].begin is not None
    assert answer(batcher, plan) == []
    assert batcher.counters.stale_results == 1
    assert [o.tokens for _, o in answer(batcher, again)] == [[7]]


def test_a_shared_prompt_is_computed_once_even_while_it_is_in_flight() -> None:
    batcher = make_batcher(num_microbatches=4)
    batcher.submit(1, make_request(13), 0.0)
    step(batcher)
    batcher.submit(2, make_request(13), 0.0)
    row = step(batcher).rows[0]
    assert row.start == 12, "three full blocks of the first request are reused"
    assert row.begin is not None
    assert len(row.begin.blocks) == 4
    batcher.check_integrity()


def test_at_least_one_token_is_always_computed() -> None:
    batcher = make_batcher(num_microbatches=4)
    batcher.submit(1, make_request(8), 0.0)
    step(batcher)
    batcher.submit(2, make_request(8), 0.0)
    row = step(batcher).rows[0]
    assert (row.start, len(row.tokens)) == (4, 4)


def test_requests_that_ask_for_prompt_logprobs_or_no_cache_do_not_use_it() -> None:
    batcher = make_batcher(num_microbatches=4)
    batcher.submit(1, make_request(8), 0.0)
    step(batcher)
    batcher.submit(2, make_request(8, prompt_logprobs=0), 0.0)
    batcher.submit(3, make_request(8, use_prefix_cache=False), 0.0)
    plan = step(batcher)
    assert [(r.start, r.prompt_logprobs, r.next_token) for r in plan.rows] == [(0, 0, -1), (0, -1, -1)]


def test_abort_frees_blocks_at_once_and_the_workers_hear_of_it_with_the_next_step() -> None:
    batcher = make_batcher(num_microbatches=2)
    batcher.submit(1, make_request(8), 0.0)
    plan = step(batcher)
    batcher.abort(1, "abort")
    batcher.check_integrity()
    assert batcher._pool.num_used == 0
    assert answer(batcher, plan) == []
    batcher.submit(2, make_request(4), 0.0)
    assert step(batcher).released == [1]
    batcher.abort(1, "abort")
    batcher.abort(12345, "abort")


def test_stop_tokens_end_a_sequence_but_not_before_min_tokens() -> None:
    batcher = make_batcher(num_microbatches=1)
    request = Request("r", [1, 2], Sampling(temperature=0.0, min_tokens=1), 10, frozenset({7}))
    batcher.submit(1, request, 0.0)
    (_, first), *_ = answer(batcher, step(batcher), 7)
    assert first.finish_reason is None
    (_, second), *_ = answer(batcher, step(batcher), 7)
    assert (second.finish_reason, second.stopped_by) == ("stop", 7)


def test_reading_a_prompt_without_generating() -> None:
    batcher = make_batcher(num_microbatches=1)
    batcher.submit(1, make_request(8, max_tokens=0, prompt_logprobs=0), 0.0)
    plan = step(batcher)
    assert not plan.rows[0].sample
    (sequence, output), *_ = answer(batcher, plan)
    assert (sequence, output.tokens, output.finish_reason) == (1, [], "length")


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    batcher = make_batcher(num_blocks=4)
    with pytest.raises(AdmissionError, match=r"10 prompt tokens and max_tokens=7 need 17 .* at most 16") as caught:
        batcher.submit(1, make_request(10, max_tokens=7), 0.0)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")
    assert batcher.num_unfinished == 0


def test_a_full_queue_is_refused() -> None:
    batcher = make_batcher(max_queue=2)
    batcher.submit(1, make_request(4), 0.0)
    batcher.submit(2, make_request(4), 0.0)
    with pytest.raises(AdmissionError, match="queue is full") as caught:
        batcher.submit(3, make_request(4), 0.0)
    assert caught.value.status == 429


def test_not_finite_logits_end_only_that_sequence() -> None:
    batcher = make_batcher(num_microbatches=1, max_step_tokens=64)
    batcher.submit(1, make_request(4), 0.0)
    batcher.submit(2, make_request(4, first=50), 0.0)
    plan = step(batcher)
    outputs = batcher.complete(StepResult(1, plan.ordinal, 0, [-1, 9], [], [], [], failed=[1]))
    assert [(s, o.finish_reason) for s, o in outputs] == [(1, "error"), (2, None)]
    batcher.check_integrity()


def test_steps_after_the_old_epoch_wait_for_all_of_its_rows() -> None:
    """A block that the last old step wrote may be anybody's as soon as that step is back, while its rows are on their way."""
    batcher = make_batcher()
    batcher.submit(1, make_request(3, max_tokens=1), 0.0)
    answer(batcher, step(batcher))
    batcher.submit(2, make_request(3, max_tokens=1), 0.0)
    last_old = step(batcher)
    batcher.guard(1)
    open_second(batcher, Snapshot([], 0))
    batcher.submit(3, make_request(3), 0.0)
    early = step(batcher)
    assert (early.epoch, early.fence) == (2, last_old.ordinal - 1)
    answer(batcher, last_old)
    assert batcher.is_vacated()
    batcher.retire_old()
    batcher.submit(4, make_request(3), 0.0)
    assert step(batcher).fence == last_old.ordinal


def test_prompts_stay_out_of_the_way_of_a_flip() -> None:
    batcher = make_batcher(num_blocks=200, max_step_tokens=200, num_microbatches=1)
    batcher.submit(1, make_request(3, max_tokens=9), 0.0)
    answer(batcher, step(batcher))
    batcher.submit(2, make_request(100, first=500), 0.0)
    batcher.flip_due_s = 0.0
    plan = step(batcher)
    assert [len(row.tokens) for row in plan.rows] == [1, FLIP_CHUNK_TOKENS], "a small piece beside what decodes"
    answer(batcher, plan)
    batcher.guard(1)
    open_second(batcher, Snapshot([], 0))
    batcher.submit(3, make_request(100, first=900), 0.0)
    plan = step(batcher)
    assert [(row.sequence, len(row.tokens)) for row in plan.rows] == [(1, 1)], "alone: it flips with this step"
    answer(batcher, plan)
    plan = step(batcher)
    behind = [(row.sequence, len(row.tokens)) for row in plan.rows]
    left = 2 * FLIP_CHUNK_TOKENS - 100
    assert behind == [(1, 1), (2, 100 - FLIP_CHUNK_TOKENS), (3, left)], "and prompts go on behind it"
    answer(batcher, plan)
    whole = [(row.sequence, len(row.tokens)) for row in step(batcher).rows]
    assert whole == [(1, 1), (2, 1), (3, 100 - left)], (
        "in their usual pieces once all have flipped, though cached blocks are yet to come"
    )


@pytest.mark.parametrize(
    ("due_s", "prefill_s", "num_stages", "expected"),
    [
        (math.inf, 0.001, 2, 100),
        (0.321, 0.001, 2, 80),
        (0.241, 0.001, 1, 80),
        (0.401, 0.001, 2, 100),
        (0.02, 0.001, 2, FLIP_CHUNK_TOKENS),
        (NEAR_S, 0.0, 2, 100),
        (0.4001 * NEAR_S, 0.0, 2, 80),
        (-1.0, 0.001, 2, FLIP_CHUNK_TOKENS),
    ],
)
def test_what_is_read_before_a_flip_is_through_by_then(
    due_s: float, prefill_s: float, num_stages: int, expected: int
) -> None:
    batcher = make_batcher(num_blocks=200, max_step_tokens=200, num_microbatches=2)
    batcher.submit(1, make_request(3, max_tokens=9), 0.0)
    answer(batcher, step(batcher))
    batcher.num_stages, batcher.prices = num_stages, StepPrices(row_s=1.0, prefill_s=prefill_s)
    batcher.submit(2, make_request(100, first=500), 0.0)
    batcher.flip_due_s = due_s
    assert [len(row.tokens) for row in step(batcher).rows] == [1, expected]


def test_a_step_ahead_is_formed_late_so_that_who_arrives_is_in_it() -> None:
    batcher = make_batcher(num_microbatches=1, max_step_tokens=64)
    batcher.submit(1, make_request(6, max_tokens=30), 0.0)
    plan = step(batcher)
    for index in range(1, 4):
        ahead = step(batcher) if index == 1 else batcher.next_step(0.02 * index - 0.01)
        assert ahead is not None
        batcher.complete(result_of(plan), 0.02 * index)
        plan = ahead
    assert batcher.next_step(0.065) is None
    assert batcher.wake_s == pytest.approx(0.07)
    batcher.submit(2, make_request(6, first=50), 0.066)
    assert batcher.next_step(0.066) is None
    ahead = batcher.next_step(0.0701)
    assert ahead is not None
    assert [(row.sequence, row.tokens[0]) for row in ahead.rows] == [(1, AHEAD), (2, 50)]
    assert batcher.next_step(0.0702) is None
    assert batcher.wake_s == math.inf


def test_after_a_rest_nothing_is_waited_for() -> None:
    batcher = make_batcher(num_microbatches=1)
    for begun_s in (0.0, 1000.0):
        batcher.submit(int(begun_s) + 1, make_request(6, max_tokens=3, first=int(begun_s)), begun_s)
        plans = [batcher.next_step(begun_s), batcher.next_step(begun_s)]
        for index in range(3):
            plan = plans[index]
            assert plan is not None
            back_s = begun_s + 0.02 * (index + 1)
            batcher.complete(result_of(plan), back_s)
            plans += [batcher.next_step(back_s + 0.015)]
    assert batcher.num_unfinished == 0


def test_beside_workers_that_need_its_cores_the_head_looks_ahead_only_where_they_are_idle() -> None:
    batcher = make_batcher(num_microbatches=2, look_ahead="idle")
    batcher.submit(1, make_request(6, max_tokens=30), 0.0)
    first, ahead = step(batcher), step(batcher)
    assert (ahead.is_ahead, ahead.is_followed) == (True, True), "alone it leaves a stage idle"
    batcher.submit(2, make_request(6, max_tokens=30, first=50), 0.0)
    assert batcher.next_step(0.0) is None
    answer(batcher, first)
    other = step(batcher)
    assert ([row.sequence for row in other.rows], other.is_followed) == ([2], False)
    assert batcher.next_step(0.0) is None
    answer(batcher, ahead)
    third = step(batcher)
    assert ([row.sequence for row in third.rows], third.is_ahead, third.is_followed) == ([1], False, False)


def pump(batcher: Batcher, count: int) -> None:
    """So many steps, or as many as there are, each answered when the pipeline is full."""
    flying: list[StepPlan] = []
    for _ in range(count):
        while (plan := batcher.next_step(0.0)) is not None:
            flying.append(plan)
        if flying:
            answer(batcher, flying.pop(0))
    for plan in flying:
        answer(batcher, plan)


def copied_but_for_the_cached(batcher: Batcher) -> Snapshot:
    """A change has begun, and of its snapshot what runs has arrived."""
    batcher.guard(1)
    blocks, num_running = batcher.live_blocks()
    assert num_running < len(blocks)
    snapshot = Snapshot(blocks, 1)
    batcher.copied_by(snapshot)
    snapshot.advance(0, num_running)
    return snapshot


def test_who_grows_into_a_block_that_was_cached_does_not_wait_for_the_whole_snapshot() -> None:
    """In a pool that is full of cached blocks the next one handed out is the last one that the snapshot would come to."""
    batcher = make_batcher(num_blocks=24, num_microbatches=1, max_step_tokens=64, look_ahead="never")
    batcher.submit(1, make_request(80, max_tokens=1), 0.0)
    pump(batcher, 2)
    batcher.submit(2, make_request(14, max_tokens=40, first=500), 0.0)
    answer(batcher, step(batcher))
    assert not batcher._pool._free, "all others are cached"
    snapshot = copied_but_for_the_cached(batcher)
    for _ in range(3):
        answer(batcher, step(batcher))
    assert len(batcher._sequences[2].blocks) == 5, "it has grown"
    open_second(batcher, snapshot)
    assert step(batcher).epoch == 2
    assert not snapshot.is_complete


@pytest.mark.parametrize("num_streams", [2, 5])
def test_a_prompt_is_read_on_beside_streams_that_have_flipped(num_streams: int) -> None:
    """It begins with cached blocks that are yet to be copied, so it cannot flip; the streams that have would fill every step."""
    batcher = make_batcher(num_blocks=200, num_microbatches=2, max_step_tokens=64, look_ahead="never")
    batcher.submit(1, make_request(80, max_tokens=1), 0.0)
    pump(batcher, 3)
    for index in range(num_streams):
        batcher.submit(2 + index, make_request(3, max_tokens=400, first=500 + 100 * index), 0.0)
    pump(batcher, 3)
    snapshot = copied_but_for_the_cached(batcher)
    conversation = Request("r", [*range(80), *range(2000, 2300)], GREEDY, 4)
    batcher.submit(100, conversation, 0.0)
    pump(batcher, 1)
    open_second(batcher, snapshot)
    assert not snapshot.covers(batcher._sequences[100].blocks)
    assert batcher._sequences[100].num_remaining > 64
    pump(batcher, 30)
    assert not snapshot.is_complete
    assert 100 not in batcher._sequences, "it has been read and answered"
    assert batcher.num_running == num_streams


def test_a_request_begins_in_the_next_epoch_beside_streams_that_cannot_flip_yet() -> None:
    batcher = make_batcher(num_blocks=200, num_microbatches=2, max_step_tokens=64, look_ahead="never")
    batcher.submit(1, make_request(80, max_tokens=1), 0.0)
    pump(batcher, 3)
    snapshot = copied_but_for_the_cached(batcher)
    for index in range(2):
        batcher.submit(2 + index, Request("r", [*range(80), 600 + index], GREEDY, 400), 0.0)
    pump(batcher, 2)
    open_second(batcher, snapshot)
    pump(batcher, 2)
    assert {s.epoch for s in batcher._sequences.values()} == {1}
    batcher.submit(10, make_request(8, max_tokens=2, first=900), 0.0)
    pump(batcher, 10)
    assert 10 not in batcher._sequences
    assert {s.epoch for s in batcher._sequences.values()} == {1}, "their cached blocks are not there yet"


def test_prompt_logprobs_of_an_attempt_that_was_put_back_are_dropped() -> None:
    batcher = make_batcher(num_microbatches=2, prefix_cache=False, look_ahead="never")
    batcher.submit(1, make_request(40, max_tokens=1, prompt_logprobs=0), 0.0)

    def read(plan: StepPlan) -> list[Output]:
        found = []
        for row in plan.rows:
            known = len(row.tokens) - (row.next_token < 0)  # what follows the last one is known, or not
            entries = [TokenLogprobs(7, -1.0, 0, [])] * known
            found += [(row.sequence, row.start, entries)] if row.sequence == 1 else []
        tokens = [7 for row in plan.rows if row.sample]
        return batcher.complete(StepResult(plan.epoch, plan.ordinal, plan.microbatch, tokens, [], found, []))

    late = step(batcher)
    batcher.preempt_all()
    batcher.submit(2, make_request(9, max_tokens=1, first=100), 0.0)
    again = step(batcher)
    assert (late.rows[0].start, again.rows[0].start) == (0, 0)
    read(late)
    assert not batcher._sequences[1].prompt_logprobs
    outputs = read(again)
    while 1 in batcher._sequences:
        outputs += read(step(batcher))
    (last,) = [output for sequence, output in outputs if sequence == 1]
    assert last.prompt_logprobs is not None
    assert len(last.prompt_logprobs) == 39


def test_what_was_cached_during_one_hop_is_a_hit_in_the_next() -> None:
    batcher = make_batcher(num_blocks=200, num_microbatches=1, max_step_tokens=64, look_ahead="never")
    batcher.submit(1, make_request(3, max_tokens=60, first=500), 0.0)
    pump(batcher, 30)
    batcher.guard(1)
    batcher.submit(2, make_request(40, max_tokens=1), 0.0)
    pump(batcher, 3)
    open_second(batcher, Snapshot([], 0))
    pump(batcher, 2)
    batcher.retire_old()
    batcher._directory.close_epoch(1)
    batcher._directory.open_epoch(3, (("w0", LayerRange(0, 2)),))
    batcher.open_next(Opening(3, Snapshot([], 0)))
    batcher.submit(3, make_request(40, max_tokens=1), 0.0)
    rows = []
    for _ in range(3):
        plan = step(batcher)
        rows += [row for row in plan.rows if row.sequence == 3]
        answer(batcher, plan)
    assert rows[0].start == 36, "all full blocks but the last token's were written in the first hop"


def test_what_a_change_costs_counts_from_its_first_try() -> None:
    batcher = make_batcher(num_microbatches=1, prefix_cache=False)
    batcher.submit(1, make_request(12, max_tokens=8), 0.0)
    answer(batcher, step(batcher))
    batcher.guard(1)
    batcher.is_squeezed = True
    batcher.preempt_all()
    answer(batcher, step(batcher))
    assert batcher.recomputed_for_change() == 12
    batcher.unguard()
    batcher.guard(1)
    assert batcher.recomputed_for_change() == 12, "it is begun anew"
    batcher.unguard()
    batcher.guard(2)
    assert batcher.recomputed_for_change() == 0
