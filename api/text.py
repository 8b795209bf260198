"""Text in, token ids out, and back: the tokenizer, the chat template and incremental detokenisation.

A `Detokenizer` gives the text of a growing sequence token by token. Characters whose bytes are spread over tokens
appear with the token that completes them, and the pieces together equal the decoding of the whole. For byte-level
tokenizers (GPT-2, Llama 3, Qwen, SmolLM) that is a table of each token's bytes and a UTF-8 decoder with a memory,
well under a microsecond a token; for all others a sliding window is decoded twice.

A model folder may lack a tokenizer: then prompts are token ids, text prompts are refused and output text is empty.
"""

import asyncio
import codecs
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from api.errors import ApiError

THREAD_THRESHOLD_CHARS = 8192
"""Longer texts are encoded on a thread, so that the event loop is never away for more than a few milliseconds."""

_WINDOW_HOLD_TOKENS = 16
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer_config.json")
_log = logging.getLogger(__name__)


class Detokenizer(Protocol):
    def step(self, token: int) -> str:
        """The text that `token` adds; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What an incomplete character at the end comes to."""
        ...


class Text:
    """The tokenizer of the served model; `tokenizer` is a `transformers` tokenizer or None."""

    def __init__(self, tokenizer: Any | None):
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._token_bytes: dict[int, bytes] = {}
        self._tables: dict[bool, tuple[dict[int, str], dict[int, bytes]]] = {True: ({}, {}), False: ({}, {})}
        self.max_token_chars = 0
        self._special_ids: frozenset[int] = frozenset()
        self._is_byte_level = False
        if tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            self.max_token_chars = max(map(len, vocabulary), default=1)
            self._special_ids = frozenset(tokenizer.all_special_ids)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._is_byte_level = type(self._backend.decoder).__name__ == "ByteLevel"
            added = self._backend.get_added_tokens_decoder()
            self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._template_reserved = _template_parameters(tokenizer)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and bool(getattr(self._tokenizer, "chat_template", None))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- text to tokens ----------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. Raises `ApiError` (400) without a tokenizer."""
        self.require_tokenizer("prompt")
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        assert self._tokenizer is not None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def encode_off_loop(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int, param: str
    ) -> list[int]:
        """As `encode`; long texts on a thread, and hopelessly long ones (for `max_tokens`) are refused unread."""
        self.require_tokenizer(param)
        if len(text) > 4 * max_tokens * self.max_token_chars:
            raise ApiError(
                f"{param}: a text of {len(text)} characters cannot fit the context of {max_tokens} tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if len(text) <= THREAD_THRESHOLD_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: self.encode(text, add_special_tokens=add_special_tokens))

    def require_tokenizer(self, param: str) -> None:
        if self._tokenizer is None:
            raise ApiError(
                f"{param}: the served model's folder has no tokenizer; send the prompt as token ids to /v1/completions",
                param=param,
            )

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: dict[str, Any] | None = None,
    ) -> str:
        """The model's chat template applied to `messages`.

        Raises:
            ApiError: 400 when there is no template, or the template refuses the messages.
        """
        self.require_tokenizer("messages")
        if not self.has_chat_template:
            raise ApiError("messages: the served model has no chat template; use /v1/completions", param="messages")
        arguments = template_arguments or {}
        if reserved := sorted(self._template_reserved & arguments.keys()):
            raise ApiError(
                f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a request", param="chat_template_kwargs"
            )
        assert self._tokenizer is not None
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **arguments,
            )
        except (
            Exception
        ) as error:  # the template is a program that comes with the model: whatever it raises is its "no"
            raise ApiError(f"messages: the model's chat template refused them: {error}", param="messages") from error
        return rendered

    # -- tokens to text ----------------------------------------------------------------------------------------

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        if self._backend is not None:
            return self._backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        if self._tokenizer is not None:
            return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return ""

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        if self._is_byte_level:
            return _ByteLevelDetokenizer(self, skip_special_tokens)
        if self._tokenizer is not None:
            return _WindowDetokenizer(self, skip_special_tokens)
        return _NoDetokenizer()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for, special tokens spelled out; nothing for an id outside the vocabulary."""
        known = self._token_bytes.get(token)
        if known is None:
            known = self._token_bytes[token] = self._find_token_bytes(token)
        return known

    def token_text(self, token: int) -> str:
        """`token` on its own, for log-probabilities; broken characters show as U+FFFD."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self.token_bytes(token).decode("utf-8", "replace")

    def _find_token_bytes(self, token: int) -> bytes:
        if self._backend is None:
            return self.decode([token], skip_special_tokens=False).encode("utf-8", "replace")
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            except KeyError:  # an added token that is spelled plainly
                return piece.encode("utf-8", "replace")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode("utf-8", "replace")

    def visible_bytes(self, token: int, skip_special_tokens: bool) -> bytes:
        if skip_special_tokens and token in self._special_ids:
            return b""
        return self.token_bytes(token)

    def table(self, skip_special_tokens: bool) -> tuple[dict[int, str], dict[int, bytes]]:
        """Tokens that are whole characters, and those that are not; filled as they are met."""
        return self._tables[skip_special_tokens]


def load_text(folder: Path) -> Text:
    """The tokenizer in `folder`, or none when there is none.

    Raises:
        ValueError: there is a tokenizer but it cannot be read.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        _log.warning("no tokenizer in %s: prompts must be token ids, output text will be empty", folder)
        return Text(None)
    from transformers import AutoTokenizer  # heavy: not for `midflight --help`

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"cannot read the tokenizer in {folder}: {error}") from error
    return Text(tokenizer)


