"""The directory: one owner per (sequence, layer), epochs that only grow."""

from collections.abc import Callable

import pytest

from kvstore.directory import Directory, Placement
from kvstore.ids import LayerRange

TWO: Placement = (("a", LayerRange(0, 3)), ("b", LayerRange(3, 6)))
MOVED: Placement = (("a", LayerRange(0, 2)), ("b", LayerRange(2, 4)), ("a", LayerRange(4, 6)))


@pytest.fixture
def directory() -> Directory:
    directory = Directory()
    directory.open_epoch(1, TWO)
    directory.open_epoch(2, MOVED)
    return directory


def test_the_epoch_decides_who_owns_a_layer(directory: Directory) -> None:
    directory.add(7, 1, [1, 2])
    assert [directory.owner(7, layer) for layer in range(6)] == ["a", "a", "a", "b", "b", "b"]
    directory.flip(7, 2)
    assert [directory.owner(7, layer) for layer in range(6)] == ["a", "a", "b", "b", "a", "a"]
    assert [directory.owner_in(1, layer) for layer in (2, 3)] == ["a", "b"]
    assert directory.epoch_of(7) == 2
    assert directory.placement_of(2) == MOVED
    with pytest.raises(AssertionError, match=r"layer 6 is outside \[0, 6\)"):
        directory.owner(7, 6)
    with pytest.raises(AssertionError, match="layer -1"):
        directory.owner(7, -1)


def test_a_flip_moves_one_sequence_and_only_upward(directory: Directory) -> None:
    for sequence in (1, 2, 3):
        directory.add(sequence, 1, [])
    directory.flip(2, 2)
    assert list(directory.sequences_in(1)) == [1, 3]
    assert list(directory.sequences_in(2)) == [2]
    with pytest.raises(AssertionError, match="cannot flip to 1"):
        directory.flip(2, 1)
    with pytest.raises(AssertionError, match="cannot flip to 2"):
        directory.flip(2, 2)
    with pytest.raises(AssertionError, match="not open"):
        directory.flip(1, 3)
    directory.check_integrity()


def test_block_tables_are_adopted_and_grow_in_place(directory: Directory) -> None:
    table = [4, 5]
    directory.add(1, 1, table)
    directory.extend(1, [9])
    assert directory.blocks_of(1) is table
    assert table == [4, 5, 9]
    assert directory.remove(1) is table
    assert 1 not in directory
    assert directory.num_sequences == 0


def test_fencing_refuses_the_past_and_strangers(directory: Directory) -> None:
    directory.add(1, 1, [])
    assert directory.may_write(1, 1)
    directory.flip(1, 2)
    assert not directory.may_write(1, 1)
    assert directory.may_write(1, 2)
    directory.remove(1)
    assert not directory.may_write(1, 2)


def test_an_epoch_closes_when_it_is_empty(directory: Directory) -> None:
    directory.add(1, 1, [])
    with pytest.raises(AssertionError, match="closed with 1 sequences"):
        directory.close_epoch(1)
    directory.flip(1, 2)
    directory.close_epoch(1)
    assert directory.epochs == (2,)
    directory.check_integrity()


def test_epochs_only_grow_even_when_closed(directory: Directory) -> None:
    directory.close_epoch(2)
    with pytest.raises(AssertionError, match="epochs only grow"):
        directory.open_epoch(2, TWO)
    directory.open_epoch(3, TWO)
    assert directory.epochs == (1, 3)


@pytest.mark.parametrize(
    "placement",
    [
        (("a", LayerRange(1, 3)),),
        (("a", LayerRange(0, 3)), ("b", LayerRange(4, 6))),
        (("a", LayerRange(0, 3)), ("b", LayerRange(2, 6))),
    ],
)
def test_placements_have_no_gap_and_no_overlap(placement: Placement) -> None:
    with pytest.raises(AssertionError, match="expected"):
        Directory().open_epoch(1, placement)


def test_an_end_may_hold_no_layer() -> None:
    directory = Directory()
    directory.open_epoch(1, (("a", LayerRange(0, 0)), ("b", LayerRange(0, 2)), ("c", LayerRange(2, 2))))
    assert [directory.owner_in(1, layer) for layer in range(2)] == ["b", "b"]


def test_misuse_is_caught(directory: Directory) -> None:
    directory.add(1, 1, [])
    with pytest.raises(AssertionError, match="already"):
        directory.add(1, 1, [])
    with pytest.raises(AssertionError, match="not open"):
        directory.add(2, 9, [])
    with pytest.raises(KeyError):
        directory.blocks_of(2)
    directory.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: directory._epochs[1].sequences.clear(),
        lambda directory: directory._epochs[2].sequences.update({1: None}),
        lambda directory: directory._epochs[2].sequences.update({99: None}),
        lambda directory: setattr(directory._sequences[1], "epoch", 2),
        lambda directory: directory._sequences[1].blocks.append(4),
        lambda directory: setattr(directory._epochs[1], "owners", ("a",) * 6),
        lambda directory: directory._epochs.update({0: directory._epochs.pop(1)}),
    ],
)
def test_the_audit_notices_damage(directory: Directory, damage: Callable[[Directory], None]) -> None:
    directory.add(1, 1, [4])
    directory.check_integrity()
    damage(directory)
    with pytest.raises(AssertionError):
        directory.check_integrity()
