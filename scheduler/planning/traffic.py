"""What is asked of the server, and what steps the batcher makes of it: the load as values. Pure.

`scheduler/batching.py` forms a step of an even share of the decoding sequences and adds prompt chunks. With M
microbatches in flight and N sequences being served, a request of q prompt tokens (those that the prefix cache lacks), read in
n chunks, and o output tokens lives for n - 1 steps and o rounds of M steps. So by Little's law r = N / (M o + n - 1) requests
are finished per step, and a mean step carries r (o - 1) decode rows and r q prompt tokens, but never more tokens than
fit. Prompt tokens come in lumps: a share of the steps carries a chunk, the rest only decodes; `mean_steps` gives both
kinds with their shares.

Never true: a step here carries a whole number of rows. These are means.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np

from scheduler.planning.cost import Works, corner, pick

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

    @property
    def prefill_context(self) -> float:
        """Positions that a row of a prompt attends to, in mean."""
        return self.cached_tokens + self.new_tokens / 2


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


@dataclass(frozen=True, slots=True)
class Steps:
    """The mean steps of G pipelines with `num_sequences` in service, ``[G]`` each: a share of steps only decodes, the rest also prefills.

    `in_flight` is how many steps are in the pipeline at a time; `requests` how many requests a step finishes; `prefill_steps`
    how many steps read one prompt. `works` ``[2 G]`` are the steps that only decode, then those that also prefill.
    """

    num_sequences: np.ndarray
    in_flight: np.ndarray
    requests: np.ndarray
    num_tokens: np.ndarray
    prefill_share: np.ndarray
    prefill_steps: np.ndarray
    works: Works


class Pieces(NamedTuple):
    """What decides how prompts are cut: `even` tokens of them have as much arithmetic as the weights take to be read, each stage adds `fixed` tokens'
    time to that, and beyond these a step is as much longer as the roofline's corner, of this `sharpness`, has it."""

    even: float
    fixed: float
    sharpness: float


def mean_steps(
    traffic: Traffic, serving: Serving, pieces: Pieces, num_stages: Any, num_microbatches: Any, num_sequences: Any
) -> Steps:
    """What the batcher makes of `traffic` with `num_sequences` in service, at least 1.

    Stages, microbatches and sequences are numbers or arrays ``[G]``.
    """
    num_sequences = np.atleast_1d(np.maximum(1.0, num_sequences))
    budget = float(serving.max_step_tokens)
    in_flight, requests, chunks, share, decoding, decode_rows, chunk, _ = step_of(
        traffic.new_tokens, traffic.output_tokens, budget, *pieces, num_stages, num_microbatches, num_sequences
    )
    none = np.zeros(requests.shape)
    return Steps(
        num_sequences=num_sequences,
        in_flight=in_flight,
        requests=requests,
        num_tokens=requests * (traffic.output_tokens - 1.0 + traffic.new_tokens),
        prefill_share=share,
        prefill_steps=chunks,
        works=Works(
            decode_rows=np.concatenate([decoding, decode_rows]),
            decode_context=np.full(2 * len(none), traffic.mean_context),
            prefill_tokens=np.concatenate([none, chunk]),
            prefill_context=np.concatenate([none, none + traffic.prefill_context]),
            samples=np.concatenate([decoding, decode_rows + chunk / traffic.new_tokens]),
        ),
    )


def piece_of(prompt: float, even: Any, sharpness: float, stages: Any) -> Any:
    """Tokens of a prompt that a step takes, in mean, of a prompt that is alone: for numbers or for arrays, likewise.

    P tokens in pieces of p are through S stages after P / p + S - 1 steps of (1 + (p / even)^q)^(1/q) times a step without: soonest with
    p = even (P / (even (S - 1)))^a, a = 1 / (q + 1). It is cut anew in each step, and what is left in smaller pieces.
    """
    cut = 1.0 / (sharpness + 1.0)
    first = even * (prompt / (even * np.maximum(stages - 1.0, 1.0))) ** cut
    return pick((stages > 1.0) & (first < prompt), np.maximum(1.0, (1.0 - cut / 2.0) * first), prompt)


def step_of(
    prompt: float, output: float, budget: float, even: float, fixed: float, sharpness: float,
    stages: Any, microbatches: Any, in_service: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The law of the mean step: for numbers or for arrays, which numba compiles into the planner's loops as it is.

    Requests have `prompt` tokens to compute and `output` tokens to give; a step has room for `budget` tokens, and at least one
    sequence is in service. Prompts are cut as `piece_of` has it; where more is to be read than that, pieces are larger.

    Returns:
        steps in flight; requests that a step finishes; steps that read one prompt; the share of steps with a chunk; decoding rows of a step
        without one, and of a step with one; tokens of the chunk; tokens of prompts for which a step has room.
    """
    in_flight = np.minimum(microbatches, in_service)
    alone = in_service <= microbatches  # a step then carries one sequence: a token of it, or a chunk
    decode_rows = in_service * 0.0
    requests, chunks, piece = decode_rows, decode_rows, decode_rows
    for _ in range(2):  # how a prompt is read depends on the rows that decode beside it, and the other way round
        piece = piece_of(prompt, corner(even + stages * fixed, decode_rows, sharpness), sharpness, stages)
        chunk = np.minimum(np.maximum(piece, requests * prompt), np.maximum(1.0, budget - decode_rows))
        chunks = np.ceil(prompt / chunk)
        most = pick(alone, 1.0 / (chunks + (output - 1.0)), budget / (prompt + output - 1.0))
        requests = np.minimum(in_service / (in_flight * output + chunks - 1.0), most)
        decode_rows = pick(alone, 0.0, requests * (output - 1.0))
    room = np.maximum(1.0, budget - decode_rows)
    read = requests * prompt
    lumps = pick(piece < prompt, read / np.minimum(room, piece), -np.expm1(-read / np.minimum(room, prompt)))
    shares = np.maximum(read / room, lumps)
    share = np.minimum(1.0, pick(alone, requests * chunks, shares))
    decoding = requests * (output - 1.0) / pick(alone & (share < 1.0), 1.0 - share, 1.0)
    return in_flight, requests, chunks, share, decoding, decode_rows, read / share, room
