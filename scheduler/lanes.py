"""The batcher's small parts: its configuration and counters, the steps in flight of an epoch, a step being formed.

A *lane* is the pipeline of one epoch: its steps are numbered 0, 1, 2, ... and every hop runs them in that order. Outside
a transition there is one lane; while one epoch hands over to the next there are two, and nothing orders steps of
different lanes but what the scheduler does about it (`Opening`, the fence, the limbo).
"""

import math
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from kvstore.ids import BlockId, Epoch
from runtime.messages import StepResult
from scheduler.sequence import Sequence

RHYTHM_STEPS = 8
AHEAD_AT = 0.5
"""Of the time between two results: after so much of it a step is formed ahead of the next one."""
MIN_WAIT_S = 0.001
"""Less is not waited for: event loops count milliseconds."""


LookAhead: TypeAlias = Literal["never", "idle", "always"]


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Bounds on everything that the batcher may pile up."""

    num_microbatches: int = 2
    """Steps in flight at most, beside one that is formed ahead; 0 for as many as the layout has stages."""
    max_step_tokens: int = 256
    max_running: int = 256
    max_queue: int = 1024
    block_size: int = 16
    prefix_cache: bool = True
    cache_root: bytes = b""
    look_ahead: LookAhead = "always"
    """When a step is formed before the tokens that it reads are back, so that no stage waits for the head: where the stages would have
    nothing to do otherwise ("idle"), or also beside as many steps as there are microbatches, which costs the head more."""
    tpot_goal_s: float = 0.0
    """Prompt chunks are cut so that decoding streams get a token that often; 0 for no such goal."""


@dataclass(frozen=True, slots=True)
class StepPrices:
    """What a step costs the slowest stage, in seconds, as a line. While nothing was measured, every row costs the same."""

    step_s: float = 0.0
    row_s: float = 1.0
    """A decoding row."""
    context_s: float = 0.0
    """Each token of a decoding row's context."""
    prefill_s: float = 0.0
    """Each token of a prompt; 0 when it is not known."""
    with_prompt: tuple[tuple[int, float], ...] = ()
    """What steps last that read so many tokens of prompts beside their decoding rows, fewest tokens first; empty when it is not known."""

    def decode_s(self, num_rows: int, num_context: int) -> float:
        """`num_rows` decoding rows with so much context together."""
        return num_rows * self.row_s + num_context * self.context_s

    def piece(self, unread: int, num_stages: int, in_flight: int) -> int:
        """Of so many `unread` tokens of prompts, those that one step takes so that the last of them is through the pipeline soonest.

        In n pieces they are through S stages after n + S - 1 times what a step with a piece lasts (with fewer steps `in_flight` than stages a
        piece waits for one to come back): with few large ones stages are idle before and behind each, many small ones make many steps.
        """
        if num_stages == 1:
            return unread
        apart = max(1.0, num_stages / in_flight)
        best_s, best = math.inf, unread
        for tokens, seconds in self.with_prompt:
            through_s = ((max(1.0, unread / tokens) - 1) * apart + num_stages) * seconds
            if through_s < best_s:
                best_s, best = through_s, tokens
            if tokens >= unread:
                break
        return -(-unread // max(1, round(unread / best)))


@dataclass(frozen=True, slots=True)
class BatchLoad:
    """What steps are made of at present, in mean."""

    decode_rows: float
    """In one step."""
    decode_context: float
    """Tokens of a decoding row."""
    prefill_context: float
    """Positions before a prompt's token; 0 when no prompt is being read."""

    def is_like(self, other: "BatchLoad", tolerance: float) -> bool:
        """Whether every figure is within `tolerance` of the other's, relatively."""
        return all(
            abs(one - two) <= tolerance * max(one, two)
            for one, two in (
                (self.decode_rows, other.decode_rows),
                (self.decode_context, other.decode_context),
                (self.prefill_context, other.prefill_context),
            )
        )


@dataclass(slots=True)
class Counters:
    """Sums since the start."""

    steps: int = 0
    steps_ahead: int = 0
    """Those that were formed before what they read was sampled."""
    discarded_tokens: int = 0
    """Sampled for sequences that had ended, or were put back, meanwhile."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    """KV rows computed again because of a preemption, a lost worker or the `recompute` strategy."""
    recomputed_for_changes_tokens: int = 0
    """Those of them that a change of layout is to blame for."""
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0
    rejected: int = 0
    stale_results: int = 0
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Flight:
    """Who takes part in a step, in row order and in which attempt, and what it awaits of it."""

    members: list[tuple[Sequence, int, str]]
    """The third is "token" (sampled), "end" (a prompt of ``max_tokens == 0`` was read) or "" (a chunk)."""
    num_samples: int
    is_followed: bool = False
    """Whether the first hop is told what it samples, so that a step may be formed ahead of that."""


@dataclass(slots=True)
class Lane:
    """The steps of one epoch."""

    next_ordinal: int = 0
    in_flight: dict[int, Flight] = field(default_factory=dict)
    """In their order."""
    early: dict[int, StepResult] = field(default_factory=dict)
    """Results that have overtaken others."""
    fence: int = -1
    """What its steps must wait for, of the epoch before."""
    newest_back: int = -1
    """The newest step that has come back, which every hop has run, and therefore all before it, though their results may be late."""

    @property
    def completed(self) -> int:
        """The last step that has come back, with all before it; -1 when there is none."""
        return self.oldest - 1

    @property
    def oldest(self) -> int:
        """The oldest step in flight; the next one when there is none."""
        return next(iter(self.in_flight), self.next_ordinal)


@dataclass(slots=True)
class Rhythm:
    """How often results come, as a mean of the last ones. It says when to form a step ahead: late, so that who has just arrived is in it,
    and early enough that it is there before it is due. Formed at once it would cost who arrives a stage's time, and gain nothing.
    """

    last_s: float = -math.inf
    mean_s: float = 0.0

    def came(self, now_s: float) -> None:
        gap_s, self.last_s = now_s - self.last_s, now_s
        if gap_s == math.inf:
            return
        self.mean_s = self.mean_s + (gap_s - self.mean_s) / RHYTHM_STEPS if self.mean_s else gap_s

    def rested(self) -> None:
        """Nothing is left to do: how long that lasts says nothing."""
        self.last_s = -math.inf

    def ahead_s(self) -> float:
        """When to form a step ahead."""
        return self.last_s + AHEAD_AT * self.mean_s


class Arrived(Protocol):
    """What the transition knows of the KV that moves."""

    def skip(self, blocks: ListOf[BlockId]) -> None:
        """These blocks have been handed out anew, so nothing of the snapshot is waited for to read them."""
        ...

    def covers(self, blocks: ListOf[BlockId]) -> bool:
        """Whether the snapshot of these blocks is at its targets (blocks that need none count as covered)."""
        ...

    def num_covered(self, blocks: ListOf[BlockId]) -> int:
        """How many of these blocks, from the first on, are covered."""
        ...


@dataclass(slots=True)
class Opening:
    """The epoch that sequences flip to, from the moment they may. New sequences start in it."""

    epoch: Epoch
    arrived: Arrived
    num_stages: int = 1
    """Of its layout."""
    num_flipped: int = 0


class StepBuilder:
    """A step being formed: rows in order, each with the number of tokens it takes. All rows are of one epoch."""

    __slots__ = ("budget", "epoch", "fence", "flips", "is_ahead", "new_blocks", "rows")

    def __init__(self, budget: int, epoch: Epoch | None = None) -> None:
        """Of `epoch`, or of whichever the first row is of."""
        self.budget = budget
        self.epoch = epoch
        self.fence = -1
        self.is_ahead = False
        """Whether a row reads what is yet to be sampled."""
        self.rows: dict[Sequence, int] = {}
        self.flips: list[Sequence] = []
        self.new_blocks: dict[Sequence, list[BlockId]] = {}

    def accepts(self, epoch: Epoch) -> bool:
        """Whether a row of `epoch` may join; the first row decides for all."""
        return self.epoch is None or self.epoch == epoch

    def add(self, sequence: Sequence, count: int, epoch: Epoch) -> None:
        self.epoch = epoch
        self.rows[sequence] = count
        self.budget -= count

    def remove(self, sequence: Sequence) -> None:
        count = self.rows.pop(sequence, None)
        if count is not None:
            self.budget += count
            self.new_blocks.pop(sequence, None)
