"""A stage: the units that one worker holds under one layout, its page pool, and how it runs its part of a step.

`Stage.run` is the whole hot path of a worker between two messages: plan -> batch -> embedding (first hop) -> layers ->
hidden state, or logits of the sampled rows and their tokens (last hop).
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvstore.ids import WorkerName
from kvstore.page_pool import PagePool
from runtime.batch import NOT_TIMED, LayerKV, StepBatch, run_layers
from runtime.cuda.step import upload
from runtime.kernels.clock import LM_HEAD
from runtime.layout import Layout
from runtime.messages import Row, StepPlan, TokenLogprobs
from runtime.sampling import SamplingRow, TokenHistory, prompt_logprobs, sample
from runtime.stage_state import PlannedBatch, SequenceState, StageState

if TYPE_CHECKING:
    from runtime.cuda.runner import Runner


@dataclass(slots=True)
class Units:
    """The loaded units of a worker. Layers map ``[T, hidden]`` to ``[T, hidden]``; see `runtime.model.builder`."""

    layers: dict[int, Callable[[torch.Tensor, StepBatch, LayerKV], torch.Tensor]]
    embedding: Callable[[torch.Tensor], torch.Tensor] | None = None
    lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None
    runner: "Runner | None" = None
    """What runs the layers on a device whose work is queued; None on the CPU, where `Stage` does."""


@dataclass(slots=True)
class Sampled:
    """What the last hop found; the fields are those of `StepResult`."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[tuple[int, int, list[TokenLogprobs]]]
    failed: list[int]


