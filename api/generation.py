"""One HTTP request while it generates: its sequences, their tokens turned into text, and their end.

The engine calls a `Choice`'s sink for every step; the choice detokenises, looks for stop strings, and hands text to an
`Output` (the event stream, or the collector of a whole response) in the same call: no task wakes up and no queue is
crossed per token. The handler's task sleeps until the last choice has ended. However it ends (done, error, client gone),
`Generation.close` leaves no sequence running.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from api.errors import ApiError
from api.metrics import Metrics
from api.protocol import Usage, usage
from api.stop import StopMatcher
from api.text import Text
from api.validation import Plan
from kvstore.ids import SequenceId
from runtime.messages import TokenLogprobs
from scheduler.request import AdmissionError, Engine, Limits, Request, TokenOutput

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Prompt:
    """Token ids, and the text they came from when there was one."""

    tokens: list[int]
    text: str | None = None


@dataclass(slots=True)
class Delta:
    """What a choice grows by. `logprobs` and `offsets` (characters before each token) align with `tokens`.

    The first `num_echoed` tokens are the prompt's.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] | None = None
    offsets: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_echoed: int = 0


class Output(Protocol):
    """Where text goes."""

    def text_writer(self, index: int) -> Callable[[str], None]:
        """The shortest way for a token of choice `index` that is nothing but text."""
        ...

    def write(self, delta: Delta) -> None: ...


class Choice:
    """One sequence, from the engine's tokens to the client's text."""

    __slots__ = (
        "_detokenizer",
        "_generation",
        "_inter_token",
        "_is_plain",
        "_last_s",
        "_matcher",
        "_offset",
        "_write_text",
        "ended",
        "error",
        "index",
        "num_cached_tokens",
        "num_tokens",
        "prompt",
        "prompt_logprobs",
        "request",
        "sequence",
    )

    def __init__(self, generation: "Generation", index: int, prompt: Prompt, request: Request):
        plan = generation.plan
        self.index = index
        self.prompt = prompt
        self.request = request
        self.sequence: SequenceId | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.error: ApiError | None = None
        self.ended = False
        self._generation = generation
        self._inter_token = generation.metrics.inter_token
        self._detokenizer = generation.text.detokenizer(skip_special_tokens=plan.skip_special_tokens)
        self._matcher = StopMatcher(plan.stops, plan.include_stop) if plan.stops else None
        self._offset = 0
        self._last_s = 0.0
        self._is_plain = self._matcher is None and plan.logprobs < 0 and not plan.return_token_ids
        self._write_text = generation.output.text_writer(index)

    def sink(self, output: TokenOutput) -> None:
        """What the engine calls. A failure of ours ends the request instead of leaving its client waiting."""
        if self.ended:
            return
        try:
            now, last_s = perf_counter(), self._last_s
            if last_s:
                self._last_s = now
                self._inter_token.observe(now - last_s)
                if self._is_plain and output.finish_reason is None and len(output.tokens) == 1:
                    self.num_tokens += 1
                    self._write_text(self._detokenizer.step(output.tokens[0]))
                    return
            else:
                self._begin(output, now)
            self._take(output)
        except Exception:
            _log.exception("the output of %s could not be handled", self.request.request_id)
            self.error = ApiError("internal error; the server's log has the details", status=500)
            self._end(tell_engine=output.finish_reason is None)

    def _begin(self, output: TokenOutput, now: float) -> None:
        assert output.tokens or output.finish_reason is not None, "an output brings tokens, or the end"
        self._last_s = now
        self.num_cached_tokens = output.num_cached_tokens
        self.prompt_logprobs = output.prompt_logprobs
        metrics = self._generation.metrics
        if output.queue_s >= 0:
            metrics.queue.observe(output.queue_s)
        if output.tokens:
            metrics.first_token.observe(now - self._generation.began_s)
        if self._generation.plan.echo and output.finish_reason not in ("error", "abort"):
            self._echo(output)

    def _echo(self, output: TokenOutput) -> None:
        tokens, plan = self.prompt.tokens, self._generation.plan
        delta = Delta(self.index, tokens=tokens, num_echoed=len(tokens))
        detokenizer = self._generation.text.detokenizer(skip_special_tokens=plan.skip_special_tokens)
        pieces, offsets = [], []
        for token in tokens:
            offsets.append(self._offset)
            pieces.append(detokenizer.step(token))
            self._offset += len(pieces[-1])
        delta.text = "".join(pieces) + detokenizer.flush() if self.prompt.text is None else self.prompt.text
        self._offset = len(delta.text)
        if plan.logprobs >= 0:
            delta.logprobs = [None, *(output.prompt_logprobs or [None] * (len(tokens) - 1))]
            delta.offsets = offsets
        self._generation.output.write(delta)

    def _take(self, output: TokenOutput) -> None:
        """Any output, the long way."""
        plan = self._generation.plan
        delta = Delta(self.index, finish_reason=output.finish_reason, stop_reason=output.stopped_by)
        pieces, offsets = [], []
        for i, token in enumerate(output.tokens):
            self.num_tokens += 1
            offsets.append(self._offset)
            is_hidden = output.stopped_by is not None and i == len(output.tokens) - 1 and not plan.include_stop
            piece = "" if is_hidden else self._detokenizer.step(token)
            self._offset += len(piece)
            pieces.append(self._pass_stops(piece))
            delta.tokens.append(token)
            if self._stopped:
                break
        if delta.finish_reason is not None and not self._stopped:
            pieces.append(self._pass_stops(self._detokenizer.flush()))
            if self._matcher is not None and not self._stopped:
                pieces.append(self._matcher.flush())
        if self._stopped:
            assert self._matcher is not None
            delta.finish_reason, delta.stop_reason = "stop", self._matcher.matched
        delta.text = "".join(pieces)
        if plan.logprobs >= 0:
            delta.logprobs = list((output.logprobs or [])[: len(delta.tokens)])
            delta.offsets = offsets
        if delta.finish_reason in ("error", "abort"):
            status = 500 if delta.finish_reason == "error" else 503
            message = output.error or "the server ended the request"
            self.error = ApiError(message, status=status, code="generation_failed")
        elif delta.tokens or delta.finish_reason is not None:
            self._generation.output.write(delta)
        if delta.finish_reason is not None:
            self._end(tell_engine=output.finish_reason is None)

    @property
    def _stopped(self) -> bool:
        return self._matcher is not None and self._matcher.matched is not None

    def _pass_stops(self, piece: str) -> str:
        if self._matcher is None or not piece or self.num_tokens <= self._generation.plan.min_tokens:
            return piece
        return self._matcher.push(piece)

    def _end(self, tell_engine: bool) -> None:
        self.ended = True
        if tell_engine and self.sequence is not None:
            self._generation.engine.finish(self.sequence)
        self._generation.choice_ended(self)


