"""Continuous batching: which tokens of which sequences go into the next step. Pure.

At most `num_microbatches` steps are in flight. Whenever there is room for one more, `next_step` forms it:

1. decode: the longest-waiting ready sequences, as near to an even share of what all decoding ones cost together as they come
   (`StepPrices`), so that the microbatches balance themselves whatever joins and leaves;
2. prefill: chunks of running sequences, oldest first, within the token budget, within the time that a goal for the
   TPOT leaves beside the decoding rows, and in pieces with which all that is to be read is through the pipeline soonest (`StepPrices.piece`): a step
   that takes a prompt whole is long at every stage, and others wait for it there. Every hop runs the steps of an epoch in
   their order, so the next chunk of a prompt may follow while the last one is still on its way;
3. admission: waiting sequences, first come first served, when their blocks can be had. The first that does not
   fit stops the line: nobody overtakes, but for those that the pool cannot hold at all while a change has made it small.

One more is formed *ahead*: from what the oldest step in flight is about to sample (`Rhythm` says when). The first hop has it early, and
the tokens from the last hop, so no stage waits while the head takes in a result, forms a step and sends it. What a sequence has in flight when it
ends on one of these tokens is computed for nothing, and dropped. While sequences flip nothing is formed ahead: they flip
between two of their steps.

When a running sequence needs a block and there is none, the youngest running sequence is preempted: it gives its
blocks back and waits at the head of the line to be recomputed. The oldest is never preempted by a younger, and no
sequence can outgrow the pool alone (`Batcher.submit` refuses it; while a change has made the pool smaller it waits for its end), so there is
always progress.

Within one epoch the order of steps is the order of KV writes. While a transition is under way two epochs run side by side, and two
rules take its place, beside those for blocks (`scheduler.blocks`):

- a step has rows of one epoch only; a sequence *flips* between two of its steps, never with one in flight, and only
  when the snapshot of its blocks has arrived;
- a step of the next epoch carries a *fence*, the last step of the old epoch that it may depend on, or whose rows it may
  overwrite: a worker that receives layers runs it only when the mirror is complete through there. (Once the old epoch is
  over that is its very last step: the blocks that it wrote may be anybody's now, and its rows still on their way.)
"""

import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from itertools import islice
from typing import TypeAlias

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import BlockId, Epoch, SequenceId
from runtime.messages import AHEAD, Row, SequenceStart, StepPlan, StepResult, TokenLogprobs
from scheduler.blocks import GROWTH_BLOCKS, SequenceBlocks
from scheduler.lanes import (
    MIN_WAIT_S,
    Arrived,
    BatchingConfig,
    BatchLoad,
    Counters,
    Flight,
    Lane,
    Opening,
    Rhythm,
    StepBuilder,
    StepPrices,
)
from scheduler.request import AdmissionError, FinishReason, Request, TokenOutput
from scheduler.sequence import Sequence

__all__ = ["Batcher", "BatchingConfig", "Output", "StepPrices"]

FLIP_CHUNK_TOKENS = 64
"""Of prompts, in a step around a flip: what goes over would stand behind more for longer than it usually waits."""
MIN_CHUNK_TOKENS = 16
"""Prompts are never cut smaller for the sake of a goal or of the pipeline, or they would not get anywhere."""
_LOOKED_AT = 64
"""Of those who wait, when it is asked how much there is to read: the others are taken for alike."""
NEAR_S = 0.25
"""A flip that is expected within so long is near, as long as it is not known what a prompt's token takes."""

_EPSILON = 1e-9

Output: TypeAlias = tuple[SequenceId, TokenOutput]


