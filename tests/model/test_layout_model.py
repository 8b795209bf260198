"""The difference of two layouts: applied to the one it gives the other, and it says nothing else."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.ids import LayerRange, WorkerName
from runtime.layout import Layout, Segment, layout_from_owners, moves_between
from runtime.member import UnitKey, unit_keys

WORKERS = ("w0", "w1", "w2", "w3")


@st.composite
def layouts(draw: st.DrawFn, num_layers: int) -> Layout:
    """Any chain: some workers idle, some in several segments, ends with or without layers."""
    owners = draw(st.lists(st.sampled_from(WORKERS), min_size=num_layers, max_size=num_layers))
    segments = list(layout_from_owners(draw(st.integers(0, 9)), owners).segments)
    before, after = (draw(st.sampled_from((None, *WORKERS))) for _ in range(2))
    if before is not None and before != segments[0].worker:
        segments.insert(0, Segment(before, LayerRange(0, 0)))
    if after is not None and after != segments[-1].worker:
        segments.append(Segment(after, LayerRange(num_layers, num_layers)))
    return Layout(draw(st.integers(0, 9)), num_layers, tuple(segments))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Layout, Layout]:
    num_layers = draw(st.integers(1, 9))
    return draw(layouts(num_layers)), draw(layouts(num_layers))


def holders(layout: Layout) -> dict[UnitKey, WorkerName]:
    """Who holds which unit; each has one holder."""
    held = [(key, worker) for worker in layout.workers for key in unit_keys(layout, worker)]
    assert len(held) == len(dict(held)) == layout.num_layers + 2, "each unit is held once"
    return dict(held)


@given(change=changes())
@settings(deadline=None, max_examples=500)
def test_the_moves_applied_to_the_old_layout_give_the_new_one(change: tuple[Layout, Layout]) -> None:
    old, new = change
    after = holders(old)
    for move in moves_between(old, new):
        for layer in move.layers:
            assert after[layer] == move.source, "a layer is taken from where it is, and once"
            after[layer] = move.target
    # The ends of the model go with their segments; they are no layers and have no KV, so no move has them.
    after |= {"embedding": new.embedding_worker, "lm_head": new.lm_head_worker}
    assert after == holders(new)


@given(change=changes())
@settings(deadline=None, max_examples=500)
def test_the_moves_are_as_few_as_can_be(change: tuple[Layout, Layout]) -> None:
    old, new = change
    moves = moves_between(old, new)
    assert all(move.source != move.target and len(move.layers) for move in moves), "what stays is in no move"
    for one, two in pairwise(moves):
        assert one.layers.stop <= two.layers.start, "they ascend, and share no layer"
        touching = one.layers.stop == two.layers.start
        assert not touching or (one.source, one.target) != (two.source, two.target), "two that touch could be one"
    back = [(move.layers, move.target, move.source) for move in moves]
    assert [(move.layers, move.source, move.target) for move in moves_between(new, old)] == back
    assert not moves_between(new, new)
