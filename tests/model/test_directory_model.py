"""The directory against a dumb model: a dict of tuples, and ownership looked up by scanning the placement."""

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.directory import Directory, Placement
from kvstore.ids import LayerRange

NUM_LAYERS = 7


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    cuts = sorted(draw(st.lists(st.integers(0, NUM_LAYERS), max_size=4)))
    edges = [0, *cuts, NUM_LAYERS]
    return tuple((draw(st.sampled_from("abcd")), LayerRange(start, stop)) for start, stop in pairwise(edges))


def owner_by_scan(placement: Placement, layer: int) -> str:
    (worker,) = [worker for worker, layers in placement if layer in layers]
    return worker


class DirectoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory()
        self.placements: dict[int, Placement] = {}
        self.sequences: dict[int, tuple[int, list[int]]] = {}
        self.highest_epoch_of: dict[int, int] = {}
        self.last_epoch = 0
        self.num_started = 0

    @initialize(placement=placements())
    def open_the_first_epoch(self, placement: Placement) -> None:
        self.open_epoch(placement, 0)

    @rule(placement=placements(), skip=st.integers(0, 2))
    def open_another_epoch(self, placement: Placement, skip: int) -> None:
        self.open_epoch(placement, skip)

    def open_epoch(self, placement: Placement, skip: int) -> None:
        self.last_epoch += 1 + skip
        self.directory.open_epoch(self.last_epoch, placement)
        self.placements[self.last_epoch] = placement

    @precondition(lambda self: self.placements)
    @rule(data=st.data(), blocks=st.lists(st.integers(0, 30), unique=True, max_size=5))
    def add(self, data: st.DataObject, blocks: list[int]) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.placements)))
        self.num_started += 1
        self.directory.add(self.num_started, epoch, list(blocks))
        self.sequences[self.num_started] = (epoch, blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), blocks=st.lists(st.integers(31, 99), unique=True, max_size=3))
    def extend(self, data: st.DataObject, blocks: list[int]) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.sequences)))
        epoch, table = self.sequences[sequence]
        fresh = [block for block in blocks if block not in table]
        self.directory.extend(sequence, fresh)
        self.sequences[sequence] = (epoch, table + fresh)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def flip(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.sequences)))
        epoch, table = self.sequences[sequence]
        later = [other for other in self.placements if other > epoch]
        if later:
            target = data.draw(st.sampled_from(later))
            self.directory.flip(sequence, target)
            self.sequences[sequence] = (target, table)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.sequences)))
        _, table = self.sequences.pop(sequence)
        assert self.directory.remove(sequence) == table

    @rule()
    def close_empty_epochs(self) -> None:
        for epoch in list(self.placements):
            if not any(home == epoch for home, _ in self.sequences.values()):
                self.directory.close_epoch(epoch)
                del self.placements[epoch]

    @invariant()
    def agrees(self) -> None:
        directory = self.directory
        directory.check_integrity()
        assert directory.epochs == tuple(sorted(self.placements))
        assert directory.num_sequences == len(self.sequences)
        for epoch in self.placements:
            members = {sequence for sequence, (home, _) in self.sequences.items() if home == epoch}
            assert set(directory.sequences_in(epoch)) == members
        for sequence, (epoch, table) in self.sequences.items():
            assert directory.epoch_of(sequence) == epoch
            assert directory.blocks_of(sequence) == table
            assert epoch >= self.highest_epoch_of.get(sequence, 0)
            self.highest_epoch_of[sequence] = epoch
            for writer in range(self.last_epoch + 2):
                assert directory.may_write(sequence, writer) == (writer >= epoch)
            for layer in range(NUM_LAYERS):
                assert directory.owner(sequence, layer) == owner_by_scan(self.placements[epoch], layer)
        assert not directory.may_write(self.num_started + 1, self.last_epoch)


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
