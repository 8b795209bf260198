"""``POST /v1/chat/completions``: messages through the model's chat template, whole or streamed."""

import time
from typing import Any

import msgspec
from aiohttp import web

from api.context import CONTEXT, ApiContext, read_body
from api.errors import ApiError, shown
from api.generation import Choice, Delta, Prompt
from api.logprobs import chat_logprobs, prompt_logprobs_view
from api.protocol import ChatRequest, Message, Usage, decode
from api.serving import new_id, serve
from api.text import Text
from api.validation import Plan, plan_chat

_encode = msgspec.json.Encoder().encode

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = decode(ChatRequest, await read_body(request))
    context.check_model(body.model)
    limits = context.limits()
    plan = plan_chat(body, limits, context.text, context.settings.eos_token_ids)
    rendered = render(context.text, body)
    tokens = await context.text.encode_off_loop(
        rendered, add_special_tokens=bool(body.add_special_tokens), max_tokens=limits.max_context, param="messages"
    )
    answer = ChatFormat(new_id("chatcmpl"), context, plan)
    return await serve(request, plan, [Prompt(tokens)], context.limits(), answer)  # a change may have begun meanwhile


def render(text: Text, body: ChatRequest) -> str:
    """The chat as one text."""
    continue_final = bool(body.continue_final_message)
    add_generation_prompt = body.add_generation_prompt is not False
    if continue_final and body.add_generation_prompt:
        raise ApiError("continue_final_message: it excludes add_generation_prompt", param="continue_final_message")
    return text.render_chat(
        plain_messages(body.messages),
        add_generation_prompt=add_generation_prompt and not continue_final,
        continue_final_message=continue_final,
        template_arguments=body.chat_template_kwargs,
    )


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Role and text of each message.

    Raises:
        ApiError: 400 for a role or a kind of content that text models don't know.
    """
    if not messages:
        raise ApiError("messages: the list is empty", param="messages")
    plain = []
    for i, message in enumerate(messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise ApiError(
                f"messages[{i}].role: {shown(message.role)} is not supported; use one of {', '.join(_ROLES)}",
                param="messages",
            )
        if message.tool_calls or message.function_call:
            raise ApiError(f"messages[{i}]: tool calls are not supported by this server", param="messages")
        plain.append({"role": role, "content": _content(i, message)})
    return plain


def _content(i: int, message: Message) -> str:
    content = message.content
    if content is None:
        raise ApiError(f"messages[{i}].content: a text is wanted", param="messages")
    if isinstance(content, str):
        return content
    for j, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise ApiError(
                f"messages[{i}].content[{j}]: only parts of type text are supported, not {shown(part.type)}",
                param="messages",
            )
    return "".join(part.text or "" for part in content)


class ChatFormat:
    """OpenAI's ``chat.completion`` and ``chat.completion.chunk`` objects."""

    def __init__(self, response_id: str, context: ApiContext, plan: Plan):
        self._head: dict[str, Any] = {
            "id": response_id,
            "object": "chat.completion.chunk" if plan.stream else "chat.completion",
            "created": int(time.time()),
            "model": context.model_name,
        }
        self._plan = plan
        self._text: Text = context.text

    def text_chunk(self, index: int) -> tuple[bytes, bytes]:
        head = _encode(self._head)[:-1]
        return (
            b'%b,"choices":[{"index":%d,"delta":{"content":' % (head, index),
            b'},"logprobs":null,"finish_reason":null}]}',
        )

    def opening_chunk(self, index: int) -> bytes | None:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return _encode({**self._head, "choices": [choice]})

    def chunk(self, delta: Delta) -> bytes:
        content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        return _encode({**self._head, "choices": [self._choice(delta, "delta", content)]})

    def usage_chunk(self, usage: Usage) -> bytes:
        return _encode({**self._head, "choices": [], "usage": usage})

    def whole(self, results: list[Delta], choices: list[Choice], usage: Usage) -> bytes:
        views = []
        for delta, choice in zip(results, choices, strict=True):
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            view = self._choice(delta, "message", message)
            if self._plan.return_token_ids:
                view["prompt_token_ids"] = choice.prompt.tokens
            if self._plan.prompt_logprobs >= 0:
                view["prompt_logprobs"] = prompt_logprobs_view(choice, self._text, self._plan.prompt_logprobs)
            views.append(view)
        return _encode({**self._head, "choices": views, "usage": usage})

    def _choice(self, delta: Delta, key: str, message: dict[str, Any]) -> dict[str, Any]:
        view: dict[str, Any] = {"index": delta.index, key: message, "logprobs": None}
        if delta.logprobs is not None:
            view["logprobs"] = chat_logprobs(delta, self._text, self._plan.logprobs)
        view["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            view["stop_reason"] = delta.stop_reason
        if self._plan.return_token_ids:
            view["token_ids"] = delta.tokens
        return view
