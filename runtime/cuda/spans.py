"""Which graphs there should be: of which layers, for how many rows, up to which context. Pure.

A graph runs a *span* of layers for a *bucket* of decode steps. A bucket has a number of rows, to which steps are padded, and a
context, up to which it can attend. Spans are cut on a grid of powers of two, as a buddy allocator cuts memory, and a layout
uses those that are there already: when a boundary moves, the spans of the arriving layers are new. Where layers leave, so
are those of at most `longest - 1` layers that stay, whose span the new boundary cuts.

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


def cover(layers: LayerRange, held: Iterable[LayerRange], longest: int = LONGEST_SPAN) -> list[LayerRange]:
    """`layers` by spans of `held` where they fit in, the longest first, and by the grid in the gaps between them.

    So a layer that stays where it is keeps its span, unless that crosses a boundary. Where this would make more than `longest`
    pieces more than the grid alone, as many small moves do, it is the grid.
    """
    longest_at: dict[int, LayerRange] = {}
    for span in held:
        if layers.start <= span.start and span.stop <= layers.stop:
            longest_at[span.start] = max(span, longest_at.get(span.start, span), key=len)
    pieces, gap, start = [], layers.start, layers.start
    while start < layers.stop:
        span = longest_at.get(start)
        if span is None:
            start += 1
            continue
        pieces += [*spans_of(LayerRange(gap, start), longest), span]
        gap = start = span.stop
    pieces += spans_of(LayerRange(gap, layers.stop), longest)
    grid = spans_of(layers, longest)
    return pieces if len(pieces) <= len(grid) + longest else grid


def static_bytes(buckets: Buckets, num_layers: int, hidden_bytes: int, block_size: int) -> int:
    """What the inputs of all buckets take: a hidden state of `hidden_bytes` a row, page tables and slots of every layer."""
    total = 0
    for bucket in buckets.all():
        tables = num_layers * bucket.rows * -(-bucket.context // block_size) * 4
        total += bucket.rows * (hidden_bytes + 8 + 8 * num_layers + 8) + tables
    return total
