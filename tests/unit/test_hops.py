"""Which layers go when, if not all of them have room at once: against every order of single layers."""

from collections.abc import Collection, Mapping

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstore.ids import WorkerName
from runtime.layout import Layout, layout_from_counts, layout_from_owners, moves_between
from scheduler.hops import Room, capacity, find_course, roomiest, split_into_hops

WORKERS = ("w0", "w1", "w2")


def rooms(pages: Mapping[WorkerName, int], end_pages: int = 0) -> Room:
    """Workers with so many pages; an end of the model takes some of them."""

    def room(worker: WorkerName, layers: Collection[int], *, embedding: bool, lm_head: bool) -> int:
        return max(0, pages[worker] - end_pages * (embedding + lm_head)) // len(layers)

    return room


@st.composite
def changes(draw: st.DrawFn) -> tuple[Layout, Layout, Room]:
    num_layers = draw(st.integers(2, 7))
    owner = st.lists(st.sampled_from(WORKERS), min_size=num_layers, max_size=num_layers)
    pages = {worker: draw(st.integers(0, 60)) for worker in WORKERS}
    return layout_from_owners(1, draw(owner)), layout_from_owners(0, draw(owner)), rooms(pages, draw(st.integers(0, 5)))


def is_possible(old: Layout, new: Layout, room: Room, wanted: int) -> bool:
    """Whether there is any order, by trying all of them, each layer a transition of its own."""
    targets, seen, ways = new.owners(), set(), [old.owners()]
    while ways:
        owners = ways.pop()
        if owners == targets:
            return True
        for layer in range(len(owners)):
            after = (*owners[:layer], targets[layer], *owners[layer + 1 :])
            if (
                after not in seen
                and capacity(room, layout_from_owners(0, owners), layout_from_owners(0, after)) >= wanted
            ):
                seen.add(after)
                ways.append(after)
    return False


@given(change=changes(), wanted=st.integers(1, 30))
@settings(deadline=None, max_examples=400)
def test_hops_are_found_when_any_order_of_single_layers_has_room(
    change: tuple[Layout, Layout, Room], wanted: int
) -> None:
    old, new, room = change
    assume(capacity(room, old, old) >= wanted)
    hops = split_into_hops(old, new, moves_between(old, new), room, wanted)
    assert bool(hops) or not is_possible(old, new, room, wanted)
    for before, after in zip([old, *hops], hops, strict=False):
        assert capacity(room, before, after) >= wanted, "each hop has room"
    assert not hops or hops[-1] == new


@given(change=changes())
@settings(deadline=None, max_examples=200)
def test_the_roomiest_way_is_the_limit(change: tuple[Layout, Layout, Room]) -> None:
    old, new, room = change
    moves = moves_between(old, new)
    most = roomiest(old, new, moves, room)
    assume(most > 0)
    assert split_into_hops(old, new, moves, room, most)
    assert not split_into_hops(old, new, moves, room, most + 1)


@pytest.mark.parametrize(
    ("old", "new", "at_once", "most"),
    [
        (("w0", "w1"), ("w1", "w0"), 100, 187),
        (("w0", "w1", "w2"), ("w1", "w2", "w0"), 150, 272),
    ],
    ids=["two workers change places", "three go round"],
)
def test_full_workers_change_places_a_few_layers_at_a_time(
    old: tuple[str, ...], new: tuple[str, ...], at_once: int, most: int
) -> None:
    """Each with 3,000 pages: blocks for all of its layers at once, and with one more."""
    counts = [30 // len(old)] * len(old)
    a, b = layout_from_counts(1, old, counts), layout_from_counts(0, new, counts)
    room = rooms(dict.fromkeys(WORKERS, 3000))
    assert capacity(room, a, b) == at_once
    assert roomiest(a, b, moves_between(a, b), room) == most
    hops = split_into_hops(a, b, moves_between(a, b), room, most)
    assert len(hops) > 2
    assert max(len(hop.segments) for hop in hops) <= 2 * len(old), "layouts between stay in few pieces"


@pytest.mark.parametrize("target", [(5, 13, 12), (12, 13, 5)])
def test_givers_go_before_takers(target: tuple[int, ...]) -> None:
    old, new = layout_from_counts(1, WORKERS, (10, 10, 10)), layout_from_counts(0, WORKERS, target)
    room = rooms(dict.fromkeys(WORKERS, 3000))
    assert roomiest(old, new, moves_between(old, new), room) == 3000 // 13


def test_what_stands_in_the_way_is_named() -> None:
    old, new = layout_from_counts(1, ("w0", "w1"), (10, 10)), layout_from_counts(0, ("w0", "w1"), (6, 14))
    course = find_course(old, new, moves_between(old, new), rooms({"w0": 1000, "w1": 1200}), 100)
    assert course.blocked == "w1"
    assert course.reached.counts() == (8, 12)
    assert course.layers == (9, 8)
