"""Who owns what: every sequence has one epoch, and every epoch says which worker owns which layers.

Ownership of (sequence, layer) is derived, never stored: the sequence's epoch picks a placement, the placement the
worker. Moving a sequence to a new layout is therefore the change of one number, and there is no moment in which two
workers own the same KV rows or none does. Several epochs may be open at once while a transition is going on.

The directory adopts the block lists it is given and grows them in place; what it hands out are those very lists, to
be read and not changed. Never true: a sequence in an epoch that is not open; a sequence whose epoch went down; an epoch
number used twice; a placement with a gap or an overlap.
"""

from collections.abc import Collection, Sequence
from typing import TypeAlias

from kvstore.ids import BlockId, Epoch, LayerRange, SequenceId, WorkerName

Placement: TypeAlias = tuple[tuple[WorkerName, LayerRange], ...]
"""Layer ranges in order, from layer 0 without gap or overlap, each with its worker. A range may be empty."""


class Directory:
    """Sequences, their epochs and their block tables; O(1) per operation (`open_epoch` is O(layers))."""

    def __init__(self) -> None:
        self._epochs: dict[Epoch, _EpochEntry] = {}
        self._sequences: dict[SequenceId, _SequenceEntry] = {}
        self._last_epoch: Epoch | None = None

    # -- epochs ---------------------------------------------------------------------------------------------

    def open_epoch(self, epoch: Epoch, placement: Placement) -> None:
        """Make `epoch` known; it must be larger than every epoch before it."""
        assert self._last_epoch is None or epoch > self._last_epoch, (
            f"epoch {epoch} is opened after epoch {self._last_epoch}; epochs only grow"
        )
        self._epochs[epoch] = _EpochEntry(placement, _owners(placement))
        self._last_epoch = epoch

    def close_epoch(self, epoch: Epoch) -> None:
        """Forget an epoch in which no sequence is left."""
        entry = self._epochs[epoch]
        assert not entry.sequences, f"epoch {epoch} is closed with {len(entry.sequences)} sequences in it"
        del self._epochs[epoch]

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The open epochs, ascending."""
        return tuple(self._epochs)

    def placement_of(self, epoch: Epoch) -> Placement:
        return self._epochs[epoch].placement

    def owner_in(self, epoch: Epoch, layer: int) -> WorkerName:
        """The worker that owns `layer` for the sequences of `epoch`."""
        owners = self._epochs[epoch].owners
        assert 0 <= layer < len(owners), f"layer {layer} is outside [0, {len(owners)}) of epoch {epoch}"
        return owners[layer]

    def sequences_in(self, epoch: Epoch) -> Collection[SequenceId]:
        """The sequences of an epoch, in the order they came. A live view: copy it before changing the directory."""
        return self._epochs[epoch].sequences.keys()

    # -- sequences ------------------------------------------------------------------------------------------

    def add(self, sequence: SequenceId, epoch: Epoch, blocks: list[BlockId]) -> None:
        """A new sequence, owned under `epoch`. `blocks` is adopted: only `extend` may change it from now on."""
        assert sequence not in self._sequences, f"sequence {sequence} is already in the directory"
        assert epoch in self._epochs, f"sequence {sequence} is added to epoch {epoch}, which is not open"
        self._sequences[sequence] = _SequenceEntry(epoch, blocks)
        self._epochs[epoch].sequences[sequence] = None

    def extend(self, sequence: SequenceId, blocks: Sequence[BlockId]) -> None:
        """Append to the block table of a sequence."""
        self._sequences[sequence].blocks.extend(blocks)

    def flip(self, sequence: SequenceId, epoch: Epoch) -> None:
        """From now on the sequence is owned under `epoch`, which must be open and larger than its present one."""
        entry = self._sequences[sequence]
        assert epoch > entry.epoch, f"sequence {sequence} is in epoch {entry.epoch} and cannot flip to {epoch}"
        assert epoch in self._epochs, f"sequence {sequence} flips to epoch {epoch}, which is not open"
        del self._epochs[entry.epoch].sequences[sequence]
        self._epochs[epoch].sequences[sequence] = None
        entry.epoch = epoch

    def remove(self, sequence: SequenceId) -> list[BlockId]:
        """Forget a sequence; its block table goes back to the caller."""
        entry = self._sequences.pop(sequence)
        del self._epochs[entry.epoch].sequences[sequence]
        return entry.blocks

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._sequences

    def epoch_of(self, sequence: SequenceId) -> Epoch:
        return self._sequences[sequence].epoch

    def blocks_of(self, sequence: SequenceId) -> Sequence[BlockId]:
        """The block table, in the order of positions. The live list: read it, don't change it."""
        return self._sequences[sequence].blocks

    def owner(self, sequence: SequenceId, layer: int) -> WorkerName:
        """The one worker that may write the KV rows of `layer` of this sequence."""
        return self.owner_in(self._sequences[sequence].epoch, layer)

    def may_write(self, sequence: SequenceId, epoch: Epoch) -> bool:
        """Whether a step that carries `epoch` may write this sequence's KV.

        False for an unknown sequence, and for an epoch older than the sequence's: such a writer missed the flip.
        """
        entry = self._sequences.get(sequence)
        return entry is not None and epoch >= entry.epoch

    def check_integrity(self) -> None:
        """Audit everything. O(sequences + blocks + layers).

        Raises:
            AssertionError: with the story of what is wrong.
        """
        assert list(self._epochs) == sorted(self._epochs), f"the open epochs {list(self._epochs)} do not ascend"
        for epoch, opened in self._epochs.items():
            assert opened.owners == _owners(opened.placement), f"the owners of epoch {epoch} differ from its placement"
            for sequence in opened.sequences:
                assert sequence in self._sequences, f"epoch {epoch} lists sequence {sequence}, which is gone"
        for sequence, entry in self._sequences.items():
            homes = [epoch for epoch, other in self._epochs.items() if sequence in other.sequences]
            assert homes == [entry.epoch], f"sequence {sequence} is in epoch {entry.epoch} but listed in {homes}"
            assert len(set(entry.blocks)) == len(entry.blocks), f"sequence {sequence} lists a block twice"


class _EpochEntry:
    __slots__ = ("owners", "placement", "sequences")

    def __init__(self, placement: Placement, owners: tuple[WorkerName, ...]):
        self.placement = placement
        self.owners = owners
        self.sequences: dict[SequenceId, None] = {}


class _SequenceEntry:
    __slots__ = ("blocks", "epoch")

    def __init__(self, epoch: Epoch, blocks: list[BlockId]):
        self.epoch = epoch
        self.blocks = blocks


def _owners(placement: Placement) -> tuple[WorkerName, ...]:
    owners: list[WorkerName] = []
    for worker, layers in placement:
        assert layers.start == len(owners), f"{worker} starts at layer {layers.start}, expected {len(owners)}"
        owners.extend([worker] * len(layers))
    return tuple(owners)
