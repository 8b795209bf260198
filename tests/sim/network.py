"""Links between members, as the real door gives them: what is lost is lost with its connection, and the sender is told.

A link is the connection that carries the messages of one member to another; the other way round there is another one. It delays,
reorders and doubles, which is more than TCP does. It never loses one message and carries the next. Two things happen to it:

- *It breaks*, and both ends live. What is on its way is lost, so is all that is sent later: torch never makes a second connection
  between the same two members. The sender is told of each of these messages within a second, and of those that had arrived but were
  not acknowledged yet, for it cannot know (`tests/integration/test_rpc_door.py` shows all of this of the real one).
- *It stalls* for a while, or for ever: nothing gets through, acknowledgements neither. Of messages that are too old for that the
  sender is told that nobody took them; they may arrive afterwards.

Never true: a message is lost and nobody is told, unless its sender has ended.
"""

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

Act = Callable[[], None]
Told = Callable[[str], None]

HEAD = "head"
ACK_WITHIN_S = 1.0
"""Acknowledgements are given, and looked at, about once a second (`runtime.acks`)."""
ACK_TIMEOUT_S = 4.0
"""When a message that nobody acknowledges is given up; the real door takes 30 s."""
_EOF = "EOF: end of file"
_LATE = "not acknowledged in time"


@dataclass(slots=True, eq=False)
class _Parcel:
    sent_s: float
    told: Told | None
    acknowledged_s: float = math.inf


@dataclass(slots=True)
class _Link:
    is_broken: bool = False
    stalled_until_s: float = 0.0
    parcels: deque[_Parcel] = field(default_factory=deque)
    """Those of which the sender may yet be told."""


class Network:
    """All links. `at` schedules something so many seconds from now, which `clock` tells."""

    def __init__(self, rng: random.Random, at: Callable[[float, Act], None], clock: Callable[[], float]) -> None:
        self._random = rng
        self._at = at
        self._clock = clock
        self._links: dict[tuple[str, str], _Link] = {}
        self.num_lost = 0
        """Messages that never arrived because their link broke."""

    def send(self, sender: str, to: str, deliver: Act, told: Told | None, *, twice: float) -> None:
        """Have `deliver` called, twice with that probability; or `told`, with what went wrong."""
        link = self._links.get((sender, to))
        if link is None:
            link = self._links[sender, to] = _Link()
        if link.is_broken:
            self._lose(_Parcel(self._clock(), told))
            return
        parcel = _Parcel(self._clock(), told)
        link.parcels.append(parcel)
        while link.parcels[0].acknowledged_s <= parcel.sent_s:
            link.parcels.popleft()
        if parcel.sent_s < link.stalled_until_s:
            self._expect(link, parcel)
        for _ in range(2 if self._random.random() < twice else 1):
            self._at(self.delay(), lambda: self._arrive(link, parcel, deliver))

    def delay(self) -> float:
        return self._random.choice((0.0005, 0.001, self._random.expovariate(300.0)))

    def break_off(self, sender: str, to: str) -> None:
        """From now on nothing gets from `sender` to `to`."""
        link, now_s = self._links.setdefault((sender, to), _Link()), self._clock()
        link.is_broken = True
        for parcel in link.parcels:
            if parcel.acknowledged_s > now_s:
                self._lose(parcel)
        link.parcels.clear()

    def stall(self, sender: str, to: str, seconds: float) -> None:
        """For so long nothing gets from `sender` to `to`, nor an acknowledgement back."""
        link, now_s = self._links.setdefault((sender, to), _Link()), self._clock()
        link.stalled_until_s = max(link.stalled_until_s, now_s + seconds)
        for parcel in link.parcels:
            if parcel.acknowledged_s > now_s:
                parcel.acknowledged_s = max(parcel.acknowledged_s, link.stalled_until_s)
                self._expect(link, parcel)

    def carries(self, sender: str, to: str) -> bool:
        """Whether a message from `sender` to `to` would get through now."""
        link = self._links.get((sender, to))
        return link is None or not (link.is_broken or self._clock() < link.stalled_until_s)

    def _arrive(self, link: _Link, parcel: _Parcel, deliver: Act) -> None:
        now_s = self._clock()
        if link.is_broken or link.stalled_until_s == math.inf:
            return
        if now_s < link.stalled_until_s:
            self._at(link.stalled_until_s - now_s + self.delay(), lambda: self._arrive(link, parcel, deliver))
            return
        parcel.acknowledged_s = min(parcel.acknowledged_s, now_s + self._random.uniform(0.0, ACK_WITHIN_S))
        deliver()

    def _lose(self, parcel: _Parcel) -> None:
        self.num_lost += parcel.acknowledged_s == math.inf
        if parcel.told is not None:
            told = parcel.told
            self._at(self._random.uniform(0.0, ACK_WITHIN_S), lambda: told(_EOF))

    def _expect(self, link: _Link, parcel: _Parcel) -> None:
        """Look after the acknowledgement of `parcel` when it would be late."""

        def look() -> None:
            if not link.is_broken and parcel.acknowledged_s > self._clock() and parcel.told is not None:
                told, parcel.told = parcel.told, None
                told(_LATE)

        left_s = parcel.sent_s + ACK_TIMEOUT_S - self._clock()
        self._at(max(0.0, left_s) + self._random.uniform(0.0, ACK_WITHIN_S), look)
