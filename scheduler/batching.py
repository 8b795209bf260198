"""Continuous batching: which tokens of which sequences go into the next step. Pure.

At most `num_microbatches` steps are in flight. Whenever there is room for one more, `next_step` forms it:

1. decode: the longest-waiting ready sequences, at most an even share of all decoding ones, so that the microbatches
   balance themselves whatever joins and leaves;
2. prefill: chunks of running sequences, oldest first, within the token budget. Every hop runs the steps in their
   order, so the next chunk of a prompt may follow while the last one is still on its way;
3. admission: waiting sequences, first come first served, when their blocks can be had. The first that does not
   fit stops the line: nobody overtakes.

When a running sequence needs a block and there is none, the youngest running sequence is preempted: it gives its
blocks back and waits at the head of the line to be recomputed. The oldest is never preempted by a younger, and no
sequence can outgrow the pool alone (`Batcher.submit` refuses it), so there is always progress.

Because the order of steps is the order of KV writes, a block may be published to the prefix cache when its tokens
are *scheduled*, and freed blocks may be handed on at once: whoever reads or overwrites them does so in a later step.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import Epoch, SequenceId
from kvstore.prefix import PrefixHasher
from runtime.messages import Row, SequenceStart, StepPlan, StepResult
from scheduler.request import AdmissionError, FinishReason, Request, TokenOutput
from scheduler.sequence import Sequence

Output: TypeAlias = tuple[SequenceId, TokenOutput]


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Bounds on everything that the batcher may pile up."""

    num_microbatches: int = 2
    max_step_tokens: int = 256
    max_running: int = 256
    max_queue: int = 1024
    block_size: int = 16
    prefix_cache: bool = True
    cache_root: bytes = b""


