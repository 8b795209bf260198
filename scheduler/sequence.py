"""A sequence: one request on its way from waiting to finished. Plain state, mutated only by `scheduler.batching`."""

from dataclasses import dataclass, field

from kvstore.ids import BlockId, Epoch, SequenceId
from runtime.messages import TokenLogprobs
from scheduler.request import Request


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
    def goes_on(self) -> bool:
        """Whether it needs a token after the one that is being sampled, as far as can be known before."""
        return len(self.tokens) + 1 < len(self.request.prompt) + self.request.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_scheduled