class Generation:
    """All sequences of one request: ``plan.num_choices`` for each prompt, prompt by prompt."""

    def __init__(self, engine: Engine, text: Text, metrics: Metrics, plan: Plan, output: Output):
        self.engine = engine
        self.text = text
        self.metrics = metrics
        self.plan = plan
        self.output = output
        self.choices: list[Choice] = []
        self.began_s = perf_counter()
        self._num_running = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def submit(self, request_id: str, prompts: list[Prompt], limits: Limits) -> None:
        """Hand every sequence to the engine, or none.

        Raises:
            ApiError: 400 when one can never fit, 429 when the queue is full, 503 when not serving.
        """
        num_sequences = len(prompts) * self.plan.num_choices
        if num_sequences > limits.max_queue:
            raise ApiError(
                f"{len(prompts)} prompts with n = {self.plan.num_choices} make {num_sequences} sequences, "
                f"the queue holds {limits.max_queue}; send fewer at a time",
                param="n" if len(prompts) == 1 else "prompt",
            )
        for prompt in prompts:
            for choice in range(self.plan.num_choices):
                index = len(self.choices)
                request = self.plan.request(f"{request_id}-{index}", prompt.tokens, choice, limits)
                self.choices.append(Choice(self, index, prompt, request))
        self._num_running = len(self.choices)
        try:
            for choice in self.choices:
                choice.sequence = self.engine.submit(choice.request, choice.sink)
        except AdmissionError as error:
            self.close()
            raise ApiError.from_admission(error) from None

    async def wait(self) -> None:
        """Until every choice has ended.

        Raises:
            ApiError: 500 or 503 when the engine gave one of them up.
        """
        await self._done

    def choice_ended(self, choice: Choice) -> None:
        self._num_running -= 1
        self.metrics.request.observe(perf_counter() - self.began_s)
        if self._done.done():
            return
        if choice.error is not None:
            self._done.set_exception(choice.error)
        elif self._num_running == 0:
            self._done.set_result(None)

    def close(self) -> None:
        """Abort what still runs. Idempotent."""
        for choice in self.choices:
            if not choice.ended:
                choice.ended = True
                if choice.sequence is not None:
                    self.engine.abort(choice.sequence)
        if self._done.done() and not self._done.cancelled():
            self._done.exception()  # looked at, so that the loop does not complain when nobody waits for it

    def usage(self) -> Usage:
        """Prompts count once, whatever `n`."""
        firsts = self.choices[:: self.plan.num_choices]
        return usage(
            prompt_tokens=sum(len(choice.prompt.tokens) for choice in firsts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in firsts),
        )


class Collector:
    """The `Output` of a response that is not streamed: one growing `Delta` per choice."""

    def __init__(self) -> None:
        self._parts: dict[int, list[str]] = {}
        self._whole: dict[int, Delta] = {}

    def text_writer(self, index: int) -> Callable[[str], None]:
        self._whole[index] = Delta(index)
        self._parts[index] = []
        return self._parts[index].append

    def write(self, delta: Delta) -> None:
        whole = self._whole[delta.index]
        self._parts[delta.index].append(delta.text)
        whole.tokens.extend(delta.tokens)
        whole.num_echoed += delta.num_echoed
        if delta.logprobs is not None:
            whole.logprobs = [*(whole.logprobs or ()), *delta.logprobs]
            whole.offsets = [*(whole.offsets or ()), *(delta.offsets or ())]
        if delta.finish_reason is not None:
            whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason

    def results(self) -> list[Delta]:
        """Every choice whole, in order."""
        for index, whole in self._whole.items():
            whole.text = "".join(self._parts[index])
        return [self._whole[index] for index in sorted(self._whole)]