class _ByteLevelDetokenizer:
    """Bytes of tokens through a UTF-8 decoder that remembers an incomplete character."""

    __slots__ = ("_broken", "_pending", "_skip", "_text", "_whole")

    def __init__(self, text: Text, skip_special_tokens: bool):
        self._text = text
        self._skip = skip_special_tokens
        self._whole, self._broken = text.table(skip_special_tokens)
        self._pending = b""

    def step(self, token: int) -> str:
        if not self._pending:
            whole = self._whole.get(token)
            if whole is not None:
                return whole
        return self._step_slowly(token)

    def _step_slowly(self, token: int) -> str:
        data = self._broken.get(token)
        if data is None:
            data = self._text.visible_bytes(token, self._skip)
            try:
                self._whole[token] = data.decode("utf-8")
            except UnicodeDecodeError:
                self._broken[token] = data
        data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        data, self._pending = self._pending, b""
        return data.decode("utf-8", "replace")


class _WindowDetokenizer:
    """Decodes the last few tokens with and without the new ones; the difference is the new text.

    A window that ends in U+FFFD is held, for at most `_WINDOW_HOLD_TOKENS` tokens, in case it is a character cut in two.
    """

    __slots__ = ("_read", "_skip", "_text", "_tokens")

    def __init__(self, text: Text, skip_special_tokens: bool):
        self._text = text
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._read = 0

    def step(self, token: int) -> str:
        self._tokens.append(token)
        return self._advance(final=len(self._tokens) - self._read > _WINDOW_HOLD_TOKENS)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        known = self._text.decode(self._tokens[: self._read], skip_special_tokens=self._skip)
        whole = self._text.decode(self._tokens, skip_special_tokens=self._skip)
        if not final and (whole.endswith("�") or len(whole) <= len(known)):
            return ""
        new = whole[len(known) :]
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        return new


class _NoDetokenizer:
    def step(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _template_parameters(tokenizer: Any | None) -> frozenset[str]:
    """What `apply_chat_template` itself takes: a request may not reach it."""
    render = getattr(tokenizer, "apply_chat_template", None)
    if render is None:
        return frozenset()
    parameters = inspect.signature(render).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD) | {"messages"}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: each byte as a printable character."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
