"""Which graphs there should be: of which layers, for how many rows, up to which context. Pure.

A graph runs a *span* of layers for a *bucket* of decode steps. A bucket has a number of rows, to which steps are padded, and a
context, up to which it can attend. Spans are cut on a grid of powers of two, as a buddy allocator cuts memory, so
that two layouts share most of theirs: when a boundary moves, the spans of the arriving layers are new, and those of at most
`longest - 1` layers beside each new boundary.

What is never true: a span crosses the boundary of a segment; a step runs in a bucket with fewer rows or less context.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.ids import LayerRange

LONGEST_SPAN = 4
MAX_ROWS = 64
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FIRST_CONTEXT = 512
CONTEXT_FACTOR = 4


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Decode steps of up to so many rows and positions attended to."""

    rows: int
    context: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The numbers of rows and the contexts that graphs are captured for, both ascending."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    most_positions: int | None = None
    """No bucket has more rows times context than this."""

    def fit(self, rows: int, context: int) -> Bucket | None:
        """The smallest bucket that takes such a step; None when none does."""
        size = next((size for size in self.rows if size >= rows), None)
        length = next((length for length in self.contexts if length >= context), None)
        if size is None or length is None or not self._has(size, length):
            return None
        return Bucket(size, length)

    def all(self) -> list[Bucket]:
        """Every bucket, the largest first: the later captures then find the memory that they share."""
        pairs = [(rows, context) for context in reversed(self.contexts) for rows in reversed(self.rows)]
        return [Bucket(rows, context) for rows, context in pairs if self._has(rows, context)]

    def _has(self, rows: int, context: int) -> bool:
        return self.most_positions is None or rows * context <= self.most_positions


def make_buckets(max_rows: int, max_context: int, block_size: int, most_positions: int | None = None) -> Buckets:
    """Buckets for steps of up to `max_rows` rows and `max_context` positions. Contexts are whole blocks.

    `most_positions` is for attention that reads (and holds a copy of) as much as the bucket allows, whatever the rows
    need: no bucket has more, and contexts grow by `CONTEXT_FACTOR` from `FIRST_CONTEXT`. Otherwise one is enough.
    """
    assert min(max_rows, max_context, block_size) > 0
    rows = [size for size in _ROWS if size < max_rows]
    rows.append(next((size for size in _ROWS if size >= max_rows), max_rows))
    contexts = [max_context]
    length = FIRST_CONTEXT
    while most_positions is not None and length < max_context:
        contexts.append(length)
        length *= CONTEXT_FACTOR
    whole = sorted({-(-length // block_size) * block_size for length in contexts})
    return Buckets(tuple(rows), tuple(whole), most_positions)


def spans_of(layers: LayerRange, longest: int = LONGEST_SPAN) -> list[LayerRange]:
    """`layers` cut at the grid: pieces of 1, 2, 4, ... up to `longest` (a power of two) that begin at a multiple of their size."""
    assert longest > 0 and longest & (longest - 1) == 0, f"{longest} is no power of two"  # noqa: PT018
    pieces = []
    start = layers.start
    while start < layers.stop:
        size = longest
        while start % size or start + size > layers.stop:
            size //= 2
        pieces.append(LayerRange(start, start + size))
        start += size
    return pieces


def missing(
    held: Iterable[LayerRange], segments: Iterable[LayerRange], longest: int = LONGEST_SPAN
) -> list[LayerRange]:
    """The spans that `segments` need and that are not held, in the order of the layers."""
    have = set(held)
    wanted = {span for segment in segments for span in spans_of(segment, longest)}
    return sorted(wanted - have, key=lambda span: span.start)


def static_bytes(buckets: Buckets, num_layers: int, hidden_bytes: int, block_size: int) -> int:
    """What the inputs of all buckets take: a hidden state of `hidden_bytes` a row, page tables and slots of every layer."""
    total = 0
    for bucket in buckets.all():
        tables = num_layers * bucket.rows * -(-bucket.context // block_size) * 4
        total += bucket.rows * (hidden_bytes + 8 + 8 * num_layers + 8) + tables
    return total