class Batcher:
    """All requests, from the queue to the last token, and the block pool they live in."""

    def __init__(self, config: BatchingConfig, pool: BlockPool, directory: Directory) -> None:
        self._config = config
        self._pool = pool
        self._directory = directory
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._ready: deque[Sequence] = deque()
        self._lanes: dict[Epoch, Lane] = {}
        self._blocks = SequenceBlocks(config, pool, directory, self._lanes)
        self._released: dict[Epoch, list[SequenceId]] = {}
        self._num_running = 0
        self._num_decoding = 0
        self._decoding_context = 0
        self._num_in_flight = 0
        self._epoch: Epoch = -1
        self._opening: Opening | None = None
        self._max_context = 0
        self.is_held = False
        """While True no step is formed (the `stop-copy` strategy)."""
        self.admits = True
        """While False nobody leaves the queue (the `drain` strategy), but for who ran and may need more than the limit: it ends first."""
        self.is_squeezed = False
        """While True the pool is smaller than the layout allows, because a change needs the room: what is preempted now is
        preempted for its sake."""
        self._change = 0
        self._recomputed_for_change = 0
        self.flip_due_s = math.inf
        """When sequences are expected to begin to flip: prompts are cut so that what is read before is through by then."""
        self.wake_s = math.inf
        """When `next_step` is to be asked again, if nothing happens before."""
        self._rhythm = Rhythm()
        self.num_stages = 1
        """Of the layout served; while one follows another, of the longer one."""
        self.prices = StepPrices()
        self.counters = Counters()

    @property
    def num_microbatches(self) -> int:
        """Steps that may be in flight. While one layout follows another, as many as the longer one has stages, until all have gone over."""
        if self._config.num_microbatches:
            return self._config.num_microbatches
        opening = self._opening
        return opening.num_stages if opening is not None and self.is_vacated() else self.num_stages

    # -- what is there ------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    @property
    def max_context(self) -> int:
        """Tokens that one sequence may reach: the model's context, or fewer when the pool holds fewer."""
        return self._max_context

    def load(self) -> BatchLoad:
        """What steps are made of at present."""
        reading = self._prefilling
        return BatchLoad(
            self._num_decoding / self.num_microbatches,
            self._decoding_context / self._num_decoding if self._num_decoding else 0.0,
            sum(len(sequence.tokens) for sequence in reading) / (2 * len(reading)) if reading else 0.0,
        )

    def live_sequences(self) -> list[SequenceId]:
        """Who may still be named in a step that a worker has not run: what is unfinished, and what ended with a step in flight."""
        flying = (
            member[0].id
            for lane in self._lanes.values()
            for flight in lane.in_flight.values()
            for member in flight.members
        )
        return list(dict.fromkeys((*self._sequences, *flying)))

    def growth(self, max_blocks: int) -> int:
        """Blocks that the running sequences may still need, counting at most `max_blocks` for each."""
        return sum(self._blocks.growth_of(sequence, len(sequence.blocks), max_blocks) for sequence in self._running())

    def last_ordinal(self, epoch: Epoch) -> int:
        """The last step that was formed in `epoch`, -1 for none."""
        return self._lanes[epoch].next_ordinal - 1

    def completed(self, epoch: Epoch) -> int:
        """The last step of `epoch` that has come back, with all before it."""
        return self._lanes[epoch].completed

    def live_blocks(self) -> tuple[list[BlockId], int]:
        """As `SequenceBlocks.live`, of what runs."""
        return self._blocks.live(self._running())

    def _running(self) -> Iterable[Sequence]:
        return (sequence for sequence in self._sequences.values() if sequence.running)

    # -- epochs -------------------------------------------------------------------------------------------

    def open_epoch(self, epoch: Epoch, num_blocks: int, max_context: int) -> list[Output]:
        """Serve under `epoch` with a fresh pool of `num_blocks`; what was running waits to be recomputed.

        Sequences that the new pool can never hold end with an error, which is returned.
        """
        assert not self._lanes, "close the present epoch before opening the next"
        self._pool.resize(num_blocks)
        self._epoch = epoch
        self._lanes[epoch], self._released[epoch] = Lane(), []
        return self.set_limit(num_blocks, max_context)

    def close_epoch(self) -> None:
        """The pipeline is gone: forget what is in flight and cached, put everything that ran back in line."""
        self._lanes.clear()
        self._num_in_flight = 0
        self._opening, self.is_held, self.admits, self.is_squeezed = None, False, True, False
        self.flip_due_s = self.wake_s = math.inf
        self._blocks.unguard()
        self._blocks.empty_limbo()
        self.preempt_all()
        self._released.clear()
        self._pool.forget_cached()

    def set_limit(self, num_blocks: int, max_context: int, *, spares_running: bool = False) -> list[Output]:
        """From now on no request may reach more tokens than the model's `max_context`, or than `num_blocks` hold; those that need
        more end with an error, which is returned; with `spares_running` only those that wait. (The pool itself may be smaller for the
        time of a change: what does not fit then waits.)
        """
        self._max_context = min(max_context, num_blocks * self._config.block_size)
        outputs: list[Output] = []
        for sequence in list(self._sequences.values()):
            if self._is_too_large(sequence) and not (spares_running and sequence.running):
                needed = sequence.most_tokens
                message = f"the KV cache has shrunk to {self._max_context} tokens, and this request needs {needed}"
                self._end(sequence, "error", outputs, error=message)
        return outputs

    def preempt_all(self) -> None:
        """Everything that runs is to be recomputed."""
        for sequence in sorted(self._running(), key=lambda s: s.id, reverse=True):
            self._preempt(sequence)

    def recomputed_for_change(self) -> int:
        """KV rows that were lost to the change that `guard` named: those computed again, and those that still wait for it."""
        waiting = sum(sequence.num_lost for sequence in self._waiting if sequence.lost_to == self._change)
        return self._recomputed_for_change + waiting

    # -- transitions --------------------------------------------------------------------------------------

    def guard(self, change: int) -> None:
        """A change begins, whose number is positive: from now on freed blocks wait for their last step, and writers are remembered."""
        assert not self._blocks.is_guarded, "one transition at a time"
        self._blocks.is_guarded = True
        if change != self._change:  # else it is begun anew
            self._change, self._recomputed_for_change = change, 0

    def unguard(self) -> None:
        """No transition is under way any more."""
        self._blocks.unguard()

    def copied_by(self, snapshot: Arrived) -> None:
        """What is live now is being copied, with all mirrors on."""
        self._blocks.snapshot = snapshot

    def open_next(self, opening: Opening) -> None:
        """From now on sequences flip to `opening.epoch` as they become able to, and new ones start there."""
        assert self._blocks.is_guarded, "guard first"
        assert self._opening is None, "one opening at a time"
        self._opening = opening
        self._lanes[opening.epoch], self._released[opening.epoch] = Lane(), []

    def is_vacated(self) -> bool:
        """Whether the next epoch is open and nothing runs or flies in the old one any more."""
        if self._opening is None or self._lanes[self._epoch].in_flight:
            return False
        return not self._directory.sequences_in(self._epoch)

    def retire_old(self) -> None:
        """The old epoch is over; the one that was opened is the epoch now."""
        assert self._opening is not None
        assert self.is_vacated(), "the old epoch is still in use"
        self._lanes[self._opening.epoch].fence = self.last_ordinal(self._epoch)
        del self._lanes[self._epoch], self._released[self._epoch]
        self._epoch, self._opening = self._opening.epoch, None
        self._blocks.forget_writers()
        self.flip_due_s = math.inf

    # -- requests -----------------------------------------------------------------------------------------

    def submit(self, sequence_id: SequenceId, request: Request, now_s: float) -> None:
        """Queue `request`.

        Raises:
            AdmissionError: 429 when the queue is full, 400 when the request can never fit.
        """
        if len(self._waiting) >= self._config.max_queue:
            self.counters.rejected += 1
            raise AdmissionError(
                f"the queue is full ({self._config.max_queue} requests are waiting); try again later",
                status=429,
                code="queue_full",
            )
        needed = len(request.prompt) + request.max_tokens
        if needed > self._max_context:
            self.counters.rejected += 1
            raise AdmissionError(
                f"{len(request.prompt)} prompt tokens and max_tokens={request.max_tokens} need {needed} tokens of "
                f"context; at most {self._max_context} are possible here. Shorten the prompt or lower max_tokens.",
                status=400,
                code="context_length_exceeded",
                param="prompt" if len(request.prompt) >= self._max_context else "max_tokens",
            )
        assert request.prompt, "an empty prompt is refused by the API"
        sequence = Sequence(id=sequence_id, request=request, tokens=list(request.prompt), submitted_s=now_s)
        self._sequences[sequence_id] = sequence
        self._waiting.append(sequence)

    def longest_request(self) -> int:
        """Tokens that the largest unfinished request may reach."""
        return max((sequence.most_tokens for sequence in self._sequences.values()), default=0)

    def longest_waiting(self) -> int:
        """Tokens that the largest request may reach that has not begun, or has been preempted."""
        return max((sequence.most_tokens for sequence in self._waiting), default=0)

    def is_drained(self) -> bool:
        """Whether nothing runs or flies, nor must run before the limit can hold."""
        return not (self._num_running or self._num_in_flight or any(map(self._is_too_large, self._waiting)))

    def abort(self, sequence_id: SequenceId, reason: FinishReason) -> None:
        """End a sequence without a last output; its blocks are free at once. Unknown ids are ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence, reason, None)

    # -- steps --------------------------------------------------------------------------------------------

    def next_step(self, now_s: float) -> StepPlan | None:
        """The next step to send, or None when every microbatch is in flight or nothing is ready; `wake_s` may say when to ask again."""
        self.wake_s = math.inf
        if not self._lanes or self.is_held:
            return None
        step = self._choose(now_s)
        if step is None:
            return None
        assert step.epoch is not None
        lane = self._lanes[step.epoch]
        for sequence in step.flips:
            if sequence in step.rows:
                self._flip(sequence, step)
        if self._opening is not None and step.epoch == self._opening.epoch:
            lane.fence = self._lanes[self._epoch].newest_back
        step.fence = max(step.fence, lane.fence)
        oldest, ordinal = lane.oldest, lane.next_ordinal
        lane.next_ordinal += 1
        flight = Flight([], 0)
        rows = self._rows(step, ordinal, flight)
        lane.in_flight[ordinal] = flight
        self._num_in_flight += 1
        released, self._released[step.epoch] = self._released[step.epoch], []
        self.counters.steps += 1
        self.counters.steps_ahead += step.is_ahead
        leaves_idle = self._num_in_flight < self.num_microbatches or step.is_ahead
        flight.is_followed = self._looks_ahead and flight.num_samples > 0 and (self._has_one_more or leaves_idle)
        return StepPlan(
            step.epoch,
            ordinal,
            ordinal % self.num_microbatches,
            rows,
            released,
            step.fence,
            oldest,
            step.is_ahead,
            flight.is_followed,
        )

    def complete(self, result: StepResult, now_s: float = 0.0) -> list[Output]:
        """Apply what a step brought, once those before it are back: tokens follow each other.

        A stale result (older epoch, unknown step) is counted and dropped.
        """
        lane = self._lanes.get(result.epoch)
        if lane is None or result.ordinal not in lane.in_flight or result.ordinal in lane.early:
            self.counters.stale_results += 1
            return []
        lane.newest_back = max(lane.newest_back, result.ordinal)
        outputs: list[Output] = []
        if result.ordinal != lane.oldest:
            lane.early[result.ordinal] = result
            return outputs
        self._rhythm.came(now_s)
        following: StepResult | None = result
        while following is not None:
            self._apply(following, lane.in_flight.pop(following.ordinal), outputs)
            following = lane.early.pop(lane.oldest, None)
        if self._blocks.has_limbo:
            self._blocks.empty_limbo()
        if not self._sequences:
            self._rhythm.rested()
        return outputs

    def _apply(self, result: StepResult, flight: Flight, outputs: list[Output]) -> None:
        self._num_in_flight -= 1
        assert len(result.tokens) == flight.num_samples, (
            f"step {result.ordinal} sampled {len(result.tokens)} tokens for {flight.num_samples} rows"
        )
        failed = set(result.failed)
        attempts = {s.id: attempt for s, attempt, _ in flight.members} if result.prompt_logprobs else {}
        for sequence_id, start, entries in result.prompt_logprobs:
            sequence = self._sequences.get(sequence_id)
            if sequence is None or attempts.get(sequence_id) != sequence.attempt:
                continue  # it ended or was put back meanwhile, and may read its prompt in other pieces now
            assert len(sequence.prompt_logprobs) == start, f"{start} of {len(sequence.prompt_logprobs)} come next"
            sequence.prompt_logprobs += entries
        index = -1
        for sequence, attempt, awaits in flight.members:
            if awaits == "token":
                index += 1
            if sequence.finished or sequence.attempt != attempt:
                self.counters.discarded_tokens += awaits == "token"
                continue
            sequence.num_in_flight -= 1
            if awaits == "token":
                if sequence.id in failed:
                    message = "the model produced logits that are not finite for this sequence"
                    self._end(sequence, "error", outputs, error=message)
                    continue
                logprobs = result.logprobs[index] if result.logprobs else None
                self._append(sequence, result.tokens[index], logprobs, outputs)
            elif awaits == "end":
                self._end(sequence, "length", outputs)

    def check_integrity(self) -> None:
        """Every count agrees with every list; every block in use is used by someone."""
        running = list(self._running())
        assert len(running) == self._num_running, f"{len(running)} run, {self._num_running} counted"
        decoding = [s for s in running if not s.prefilling]
        assert len(decoding) == self._num_decoding, f"{len(decoding)} decode, {self._num_decoding} counted"
        context = sum(len(s.tokens) for s in decoding)
        assert context == self._decoding_context, f"{context} tokens of context, {self._decoding_context} counted"
        for sequence in self._waiting:
            assert not sequence.running, f"sequence {sequence.id} both runs and waits"
            assert not sequence.blocks, f"sequence {sequence.id} waits and holds blocks"
        for sequence in running:
            epoch = self._directory.epoch_of(sequence.id)
            assert epoch == sequence.epoch, f"sequence {sequence.id} is of epoch {sequence.epoch}, filed under {epoch}"
        assert len(self._waiting) + len(running) == len(self._sequences), "a sequence neither waits nor runs"
        ids = [s.id for s in self._waiting]
        assert ids == sorted(ids), "the line is not in the order of arrival"
        flying = sum(len(lane.in_flight) for lane in self._lanes.values())
        assert flying == self._num_in_flight, f"{flying} steps fly, {self._num_in_flight} counted"
        for lane in self._lanes.values():
            assert list(lane.in_flight) == sorted(lane.in_flight), "steps are in flight out of their order"
            assert lane.early.keys() < lane.in_flight.keys() or not lane.early, "a result waits for no step"
        for sequence in running:
            assert sequence.num_remaining >= -1, f"sequence {sequence.id} is {-sequence.num_remaining} tokens ahead"
        self._blocks.check_integrity(running)

    # -- forming a step -----------------------------------------------------------------------------------

    def _choose(self, now_s: float) -> StepBuilder | None:
        starving = self._starving()
        if starving is not None and (step := self._filled(starving, (), now_s)):
            return step
        num_left = self.num_microbatches - self._num_in_flight
        if num_left > 0 and (step := self._filled(None, (), now_s)):
            return step
        if num_left < 0 or not self._looks_ahead or (num_left == 0 and not self._has_one_more):
            return None
        due_s = self._rhythm.ahead_s()
        if due_s - now_s >= MIN_WAIT_S:
            self.wake_s = due_s
            return None
        return self._filled(None, self._about_to_be_ready(), now_s)

    @property
    def _looks_ahead(self) -> bool:
        return self._config.look_ahead != "never" and (self._opening is None or self.is_vacated())

    @property
    def _has_one_more(self) -> bool:
        """Whether a step is formed ahead though as many as there are microbatches are in flight. A single one leaves the stages idle
        between two steps, however many sequences there are."""
        return self._looks_ahead and (self.num_microbatches == 1 or self._config.look_ahead == "always")

    def _starving(self) -> Epoch | None:
        """While two epochs run side by side, the one of which nothing is in flight though a prompt waits to be read there. Its steps come first,
        and beside as many as there are microbatches: streams of the other epoch may fill those for as long as they decode."""
        opening = self._opening
        if opening is None:
            return None
        old_waits = new_waits = False
        for sequence in self._prefilling:
            if sequence.num_remaining and not sequence.num_in_flight:
                is_old = self._epoch_for(sequence) == self._epoch
                old_waits, new_waits = old_waits or is_old, new_waits or not is_old
        if old_waits and not self._lanes[self._epoch].in_flight:
            return self._epoch
        new_waits = new_waits or bool(self._waiting and self.admits)
        return opening.epoch if new_waits and not self._lanes[opening.epoch].in_flight else None

    def _about_to_be_ready(self) -> ListOf[Sequence]:
        """Those for which the oldest step in flight samples a token that is not their last."""
        lane = self._lanes[self._epoch if self._opening is None else self._opening.epoch]
        flight = lane.in_flight.get(lane.oldest)
        if flight is None or not flight.is_followed:
            return ()
        return [
            sequence
            for sequence, attempt, awaits in flight.members
            if awaits == "token"
            and sequence.attempt == attempt
            and sequence.running
            and not sequence.num_remaining
            and sequence.goes_on
        ]

    def _filled(self, epoch: Epoch | None, ahead: ListOf[Sequence], now_s: float) -> StepBuilder | None:
        """A step of `epoch`, or of that of its first row; None when nobody is ready. `ahead` may join the decoding rows although their tokens
        are yet to come."""
        step = StepBuilder(self._config.max_step_tokens, epoch)
        decode_s = self._take_decodes(step, ahead)
        if self._prefilling or self._waiting:
            step.budget = min(step.budget, self._prefill_budget(step, decode_s, now_s))
            self._take_prefills(step)
            self._take_waiting(step, now_s)
        return step if step.rows else None

    def _take_decodes(self, step: StepBuilder, ahead: ListOf[Sequence]) -> float:
        """What the rows taken cost, in the unit of the prices."""
        prices, opening, blocks = self.prices, self._opening, self._blocks
        share = prices.decode_s(self._num_decoding, self._decoding_context) / self.num_microbatches * (1 + _EPSILON)
        ready, later, cost = self._ready, [], 0.0
        while ready and cost < share and step.budget > 0:
            sequence = ready.popleft()
            if not sequence.running or sequence.prefilling or sequence.num_remaining != 1 or sequence in step.rows:
                continue  # it ended, was preempted, or stands here twice because it was
            row_s = prices.decode_s(1, len(sequence.tokens))
            if cost and cost + row_s / 2 > share:
                later.append(sequence)  # without it the step is nearer to its share than with it
                break
            epoch = sequence.epoch if opening is None else self._epoch_for(sequence)
            if not step.accepts(epoch):
                later.append(sequence)
                continue
            if blocks.has_room(sequence) or self._reserve(sequence, step):
                self._add(step, sequence, 1, epoch)
                cost += row_s
            elif sequence.running:
                later.append(sequence)
                break
        if not later:
            return self._take_ahead(step, ahead, share, cost)
        ready.extendleft(reversed(later))
        return cost

    def _take_ahead(self, step: StepBuilder, ahead: ListOf[Sequence], share: float, cost: float) -> float:
        """Those of `ahead` that have a place beside rows that `cost` so much of their `share`."""
        prices, blocks = self.prices, self._blocks
        for sequence in ahead:
            row_s = prices.decode_s(1, len(sequence.tokens))
            if cost >= share or (cost and cost + row_s / 2 > share) or step.budget <= 0:
                break
            if not sequence.running:
                continue  # it was preempted just now
            if blocks.has_room(sequence) or (blocks.can_grow() and self._reserve(sequence, step)):
                self._add(step, sequence, 1, sequence.epoch)
                step.is_ahead = True
                cost += row_s
        return cost

    def _prefill_budget(self, step: StepBuilder, decode_s: float, now_s: float) -> int:
        """Prompt tokens that may join a step whose decoding rows take `decode_s`: all the microbatches of a round take
        a stream's time between two tokens. None beside streams that flip with this step, few in the steps around it. `now_s`: the head's."""
        if step.flips:
            return 0
        most = self._config.max_step_tokens
        if self.num_stages > 1 and self.prices.with_prompt:
            in_flight = self.num_microbatches + self._has_one_more
            most = min(most, max(MIN_CHUNK_TOKENS, self.prices.piece(self._unread(), self.num_stages, in_flight)))
        if self._num_decoding:
            most = min(most, max(FLIP_CHUNK_TOKENS, self._tokens_until_flip(now_s)))
        goal_s, prices = self._config.tpot_goal_s, self.prices
        if not (goal_s and prices.prefill_s and self._num_decoding):
            return most
        left_s = goal_s / self.num_microbatches - prices.step_s - decode_s
        return min(most, max(MIN_CHUNK_TOKENS, int(left_s / prices.prefill_s)))

    def _unread(self) -> int:
        """Tokens of prompts that the next steps could take: of who runs, and of who waits as far as there is room."""
        running = sum(sequence.num_remaining for sequence in self._prefilling)
        num_waiting = min(len(self._waiting), self._config.max_running - self._num_running)
        if num_waiting <= 0 or not self.admits:
            return running
        looked_at = min(num_waiting, _LOOKED_AT)
        waiting = (
            sum(sequence.num_remaining for sequence in islice(self._waiting, looked_at)) * num_waiting // looked_at
        )
        return running + min(waiting, self._pool.num_free * self._config.block_size)

    def _tokens_until_flip(self, now_s: float) -> int:
        """Of prompts, those that are through before anything is expected to flip: each stage in turn, behind as many in all other
        microbatches."""
        if self._opening is None:
            left_s = self.flip_due_s - now_s
        else:
            left_s = math.inf if self.is_vacated() else 0.0  # then only the rest of the cache is copied
        if left_s == math.inf:
            return self._config.max_step_tokens
        times = self.num_stages + self.num_microbatches + self._has_one_more - 1
        token_s = self.prices.prefill_s * times or NEAR_S / self._config.max_step_tokens
        return int(max(0.0, left_s) / token_s)

    def _take_prefills(self, step: StepBuilder) -> None:
        for sequence in self._prefilling:
            if step.budget <= 0:
                return
            if not sequence.num_remaining or sequence in step.rows:
                continue
            if self._opening is not None and sequence.epoch == self._epoch and sequence.num_in_flight:
                continue  # let its chunk come back, so that it can flip
            epoch = self._epoch_for(sequence)
            if step.accepts(epoch):
                self._add(step, sequence, min(sequence.num_remaining, step.budget), epoch)

    def _take_waiting(self, step: StepBuilder, now_s: float) -> None:
        epoch = self._opening.epoch if self._opening is not None else self._epoch
        if not step.accepts(epoch):
            return
        place = 0
        while place < len(self._waiting) and step.budget > 0 and self._num_running < self._config.max_running:
            sequence = self._waiting[place]
            is_due = self.admits or (sequence.attempt > 0 and self._is_too_large(sequence))
            if not is_due or (self._blocks.is_guarded and self._waits_for_the_end(sequence)):
                place += 1
                continue
            if not self._admit(sequence, epoch):
                return
            del self._waiting[place]
            if sequence.queue_s < 0.0:
                sequence.queue_s = now_s - sequence.submitted_s
            self._add(step, sequence, min(sequence.num_remaining, step.budget), epoch)

    def _epoch_for(self, sequence: Sequence) -> Epoch:
        """The epoch of the sequence's next step: the next one, if it can flip to it now."""
        opening = self._opening
        if opening is None or sequence.epoch == opening.epoch:
            return sequence.epoch
        can_flip = not sequence.num_in_flight and opening.arrived.covers(sequence.blocks)
        return opening.epoch if can_flip else sequence.epoch

    def _add(self, step: StepBuilder, sequence: Sequence, count: int, epoch: Epoch) -> None:
        if sequence.epoch != epoch:
            step.flips.append(sequence)
        step.add(sequence, count, epoch)

    def _flip(self, sequence: Sequence, step: StepBuilder) -> None:
        """The sequence's next step is of the next epoch: it begins anew there, with all its blocks and tokens."""
        assert self._opening is not None
        epoch = self._opening.epoch
        assert step.epoch == epoch
        step.fence = max(step.fence, sequence.last_ordinal)
        self._directory.flip(sequence.id, epoch)
        self._released[sequence.epoch].append(sequence.id)
        sequence.epoch, sequence.begun = epoch, False
        self._opening.num_flipped += 1

    def _admit(self, sequence: Sequence, epoch: Epoch) -> bool:
        """Take the blocks for all tokens of `sequence`, cached ones first, if they can be had."""
        blocks, tokens, opening = self._blocks, sequence.tokens, self._opening
        if epoch == self._epoch:
            hits = blocks.cached(sequence)
        else:
            assert opening is not None, "there is no other epoch"
            hits = blocks.cached(sequence, opening.arrived, self._lanes[self._epoch].completed)
        num_blocks = blocks.num_for(len(tokens))
        needed = num_blocks - len(hits)
        num_left = blocks.num_left(hits, needed)
        if num_left < min(self._num_running, self._pool.num_blocks // 50):
            return False
        may_be_short = self.is_squeezed and num_left < GROWTH_BLOCKS * (self._num_running + 1)
        if may_be_short and num_left < self.growth(GROWTH_BLOCKS) + blocks.growth_of(
            sequence, num_blocks, GROWTH_BLOCKS
        ):
            return False
        blocks.take(sequence, hits, needed, epoch)
        if sequence.attempt:
            recomputed = max(0, sequence.num_lost - sequence.num_scheduled)
            self.counters.recomputed_tokens += recomputed
            if sequence.lost_to:
                self.counters.recomputed_for_changes_tokens += recomputed
                self._recomputed_for_change += recomputed if sequence.lost_to == self._change else 0
        else:
            sequence.num_cached_tokens = sequence.num_scheduled
            self.counters.prefix_queries_tokens += len(tokens)
            self.counters.prefix_hit_tokens += sequence.num_scheduled
            self.counters.prompt_tokens += len(tokens)
        sequence.running, sequence.begun, sequence.prefilling, sequence.epoch = True, False, True, epoch
        self._num_running += 1
        self._prefilling.append(sequence)
        return True

    def _is_too_large(self, sequence: Sequence) -> bool:
        """Whether the limit has fallen below what it may reach."""
        return sequence.most_tokens > self._max_context

    def _waits_for_the_end(self, sequence: Sequence) -> bool:
        """Whether the pool is too small for it even when it is empty, as long as the change lasts: others go first."""
        needed = self._blocks.num_for(len(sequence.tokens))
        if self.is_squeezed:
            needed += self._blocks.growth_of(sequence, needed, GROWTH_BLOCKS)
        return needed > self._pool.target

    def _reserve(self, sequence: Sequence, step: StepBuilder) -> bool:
        """A block for the next token, which has no room in those that are there, by preempting younger sequences if need be.

        False when it could not be had: the sequence was itself the youngest, or blocks are still in limbo.
        """
        blocks = self._blocks
        while not blocks.can_grow():
            if blocks.has_limbo:
                return False
            victim = max(self._running(), key=lambda s: s.id)
            step.remove(victim)
            self._preempt(victim)
            self.counters.preemptions += 1
            if victim is sequence:
                return False
        step.new_blocks[sequence] = blocks.grow(sequence)
        return True

    def _rows(self, step: StepBuilder, ordinal: int, flight: Flight) -> list[Row]:
        return [self._row(step, sequence, count, ordinal, flight) for sequence, count in step.rows.items()]

    def _row(self, step: StepBuilder, sequence: Sequence, count: int, ordinal: int, flight: Flight) -> Row:
        """Make the row, advance the sequence, publish the blocks that it fills, if all their tokens are known."""
        request, start = sequence.request, sequence.num_scheduled
        stop = start + count
        ends = stop >= len(sequence.tokens)
        sample = ends and request.max_tokens > 0
        tokens = sequence.tokens[start:stop] or [AHEAD]
        reads_prompt = request.prompt_logprobs >= 0 and start < len(request.prompt) == len(sequence.tokens)
        if sequence.begun and not reads_prompt:
            row = Row(sequence.id, start, tokens, step.new_blocks.get(sequence, []), sample)
        else:
            row = Row(
                sequence.id,
                start,
                tokens,
                step.new_blocks.get(sequence, []) if sequence.begun else [],
                sample,
                None if sequence.begun else self._begin(sequence),
                request.prompt_logprobs if reads_prompt else -1,
                -1 if ends or not reads_prompt else sequence.tokens[stop],
            )
        sequence.begun = True
        sequence.num_scheduled = stop
        sequence.num_in_flight += 1
        sequence.last_ordinal = ordinal
        flight.num_samples += sample
        flight.members.append((sequence, sequence.attempt, "token" if sample else "end" if ends else ""))
        if ends and sequence.prefilling:
            self._prefilling.remove(sequence)
            sequence.prefilling = False
            self._num_decoding += 1
            self._decoding_context += len(sequence.tokens)
        if stop // self._config.block_size > sequence.num_published:
            self._blocks.publish(sequence, in_next=sequence.epoch != self._epoch)
        return row

    def _begin(self, sequence: Sequence) -> SequenceStart:
        sampling = sequence.request.sampling
        history = list(sequence.tokens) if sampling.needs_history else []
        return SequenceStart(sequence.num_prompt_tokens, sampling, list(sequence.blocks), history)

    # -- results ------------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, outputs: list[Output]) -> None:
        request, tokens = sequence.request, sequence.tokens
        tokens.append(token)
        self._decoding_context += 1
        self.counters.generated_tokens += 1
        num_output_tokens = len(tokens) - len(request.prompt)
        output = sequence.output(token, logprobs)
        if token in request.stop_token_ids and num_output_tokens > request.sampling.min_tokens:
            self._end(sequence, "stop", outputs, last=output, stopped_by=token)
        elif num_output_tokens >= request.max_tokens:
            self._end(sequence, "length", outputs, last=output)
        else:
            outputs.append((sequence.id, output))
            if not sequence.num_in_flight:
                self._ready.append(sequence)
            elif len(tokens) % self._config.block_size == 0:
                self._blocks.publish(sequence, in_next=sequence.epoch != self._epoch)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        outputs: list[Output] | None,
        *,
        last: TokenOutput | None = None,
        error: str | None = None,
        stopped_by: int | None = None,
    ) -> None:
        """Finish `sequence` for good; with `outputs` its last output is added to them."""
        if sequence.running:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.finished = True
        del self._sequences[sequence.id]
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        if outputs is not None:
            outputs.append((sequence.id, sequence.last_output(reason, last, error, stopped_by)))

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line, in the order of arrival; everything is recomputed (or found in the cache) later."""
        sequence.num_lost = min(sequence.num_scheduled, len(sequence.tokens))
        sequence.lost_to = self._change if self.is_squeezed else 0
        self._stop_running(sequence)
        sequence.attempt += 1
        sequence.num_scheduled = sequence.num_published = 0
        sequence.begun, sequence.prefilling = False, True
        if not sequence.num_output_tokens:
            sequence.prompt_logprobs = []
        position = 0
        while position < len(self._waiting) and self._waiting[position].id < sequence.id:
            position += 1
        self._waiting.insert(position, sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self._blocks.give_back(sequence)
        sequence.running = False
        sequence.num_in_flight = 0
        self._num_running -= 1
        if sequence.prefilling:
            self._prefilling.remove(sequence)
        else:
            self._num_decoding -= 1
            self._decoding_context -= len(sequence.tokens)
        if sequence.begun and sequence.epoch in self._released:
            self._released[sequence.epoch].append(sequence.id)
