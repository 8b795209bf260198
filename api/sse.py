"""Server-sent events written straight to the transport, from the engine's callback.

A token costs one JSON string, one bytes object and one `transport.write`, which is a system call at once unless something waits to be sent. What aiohttp still does: the headers, and the end of the body. Bytes that a
client doesn't read are bounded: beyond the limit the connection is dropped, which ends the request.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec
from aiohttp import HttpVersion11, web

from api.context import CONTEXT
from api.errors import ApiError
from api.generation import Delta
from api.protocol import Usage

_encode_text = msgspec.json.Encoder().encode

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ChunkFormat(Protocol):
    """How an API spells its chunks."""

    def text_chunk(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON string in a chunk that only brings text."""
        ...

    def opening_chunk(self, index: int) -> bytes | None:
        """A chunk to send before the first of choice `index`."""
        ...

    def chunk(self, delta: Delta) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...


class EventStream:
    """The `Output` of a streamed response. What is written before `open` waits for it."""

    __slots__ = (
        "_chunks",
        "_early",
        "_is_chunked",
        "_max_buffer_bytes",
        "_metrics",
        "_opened",
        "_request",
        "_send_timeout_s",
        "_transport",
    )

    def __init__(self, request: web.Request, chunks: ChunkFormat):
        context = request.app[CONTEXT]
        self._request = request
        self._chunks = chunks
        self._metrics = context.metrics
        self._max_buffer_bytes = context.settings.max_send_buffer_bytes
        self._send_timeout_s = context.settings.send_timeout_s
        self._is_chunked = request.version >= HttpVersion11
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._opened: set[int] = set()

    # -- called by choices, from the engine --------------------------------------------------------------------

    def text_writer(self, index: int) -> Callable[[str], None]:
        before, after = self._chunks.text_chunk(index)
        writer = _TextWriter(self._write, b"data: " + before, after + b"\n\n")
        return writer.write_chunk if self._is_chunked else writer.write

    def write(self, delta: Delta) -> None:
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            if (opening := self._chunks.opening_chunk(delta.index)) is not None:
                self._event(opening)
        self._event(self._chunks.chunk(delta))

    # -- called by the handler ---------------------------------------------------------------------------------

    async def open(self) -> web.StreamResponse:
        """Send the headers, and what has been written meanwhile."""
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(self._request)
        self._transport = self._request.transport
        if self._transport is None:
            raise ConnectionResetError("the client left before the first token")
        early, self._early = self._early, []
        for data in early:
            self._write(data)
        return response

    def error(self, error: ApiError) -> None:
        self._event(error.body())

    def usage(self, usage: Usage) -> None:
        self._event(self._chunks.usage_chunk(usage))

    async def close(self, response: web.StreamResponse) -> None:
        """End the stream and wait, but not for ever, until the client has taken it."""
        self._event(b"[DONE]")
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await response.write_eof()
        except TimeoutError:
            self._drop()

    def _event(self, payload: bytes) -> None:
        event = b"data: %b\n\n" % payload
        self._write(b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event)

    def _write(self, data: bytes) -> None:
        transport = self._transport
        if transport is None:
            self._early.append(data)
        elif not transport.is_closing():
            transport.write(data)
            if transport.get_write_buffer_size() > self._max_buffer_bytes:
                self._drop()

    def _drop(self) -> None:
        assert self._transport is not None
        self._metrics.slow_readers += 1
        self._transport.abort()


class _TextWriter:
    """Events that bring nothing but text: what is the same in all of a choice's is encoded once.

    Slots, not a closure: between two tokens of a stream everything leaves the processor's caches, and this is fewer lines of them.
    """

    __slots__ = ("_after", "_before", "_num_bytes", "_write")

    def __init__(self, write: Callable[[bytes], None], before: bytes, after: bytes):
        self._write = write
        self._before = before
        self._after = after
        self._num_bytes = len(before) + len(after)

    def write(self, text: str) -> None:
        self._write(b"%b%b%b" % (self._before, _encode_text(text), self._after))

    def write_chunk(self, text: str) -> None:
        """As `write`, as a chunk of a chunked body."""
        string = _encode_text(text)
        self._write(b"%x\r\n%b%b%b\r\n" % (self._num_bytes + len(string), self._before, string, self._after))