class Stage:
    """One worker's part of one layout. Not thread safe: the worker's compute thread owns it."""

    def __init__(self, layout: Layout, worker: WorkerName, units: Units, pool: PagePool, device: torch.device) -> None:
        hops = [hop for hop, segment in enumerate(layout.segments) if segment.worker == worker]
        assert hops, f"{worker} serves nothing in {layout}"
        self.layout = layout
        self.pool = pool
        self.state = StageState(pool.block_size, len(hops))
        self._units = units
        self._device = device
        self._batches: dict[int, StepBatch] = {}
        self._final_hop_here = hops[-1]
        self.planned: PlannedBatch | None = None
        """What `run` ran last."""
        self.meanwhile: Callable[[], None] = lambda: None
        """Called when all that a step asks of a device is queued, before it is waited for."""
        self.before_eager: Callable[[], None] = lambda: None
        """Called before a device is given a step piece by piece, which may take as long as the step, or wait for it."""
        self._ahead: tuple[tuple[int, int], PlannedBatch] | None = None
        self.spent = NOT_TIMED
        """Where steps from now on add the time of their parts (`runtime.kernels.clock`); empty for nowhere."""

    def run(self, plan: StepPlan, hop: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """The hidden state that leaves hop `hop`, ``[T, hidden]``. `hidden` is None at hop 0.

        Raises:
            PlanError: when the plan contradicts what this worker knows.
        """
        planned = self._plan(plan, hop)
        if plan.is_ahead and not hop:
            self.state.feed(planned)
        if self._units.runner is not None:
            return self._run_queued(self._units.runner, planned, hop, hidden)
        batch = self._batches.pop(plan.ordinal, None) or make_batch(planned, self._device)
        if hop != self._final_hop_here:
            self._batches[plan.ordinal] = batch
        batch.spent = self.spent
        if hop == 0:
            assert self._units.embedding is not None, "the first hop holds the embedding"
            hidden = self._units.embedding(torch.from_numpy(planned.tokens).to(self._device))
        assert hidden is not None, f"a step came to hop {hop} without its hidden state"
        indices = self.layout.segments[hop].layers
        kvs = [LayerKV(index, self.pool.data, self.pool.page_of(index)) for index in indices]
        self.planned = planned
        return run_layers([self._units.layers[index] for index in indices], hidden, batch, kvs)

    def plan_ahead(self, plan: StepPlan, hop: int) -> None:
        """Do what `run` will ask for first, when nothing of it can change any more but the tokens: the step is the next one of `hop`."""
        runner = self._units.runner
        if self._ahead is None and runner is not None:
            planned = self._plan(plan, hop)
            runner.prepare(self.layout.segments[hop].layers, planned, self.pool)
            self._ahead = (plan.ordinal, hop), planned

    def _plan(self, plan: StepPlan, hop: int) -> PlannedBatch:
        """The batch of `plan`, whose blocks have pages."""
        if self._ahead is not None and self._ahead[0] == (plan.ordinal, hop):
            planned, self._ahead = self._ahead[1], None
            return planned
        planned = self.state.plan_batch(plan)
        if planned.new_blocks:
            self.pool.ensure(planned.new_blocks)
        return planned

    def _run_queued(
        self, runner: "Runner", planned: PlannedBatch, hop: int, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """As `run`; what goes on to another hop is on the host, and there, when this returns."""
        layers, units = self.layout.segments[hop].layers, self._units
        assert hop == 0 or hidden is not None, f"a step came to hop {hop} without its hidden state"
        before = self.before_eager
        out = runner.run(layers, units.layers, planned, self.pool, hidden if hop else None, units.embedding, before)
        self.planned = planned
        return out if hop == self.layout.num_hops - 1 else runner.finish(out, self.meanwhile)

    def sample(self, hidden: torch.Tensor) -> Sampled:
        """The tokens of the step that `run` has just finished at the last hop; only sampled rows meet the LM head."""
        planned, lm_head = self.planned, self._units.lm_head
        assert planned is not None, "run first"
        assert lm_head is not None, "the last hop holds the LM head"
        rows, starts = planned.plan.rows, planned.query_starts
        chosen = [index for index, row in enumerate(rows) if row.sample]
        found = Sampled([], [], [], [])
        if chosen:
            begun_ns = perf_counter_ns()
            last = hidden
            if len(chosen) < len(hidden):
                last = hidden.index_select(0, upload(starts[1:][chosen].astype(np.int64) - 1, hidden.device))
            logits, first = self._read(last)
            if len(self.spent):
                self.spent[LM_HEAD] += perf_counter_ns() - begun_ns
            lens = planned.context_lens.tolist()  # of this step: the next one may have been applied to the sequences
            self._choose(logits, first, [(rows[i], planned.sequences[i], lens[i]) for i in chosen], found)
        for index, row in enumerate(rows):
            if row.prompt_logprobs >= 0:
                entries = _read_prompt(lm_head, hidden[starts[index] : starts[index + 1]], row)
                found.prompt_logprobs.append((row.sequence, row.start, entries))
        if not chosen and self._units.runner is not None:
            self.meanwhile()
            self._units.runner.wait()  # the sampler, which would have, had nothing to do
        return found

    def _read(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of all rows; and their likeliest tokens, as `runtime.sampling.likeliest` gives them, where a graph did both."""
        lm_head, runner = self._units.lm_head, self._units.runner
        assert lm_head is not None, "the last hop holds the LM head"
        found = runner.read(lm_head, hidden) if runner is not None else None
        return found if found is not None else (lm_head(hidden), None)

    def computed_s(self, begun_s: float, computed_s: float) -> float:
        """When the layers of the step that was sampled were done: `computed_s`, or later where work is queued."""
        seconds = self._units.runner.seconds() if self._units.runner is not None else None
        return computed_s if seconds is None else max(computed_s, begun_s + seconds)

    def check_integrity(self) -> None:
        self.state.check_integrity()
        self.pool.check_integrity()

    def _choose(
        self,
        logits: torch.Tensor,
        first: torch.Tensor | None,
        chosen: list[tuple[Row, SequenceState, int]],
        found: Sampled,
    ) -> None:
        sampling_rows = [
            SamplingRow(state.sampling, num_tokens - state.num_prompt_tokens, _history(state))
            for _, state, num_tokens in chosen
        ]
        output = sample(logits, sampling_rows, first, self.meanwhile)
        found.tokens = output.tokens
        if any(state.sampling.logprobs >= 0 for _, state, _ in chosen):
            found.logprobs = output.logprobs
        found.failed = [chosen[index][0].sequence for index in output.failed]
        for index, (token, row) in enumerate(zip(output.tokens, sampling_rows, strict=True)):
            if row.history is not None and index not in output.failed:
                row.history.add(token)


def make_batch(planned: PlannedBatch, device: torch.device) -> StepBatch:
    """The planned arrays as the model wants them."""
    return StepBatch(
        positions=torch.from_numpy(planned.positions).to(device),
        query_starts=planned.query_starts,
        context_lens=planned.context_lens,
        block_tables=planned.block_tables,
        prompt_lens=planned.prompt_lens,
    )


def _history(state: SequenceState) -> TokenHistory | None:
    """The token counts that the penalties need, made from the known tokens when the sequence is first sampled here."""
    if not state.sampling.needs_history:
        return None
    if state.extra is None:
        prompt, output = state.history[: state.num_prompt_tokens], state.history[state.num_prompt_tokens :]
        state.extra = TokenHistory(prompt, output)
    assert isinstance(state.extra, TokenHistory)
    return state.extra


def _read_prompt(
    lm_head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, row: Row
) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens that follow the positions of `row`, as far as they are known."""
    targets = row.tokens[1:] + ([row.next_token] if row.next_token >= 0 else [])
    entries: list[TokenLogprobs] = []
    for start in range(0, len(targets), 64):  # the logits of a whole prompt would take more room than the model
        part = targets[start : start + 64]
        logits = lm_head(hidden[start : start + len(part)])
        entries += prompt_logprobs(logits, torch.tensor(part, device=logits.device), row.prompt_logprobs)
    return entries
