"""Units from the peer that holds them, instead of the checkpoint: both ends, and the choice between the two.

A target asks with `Fetch`. A peer in the same place (`runtime.pages`) lends the unit, at once: both have it then, and it is in memory
once. Any other answers with `Weights`, a slice of a tensor at a time, between its steps and at its limiter's
pace. What travels is the unit as the peer holds it (packed), so nothing is converted on arrival. One unit is on
its way at a time, which bounds what may pile up; what a peer still sends for a fetch that was given up is not kept. Every slice has
its checksum.

A peer that is gone, that lacks the unit, or holds it in another form is no failure: the checkpoint is always there.
"""

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from kvstore.ids import WorkerName
from kvstore.page_pool import checksum
from runtime.messages import Fetch, Lent, LentPart, Weights
from runtime.pages import OWN_PAGES_BYTES, LoanError, LoanGone, borrow, empty, lend, place

SLICE_BYTES = 1 << 20
PATIENCE_S = 5.0
"""How long a peer may be silent before it is given up."""
TRY_AGAIN_AFTER = 16
"""After so many units from the faster source the other is measured again; after twice as many each time that it is still slower."""
MOST_UNTIL_TRIED = 1024


class FetchFailed(Exception):
    """The peer did not give the unit; the message says why."""


def lent(fetch: Fetch, parts: Mapping[str, torch.Tensor] | None) -> tuple[Lent, tuple[torch.Tensor, ...]] | None:
    """The answer of a peer that can lend all that is large of a unit, and what travels beside it; else None."""
    if parts is None or not fetch.place or fetch.place != place():
        return None
    loans = {name: lend(part) for name, part in parts.items()}
    small = tuple(part for name, part in parts.items() if loans[name] is None)
    if any(part.nbytes >= OWN_PAGES_BYTES for part in small):
        return None
    shown = [LentPart(name, _name_of(part.dtype), tuple(part.shape), loans[name]) for name, part in parts.items()]
    return Lent(fetch.ticket, shown), tuple(part.detach().cpu() for part in small)


class Export:
    """The peer's end: a unit on its way out, as slices. Its tensors never change, so they are not copied."""

    def __init__(self, fetch: Fetch, parts: Mapping[str, torch.Tensor] | None) -> None:
        self.target = fetch.worker
        self._slices = _slices(fetch.ticket, parts)
        self._next = next(self._slices)

    @property
    def is_done(self) -> bool:
        return self._next is None

    def take(self) -> tuple[Weights, tuple[torch.Tensor, ...]]:
        """The next slice; the memory beside it must stay until it is sent."""
        assert self._next is not None, "the export is done"
        taken, self._next = self._next, next(self._slices, None)
        return taken


def _slices(
    ticket: int, parts: Mapping[str, torch.Tensor] | None
) -> Iterator[tuple[Weights, tuple[torch.Tensor, ...]]]:
    if parts is None:
        yield Weights(ticket), ()
        return
    num_bytes = sum(part.nbytes for part in parts.values())
    for name, part in parts.items():
        raw = part.detach().contiguous().reshape(-1).view(torch.uint8)
        for offset in range(0, max(1, len(raw)), SLICE_BYTES):
            piece = raw[offset : offset + SLICE_BYTES].cpu()
            yield (
                Weights(ticket, num_bytes, name, _name_of(part.dtype), tuple(part.shape), offset, checksum(piece)),
                (piece,),
            )


class _Awaited:
    """What has arrived for one fetch."""

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket
        self.arrived: queue.SimpleQueue[tuple[Weights | Lent, list[torch.Tensor]]] = queue.SimpleQueue()


