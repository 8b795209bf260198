"""A worker's part in one transition: what it sends away, what it receives, and when a step must wait.

All of it is driven by `runtime.member.Member` on one thread. The snapshot is read in slices between steps, each of about a
millisecond, and put in place between steps as well; at either end the member's limiter sets the pace. A source is ahead of its
target by a few slices at most, so the slower of the two sets it for both, and little waits in the target's memory. While more of it is to come than the flip waits for, the rows that steps
write are collected and mirrored many steps at a time, since a message costs as much as the rows of several steps; then those of
each step as it ends, so that the flip finds them there. On CUDA what is sent is gathered between steps too, and then
copied to the host, checked and sent beside them (`runtime.cuda.copies`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore.ids import Epoch, SequenceId, WorkerName
from kvstore.page_pool import PagePool, checksum
from kvstore.transfers import Incoming, Outgoing
from runtime.cuda.copies import Copies
from runtime.layout import Layout, Move
from runtime.messages import Copy, Mirror, Pages, Prepare, StepPlan, Taken
from runtime.stage_state import PlannedBatch

SLICE_BYTES = 1 << 20
MOST_UNTAKEN = 8
"""Slices of a move that may be on their way, or wait at their target."""
BOUND_SLICE_S = 0.1
"""Under a bound, what a slice may carry, in seconds of that rate; but at least a block."""
MAX_PAUSES = 4096
"""And as many gaps between steps to hold them against."""

SendPeer = Callable[[WorkerName, Mirror | Pages, tuple[torch.Tensor, ...]], None]


@dataclass(slots=True, eq=False)
class _Source:
    """One move away from here."""

    index: int
    move: Move
    outgoing: Outgoing
    hop: int
    start: int
    first: int
    """The step with which the rows begin that were not mirrored yet."""
    num_rows: int = 0
    slots: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Where these rows are, a step each: blocks and offsets, int64 ``[T]``."""


@dataclass(slots=True, eq=False)
class _CopyJob:
    """The snapshot that remains to be sent for one move."""

    source: _Source
    blocks: np.ndarray
    blocks_per_slice: int
    next: int = 0
    num_taken: int = 0
    """Blocks that are in place at the target, from the first on."""

    @property
    def slice(self) -> np.ndarray:
        """The blocks of the next slice."""
        return self.blocks[self.next : self.next + self.blocks_per_slice]

    @property
    def is_far_ahead(self) -> bool:
        """Whether the target is to take more of what was sent before there is another slice."""
        return self.next - self.num_taken >= MOST_UNTAKEN * self.blocks_per_slice


@dataclass(slots=True)
class _Rhythm:
    """When a sequence last ran here in the old epoch, and how long it usually waited between two steps."""

    ended_s: float
    num_gaps: int = 0
    sum_gaps_s: float = 0.0

    def excess_s(self, begun_s: float) -> float | None:
        """How much longer than usual it has waited for a step that begins now; None when it never waited before."""
        return begun_s - self.ended_s - self.sum_gaps_s / self.num_gaps if self.num_gaps else None

    def ran(self, begun_s: float, ended_s: float) -> None:
        self.num_gaps += 1
        self.sum_gaps_s += begun_s - self.ended_s
        self.ended_s = ended_s


