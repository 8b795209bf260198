"""Which graphs there should be: of which layers, for how many rows, up to which context. Pure.

A graph runs a *span* of layers for a *bucket* of steps. A bucket has a number of rows, to which decode steps are padded, and a context, up
to which it can attend; a bucket for steps with prompts in them has a number of tokens besides, to which those are padded. Spans are cut on a grid of powers of two, as a buddy allocator cuts memory, and a layout
uses those that are there already: when a boundary moves, the spans of the arriving layers are new. Where layers leave, so
are those of at most `longest - 1` layers that stay, whose span the new boundary cuts.

What is never true: a span crosses the boundary of a segment; a step runs in a bucket with fewer rows or less context.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.ids import LayerRange

LONGEST_SPAN = 4
MAX_ROWS = 256
"""What the server computes at once, unless it is told otherwise."""
HEAD_ROWS = 64
"""The LM head has graphs for so many rows: their logits stay, and of more rows the launches are a small part of a step."""
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PROMPT_TOKENS = (32, 128, 256, 512)
"""Tokens of the buckets for steps with prompts. Up to a hundred or two, more tokens take a device no longer than fewer."""
PROMPT_CONTEXT = 8192
"""Steps with prompts that attend to more are not worth a graph: they take long, and FlashAttention is faster."""
QUERIES = 16
"""Tokens of one row that attention of prompts takes at a time (`runtime.cuda.prompts`)."""
FIRST_CONTEXT = 512
CONTEXT_FACTOR = 4


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Steps of up to so many rows and positions attended to: decode steps, or, with `tokens`, any of up to so many tokens."""

    rows: int
    context: int
    tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Of a step that is padded to it."""
        return self.tokens or self.rows


@dataclass(frozen=True, slots=True)
class Buckets:
    """The numbers of rows, contexts and, for steps with prompts, tokens that graphs are captured for, all ascending."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    most_positions: int | None = None
    """No bucket has more rows times context than this, because attention reads all of it; None where it does not."""
    tokens: tuple[int, ...] = ()

    def fit(self, rows: int, context: int, tokens: int) -> Bucket | None:
        """The smallest bucket that takes such a step; None when none does. As many tokens as rows is a decode step."""
        if tokens > rows:
            found = next((bucket for bucket in self._of_prompts() if bucket.tokens >= tokens), None)
            return found if found is not None and rows <= found.rows and context <= found.context else None
        size = next((size for size in self.rows if size >= rows), None)
        length = next((length for length in self.contexts if length >= context), None)
        if size is None or length is None or not self._has(size, length):
            return None
        return Bucket(size, length)

    def all(self) -> list[Bucket]:
        """Every bucket, the largest first: the later captures then find the memory that they share."""
        pairs = [(rows, context) for context in reversed(self.contexts) for rows in reversed(self.rows)]
        decode = [Bucket(rows, context) for rows, context in pairs if self._has(rows, context)]
        return [*reversed(self._of_prompts()), *decode]

    def _of_prompts(self) -> list[Bucket]:
        context = min(self.contexts[-1], PROMPT_CONTEXT)
        return [Bucket(min(self.rows[-1], tokens), context, tokens) for tokens in self.tokens]

    def of_head(self) -> list[int]:
        """The numbers of rows that there are graphs of the LM head for, ascending."""
        return [rows for rows in self.rows if rows <= HEAD_ROWS]

    def _has(self, rows: int, context: int) -> bool:
        return self.most_positions is None or rows * context <= self.most_positions


def make_buckets(
    max_rows: int, max_context: int, block_size: int, most_positions: int | None = None, *, prompts: bool = False
) -> Buckets:
    """Buckets for steps of up to `max_rows` rows and `max_context` positions, with `prompts` or decode steps only. Contexts are whole blocks.

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
    return Buckets(tuple(rows), tuple(whole), most_positions, PROMPT_TOKENS if prompts else ())


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
    """What the inputs of all buckets take: a hidden state of `hidden_bytes` a token, page tables and slots of every layer."""
    total = 0
    for bucket in buckets.all():
        tables = num_layers * bucket.rows * -(-bucket.context // block_size) * 4
        blocks = 8 * num_blocks(bucket) if bucket.tokens else 0
        total += bucket.num_tokens * (hidden_bytes + 16 + 8 * num_layers) + 8 * bucket.rows + tables + blocks
    return total


def num_blocks(bucket: Bucket) -> int:
    """The most blocks of queries (`runtime.cuda.step.query_blocks`) that a step of this bucket can have."""
    return bucket.tokens // QUERIES + bucket.rows
