"""Acknowledgements that cost little: owed ones are answered in batches, awaited ones are looked at in batches.

Torch's RPC wants an answer to every message. An answer of its own costs both ends as much as the message did: ten reads, five
writes, and a thread or two woken at either end, on caches that are cold by then. Nobody waits for it, so it may be late, and the
more of them go at once the less each costs.

- The receiver (`Owed`) answers up to `BATCH` messages at once, by one torch future that all of them share.
- The sender (`Awaited`, one per peer) gives torch no timeout and no callback, for each of which a thread would wake up. It keeps
  the futures of the answers in a line and looks at it now and then.

Whoever has one of these calls `flush` or `take` about once a second, so that nothing waits for more messages to come.

Never true: an answer says more than that the message was handled. Not thread safe: `Awaited`; its owner holds a lock.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import torch

from runtime import wire

OnError: TypeAlias = Callable[[Exception], None]

BATCH = 64
"""Messages that are answered, or looked at, together."""


class Owed:
    """Acknowledgements that this process has not given yet. Called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer = torch.futures.Future()
        self._count = 0

    def owe(self) -> torch.futures.Future:
        """The answer to a message that was just handled: it is given with those of the next ones."""
        with self._lock:
            answer = self._answer
            self._count += 1
            if self._count < BATCH:
                return answer
            self._answer, self._count = torch.futures.Future(), 0
        answer.set_result(wire.ACK)
        return answer

    def flush(self) -> None:
        """Give what is owed."""
        with self._lock:
            if not self._count:
                return
            answer, self._answer, self._count = self._answer, torch.futures.Future(), 0
        answer.set_result(wire.ACK)


class Awaited:
    """Messages to one peer that were not acknowledged yet, oldest first, and who wants to know if one never is."""

    def __init__(self) -> None:
        self._line: deque[tuple[float, torch.futures.Future, OnError]] = deque()

    def add(self, now_s: float, answer: torch.futures.Future, on_error: OnError) -> bool:
        """Remember a message; whether there are so many by now that it is time to look."""
        self._line.append((now_s, answer, on_error))
        return len(self._line) % (2 * BATCH) == 0

    def take(self, now_s: float, timeout_s: float) -> list[tuple[OnError, torch.futures.Future | None]]:
        """Forget what was answered, and what is older than `timeout_s`; the answers, None where there is none."""
        line, ended = self._line, []
        while line:
            sent_s, answer, on_error = line[0]
            if answer.done():
                ended.append((on_error, answer))
            elif now_s - sent_s > timeout_s:
                ended.append((on_error, None))
            else:
                break
            line.popleft()
        return ended
