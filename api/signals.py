"""Signals as events, and waiting that gives way to them.

SIGTERM asks the head to drain and end; SIGINT, or a second SIGTERM, to end now. Work that cannot be interrupted runs in a
daemon thread, which a signal simply leaves behind: the process ends without it.
"""

import asyncio
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


class Stopped(Exception):
    """A signal came before the server was up."""


@dataclass(slots=True)
class Signals:
    """`draining` is set by the first signal, `stopping` when there is no time to drain."""

    draining: asyncio.Event
    stopping: asyncio.Event

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _terminate(self) -> None:
        if self.draining.is_set():
            self.stopping.set()
        self.draining.set()

    def _interrupt(self) -> None:
        self.draining.set()
        self.stopping.set()


async def unless_stopped(signals: Signals, blocking: Callable[..., _T], *args: Any) -> _T:
    """What `blocking` returns. It runs in a thread that is left alone when a signal comes first.

    Raises:
        Stopped: a signal came first.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def settle(settle_one: Callable[[Any], None], value: Any) -> None:
        if not result.done():
            settle_one(value)

    def run() -> None:
        try:
            value, settle_one = blocking(*args), result.set_result
        except BaseException as error:
            value, settle_one = error, result.set_exception
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, settle_one, value)

    threading.Thread(target=run, name=blocking.__name__, daemon=True).start()
    stopped = asyncio.ensure_future(signals.draining.wait())
    await asyncio.wait((result, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not result.done():
        result.cancel()
        raise Stopped
    return result.result()


async def first_of(*events: asyncio.Event) -> None:
    """Wait until one of `events` is set."""
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
