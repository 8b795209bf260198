"""What a worker remembers of sequences, and how a step plan becomes a ragged batch. Pure: numpy, no torch.

The head is the only author: a sequence appears with `Row.begin`, grows with `Row.new_blocks`, and goes with
`StepPlan.released`. A worker never decides anything about a sequence; it only refuses what cannot be (a row that
starts elsewhere than where the sequence's KV ends), because that would be silent corruption.

Plans of one epoch are applied in the order of their ordinals, once per worker, however many hops of the chain the
worker serves; `StageState.plan_batch` gives the later hops the batch that the first one built.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from kvstore.ids import BlockId, SequenceId
from runtime.messages import AHEAD, Row, Sampling, SequenceStart, StepPlan, Tokens

T = TypeVar("T")


class PlanError(Exception):
    """A plan contradicts what this worker knows. Never the client's fault."""


@dataclass(slots=True)
class SequenceState:
    """One sequence on one worker. `num_tokens` is the watermark: KV rows written once every applied plan has run."""

    sequence: SequenceId
    num_prompt_tokens: int
    sampling: Sampling
    blocks: np.ndarray
    num_blocks: int
    num_tokens: int
    history: list[int]
    extra: object | None = None
    """The sampler's own memory of this sequence (token counts), made by the worker that samples."""

    def extend(self, new_blocks: Sequence[BlockId]) -> None:
        needed = self.num_blocks + len(new_blocks)
        if needed > len(self.blocks):
            grown = np.zeros(max(needed, 2 * len(self.blocks)), dtype=np.int32)
            grown[: self.num_blocks] = self.blocks[: self.num_blocks]
            self.blocks = grown
        self.blocks[self.num_blocks : needed] = new_blocks
        self.num_blocks = needed


