"""What is asked of the server, and what steps the batcher makes of it: the load as values. Pure.

`scheduler/batching.py` forms a step of an even share of the decoding sequences and fills it up with prompt chunks. With M
microbatches in flight and N sequences being served, a request of q prompt tokens (those that the prefix cache lacks), read in
n chunks, and o output tokens lives for n - 1 steps and o rounds of M steps. So by Little's law r = N / (M o + n - 1) requests
are finished per step, and a mean step carries r (o - 1) decode rows and r q prompt tokens, but never more tokens than
fit. Prompt tokens come in lumps: a share of the steps carries a chunk, the rest only decodes; `mean_steps` gives both
kinds with their shares.

Never true: a step here carries a whole number of rows. These are means.
"""

import math
from typing import Literal, TypeAlias

import msgspec

from scheduler.planning.cost import Work

Objective: TypeAlias = Literal["throughput", "latency", "goodput"]


class Traffic(msgspec.Struct, frozen=True):
    """The load to plan for; means over requests, tokens.

    `requests_per_s` 0 means a closed loop: `concurrency` clients, each waiting for its answer before it asks again. In an
    open loop `concurrency` bounds how many are served at once (0: no bound but the server's). `arrival_cv` and
    `service_cv` are coefficients of variation, of the times between arrivals and of the lengths.
    """

    requests_per_s: float = 0.0
    prompt_tokens: float = 128.0
    output_tokens: float = 128.0
    cached_tokens: float = 0.0
    concurrency: float = 32.0
    arrival_cv: float = 1.0
    service_cv: float = 1.0

    def __post_init__(self) -> None:
        if self.output_tokens < 1 or self.prompt_tokens < 1:
            raise ValueError(
                f"traffic of {self.prompt_tokens:g} prompt and {self.output_tokens:g} output tokens; at least 1 of each is needed"
            )
        if self.requests_per_s <= 0 and self.concurrency <= 0:
            raise ValueError("traffic needs requests_per_s (an open loop) or a concurrency (a closed one)")

    @property
    def new_tokens(self) -> float:
        """Prompt tokens that must be computed."""
        return max(1.0, self.prompt_tokens - self.cached_tokens)

    @property
    def mean_context(self) -> float:
        """Positions that a decoding row attends to, and KV rows that a running sequence holds, in mean."""
        return self.prompt_tokens + self.output_tokens / 2


class Slo(msgspec.Struct, frozen=True):
    """What a request must meet to count: seconds to the first token, seconds per further token (means over its output)."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1


class Serving(msgspec.Struct, frozen=True):
    """How the server batches. `num_microbatches` 0: as many as there are stages. `head_s`: the head's share of a round."""

    max_step_tokens: int = 512
    max_running: int = 256
    num_microbatches: int = 0
    block_size: int = 16
    head_s: float = 0.0005

    def microbatches(self, num_stages: int) -> int:
        return max(self.num_microbatches, num_stages)

    def kv_tokens(self, traffic: Traffic, num_sequences: float) -> float:
        """KV rows that so many running sequences hold in each layer, whole blocks."""
        return num_sequences * math.ceil(traffic.mean_context / self.block_size) * self.block_size


class Steps(msgspec.Struct, frozen=True):
    """The mean steps of a pipeline with `num_sequences` in service: a share of steps only decodes, the rest also prefills.

    `in_flight` is how many steps are in the pipeline at a time; `requests` how many requests a step finishes; `prefill_steps`
    how many steps read one prompt; `free_tokens` what a step has room for beside its decode rows.
    """

    num_sequences: float
    in_flight: float
    requests: float
    num_tokens: float
    prefill_share: float
    prefill_steps: float
    free_tokens: float
    decode: Work
    prefill: Work


def mean_steps(traffic: Traffic, serving: Serving, num_microbatches: int, num_sequences: float) -> Steps:
    """What the batcher makes of `traffic` with `num_sequences` in service, at least 1."""
    output, prompt, budget = traffic.output_tokens, traffic.new_tokens, float(serving.max_step_tokens)
    num_sequences = max(1.0, num_sequences)
    in_flight = min(float(num_microbatches), num_sequences)
    alone = num_sequences <= num_microbatches  # a step then carries one sequence: a token of it, or a chunk
    requests, decode_rows, chunks = 0.0, 0.0, 1.0
    for _ in range(2):  # the chunks of a prompt depend on the room that decode rows leave, and the other way round
        chunks = float(math.ceil(prompt / max(1.0, budget - decode_rows)))
        most = 1.0 / (chunks + output - 1.0) if alone else budget / (prompt + output - 1.0)
        requests = min(num_sequences / (in_flight * output + chunks - 1.0), most)
        decode_rows = 0.0 if alone else requests * (output - 1.0)
    free = max(1.0, budget - decode_rows)
    read = requests * prompt
    if alone:
        share = min(1.0, requests * chunks)
    else:
        share = min(1.0, max(read / free, -math.expm1(-read / min(free, prompt))))
    chunk = read / share
    rows = requests * (output - 1.0)
    context = traffic.mean_context
    decoding = rows / (1.0 - share) if alone and share < 1.0 else rows
    prefill = Work(decode_rows, context, chunk, traffic.cached_tokens + prompt / 2, decode_rows + chunk / prompt)
    return Steps(
        num_sequences=num_sequences,
        in_flight=in_flight,
        requests=requests,
        num_tokens=rows + requests * prompt,
        prefill_share=share,
        prefill_steps=chunks,
        free_tokens=free,
        decode=Work(decoding, context, 0.0, 0.0, decoding),
        prefill=prefill,
    )
