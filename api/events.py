"""``GET /admin/events``: what happens in the engine, as server-sent events for operators.

Each client has a buffer of its own; the engine's callback only puts an event into it and never waits. A client that reads
too slowly loses the oldest events and is told how many (``{"type": "missed", "num_events": N}``); one that reads nothing
at all is dropped. Every stream begins with the present layout, so that whoever listens needs no second request, and ends
when the server stops.
"""

import asyncio
from collections import deque
from typing import Any

import msgspec
from aiohttp import web

from api.errors import ApiError
from api.metrics import Metrics
from scheduler.request import Engine

MAX_BUFFERED_EVENTS = 256
MAX_LISTENERS = 64

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_HEARTBEAT = b": alive\n\n"


class EventBuffer:
    """The events that one client has not taken yet: the newest `max_events`."""

    def __init__(self, max_events: int = MAX_BUFFERED_EVENTS) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=max_events)
        self._num_missed = 0
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: dict[str, Any]) -> None:
        self._num_missed += len(self._events) == self._events.maxlen
        self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        """What is buffered can still be taken; then there is nothing more."""
        self._closed = True
        self._wake.set()

    async def take(self, timeout_s: float) -> list[dict[str, Any]] | None:
        """All events there are; none after `timeout_s` without one; None once it is closed."""
        if not self._events and not self._closed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return []
        self._wake.clear()
        if not self._events:
            return None
        events = list(self._events)
        self._events.clear()
        if self._num_missed:
            events.insert(0, {"type": "missed", "num_events": self._num_missed})
            self._num_missed = 0
        return events


class Listeners:
    """The event streams that are open; kept in the application, closed with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: set[EventBuffer] = set()
        self._is_closed = False

    def close(self) -> None:
        """End every stream, and take no new one."""
        self._is_closed = True
        for buffer in self._open:
            buffer.close()

    async def serve(
        self, request: web.Request, metrics: Metrics, heartbeat_s: float, send_timeout_s: float
    ) -> web.StreamResponse:
        """Stream events until the client leaves or the server stops.

        Raises:
            ApiError: 503 when the server stops, or when too many listen already.
        """
        if self._is_closed or len(self._open) >= MAX_LISTENERS:
            why = "the server is stopping" if self._is_closed else f"{MAX_LISTENERS} clients listen already, the most"
            raise ApiError(f"no events: {why}", status=503, code="no_events")
        buffer = EventBuffer()
        buffer.put({"type": "layout", "layout": self._engine.layout_view()})
        self._open.add(buffer)
        unlisten = self._engine.listen(buffer.put)
        try:
            response = web.StreamResponse(headers=_HEADERS)
            await response.prepare(request)
            while (events := await buffer.take(heartbeat_s)) is not None:
                async with asyncio.timeout(send_timeout_s):
                    await response.write(b"".join(map(_event, events)) or _HEARTBEAT)
        except TimeoutError:  # it has stopped reading
            metrics.slow_readers += 1
            if request.transport is not None:
                request.transport.abort()
        finally:
            unlisten()
            self._open.discard(buffer)
        return response


def _event(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(event)