@dataclass(slots=True)
class Counters:
    """Sums since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0
    rejected: int = 0
    stale_results: int = 0
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _InFlight:
    """Who awaits something of a step, and in which attempt; `samples` get a token each, in row order."""

    samples: list[tuple[Sequence, int]]
    reads: list[tuple[Sequence, int]]
    """Sequences of ``max_tokens == 0`` whose prompt ends with this step."""


class Batcher:
    """All requests, from the queue to the last token, and the block pool they live in."""

    def __init__(self, config: BatchingConfig, pool: BlockPool, directory: Directory) -> None:
        self._config = config
        self._pool = pool
        self._directory = directory
        self._hasher = PrefixHasher(config.block_size, config.cache_root)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._ready: deque[Sequence] = deque()
        self._in_flight: dict[int, _InFlight] = {}
        self._released: list[SequenceId] = []
        self._num_running = 0
        self._num_decoding = 0
        self._epoch: Epoch = 0
        self._next_ordinal = 0
        self._open = False
        self._max_context = 0
        self.counters = Counters()

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
        return len(self._in_flight)

    @property
    def max_context(self) -> int:
        """Tokens that one sequence may reach: the model's context, or fewer when the pool holds fewer."""
        return self._max_context

    def live_sequences(self) -> list[SequenceId]:
        return list(self._sequences)

    # -- epochs -------------------------------------------------------------------------------------------

    def open_epoch(self, epoch: Epoch, num_blocks: int, max_context: int) -> list[Output]:
        """Serve under `epoch` with a fresh pool of `num_blocks`; what was running waits to be recomputed.

        Sequences that the new pool can never hold end with an error, which is returned.
        """
        assert not self._open, "close the present epoch before opening the next"
        self._pool.resize(num_blocks)
        self._epoch, self._next_ordinal, self._open = epoch, 0, True
        self._max_context = min(max_context, num_blocks * self._config.block_size)
        outputs: list[Output] = []
        for sequence in list(self._sequences.values()):
            if sequence.num_prompt_tokens + sequence.request.max_tokens > self._max_context:
                message = (
                    f"the KV cache shrank to {self._max_context} tokens after a worker was lost; this request needs "
                    f"{sequence.num_prompt_tokens + sequence.request.max_tokens}"
                )
                self._end(sequence, "error", outputs, error=message)
        return outputs

    def close_epoch(self) -> None:
        """The pipeline is gone: forget what is in flight and cached, put everything that ran back in line."""
        self._in_flight.clear()
        for sequence in sorted((s for s in self._sequences.values() if s.running), key=lambda s: s.id, reverse=True):
            self._preempt(sequence)
        self._pool.forget_cached()
        self._released.clear()
        self._open = False

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

    def abort(self, sequence_id: SequenceId, reason: FinishReason) -> None:
        """End a sequence without a last output; its blocks are free at once. Unknown ids are ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence, reason, None)

    # -- steps --------------------------------------------------------------------------------------------

    def next_step(self, now_s: float) -> StepPlan | None:
        """The next step to send, or None when every microbatch is in flight or nothing is ready."""
        config = self._config
        if not self._open or len(self._in_flight) >= config.num_microbatches:
            return None
        step = _StepBuilder(config.max_step_tokens)
        self._take_decodes(step)
        self._take_prefills(step)
        self._take_waiting(step, now_s)
        if not step.rows:
            return None
        rows = [self._row(step, sequence, count) for sequence, count in step.rows.items()]
        ordinal = self._next_ordinal
        self._next_ordinal += 1
        self._in_flight[ordinal] = _InFlight(step.samples, step.reads)
        released, self._released = self._released, []
        self.counters.steps += 1
        return StepPlan(self._epoch, ordinal, ordinal % config.num_microbatches, rows, released)

    def complete(self, result: StepResult) -> list[Output]:
        """Apply what a step brought. A stale result (older epoch, unknown step) is counted and dropped."""
        flight = self._in_flight.pop(result.ordinal, None) if result.epoch == self._epoch else None
        if flight is None:
            self.counters.stale_results += 1
            return []
        assert len(result.tokens) == len(flight.samples), (
            f"step {result.ordinal} sampled {len(result.tokens)} tokens for {len(flight.samples)} rows"
        )
        outputs: list[Output] = []
        failed = set(result.failed)
        for sequence_id, start, entries in result.prompt_logprobs:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and len(sequence.prompt_logprobs) == start:
                sequence.prompt_logprobs += entries
        for index, (sequence, attempt) in enumerate(flight.samples):
            if sequence.finished or sequence.attempt != attempt:
                continue
            if sequence.id in failed:
                message = "the model produced logits that are not finite for this sequence"
                self._end(sequence, "error", outputs, error=message)
                continue
            logprobs = result.logprobs[index] if result.logprobs else None
            self._append(sequence, result.tokens[index], logprobs, outputs)
        for sequence, attempt in flight.reads:
            if not sequence.finished and sequence.attempt == attempt:
                self._end(sequence, "length", outputs)
        return outputs

    def check_integrity(self) -> None:
        """Every count agrees with every list; every block in use is used by someone."""
        running = [s for s in self._sequences.values() if s.running]
        assert len(running) == self._num_running, f"{len(running)} run, {self._num_running} counted"
        decoding = [s for s in running if not s.prefilling]
        assert len(decoding) == self._num_decoding, f"{len(decoding)} decode, {self._num_decoding} counted"
        for sequence in self._waiting:
            assert not sequence.running, f"sequence {sequence.id} both runs and waits"
            assert not sequence.blocks, f"sequence {sequence.id} waits and holds blocks"
        assert len(self._waiting) + len(running) == len(self._sequences), "a sequence neither waits nor runs"
        ids = [s.id for s in self._waiting]
        assert ids == sorted(ids), "the line is not in the order of arrival"
        held = {b for s in running for b in s.blocks}
        assert len(held) == self._pool.num_used, f"{self._pool.num_used} blocks in use, sequences hold {len(held)}"
        self._pool.check_integrity()
        self._directory.check_integrity()

    # -- forming a step -----------------------------------------------------------------------------------

    def _take_decodes(self, step: "_StepBuilder") -> None:
        share = -(-self._num_decoding // self._config.num_microbatches)
        ready = self._ready
        while ready and len(step.rows) < share and step.budget > 0:
            sequence = ready.popleft()
            if not sequence.running or sequence.prefilling or sequence.num_remaining != 1 or sequence in step.rows:
                continue  # it ended, was preempted, or stands here twice because it was
            if not self._reserve(sequence, 1, step):
                continue
            step.add(sequence, 1)

    def _take_prefills(self, step: "_StepBuilder") -> None:
        for sequence in self._prefilling:
            if step.budget <= 0:
                return
            if sequence.num_remaining and sequence not in step.rows:
                step.add(sequence, min(sequence.num_remaining, step.budget))

    def _take_waiting(self, step: "_StepBuilder", now_s: float) -> None:
        while self._waiting and step.budget > 0 and self._num_running < self._config.max_running:
            sequence = self._waiting[0]
            if not self._admit(sequence):
                return
            self._waiting.popleft()
            if sequence.queue_s < 0.0:
                sequence.queue_s = now_s - sequence.submitted_s
            step.add(sequence, min(sequence.num_remaining, step.budget))

    def _admit(self, sequence: Sequence) -> bool:
        """Take the blocks for all tokens of `sequence`, cached ones first, if they can be had."""
        config, pool = self._config, self._pool
        tokens = sequence.tokens
        hits = self._cached_blocks(sequence)
        needed = -(-len(tokens) // config.block_size) - len(hits)
        headroom = min(self._num_running, pool.num_blocks // 50)
        if pool.num_free_after_acquire(hits) < needed + headroom:
            return False
        pool.acquire(hits)
        sequence.blocks = [*hits, *pool.allocate(needed)]
        sequence.num_published = len(hits)
        sequence.num_scheduled = len(hits) * config.block_size
        if not sequence.attempt:
            sequence.num_cached_tokens = sequence.num_scheduled
            self.counters.prefix_queries_tokens += len(tokens)
            self.counters.prefix_hit_tokens += sequence.num_scheduled
            self.counters.prompt_tokens += len(tokens)
        sequence.running, sequence.begun, sequence.prefilling = True, False, True
        self._num_running += 1
        self._prefilling.append(sequence)
        self._directory.add(sequence.id, self._epoch, sequence.blocks)
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        request = sequence.request
        if not (self._config.prefix_cache and request.use_prefix_cache) or request.prompt_logprobs >= 0:
            return []
        self._hasher.extend(sequence.digests, sequence.tokens)
        usable = (len(sequence.tokens) - 1) // self._config.block_size
        return self._pool.lookup(sequence.digests[:usable])

    def _reserve(self, sequence: Sequence, count: int, step: "_StepBuilder") -> bool:
        """Blocks for the next `count` tokens, by preempting younger sequences if need be; False if it was itself."""
        room = len(sequence.blocks) * self._config.block_size
        missing = -(-(sequence.num_scheduled + count - room) // self._config.block_size)
        while missing > 0 and not self._pool.can_allocate(missing):
            victim = max((s for s in self._sequences.values() if s.running), key=lambda s: s.id)
            step.remove(victim)
            self._preempt(victim)
            self.counters.preemptions += 1
            if victim is sequence:
                return False
        if missing > 0:
            blocks = self._pool.allocate(missing)
            self._directory.extend(sequence.id, blocks)
            step.new_blocks[sequence] = blocks
        return True

    def _row(self, step: "_StepBuilder", sequence: Sequence, count: int) -> Row:
        """Make the row, advance the sequence, publish the blocks that it fills."""
        request, start = sequence.request, sequence.num_scheduled
        stop = start + count
        ends = stop == len(sequence.tokens)
        sample = ends and request.max_tokens > 0
        reads_prompt = request.prompt_logprobs >= 0 and not sequence.num_output_tokens
        row = Row(
            sequence.id,
            start,
            sequence.tokens[start:stop],
            step.new_blocks.get(sequence, []) if sequence.begun else [],
            sample,
            None if sequence.begun else self._begin(sequence),
            request.prompt_logprobs if reads_prompt else -1,
            -1 if ends or not reads_prompt else sequence.tokens[stop],
        )
        sequence.begun = True
        sequence.num_scheduled = stop
        flight = (sequence, sequence.attempt)
        if sample:
            step.samples.append(flight)
        elif ends:
            step.reads.append(flight)
        if ends and sequence.prefilling:
            self._prefilling.remove(sequence)
            sequence.prefilling = False
            self._num_decoding += 1
        if stop // self._config.block_size > sequence.num_published:
            self._publish(sequence)
        return row

    def _begin(self, sequence: Sequence) -> SequenceStart:
        sampling = sequence.request.sampling
        history = list(sequence.tokens) if sampling.needs_history else []
        return SequenceStart(sequence.num_prompt_tokens, sampling, list(sequence.blocks), history)

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.num_scheduled // self._config.block_size
        if self._config.prefix_cache and sequence.request.use_prefix_cache:
            self._hasher.extend(sequence.digests, sequence.tokens)
            for index in range(sequence.num_published, full):
                self._pool.publish(sequence.blocks[index], sequence.digests[index])
        sequence.num_published = full

    # -- results ------------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, token: int, logprobs, outputs: list[Output]) -> None:
        request = sequence.request
        sequence.tokens.append(token)
        self.counters.generated_tokens += 1
        first = sequence.num_output_tokens == 1
        output = TokenOutput(
            [token],
            None if logprobs is None else [logprobs],
            num_cached_tokens=sequence.num_cached_tokens if first else 0,
            prompt_logprobs=sequence.prompt_logprobs if first and request.prompt_logprobs >= 0 else None,
            queue_s=sequence.queue_s if first else -1.0,
        )
        if token in request.stop_token_ids and sequence.num_output_tokens > request.sampling.min_tokens:
            self._end(sequence, "stop", outputs, last=output, stopped_by=token)
        elif sequence.num_output_tokens >= request.max_tokens:
            self._end(sequence, "length", outputs, last=output)
        else:
            outputs.append((sequence.id, output))
            self._ready.append(sequence)

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
        if outputs is None:
            return
        reads = sequence.request.prompt_logprobs >= 0 and sequence.request.max_tokens == 0
        outputs.append(
            (
                sequence.id,
                TokenOutput(
                    last.tokens if last else [],
                    last.logprobs if last else None,
                    reason,
                    error,
                    stopped_by,
                    last.num_cached_tokens if last else sequence.num_cached_tokens,
                    sequence.prompt_logprobs if reads else last.prompt_logprobs if last else None,
                    last.queue_s if last else sequence.queue_s,
                ),
            )
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line, in the order of arrival; everything is recomputed (or found in the cache) later."""
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
        self._pool.release(sequence.blocks)
        self._directory.remove(sequence.id)
        sequence.blocks = []
        sequence.running = False
        self._num_running -= 1
        if sequence.prefilling:
            self._prefilling.remove(sequence)
        else:
            self._num_decoding -= 1
        if sequence.begun:
            self._released.append(sequence.id)


class _StepBuilder:
    """A step being formed: rows in order, each with the number of tokens it takes."""

    __slots__ = ("budget", "new_blocks", "reads", "rows", "samples")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: dict[Sequence, int] = {}
        self.new_blocks: dict[Sequence, list[int]] = {}
        self.samples: list[tuple[Sequence, int]] = []
        self.reads: list[tuple[Sequence, int]] = []

    def add(self, sequence: Sequence, count: int) -> None:
        self.rows[sequence] = count
        self.budget -= count

    def remove(self, sequence: Sequence) -> None:
        count = self.rows.pop(sequence, None)
        if count is not None:
            self.budget += count
            self.new_blocks.pop(sequence, None)
