"""Step plans without a scheduler: sequences with all of their blocks from the start."""

from collections.abc import Callable, Sequence

from runtime.messages import Row, Sampling, SequenceStart, StepPlan


def plans_of(
    schedule: Sequence[Sequence[tuple[int, int]]], blocks_each: int, draw: Callable[[int], list[int]]
) -> list[StepPlan]:
    """A plan for each step of `schedule`, which says how many tokens of which sequences it runs; `draw` makes them.

    Sequence i has the blocks from ``blocks_each * i`` on.
    """
    plans, lengths = [], {}
    for ordinal, step in enumerate(schedule):
        rows = []
        for sequence, count in step:
            start = lengths.get(sequence, 0)
            lengths[sequence] = start + count
            blocks = list(range(blocks_each * sequence, blocks_each * (sequence + 1)))
            begin = None if start else SequenceStart(count, Sampling(), blocks, [])
            rows.append(Row(sequence, start, draw(count), [], False, begin))
        plans.append(StepPlan(1, ordinal, 0, rows, []))
    return plans
