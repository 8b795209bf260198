"""What an operator wants of a layout: read when it is asked for, resolved against the layout that it finds."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment, layout_from_counts
from scheduler.transition import Refused
from scheduler.wishes import Counts, Drained, LayoutError, Wish, parse_wish, resolve

WORKERS = ["w0", "w1", "w2", "w3"]


def evenly(names: Sequence[str]) -> list[int]:
    return [12 // len(names)] * len(names)


def over(names: Sequence[str]) -> Layout:
    return layout_from_counts(7, names, evenly(names))


@pytest.mark.parametrize(
    ("wish", "present", "workers", "expected"),
    [
        (Counts((5, 7)), ["w3", "w1"], WORKERS, [("w3", 5), ("w1", 7)]),
        (Counts((5, 3, 4)), ["w3", "w1"], WORKERS, [("w3", 5), ("w1", 3), ("w0", 4)]),
        (Counts((12,)), ["w3", "w1"], WORKERS, [("w3", 12)]),
        (Counts((5, 7)), ["w3", "w1"], ["w0", "w1"], [("w1", 5), ("w0", 7)]),
        (Drained("w0"), ["w0", "w1", "w2"], WORKERS, [("w1", 6), ("w2", 6)]),
        (Drained("w1"), ["w1", "w2"], WORKERS, [("w2", 12)]),
        (Drained("w1"), ["w1"], WORKERS, [("w0", 12)]),
        (Drained("w3"), ["w1", "w2"], WORKERS, [("w1", 6), ("w2", 6)]),
        (over(["w2", "w0"]), ["w1"], WORKERS, [("w2", 6), ("w0", 6)]),
    ],
)
def test_a_wish_depends_on_the_layout_that_it_finds(
    wish: Wish, present: list[str], workers: list[str], expected: list[tuple[str, int]]
) -> None:
    found = resolve(wish, over(present), workers, (), evenly)
    assert [(segment.worker, len(segment.layers)) for segment in found.segments] == expected


def test_what_no_longer_can_be_says_why() -> None:
    with pytest.raises(LayoutError, match="3 stages are asked for, 2 workers are here"):
        resolve(Counts((4, 4, 4)), over(["w0"]), ["w0", "w1"], (), evenly)
    with pytest.raises(Refused, match=r"w0 is the only worker that is not drained; start another one first$"):
        resolve(Drained("w0"), over(["w0"]), ["w0"], (), evenly)


def test_what_was_drained_is_left_out_unless_it_is_named() -> None:
    def workers_of(wish: Wish, present: list[str], drained: set[str]) -> tuple[str, ...]:
        return resolve(wish, over(present), WORKERS, drained, evenly).workers

    assert workers_of(Counts((4, 4, 4)), ["w1", "w2"], {"w0"}) == ("w1", "w2", "w3")
    assert workers_of(Counts((6, 6)), ["w0", "w2"], {"w0"}) == ("w0", "w2")  # it serves: its drain was aborted
    assert workers_of(Drained("w1"), ["w1"], {"w0"}) == ("w2",)
    assert workers_of(over(["w0", "w1"]), ["w1", "w2"], {"w0"}) == ("w0", "w1")
    with pytest.raises(LayoutError, match=r"3 workers are here .w1, w2, w3.; w0 drained: resume it"):
        resolve(Counts((3, 3, 3, 3)), over(["w1"]), WORKERS, {"w0"}, evenly)
    with pytest.raises(
        Refused, match="w1 is the only worker that is not drained; start another one first; w0 drained: resume it"
    ):
        resolve(Drained("w1"), over(["w1"]), ["w0", "w1"], {"w0"}, evenly)


def test_counts_are_kept_and_stages_are_a_layout() -> None:
    assert parse_wish({"layers": [5, 7]}, 12, WORKERS) == Counts((5, 7))
    stages = [{"worker": "w3", "layers": [0, 5]}, {"worker": "w0", "layers": [5, 12]}]
    wanted = (Segment("w3", LayerRange(0, 5)), Segment("w0", LayerRange(5, 12)))
    assert parse_wish({"stages": stages}, 12, WORKERS) == Layout(0, 12, wanted)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"layers": [5, 6]}, "adds up to 11, the model has 12"),
        ({"layers": [5, 0, 7]}, "in the middle"),
        ({"layers": "5,7"}, "not a list"),
        ({"stages": [{"worker": "w9", "layers": [0, 12]}]}, "no worker 'w9'"),
        ({"stages": [{"worker": "w0", "layers": [0, 11]}]}, "covers 11 layers"),
        ({"stages": [{"worker": "w0", "layers": [0, 12], "x": 1}]}, r"stages\[0\]: 'x' is no field of a stage"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        parse_wish(wish, 12, WORKERS)
