"""Layouts: which worker serves which units, as frozen values.

A layout is an ordered chain of segments that covers the decoder layers ``[0, num_layers)`` without gap or
overlap. The embedding is a unit that lives with the first segment, the final norm and LM head a unit that
lives with the last; either end segment may therefore hold no layer at all. A worker may appear in more than
one segment. A *hop* is the index of a segment in the chain: a step visits hop 0, 1, ... in order.

A layout never changes. The next one has a larger epoch.
"""

from collections.abc import Sequence

import msgspec

from kvstore.ids import Epoch, LayerRange, WorkerName


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """One hop of the chain: `worker` computes `layers`."""

    worker: WorkerName
    layers: LayerRange


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """An ordered chain of segments that covers ``[0, num_layers)`` exactly.

    Raises:
        ValueError: when the segments leave a gap, overlap, stop short, an inner segment is empty, or a worker follows itself.
    """

    epoch: Epoch
    num_layers: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a layout needs at least one segment")
        expected = 0
        for hop, segment in enumerate(self.segments):
            if segment.layers.start != expected:
                raise ValueError(
                    f"segment {hop} on {segment.worker} starts at layer {segment.layers.start}, expected {expected}"
                )
            if not len(segment.layers) and 0 < hop < len(self.segments) - 1:
                raise ValueError(f"segment {hop} on {segment.worker} holds no layer; only the first or last may")
            if hop and self.segments[hop - 1].worker == segment.worker:
                raise ValueError(f"segments {hop - 1} and {hop} are both on {segment.worker}; make them one")
            expected = segment.layers.stop
        if expected != self.num_layers:
            raise ValueError(f"the layout covers {expected} layers, the model has {self.num_layers}")

    @property
    def num_hops(self) -> int:
        return len(self.segments)

    @property
    def workers(self) -> tuple[WorkerName, ...]:
        """Every worker once, in the order of its first segment."""
        return tuple(dict.fromkeys(segment.worker for segment in self.segments))

    @property
    def embedding_worker(self) -> WorkerName:
        return self.segments[0].worker

    @property
    def lm_head_worker(self) -> WorkerName:
        return self.segments[-1].worker

    def layers_of(self, worker: WorkerName) -> tuple[int, ...]:
        """The layers that `worker` holds, ascending."""
        return tuple(layer for s in self.segments if s.worker == worker for layer in s.layers)

    def owner_of(self, layer: int) -> WorkerName:
        for segment in self.segments:
            if layer in segment.layers:
                return segment.worker
        raise ValueError(f"layer {layer} is outside [0, {self.num_layers})")

    def owners(self) -> tuple[WorkerName, ...]:
        """The owner of every layer, ascending."""
        return tuple(s.worker for s in self.segments for _ in s.layers)

    def brief(self) -> str:
        """One line for a log: ``w0 [0, 19) | w1 [19, 30)``."""
        return " | ".join(f"{s.worker} [{s.layers.start}, {s.layers.stop})" for s in self.segments)

    def counts(self) -> tuple[int, ...]:
        return tuple(len(segment.layers) for segment in self.segments)


def layout_from_counts(epoch: Epoch, workers: Sequence[WorkerName], counts: Sequence[int]) -> Layout:
    """The chain in which ``workers[i]`` serves the next ``counts[i]`` layers.

    Raises:
        ValueError: when the lengths differ or a count is negative.
    """
    if len(workers) != len(counts):
        raise ValueError(f"{len(counts)} layer counts for {len(workers)} workers")
    segments, start = [], 0
    for worker, count in zip(workers, counts, strict=True):
        segments.append(Segment(worker, LayerRange(start, start + count)))
        start += count
    return Layout(epoch=epoch, num_layers=start, segments=tuple(segments))


def layout_from_owners(epoch: Epoch, owners: Sequence[WorkerName]) -> Layout:
    """The chain in which ``owners[i]`` serves layer i: one segment per run of layers with one owner."""
    segments: list[Segment] = []
    for layer, owner in enumerate(owners):
        if segments and segments[-1].worker == owner:
            segments[-1] = Segment(owner, LayerRange(segments[-1].layers.start, layer + 1))
        else:
            segments.append(Segment(owner, LayerRange(layer, layer + 1)))
    return Layout(epoch, len(owners), tuple(segments))


class Move(msgspec.Struct, frozen=True, array_like=True):
    """Layers whose weights and KV go from one worker to another; the unit of a transition."""

    layers: LayerRange
    source: WorkerName
    target: WorkerName


def moves_between(old: Layout, new: Layout) -> tuple[Move, ...]:
    """What must move to get from `old` to `new`: maximal runs of layers with one source and one target, ascending.

    ``{**owners(old), **{layer: move.target ...}} == owners(new)``; layers that stay are in no move.

    Raises:
        ValueError: when the layouts are of models with different numbers of layers.
    """
    if old.num_layers != new.num_layers:
        raise ValueError(f"a layout of {old.num_layers} layers cannot become one of {new.num_layers}")
    moves: list[Move] = []
    for layer in range(old.num_layers):
        source, target = old.owner_of(layer), new.owner_of(layer)
        if source == target:
            continue
        last = moves[-1] if moves else None
        if last and last.layers.stop == layer and (last.source, last.target) == (source, target):
            moves[-1] = Move(LayerRange(last.layers.start, layer + 1), source, target)
        else:
            moves.append(Move(LayerRange(layer, layer + 1), source, target))
    return tuple(moves)
