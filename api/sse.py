"""Server-sent events written straight to the transport, from the engine's callback.

A token costs one JSON string, one bytes object and one `transport.write`; uvloop gathers what is written to a socket in
one turn of the loop into one system call. What aiohttp still does: the headers, and the end of the body. Bytes that a
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
        before = b"data: " + before
        after += b"\n\n"
        size = len(before) + len(after)
        write, encode = self._write, _encode_text
        if self._is_chunked:

            def write_text(text: str) -> None:
                string = encode(text)
                write(b"%x\r\n%b%b%b\r\n" % (size + len(string), before, string, after))
        else:

            def write_text(text: str) -> None:
                write(b"%b%b%b" % (before, encode(text), after))

        return write_text

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
