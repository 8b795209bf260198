"""What the types of a request cannot say: ranges, the vocabulary, the context, and what we don't support.

Each check names the field, the value and the limit. The result is a `Plan`: all that is the same for every
sequence of the request, ready to be made into the scheduler's `Request`s.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from api.errors import ApiError, shown
from api.protocol import ChatRequest, CompletionRequest, GenerationRequest
from api.stop import StopStrings
from api.text import Text
from runtime.messages import Sampling
from scheduler.request import Limits, Request

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
DEFAULT_COMPLETION_TOKENS = 16

_SEED_MASK = (1 << 63) - 1

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that we don't support, with the values at which they ask for nothing (beside null)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request, less its prompts. `sampling.seed` is the seed of the first choice."""

    sampling: Sampling
    max_tokens: int | None
    """None: as many as the context allows."""
    max_tokens_param: str
    min_tokens: int
    stop_token_ids: frozenset[int]
    stops: StopStrings | None
    include_stop: bool
    num_choices: int
    stream: bool
    include_usage: bool
    logprobs: int
    """Alternatives to report beside each token; -1: no log-probabilities."""
    prompt_logprobs: int
    """As asked for by the field of that name."""
    echo: bool
    skip_special_tokens: bool
    return_token_ids: bool

    def request(self, request_id: str, prompt: list[int], choice: int, limits: Limits) -> Request:
        """The scheduler's request for one sequence.

        Raises:
            ApiError: 400 when the prompt is empty, or does not fit the context with what it may bring.
        """
        max_tokens = self._room(len(prompt), limits)
        echoed_logprobs = self.logprobs if self.echo else -1
        return Request(
            request_id=request_id,
            prompt=prompt,
            sampling=msgspec.structs.replace(self.sampling, seed=(self.sampling.seed + choice) & _SEED_MASK),
            max_tokens=max_tokens,
            stop_token_ids=self.stop_token_ids,
            prompt_logprobs=max(self.prompt_logprobs, echoed_logprobs),
        )

    def _room(self, num_prompt_tokens: int, limits: Limits) -> int:
        room = limits.max_context - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise ApiError("prompt: it comes to no token at all; give it at least one", param="prompt")
        wanted = room if self.max_tokens is None else self.max_tokens
        least = max(self.min_tokens, 1 if self.max_tokens is None else self.max_tokens)
        if least > room:
            raise ApiError(
                f"the prompt's {num_prompt_tokens} tokens and {least} to generate do not fit the context of "
                f"{limits.max_context} tokens; shorten the prompt or lower {self.max_tokens_param}",
                param=self.max_tokens_param if num_prompt_tokens < limits.max_context else "prompt",
                code="context_length_exceeded",
            )
        return wanted