@dataclass(slots=True)
class PlannedBatch:
    """A plan in arrays. R rows, T tokens; see `runtime.batch.StepBatch` for the first five."""

    plan: StepPlan
    positions: np.ndarray
    query_starts: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    prompt_lens: np.ndarray
    tokens: np.ndarray
    sequences: list[SequenceState]
    new_blocks: list[BlockId] = field(default_factory=list)
    """Blocks that this worker may meet for the first time."""
    numbers: Any = None
    """Of `runtime.cuda.runner.Runner.prepare`, for one hop; None when it was not called."""

    def slots(self, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the step writes its KV rows: block ids and offsets within them, int64 ``[T]`` each."""
        rows = np.repeat(np.arange(len(self.context_lens)), np.diff(self.query_starts))
        return self.block_tables[rows, self.positions // block_size].astype(np.int64), self.positions % block_size


class StepOrder(Generic[T]):
    """Gives the steps of one epoch at one hop back in the order of their ordinals, whatever order they arrive in."""

    def __init__(self) -> None:
        self._next_ordinal = 0
        self._early: dict[int, T] = {}

    def push(self, ordinal: int, step: T) -> bool:
        """Take a step that arrived; False when it is a duplicate, which is dropped."""
        if ordinal < self._next_ordinal or ordinal in self._early:
            return False
        self._early[ordinal] = step
        return True

    @property
    def next_ordinal(self) -> int:
        """The step that is due."""
        return self._next_ordinal

    def peek(self) -> T | None:
        """The step that is due, or None while it has not arrived; it stays due."""
        return self._early.get(self._next_ordinal)

    def pop(self) -> T | None:
        """Take the step that is due, or None while it has not arrived."""
        step = self._early.pop(self._next_ordinal, None)
        if step is not None:
            self._next_ordinal += 1
        return step


class StageState:
    """All sequences that a worker knows in one epoch."""

    def __init__(self, block_size: int, num_hops_here: int) -> None:
        self._block_size = block_size
        self._num_hops_here = num_hops_here
        self._sequences: dict[SequenceId, SequenceState] = {}
        self._next_ordinal = 0
        self._open: dict[int, tuple[PlannedBatch, int]] = {}
        self._sampled: dict[int, tuple[Tokens, float]] = {}

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def plan_batch(self, plan: StepPlan) -> PlannedBatch:
        """The batch of `plan`: applied now if this worker's first hop asks, remembered if a later hop does.

        Raises:
            PlanError: when the plan is out of order or does not continue what is known.
        """
        known = self._open.get(plan.ordinal)
        if known is not None:
            batch, hops_left = known
        else:
            if plan.ordinal != self._next_ordinal:
                raise PlanError(f"step {plan.ordinal} of epoch {plan.epoch} came when {self._next_ordinal} was due")
            self._next_ordinal += 1
            batch, hops_left = self._apply(plan), self._num_hops_here
        if hops_left > 1:
            self._open[plan.ordinal] = (batch, hops_left - 1)
        else:
            self._open.pop(plan.ordinal, None)
        return batch

    def sampled(self, tokens: Tokens, arrived_s: float) -> None:
        """The last hop says what a step brought. A second time changes nothing."""
        self._sampled.setdefault(tokens.ordinal, (tokens, arrived_s))

    def fed_s(self, plan: StepPlan) -> float | None:
        """When the last token that `plan` reads was known here: -inf if always, None if it is not."""
        if not plan.is_ahead:
            return -math.inf
        found = self._sampled.get(plan.oldest)
        return None if found is None else found[1]

    def feed(self, batch: PlannedBatch) -> None:
        """Put the tokens into `batch` of which the plan only says that they are sampled by another step.

        Raises:
            PlanError: that step did not sample one of these sequences.
        """
        tokens, _ = self._sampled[batch.plan.oldest]
        known = dict(zip(tokens.sequences, tokens.tokens, strict=True))
        for index, row in enumerate(batch.plan.rows):
            if row.tokens[0] != AHEAD:
                continue
            token = known.get(row.sequence)
            if token is None:
                raise PlanError(f"sequence {row.sequence} is to go on with what step {tokens.ordinal} did not sample")
            batch.tokens[batch.query_starts[index]] = max(0, token)  # none was found; the head will end it

    def retain_only(self, live: Iterable[SequenceId], newest: SequenceId) -> None:
        """Forget every sequence up to `newest` that the head no longer has."""
        keep = set(live)
        for sequence in [s for s in self._sequences if s <= newest and s not in keep]:
            del self._sequences[sequence]

    def check_integrity(self) -> None:
        for sequence, state in self._sequences.items():
            assert state.sequence == sequence, f"sequence {sequence} is filed under another id ({state.sequence})"
            room = state.num_blocks * self._block_size
            assert state.num_tokens <= room, f"sequence {sequence} has {state.num_tokens} tokens in room for {room}"
            table = state.blocks[: state.num_blocks]
            assert len(np.unique(table)) == len(table), f"sequence {sequence} holds a block twice: {table.tolist()}"

    def _apply(self, plan: StepPlan) -> PlannedBatch:
        for ordinal in [known for known in self._sampled if known < plan.oldest]:
            del self._sampled[ordinal]
        for sequence in plan.released:
            self._sequences.pop(sequence, None)
        rows = plan.rows
        states: list[SequenceState] = []
        new_blocks: list[BlockId] = []
        query_starts = np.empty(len(rows) + 1, dtype=np.int32)
        context_lens = np.empty(len(rows), dtype=np.int32)
        prompt_lens = np.empty(len(rows), dtype=np.int32)
        query_starts[0] = 0
        tokens: list[int] = []
        max_blocks = 1
        for index, row in enumerate(rows):
            state = self._advance(row, new_blocks)
            states.append(state)
            tokens += row.tokens
            query_starts[index + 1] = len(tokens)
            context_lens[index] = state.num_tokens
            prompt_lens[index] = state.num_prompt_tokens
            max_blocks = max(max_blocks, state.num_blocks)
        block_tables = np.zeros((len(rows), max_blocks), dtype=np.int32)
        for index, state in enumerate(states):
            block_tables[index, : state.num_blocks] = state.blocks[: state.num_blocks]
        lens = np.diff(query_starts)
        positions = np.arange(len(tokens), dtype=np.int64)
        positions += np.repeat(context_lens - query_starts[1:], lens)
        return PlannedBatch(
            plan=plan,
            positions=positions,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=block_tables,
            prompt_lens=prompt_lens,
            tokens=np.array(tokens, dtype=np.int64),
            sequences=states,
            new_blocks=new_blocks,
        )

    def _advance(self, row: Row, new_blocks: list[BlockId]) -> SequenceState:
        if row.begin is not None:
            state = _begin(row.sequence, row.start, row.begin)
            self._sequences[row.sequence] = state
            new_blocks += row.begin.blocks
        else:
            found = self._sequences.get(row.sequence)
            if found is None:
                raise PlanError(f"a row of sequence {row.sequence}, which never began on this worker")
            state = found
        if row.start != state.num_tokens:
            raise PlanError(
                f"sequence {row.sequence} has {state.num_tokens} KV rows, the plan continues at {row.start}"
            )
        if row.new_blocks:
            state.extend(row.new_blocks)
            new_blocks += row.new_blocks
        state.num_tokens = row.start + len(row.tokens)
        if state.num_tokens > state.num_blocks * self._block_size:
            raise PlanError(
                f"sequence {row.sequence} needs room for {state.num_tokens} tokens and has {state.num_blocks} blocks "
                f"of {self._block_size}"
            )
        return state


def _begin(sequence: SequenceId, start: int, begin: SequenceStart) -> SequenceState:
    blocks = np.zeros(max(8, len(begin.blocks)), dtype=np.int32)
    blocks[: len(begin.blocks)] = begin.blocks
    return SequenceState(
        sequence=sequence,
        num_prompt_tokens=begin.num_prompt_tokens,
        sampling=begin.sampling,
        blocks=blocks,
        num_blocks=len(begin.blocks),
        num_tokens=start,
        history=begin.history,
    )
