"""``POST /v1/completions``: prompts as text or token ids, whole or streamed."""

import time
from typing import Any, cast

import msgspec
from aiohttp import web

from api.context import CONTEXT, ApiContext, read_body
from api.errors import ApiError
from api.generation import Choice, Delta, Prompt
from api.logprobs import completion_logprobs, prompt_logprobs_view
from api.protocol import CompletionRequest, Usage, decode
from api.serving import new_id, serve
from api.text import Text
from api.validation import Plan, check_prompt_tokens, plan_completion
from scheduler.request import Limits

_encode = msgspec.json.Encoder().encode


async def completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = decode(CompletionRequest, await read_body(request))
    context.check_model(body.model)
    limits = context.limits()
    plan = plan_completion(body, limits, context.text, context.settings.eos_token_ids)
    prompts = await _prompts(body, limits, context)
    answer = CompletionFormat(new_id("cmpl"), context, plan)
    return await serve(request, plan, prompts, context.limits(), answer)  # a change may have begun meanwhile


async def _prompts(body: CompletionRequest, limits: Limits, context: ApiContext) -> list[Prompt]:
    """One prompt, or several: OpenAI's four forms told apart by their first element."""
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if not given:
        raise ApiError("prompt: the list is empty", param="prompt")
    kind = type(given[0])
    if any(type(item) is not kind for item in given):
        raise ApiError(
            "prompt: a list holds either strings, or token ids, or lists of token ids, not a mix", param="prompt"
        )
    if kind is str:
        add_special_tokens = body.add_special_tokens is not False
        prompts = []
        for text in cast(list[str], given):
            tokens = await context.text.encode_off_loop(
                text, add_special_tokens=add_special_tokens, max_tokens=limits.max_context, param="prompt"
            )
            prompts.append(Prompt(tokens, text))
        return prompts
    if kind is int:
        return [Prompt(check_prompt_tokens(cast(list[int], given), limits))]
    return [Prompt(check_prompt_tokens(tokens, limits)) for tokens in cast(list[list[int]], given)]


class CompletionFormat:
    """OpenAI's ``text_completion`` objects."""

    def __init__(self, response_id: str, context: ApiContext, plan: Plan):
        self._head: dict[str, Any] = {
            "id": response_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.model_name,
        }
        self._plan = plan
        self._text: Text = context.text

    def text_chunk(self, index: int) -> tuple[bytes, bytes]:
        head = _encode(self._head)[:-1]
        return (
            b'%b,"choices":[{"index":%d,"text":' % (head, index),
            b',"logprobs":null,"finish_reason":null}]}',
        )

    def opening_chunk(self, index: int) -> bytes | None:
        return None

    def chunk(self, delta: Delta) -> bytes:
        return _encode({**self._head, "choices": [self._choice(delta)]})

    def usage_chunk(self, usage: Usage) -> bytes:
        return _encode({**self._head, "choices": [], "usage": usage})

    def whole(self, results: list[Delta], choices: list[Choice], usage: Usage) -> bytes:
        views = []
        for delta, choice in zip(results, choices, strict=True):
            view = self._choice(delta)
            if self._plan.return_token_ids:
                view["prompt_token_ids"] = choice.prompt.tokens
            if self._plan.prompt_logprobs >= 0:
                view["prompt_logprobs"] = prompt_logprobs_view(choice, self._text, self._plan.prompt_logprobs)
            views.append(view)
        return _encode({**self._head, "choices": views, "usage": usage})

    def _choice(self, delta: Delta) -> dict[str, Any]:
        view: dict[str, Any] = {"index": delta.index, "text": delta.text, "logprobs": None}
        if delta.logprobs is not None:
            view["logprobs"] = completion_logprobs(delta, self._text, self._plan.logprobs)
        view["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            view["stop_reason"] = delta.stop_reason
        if self._plan.return_token_ids:
            view["token_ids"] = delta.tokens[delta.num_echoed :]
        return view
