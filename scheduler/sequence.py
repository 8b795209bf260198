"""A sequence: one request on its way from waiting to finished. Plain state, mutated only by `scheduler.batching`."""

from dataclasses import dataclass, field

from kvstore.ids import BlockId, Epoch, SequenceId
from runtime.messages import TokenLogprobs
from scheduler.request import FinishReason, Request, TokenOutput


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt followed by the output; `num_scheduled` of them have been sent to the workers.

    What remains, ``len(tokens) - num_scheduled``, says it all: more than one is a prefill (or the recomputation after
    a preemption), exactly one is a decode step, none means that the next token is being sampled right now, and one less
    than none that the step which reads it is on its way as well.
    """

    id: SequenceId
    request: Request
    tokens: list[int]
    num_scheduled: int = 0
    blocks: list[BlockId] = field(default_factory=list)
    """While it runs this is the directory's own list, which alone extends it."""
    digests: list[bytes] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were needed."""
    num_published: int = 0
    attempt: int = 0
    """Grows with each preemption: a result of an older attempt is dropped."""
    epoch: Epoch = -1
    """Under which it runs; as the directory has it."""
    num_in_flight: int = 0
    """Its steps that have not come back: several while it prefills, two where one was formed ahead."""
    last_ordinal: int = -1
    """The last step it was in, of its epoch."""
    num_lost: int = 0
    """KV rows that it had when it was last preempted."""
    lost_to: int = 0
    """The change of layout that is to blame for that, if any is."""
    begun: bool = False
    running: bool = False
    finished: bool = False
    prefilling: bool = True
    """Until the first token of this attempt is out; a preempted sequence prefills again."""
    submitted_s: float = 0.0
    queue_s: float = -1.0
    """From `submitted_s` to the first step; -1 while it has not been in one."""
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        """What it may reach."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def goes_on(self) -> bool:
        """Whether it needs a token after the one that is being sampled, as far as can be known before."""
        return len(self.tokens) + 1 < self.most_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_scheduled

    def output(self, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """The token that has just been added; the first one of all comes with what is known of the prompt."""
        entries = None if logprobs is None else [logprobs]
        if self.num_output_tokens > 1:
            return TokenOutput([token], entries)
        return TokenOutput(
            [token],
            entries,
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=self.prompt_logprobs if self.request.prompt_logprobs >= 0 else None,
            queue_s=self.queue_s,
        )

    def last_output(
        self, reason: FinishReason, last: TokenOutput | None, error: str | None, stopped_by: int | None
    ) -> TokenOutput:
        """`last`, if there is one, with how it ended; otherwise an output without a token."""
        reads = self.request.prompt_logprobs >= 0 and self.request.max_tokens == 0
        return TokenOutput(
            last.tokens if last else [],
            last.logprobs if last else None,
            reason,
            error,
            stopped_by,
            last.num_cached_tokens if last else self.num_cached_tokens,
            self.prompt_logprobs if reads else last.prompt_logprobs if last else None,
            last.queue_s if last else self.queue_s,
        )