@dataclass(slots=True)
class Handover:
    """The state of one transition on one worker."""

    transition: int
    source_epoch: Epoch
    layout: Layout
    copies: Copies | None = None
    """What carries tensors between the device and the host; None on the CPU."""
    sources: list[_Source] = field(default_factory=list)
    incoming: dict[int, Incoming] = field(default_factory=dict)
    source_of: dict[int, WorkerName] = field(default_factory=dict)
    """Who sends what comes, by move."""
    is_open: bool = False
    fence_waits: int = 0
    fence_wait_s: float = 0.0
    pauses_s: list[float] = field(default_factory=list)
    excesses_s: list[float] = field(default_factory=list)
    """The pauses less the mean gap of the same sequence, for those that ran here at least twice before."""
    ordinary_s: list[float] = field(default_factory=list)
    """The same of gaps at which nothing flipped, in the old layout: what the pauses stand beside."""
    bytes_per_s: float = math.inf
    is_bound: bool = False
    """Whether `bytes_per_s` holds always, not only while steps run here."""
    slice_due_s: float = -math.inf
    """When such a bound admits the next slice."""
    copy_s: float = 0.0
    """From the first slice of the snapshot to the last."""
    _leaving: list[tuple[int, Move]] = field(default_factory=list)
    _jobs: list[_CopyJob] = field(default_factory=list)
    _num_awaited: int | None = None
    """Of the snapshot's blocks, from the first on, those that the flip waits for; None until the snapshot begins."""
    _copy_began_s: float = 0.0
    _rhythms: dict[SequenceId, _Rhythm] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)
    _early_pages: dict[int, dict[int, int]] = field(default_factory=dict)

    # -- beginning ------------------------------------------------------------------------------------------

    def begin(self, prepare: Prepare, worker: WorkerName, pool: PagePool) -> None:
        """Make ready for what will come to `worker`, if KV is to follow."""
        if prepare.copies:
            self._leaving = [(i, move) for i, move in enumerate(prepare.moves) if move.source == worker]
            arriving = [(i, move) for i, move in enumerate(prepare.moves) if move.target == worker]
            to_device = self.copies.to_device if self.copies is not None else None
            self.incoming = {index: Incoming(pool, tuple(move.layers), to_device) for index, move in arriving}
            self.source_of = {index: move.source for index, move in arriving}

    def start_mirror(self, pool: PagePool, old: Layout, starts: dict[int, int]) -> list[tuple[int, int]]:
        """Mirror what leaves, from the steps that are due now at each hop of `old`; each such move with its first step."""
        for index, move in self._leaving:
            hop = next(h for h, s in enumerate(old.segments) if move.layers.start in s.layers)
            first = starts[hop]
            self.sources.append(_Source(index, move, Outgoing(pool, tuple(move.layers)), hop, first, first))
        self._leaving = []
        return [(source.index, source.start) for source in self.sources]

    def open(self, starts: list[int], send: SendPeer) -> None:
        """The mirror's starts are known: the fence can be judged, steps of the next epoch may run."""
        for index, incoming in self.incoming.items():
            incoming.begin(starts[index])
        self.is_open = True
        self._flush(send)

    # -- steps ----------------------------------------------------------------------------------------------

    def is_complete_through(self, ordinal: int) -> bool:
        """Whether steps may run that depend on the old epoch's steps up to `ordinal`."""
        return self.is_open and all(incoming.is_complete_through(ordinal) for incoming in self.incoming.values())

    def ran(
        self, plan: StepPlan, planned: PlannedBatch, hop: int, begun_s: float, ended_s: float, send: SendPeer
    ) -> None:
        """A step has run here: mirror what it wrote, or note that what it wrote is newer than any snapshot."""
        if plan.epoch == self.source_epoch:
            for row in plan.rows:
                if (rhythm := self._rhythms.get(row.sequence)) is None:
                    self._rhythms[row.sequence] = _Rhythm(ended_s)
                else:
                    excess_s = rhythm.excess_s(begun_s)
                    if excess_s is not None and len(self.ordinary_s) < MAX_PAUSES:
                        self.ordinary_s.append(excess_s)
                    rhythm.ran(begun_s, ended_s)
            self._mirror(plan, planned, hop, send)
            return
        for row in plan.rows:
            rhythm = self._rhythms.pop(row.sequence, None) if row.begin is not None else None
            if rhythm is not None and len(self.pauses_s) < MAX_PAUSES:
                self.pauses_s.append(begun_s - rhythm.ended_s)
                if (excess_s := rhythm.excess_s(begun_s)) is not None:
                    self.excesses_s.append(excess_s)
        if self.incoming:
            blocks, offsets = planned.slots(self._block_size())
            for incoming in self.incoming.values():
                incoming.mark_newer(blocks, offsets)

    def _mirror(self, plan: StepPlan, planned: PlannedBatch, hop: int, send: SendPeer) -> None:
        due = [source for source in self.sources if source.hop == hop and plan.ordinal >= source.start]
        if not due:
            return
        blocks, offsets = planned.slots(due[0].outgoing.block_size)
        for source in due:
            source.slots.append((blocks, offsets))
            source.num_rows += len(blocks)
            if self._flip_is_near() or source.num_rows * source.outgoing.bytes_per_row >= SLICE_BYTES:
                self._mirror_collected(source, send)

    def _flip_is_near(self) -> bool:
        """Whether the flip has begun, or waits for nothing more from here than the rows of the steps that run."""
        if self.is_open:
            return True
        awaited = self._num_awaited
        return awaited is not None and all(job.next >= awaited for job in self._jobs)

    def _flush(self, send: SendPeer) -> None:
        """Mirror what was collected, if the flip is near now."""
        if self._flip_is_near():
            for source in self.sources:
                if source.slots:
                    self._mirror_collected(source, send)

    def _mirror_collected(self, source: _Source, send: SendPeer) -> None:
        """Send the rows of all steps since the last time."""
        blocks, offsets = (np.concatenate(parts) for parts in zip(*source.slots, strict=True))
        first, last = source.first, source.first + len(source.slots) - 1
        source.first, source.num_rows, source.slots = last + 1, 0, []
        head = (self.transition, source.index, source.start, first, last)
        where = blocks.astype(np.int32).tobytes(), offsets.astype(np.int32).tobytes()
        self._send(source, source.outgoing.rows(blocks, offsets), lambda check: Mirror(*head, *where, check), send)

    def _send(
        self,
        source: _Source,
        tensor: torch.Tensor,
        message: Callable[[int], Mirror | Pages],
        send: SendPeer,
    ) -> None:
        """Send a tensor with the message that `message` makes of its checksum, when it is on the host."""

        def there(host: torch.Tensor) -> None:
            send(source.move.target, message(checksum(host)), (host,))

        if self.copies is not None:
            self.copies.to_host(tensor, there)
        else:
            there(tensor)

    def _block_size(self) -> int:
        return next(iter(self.incoming.values())).block_size

    # -- what arrives ---------------------------------------------------------------------------------------

    def mirror(self, message: Mirror, tensors: list[torch.Tensor]) -> None:
        """Take mirrored rows. Raises `TransferError` when they are damaged."""
        incoming = self.incoming[message.move]
        incoming.begin(message.start)
        incoming.take_rows(
            message.first,
            message.last,
            np.frombuffer(message.blocks, dtype=np.int32).astype(np.int64),
            np.frombuffer(message.offsets, dtype=np.int32).astype(np.int64),
            tensors[0],
            message.checksum,
        )

    def pages(self, message: Pages, tensors: list[torch.Tensor]) -> int:
        """Take a piece of the snapshot; how many blocks of the move, from the first on, are in place now."""
        incoming = self.incoming[message.move]
        blocks = np.frombuffer(message.blocks, dtype=np.int32).astype(np.int64)
        incoming.apply_pages(blocks, tensors[0], message.checksum)
        early = self._early_pages.setdefault(message.move, {})
        early[message.first] = len(blocks)
        count = self._counts.get(message.move, 0)
        while count in early:
            count += early.pop(count)
        self._counts[message.move] = count
        return count

    # -- the snapshot ---------------------------------------------------------------------------------------

    @property
    def has_slices(self) -> bool:
        """Whether some of the snapshot remains to be sent, and its target has taken enough of what was."""
        return bool(self._jobs) and not self._next_job().is_far_ahead

    def taken(self, message: Taken) -> None:
        """A target has put in place what was sent."""
        for job in self._jobs:
            if job.source.index == message.move:
                job.num_taken = max(job.num_taken, message.count)

    def copy(self, message: Copy, now_s: float, send: SendPeer) -> None:
        """Begin to send the snapshot for every move away from here."""
        self.bytes_per_s, self.is_bound = message.bytes_per_s, message.is_bound
        self._copy_began_s, self._num_awaited = now_s, message.num_awaited
        most = min(SLICE_BYTES, int(BOUND_SLICE_S * self.bytes_per_s)) if self.is_bound else SLICE_BYTES
        blocks = np.asarray(message.blocks, dtype=np.int64)
        for source in self.sources:
            per_slice = max(1, most // source.outgoing.bytes_per_block)
            self._jobs.append(_CopyJob(source, blocks, per_slice))
        self._await_rate(now_s)
        self._flush(send)

    def send_slice(self, now_s: float, send: SendPeer) -> int:
        """Send the next slice of the snapshot, of what the flip waits for first; its bytes."""
        job = self._next_job()
        blocks = job.slice
        pages = job.source.outgoing.pages(blocks)
        head = (self.transition, job.source.index, job.next, blocks.astype(np.int32).tobytes())
        self._send(job.source, pages, lambda check: Pages(*head, check), send)
        job.next += len(blocks)
        if job.next >= len(job.blocks):
            self._jobs.remove(job)
        self.copy_s = now_s - self._copy_began_s
        self._await_rate(now_s)
        self._flush(send)
        return pages.nbytes

    def _next_job(self) -> _CopyJob:
        awaited = self._num_awaited or 0
        return next((job for job in self._jobs if job.next < awaited), self._jobs[0])

    def _await_rate(self, now_s: float) -> None:
        """Under a bound the next slice is sent when there has been time for it."""
        if self.is_bound and self._jobs:
            job = self._next_job()
            num_bytes = len(job.slice) * job.source.outgoing.bytes_per_block
            self.slice_due_s = max(self.slice_due_s, now_s) + num_bytes / self.bytes_per_s

    def totals(self) -> tuple[int, int]:
        """Bytes received here: mirrored rows, snapshot pages."""
        return sum(i.row_bytes for i in self.incoming.values()), sum(i.page_bytes for i in self.incoming.values())
