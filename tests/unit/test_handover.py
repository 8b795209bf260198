"""The mirror: many steps to a message while the flip waits for the snapshot, each step's own when it is near."""

import numpy as np
import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime.handover import MOST_UNTAKEN, SLICE_BYTES, Handover
from runtime.layout import Move, layout_from_counts
from runtime.messages import Copy, Load, Mirror, Pages, Prepare, Row, StepPlan, Taken
from runtime.stage_state import PlannedBatch

OLD, NEW, BLOCK_SIZE = 4, 5, 4
MOVES = (Move(LayerRange(0, 2), "a", "b"), Move(LayerRange(3, 4), "a", "b"))


class Ends:
    """The source and the target of two moves, and what is on its way between them."""

    def __init__(self, head_dim: int = 2) -> None:
        self.old = layout_from_counts(OLD, ["a"], [4])
        new = layout_from_counts(NEW, ["a", "b"], [2, 2])
        self.pools = [PagePool(128, BLOCK_SIZE, 1, head_dim, torch.float32, "cpu") for _ in range(2)]
        self.pools[0].hold(range(4))
        self.pools[1].hold([0, 1, 3])
        prepare = Prepare(NEW, OLD, Load(new, "", "", "", BLOCK_SIZE, 0, 0, 0), MOVES, [], True, ("a", "a"))
        self.source, self.target = Handover(NEW, OLD, new), Handover(NEW, OLD, new)
        self.source.begin(prepare, "a", self.pools[0])
        self.target.begin(prepare, "b", self.pools[1])
        self.sent: list[tuple[Mirror | Pages, torch.Tensor]] = []
        self.ordinal = 0

    def send(self, worker: str, message: Mirror | Pages, tensors: tuple[torch.Tensor, ...]) -> None:
        assert worker == "b"
        self.sent.append((message, tensors[0]))

    def write(self, position: int) -> None:
        """A step writes the row at `position` of a sequence that has blocks 0, 1, 2, ..."""
        block, offset = divmod(position, BLOCK_SIZE)
        self.pools[0].ensure([block])
        for layer in range(4):
            self.pools[0].read_page(layer, block)[:, offset] = 100 * layer + position + 1
        plan = StepPlan(OLD, self.ordinal, 0, [Row(1, position, [7], [], True, None)], [])
        one = np.array([position], dtype=np.int64)
        table = np.arange(32, dtype=np.int32)[None]
        batch = PlannedBatch(plan, one, np.array([0, 1]), np.array([position + 1]), table, one, one, [])
        self.source.ran(plan, batch, 0, 0.0, 0.0, self.send)
        self.ordinal += 1

    def mirrors(self) -> list[tuple[int, int, int]]:
        return [(m.move, m.first, m.last) for m, _ in self.sent if isinstance(m, Mirror)]

    def deliver(self) -> None:
        for message, tensor in self.sent:
            if isinstance(message, Mirror):
                self.target.mirror(message, [tensor])
            else:
                count = self.target.pages(message, [tensor])
                self.source.taken(Taken(NEW, message.move, count))
        self.sent.clear()

    def check(self, num_positions: int) -> None:
        """Every row is where it should be in the layers that moved."""
        for layer in (0, 1, 3):
            for position in range(num_positions):
                block, offset = divmod(position, BLOCK_SIZE)
                row = self.pools[1].read_page(layer, block)[:, offset]
                assert (row == 100 * layer + position + 1).all(), (layer, position)


def test_rows_are_collected_while_the_flip_waits_for_the_snapshot() -> None:
    ends = Ends()
    for position in range(6):
        ends.write(position)
    assert ends.source.start_mirror(ends.pools[0], ends.old, {0: ends.ordinal}) == [(0, 6), (1, 6)]
    ends.write(6)
    ends.source.copy(Copy(NEW, [0, 1], 1 << 30, 2), 0.0, ends.send)
    ends.write(7)
    assert not ends.sent, "two of the snapshot's blocks are awaited, so there is time"
    ends.source.send_slice(0.0, ends.send)
    assert not ends.mirrors(), "the other move has sent nothing of its snapshot yet"
    ends.source.send_slice(0.0, ends.send)
    assert ends.mirrors() == [(0, 6, 7), (1, 6, 7)]
    ends.write(8)
    assert ends.mirrors()[2:] == [(0, 8, 8), (1, 8, 8)], "now every step sends its own"
    ends.target.open([6, 6], ends.send)
    assert not ends.target.is_complete_through(6)
    ends.deliver()
    assert ends.target.is_complete_through(8)
    ends.check(9)


def test_what_is_awaited_of_every_move_goes_before_what_is_only_cached() -> None:
    ends = Ends(head_dim=SLICE_BYTES // (2 * 2 * BLOCK_SIZE * 4))  # a slice is one block
    for position in range(12):
        ends.write(position)
    ends.source.start_mirror(ends.pools[0], ends.old, {0: ends.ordinal})
    ends.source.copy(Copy(NEW, [2, 0, 1], 1 << 30, 1), 0.0, ends.send)
    while ends.source.has_slices:
        ends.source.send_slice(0.0, ends.send)
    order = [(m.move, m.first) for m, _ in ends.sent if isinstance(m, Pages)]
    assert order[:2] == [(0, 0), (1, 0)]
    ends.deliver()
    ends.check(12)


def test_a_source_waits_for_a_target_that_is_slow() -> None:
    ends, num_blocks = (
        Ends(head_dim=SLICE_BYTES // (2 * 2 * BLOCK_SIZE * 4)),
        2 * MOST_UNTAKEN + 1,
    )  # a slice is one block
    for position in range(num_blocks * BLOCK_SIZE):
        ends.write(position)
    ends.source.start_mirror(ends.pools[0], ends.old, {0: ends.ordinal})
    ends.source.copy(Copy(NEW, list(range(num_blocks)), 1 << 30, num_blocks), 0.0, ends.send)
    while ends.source.has_slices:
        ends.source.send_slice(0.0, ends.send)
    assert [(m.move, m.first) for m, _ in ends.sent if isinstance(m, Pages)] == [(0, b) for b in range(MOST_UNTAKEN)]
    ends.source.taken(Taken(NEW, 1, 3))
    assert not ends.source.has_slices, "that was the other move"
    ends.source.taken(Taken(NEW, 0, 1))
    ends.source.taken(Taken(NEW, 0, 0))  # it came late
    ends.source.send_slice(0.0, ends.send)
    assert not ends.source.has_slices
    while ends.sent:
        ends.deliver()
        while ends.source.has_slices:
            ends.source.send_slice(0.0, ends.send)
    assert not ends.mirrors()
    ends.check(num_blocks * BLOCK_SIZE)


def test_the_flip_sends_what_was_collected() -> None:
    ends = Ends()
    ends.source.start_mirror(ends.pools[0], ends.old, {0: 0})
    for position in range(3):
        ends.write(position)
    assert not ends.sent
    ends.source.open([0, 0], ends.send)
    assert ends.mirrors() == [(0, 0, 2), (1, 0, 2)]
    ends.write(3)
    ends.deliver()
    ends.check(4)


def test_what_is_collected_is_bounded() -> None:
    ends = Ends(head_dim=SLICE_BYTES // (2 * 2 * 4) // 4)  # four rows of the first move are a slice
    ends.source.start_mirror(ends.pools[0], ends.old, {0: 0})
    for position in range(4):
        ends.write(position)
    assert ends.mirrors() == [(0, 0, 3)]
