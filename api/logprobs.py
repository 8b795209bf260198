"""Log-probabilities as the two APIs spell them. Minus infinity, which JSON lacks, is -9999."""

from typing import Any

from api.generation import Choice, Delta
from api.text import Text
from runtime.messages import TokenLogprobs

_LOWEST = -9999.0


def completion_logprobs(delta: Delta, text: Text, num_top: int) -> dict[str, Any]:
    """Parallel lists over the tokens; the first token of an echoed prompt has no log-probability."""
    entries = delta.logprobs or []
    return {
        "tokens": [_completion_token(token, text) for token in delta.tokens],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(entry, text, num_top) for entry in entries],
        "text_offset": list(delta.offsets or ()),
    }


def chat_logprobs(delta: Delta, text: Text, num_top: int) -> dict[str, Any]:
    """One object per token with its bytes and alternatives."""
    content = []
    for entry in delta.logprobs or []:
        assert entry is not None
        view = _chat_token(entry.token, entry.logprob, text)
        view["top_logprobs"] = [_chat_token(token, logprob, text) for token, logprob in entry.top[:num_top]]
        content.append(view)
    return {"content": content, "refusal": None}


def prompt_logprobs_view(choice: Choice, text: Text, num_top: int) -> list[dict[str, Any] | None]:
    """Per prompt position, from token id to log-probability, rank (1 is the most likely) and text; None for the first."""
    views: list[dict[str, Any] | None] = [None]
    for entry in choice.prompt_logprobs or []:
        view = {
            str(token): _ranked(token, logprob, i + 1, text) for i, (token, logprob) in enumerate(entry.top[:num_top])
        }
        view[str(entry.token)] = _ranked(entry.token, entry.logprob, entry.rank + 1, text)
        views.append(view)
    return views


def _top(entry: TokenLogprobs, text: Text, num_top: int) -> dict[str, float] | None:
    if num_top == 0:
        return None
    top = {_completion_token(token, text): _finite(logprob) for token, logprob in entry.top[:num_top]}
    top.setdefault(_completion_token(entry.token, text), _finite(entry.logprob))
    return top


def _completion_token(token: int, text: Text) -> str:
    """The token's text; broken UTF-8 is spelled out as OpenAI does, so that different tokens stay different."""
    shown = text.token_text(token)
    if "�" in shown and text.has_tokenizer:
        data = text.token_bytes(token)
        if data != shown.encode():
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return shown


def _chat_token(token: int, logprob: float, text: Text) -> dict[str, Any]:
    return {"token": text.token_text(token), "logprob": _finite(logprob), "bytes": list(text.token_bytes(token))}


def _ranked(token: int, logprob: float, rank: int, text: Text) -> dict[str, Any]:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text.token_text(token)}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