class Importer:
    """The target's end. `fetch` runs in the loader's thread; `take` in whichever thread messages arrive."""

    def __init__(self) -> None:
        self.send: Callable[[WorkerName, Fetch], None] = lambda worker, fetch: None
        self.name: WorkerName = ""
        self._ticket = 0
        self.lenders: set[WorkerName] = set()
        """Peers that lent what they were last asked for: nothing is faster."""
        self._takes_no_loans_of: set[WorkerName] = set()
        self._awaited: _Awaited | None = None

    def take(self, message: Weights | Lent, tensors: list[torch.Tensor]) -> None:
        """Keep it for the fetch that waits for it, if one does."""
        awaited = self._awaited
        if awaited is not None and awaited.ticket == message.ticket:
            awaited.arrived.put((message, tensors))

    def fetch(
        self,
        peer: WorkerName,
        unit: int | str,
        form: str,
        is_cancelled: Callable[[], bool],
        rest: Callable[[], None] = lambda: None,
    ) -> dict[str, torch.Tensor]:
        """The parts of `unit` as `peer` holds them, on the CPU; lent ones must not be written to. `rest` is called after each slice.

        Raises:
            FetchFailed: the peer has it not in this form, fell silent, sent damaged bytes, or the load was cancelled.
        """
        self._ticket += 1
        self._awaited = awaited = _Awaited(self._ticket)
        where = "" if peer in self._takes_no_loans_of else place()
        try:
            self.send(peer, Fetch(self.name, self._ticket, unit, form, where))
            return self._receive(awaited, peer, unit, is_cancelled, rest)
        finally:
            self._awaited = None

    def _receive(
        self,
        awaited: _Awaited,
        peer: WorkerName,
        unit: int | str,
        is_cancelled: Callable[[], bool],
        rest: Callable[[], None],
    ) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = {}
        seen: set[tuple[str, int]] = set()
        missing: int | None = None
        heard_s = time.monotonic()
        while missing != 0:
            try:
                message, tensors = awaited.arrived.get(timeout=0.1)
            except queue.Empty:
                if is_cancelled():
                    raise FetchFailed("the load was cancelled") from None
                if time.monotonic() - heard_s > PATIENCE_S:
                    raise FetchFailed(f"{peer} did not answer for {PATIENCE_S:g} s") from None
                continue
            if isinstance(message, Lent):
                return self._borrow(message, tensors, peer)
            self.lenders.discard(peer)
            piece = (message.name, message.offset)
            if piece in seen:
                continue
            seen.add(piece)
            heard_s = time.monotonic()
            if not message.name or not tensors:
                raise FetchFailed(f"{peer} does not hold unit {unit} in the same form")
            raw = tensors[0]
            missing = (message.num_bytes if missing is None else missing) - raw.nbytes
            _put(parts, message, raw, peer, rest)
            rest()
        return parts

    def _borrow(self, message: Lent, tensors: list[torch.Tensor], peer: WorkerName) -> dict[str, torch.Tensor]:
        beside, parts = iter(tensors), {}
        for part in message.parts:
            try:
                dtype = getattr(torch, part.dtype)
                parts[part.name] = next(beside) if part.loan is None else borrow(part.loan, part.shape, dtype)
            except LoanError as error:
                self.lenders.discard(peer)
                if not isinstance(error, LoanGone):
                    self._takes_no_loans_of.add(peer)
                raise FetchFailed(f"{peer} lent {part.name}, and {error}") from error
        self.lenders.add(peer)
        return parts


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _put(
    parts: dict[str, torch.Tensor], message: Weights, raw: torch.Tensor, peer: WorkerName, rest: Callable[[], None]
) -> None:
    if checksum(raw) != message.checksum:
        raise FetchFailed(f"{peer} sent {message.name}, and it arrived damaged")
    if message.name not in parts:
        parts[message.name] = empty(message.shape, getattr(torch, message.dtype), rest)
    parts[message.name].view(-1).view(torch.uint8)[message.offset : message.offset + raw.nbytes] = raw


@dataclass(slots=True)
class _Speed:
    s_per_byte: float | None = None
    was_faster: bool | None = None
    """Than the checkpoint, when it was last asked; of peers only, as the next two."""
    since_tried: int = 0
    patience: int = TRY_AGAIN_AFTER

    def add(self, num_bytes: int, seconds: float) -> None:
        new = seconds / max(1, num_bytes)
        self.s_per_byte = new if self.s_per_byte is None else 0.7 * min(self.s_per_byte, 2.0 * new) + 0.3 * new


@dataclass(slots=True)
class Sources:
    """Which of the two is faster here, by what was measured: the checkpoint, or a peer. Each is tried first once."""

    _checkpoint: _Speed = field(default_factory=_Speed)
    _peers: dict[WorkerName, _Speed] = field(default_factory=dict)

    def prefers(self, peer: WorkerName) -> bool:
        """Whether the next unit should come from `peer`."""
        known = self._peers.get(peer)
        if known is None or known.s_per_byte is None:
            return True
        if self._checkpoint.s_per_byte is None:
            return False
        known.since_tried += 1
        faster = known.s_per_byte < self._checkpoint.s_per_byte
        if faster != known.was_faster:
            known.was_faster, known.since_tried, known.patience = faster, 0, TRY_AGAIN_AFTER
        if known.since_tried > known.patience:
            known.since_tried, known.patience = 0, min(2 * known.patience, MOST_UNTIL_TRIED)
            return not faster
        return faster

    def measured(self, peer: WorkerName | None, num_bytes: int, seconds: float) -> None:
        """A unit came from `peer` (None: the checkpoint) and took so long, rests included."""
        speed = self._checkpoint if peer is None else self._peers.setdefault(peer, _Speed())
        speed.add(num_bytes, seconds)

    def failed(self, peer: WorkerName) -> None:
        """`peer` could not give a unit: not soon again."""
        known = self._peers.setdefault(peer, _Speed())
        known.s_per_byte, known.since_tried = 1.0, 0