def plan_completion(body: CompletionRequest, limits: Limits, text: Text, eos_token_ids: Iterable[int]) -> Plan:
    """Raises `ApiError` (400) naming the field and the limit."""
    _refuse_unsupported(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError("best_of: only supported when it equals n", param="best_of", code="unsupported_parameter")
    logprobs = _integer("logprobs", body.logprobs, -1, 0, MAX_LOGPROBS)
    max_tokens = _integer("max_tokens", body.max_tokens, DEFAULT_COMPLETION_TOKENS, 0, limits.max_context)
    return _plan(body, limits, text, eos_token_ids, logprobs, max_tokens, "max_tokens", echo=bool(body.echo))


def plan_chat(body: ChatRequest, limits: Limits, text: Text, eos_token_ids: Iterable[int]) -> Plan:
    """Raises `ApiError` (400) naming the field and the limit."""
    _refuse_unsupported(body)
    top_logprobs = _integer("top_logprobs", body.top_logprobs, 0, 0, MAX_LOGPROBS)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs: it needs logprobs to be true", param="top_logprobs")
    max_tokens, param = None, "max_tokens"
    for name in ("max_tokens", "max_completion_tokens"):
        if (value := getattr(body, name)) is not None:
            max_tokens, param = _integer(name, value, 0, 1, limits.max_context), name
    return _plan(body, limits, text, eos_token_ids, top_logprobs if body.logprobs else -1, max_tokens, param)


def _plan(
    body: GenerationRequest,
    limits: Limits,
    text: Text,
    eos_token_ids: Iterable[int],
    logprobs: int,
    max_tokens: int | None,
    max_tokens_param: str,
    echo: bool = False,
) -> Plan:
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise ApiError("stream_options: it needs stream to be true", param="stream_options")
    prompt_logprobs = _integer("prompt_logprobs", body.prompt_logprobs, -1, 0, MAX_LOGPROBS)
    if prompt_logprobs >= 0 and stream:
        raise ApiError("prompt_logprobs: not available in a stream; set stream to false", param="prompt_logprobs")
    min_tokens = _integer("min_tokens", body.min_tokens, 0, 0, limits.max_context)
    if max_tokens is not None and min_tokens > max_tokens:
        raise ApiError(
            f"min_tokens: {min_tokens} is more than {max_tokens_param}, which is {max_tokens}", param="min_tokens"
        )
    stop_token_ids = _token_ids("stop_token_ids", body.stop_token_ids or [], limits, MAX_STOP_TOKEN_IDS)
    stopping = frozenset(stop_token_ids) if body.ignore_eos else frozenset(stop_token_ids) | frozenset(eos_token_ids)
    return Plan(
        sampling=_sampling(body, limits, logprobs, min_tokens, stopping),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        min_tokens=min_tokens,
        stop_token_ids=stopping,
        stops=_stop_strings(body.stop, text),
        include_stop=bool(body.include_stop_str_in_output),
        num_choices=_integer("n", body.n, 1, 1, MAX_CHOICES),
        stream=stream,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        echo=echo,
        skip_special_tokens=body.skip_special_tokens is not False,
        return_token_ids=bool(body.return_token_ids) or not text.has_tokenizer,
    )


def _sampling(
    body: GenerationRequest, limits: Limits, logprobs: int, min_tokens: int, stopping: frozenset[int]
) -> Sampling:
    seed = body.seed
    if seed is not None and not -(1 << 63) <= seed < 1 << 64:
        raise ApiError(f"seed: {shown(seed)} does not fit 64 bits", param="seed")
    top_k = body.top_k if body.top_k != -1 else 0
    return Sampling(
        temperature=_number("temperature", body.temperature, 1.0, 0.0, 2.0),
        top_p=_number("top_p", body.top_p, 1.0, 0.0, 1.0, low_included=False),
        top_k=_integer("top_k", top_k, 0, 0, limits.vocab_size, " (0 or -1 switch it off)"),
        min_p=_number("min_p", body.min_p, 0.0, 0.0, 1.0),
        seed=(random.getrandbits(63) if seed is None else seed) & _SEED_MASK,
        frequency_penalty=_number("frequency_penalty", body.frequency_penalty, 0.0, -2.0, 2.0),
        presence_penalty=_number("presence_penalty", body.presence_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=_number("repetition_penalty", body.repetition_penalty, 1.0, 0.0, 100.0, low_included=False),
        logit_bias=_logit_bias(body.logit_bias or {}, limits),
        min_tokens=min_tokens,
        banned_until_min_tokens=tuple(sorted(stopping)) if min_tokens else (),
        logprobs=logprobs,
    )


def check_prompt_tokens(tokens: list[int], limits: Limits, param: str = "prompt") -> list[int]:
    """Token ids that a client sent as a prompt: all within the vocabulary."""
    if tokens and (min(tokens) < 0 or max(tokens) >= limits.vocab_size):
        bad = min(tokens) if min(tokens) < 0 else max(tokens)
        raise ApiError(
            f"{param}: token id {shown(bad)} is outside the vocabulary, 0 to {limits.vocab_size - 1}", param=param
        )
    return tokens


def _refuse_unsupported(body: GenerationRequest) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise ApiError(f"{name}: not supported by this server", param=name, code="unsupported_parameter")


def _integer(name: str, value: int | None, default: int, low: int, high: int, note: str = "") -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise ApiError(f"{name}: {shown(value)} is outside its range, {low} to {high}{note}", param=name)
    return value


def _number(
    name: str, value: float | None, default: float, low: float, high: float, low_included: bool = True
) -> float:
    if value is None:
        return default
    above = value >= low if low_included else value > low
    if not (math.isfinite(value) and above and value <= high):
        lower = f"{low:g} to" if low_included else f"above {low:g}, up to"
        raise ApiError(f"{name}: {shown(value)} is outside its range, {lower} {high:g}", param=name)
    return float(value)


def _token_ids(name: str, ids: list[int], limits: Limits, max_num: int) -> list[int]:
    if len(ids) > max_num:
        raise ApiError(f"{name}: {len(ids)} token ids, at most {max_num} are taken", param=name)
    return check_prompt_tokens(ids, limits, name)


def _logit_bias(bias: dict[int, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    _token_ids("logit_bias", list(bias), limits, MAX_LOGIT_BIAS)
    return tuple((token, _number("logit_bias", value, 0.0, -100.0, 100.0)) for token, value in sorted(bias.items()))


def _stop_strings(stop: str | list[str] | None, text: Text) -> StopStrings | None:
    strings = [stop] if isinstance(stop, str) else stop
    if not strings:
        return None
    text.require_tokenizer("stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise ApiError(f"stop: {len(strings)} strings, at most {MAX_STOP_STRINGS} are taken", param="stop")
    for string in strings:
        if not 0 < len(string) <= MAX_STOP_CHARS:
            raise ApiError(
                f"stop: a string of {len(string)} characters; between 1 and {MAX_STOP_CHARS} are taken", param="stop"
            )
    return StopStrings(strings)
