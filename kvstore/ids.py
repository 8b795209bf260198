"""The ids that every floor shares, and the half-open range of layers.

Sequence ids are handed out by the head and never reused in its lifetime. Block ids are global: the same id
means the same run of token positions on every worker. An epoch numbers a committed layout and only grows.
"""

from typing import TypeAlias

import msgspec

WorkerName: TypeAlias = str
SequenceId: TypeAlias = int
BlockId: TypeAlias = int
PageId: TypeAlias = int
Epoch: TypeAlias = int


class LayerRange(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Decoder layers ``start <= layer < stop``; empty when ``start == stop``.

    Raises:
        ValueError: when ``start`` is negative or ``stop < start``.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop < self.start:
            raise ValueError(f"a layer range needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        return iter(range(self.start, self.stop))

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.stop

    def intersection(self, other: "LayerRange") -> "LayerRange":
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return LayerRange(start, max(start, stop))
