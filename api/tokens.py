"""``POST /tokenize`` and ``POST /detokenize``: what the served model's tokenizer makes of a text."""

import msgspec
from aiohttp import web

from api.chat import plain_messages
from api.context import CONTEXT, read_body
from api.errors import ApiError
from api.protocol import DetokenizeRequest, TokenizeRequest, decode
from api.validation import check_prompt_tokens

MAX_TOKENIZE_TOKENS = 1 << 20


async def tokenize(request: web.Request) -> web.Response:
    """The token ids of a text, or of a chat through the template."""
    context = request.app[CONTEXT]
    body = decode(TokenizeRequest, await read_body(request))
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("prompt: either it or messages is wanted", param="prompt")
    if body.prompt is not None:
        text, param, add_special_tokens = body.prompt, "prompt", body.add_special_tokens is not False
    else:
        assert body.messages is not None
        messages = plain_messages(body.messages)
        text = context.text.render_chat(messages, add_generation_prompt=body.add_generation_prompt is not False)
        param, add_special_tokens = "messages", bool(body.add_special_tokens)
    tokens = await context.text.encode_off_loop(
        text, add_special_tokens=add_special_tokens, max_tokens=MAX_TOKENIZE_TOKENS, param=param
    )
    view: dict[str, object] = {
        "count": len(tokens),
        "max_model_len": context.limits().max_context,
        "tokens": tokens,
        "token_strs": [context.text.token_text(token) for token in tokens] if body.return_token_strs else None,
    }
    return web.Response(body=msgspec.json.encode(view), content_type="application/json")


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    context = request.app[CONTEXT]
    body = decode(DetokenizeRequest, await read_body(request))
    context.check_model(body.model)
    context.text.require_tokenizer("tokens")
    tokens = check_prompt_tokens(body.tokens, context.limits(), "tokens")
    text = context.text.decode(tokens, skip_special_tokens=False)
    return web.Response(body=msgspec.json.encode({"prompt": text}), content_type="application/json")
