"""One worker's memory for KV: a pool of equal pages, any of which can hold any block of any layer.

The pages are one tensor that never moves. A table maps (held layer, block id) to a page;
layers that arrive or leave just take and return pages, so the KV cache is resized live by construction. Pages are
taken when a block is first needed and zeroed then, so that whatever a padded kernel reads is finite; on a CPU the
memory of a page that was never taken is not even committed. The number of pages is fixed, or follows what else needs
memory: then the tensor spans a range of addresses for the most there may be (`kvstore.page_memory`), `resize` says how many are there,
and pages beyond them move before they go.

The head counts blocks for every worker, so the pool never runs dry unless the head is wrong; `PoolExhausted` says by
how much. The pool has one owner, the thread that runs the worker's stage; it takes no locks.

Never true: a page that two (layer, block) pairs share, or that is both free and mapped; a page for a layer that
is not held; a free or mapped page that is not there.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xxhash

from kvstore.ids import BlockId, PageId
from kvstore.page_memory import HostMemory, PageMemory

NO_PAGE = -1
"""What `PagePool.page_of` holds for a block without a page."""
_MOVED_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Pages that move are copied in pieces of about this size: on the host one that stays in a cache, on a device one that is worth
its launch."""
GIVEN_BACK = 32
"""A resize in pieces gives back so many times what it may move."""


class PoolExhausted(Exception):
    """The head asked for more pages than the pool has left. Nothing was taken."""

    def __init__(self, num_needed: int, num_free: int, num_pages: int, num_layers: int):
        super().__init__(
            f"{num_needed} KV pages are needed but only {num_free} of {num_pages} are free "
            f"with {num_layers} layers held; the head has handed out more blocks than fit"
        )
        self.num_needed = num_needed
        self.num_free = num_free
        self.num_pages = num_pages
        self.num_layers = num_layers


def checksum(tensor: torch.Tensor) -> int:
    """XXH3 of the bytes of a contiguous tensor, 64 bits: against damage on the way, not against malice."""
    return xxhash.xxh3_64_intdigest(tensor.view(torch.uint8).cpu().numpy().data) if tensor.numel() else 0


class PagePool:
    """`num_pages` pages of K and V for `block_size` positions of one layer.

    With `memory`, which is empty and of the same `device`, they lie there, and `resize` changes their number.

    Raises:
        ValueError: when a size is not positive, or more pages are wanted than an int32 can number.
        MemoryError: `memory` has not got a single page, or the host has no range of addresses that large.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        memory: PageMemory | None = None,
    ):
        if min(num_pages, block_size, num_kv_heads, head_dim) < 1 or num_pages > np.iinfo(np.int32).max:
            raise ValueError(
                f"cannot build {num_pages} pages of {block_size} positions, {num_kv_heads} heads and head size {head_dim}: "
                f"every size must be positive and there can be at most {np.iinfo(np.int32).max} pages"
            )
        self.block_size = block_size
        self.page_bytes = 2 * block_size * num_kv_heads * head_dim * dtype.itemsize
        shape = (2, block_size, num_kv_heads, head_dim)
        self._is_fixed = memory is None
        if memory is None and torch.device(device).type == "cpu":
            try:
                memory = HostMemory(num_pages * self.page_bytes)
            except (OSError, ValueError) as error:
                raise MemoryError(f"there is no room for {num_pages} pages of {self.page_bytes:,} bytes") from error
        if memory is None:
            data = torch.empty((num_pages, *shape), dtype=dtype, device=device)
        else:
            capacity = min(len(memory.data) // self.page_bytes, np.iinfo(np.int32).max)
            data = memory.data[: capacity * self.page_bytes].view(dtype).view(capacity, *shape)
            num_pages = memory.resize(min(num_pages, capacity) * self.page_bytes) // self.page_bytes
            if num_pages < 1:
                raise MemoryError(f"there is no memory for a single page of {self.page_bytes:,} bytes")
            memory.reach(0)
        self.num_pages = num_pages
        """The pages that are there, from 0 on."""
        self.data = data
        """``[capacity, 2, block_size, num_kv_heads, head_dim]``, 0 is K and 1 is V; only the first `num_pages` may be touched.
        The base pointer never moves."""
        self._memory = memory
        self.num_moves = 0
        """How often pages in use have moved: what `pages_of` said is true as long as this stays."""
        self._num_reached = 0
        """Pages up to the last one that was ever taken."""
        # On the host, clearing pages through a numpy view of the bytes skips torch's indexing machinery.
        self._bytes = data.view(torch.uint8).reshape(len(data), -1).numpy() if data.is_cpu else None
        self._free = np.empty(len(data), dtype=np.int32)
        self._free[:num_pages] = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = num_pages
        self._row_of: dict[int, int] = {}
        self._table = np.empty((0, 0), dtype=np.int32)

    # -- layers ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers, ascending."""
        return tuple(sorted(self._row_of))

    @property
    def num_free(self) -> int:
        """Pages that are free."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages that hold a block of a layer."""
        return self.num_pages - self._num_free

    def hold(self, layers: Iterable[int], num_blocks_hint: int = 0) -> None:
        """Be ready to give pages to `layers`; those that are held already stay as they are.

        `num_blocks_hint` is the number of block ids to expect; with it the tables need not grow later.
        """
        arriving = [layer for layer in dict.fromkeys(layers) if layer not in self._row_of]
        taken = set(self._row_of.values())
        vacant = [row for row in range(len(self._row_of) + len(arriving)) if row not in taken]
        self._grow(max(vacant[: len(arriving)], default=-1) + 1, num_blocks_hint)
        self._row_of.update(zip(arriving, vacant, strict=False))

    def drop(self, layers: Iterable[int]) -> None:
        """Give back the layers and all their pages."""
        for layer in layers:
            row = self._table[self._row_of.pop(layer)]
            self._give_back(row[row != NO_PAGE])
            row.fill(NO_PAGE)

    def page_of(self, layer: int) -> np.ndarray:
        """int32 ``[num_block_ids]``: the page of each block of `layer`, `NO_PAGE` where there is none.

        A live view, to be read only, and valid until the next `hold` or `ensure`, which may replace the table.
        """
        return self._table[self._row_of[layer]]

    def pages_of(self, layers: Sequence[int], block_ids: np.ndarray) -> np.ndarray:
        """int32 ``[num_layers, *block_ids.shape]``: the pages of these blocks in several layers, all of which they have."""
        rows = self._rows(layers).reshape(-1, *([1] * block_ids.ndim))
        pages = self._table[rows, block_ids]
        assert (pages != NO_PAGE).all(), "some of the blocks have no page"
        return pages

    # -- size -----------------------------------------------------------------------------------------------

    def resize(self, num_pages: int, *, in_pieces: bool = False) -> int:
        """Have `num_pages` pages, or as many as there is memory for; how many there are. A fixed pool stays as it is.

        Pages in use beyond the new end move into free ones before it, so call it between steps: what `page_of` said
        before, and what was derived from it, is not true afterwards. New pages are taken last. With `in_pieces` it may
        stop on its way down, after about a millisecond's work on the host; call it again.

        Raises:
            PoolExhausted: more are in use; then nothing has changed.
        """
        if self._is_fixed or self._memory is None:
            return self.num_pages
        num_pages, before = min(num_pages, len(self.data)), self.num_pages
        if num_pages < before:
            num_pages = self._vacate(num_pages, in_pieces=in_pieces)
            self._memory.resize(num_pages * self.page_bytes)
            self._num_reached = min(self._num_reached, num_pages)
        else:
            num_pages = min(num_pages, self._memory.resize(num_pages * self.page_bytes) // self.page_bytes)
            count = num_pages - before
            self._free[count : count + self._num_free] = self._free[: self._num_free].copy()
            self._free[:count] = np.arange(num_pages - 1, before - 1, -1, dtype=np.int32)
            self._num_free += count
        self.num_pages = num_pages
        return num_pages

    # -- blocks ---------------------------------------------------------------------------------------------

    def ensure(self, block_ids: np.ndarray | Sequence[BlockId], layers: Iterable[int] | None = None) -> int:
        """Give these blocks a page in every held layer (or only in `layers`) where they have none; zeroed.

        Returns the number of pages taken.

        Raises:
            PoolExhausted: when too few are free; then none is taken.
        """
        blocks = _as_ids(block_ids)
        if not len(blocks) or not self._row_of:
            return 0
        self._grow(0, int(blocks.max()) + 1)
        rows = self._rows(layers)[:, None]
        missing = self._table[rows, blocks] == NO_PAGE
        if not missing.any():
            return 0
        blocks = np.unique(blocks)
        pages = self._table[rows, blocks]
        missing = pages == NO_PAGE
        taken = self._take(int(np.count_nonzero(missing)))
        pages[missing] = taken
        self._table[rows, blocks] = pages
        return len(taken)

    def release_blocks(self, block_ids: np.ndarray | Sequence[BlockId]) -> int:
        """Give back the pages of these blocks in every held layer; returns how many pages that were."""
        blocks = np.unique(_as_ids(block_ids))
        return self._clear(blocks[blocks < self._table.shape[1]])

    def retain_only(self, live_block_ids: np.ndarray | Sequence[BlockId]) -> int:
        """Give back the pages of all other blocks; returns how many pages that were."""
        live = _as_ids(live_block_ids)
        dead = np.ones(self._table.shape[1], dtype=bool)
        dead[live[live < len(dead)]] = False
        return self._clear(np.flatnonzero(dead))

    def read_page(self, layer: int, block: BlockId) -> torch.Tensor:
        """The page of a block, ``[2, block_size, num_kv_heads, head_dim]``: a view of the pool, not a copy."""
        return self.data[self._page(layer, block)]

    def write_page(self, layer: int, block: BlockId, page: torch.Tensor) -> None:
        """Overwrite the page of a block, which must have one, with `page` (same shape and dtype, any device)."""
        self._check_fits(page)
        self.data[self._page(layer, block)].copy_(page)

    def read_pages(self, layer: int, block_ids: np.ndarray | Sequence[BlockId]) -> torch.Tensor:
        """A copy of the pages of several blocks, ``[num_blocks, 2, block_size, num_kv_heads, head_dim]``."""
        return self.data.index_select(0, self._page_index(layer, block_ids))

    def write_pages(self, layer: int, block_ids: np.ndarray | Sequence[BlockId], pages: torch.Tensor) -> None:
        """Overwrite the pages of several distinct blocks, which must have pages, with `pages` (as `read_pages`)."""
        self._check_fits(pages[0] if len(pages) else self.data[0])
        self.data.index_copy_(0, self._page_index(layer, block_ids), pages.to(self.data.device))

    def checksum(self, layer: int, block: BlockId) -> int:
        """Of a block's page."""
        return checksum(self.read_page(layer, block).contiguous())

    def check_integrity(self) -> None:
        """Audit everything. O(pages + layers * blocks).

        Raises:
            AssertionError: with the story of what is wrong.
        """
        rows = list(self._row_of.values())
        assert len(set(rows)) == len(rows), "two layers share a row of the page table"
        mapped = self._table[self._table != NO_PAGE]
        held = self._table[rows]
        num_held = np.count_nonzero(held != NO_PAGE)
        assert num_held == len(mapped), f"{len(mapped) - num_held} pages are mapped for layers that are not held"
        pages = np.concatenate([mapped, self._free[: self._num_free]])
        assert len(pages) == self.num_pages, f"{len(mapped)} used and {self._num_free} free pages of {self.num_pages}"
        counts = np.bincount(pages, minlength=self.num_pages)
        assert len(counts) == self.num_pages, f"page {len(counts) - 1} is outside the pool of {self.num_pages}"
        wrong = np.flatnonzero(counts != 1)
        assert not len(wrong), f"page {wrong[:1]} is in {counts[wrong[:1]]} places, free or mapped"

    # -- private --------------------------------------------------------------------------------------------

    def _rows(self, layers: Iterable[int] | None) -> np.ndarray:
        rows = self._row_of.values() if layers is None else [self._row_of[layer] for layer in layers]
        return np.fromiter(rows, dtype=np.int64)

    def _grow(self, num_rows: int, num_blocks: int) -> None:
        old_rows, old_blocks = self._table.shape
        if num_rows <= old_rows and num_blocks <= old_blocks:
            return
        if num_blocks > old_blocks:
            num_blocks = max(num_blocks, 2 * old_blocks, 64)
        table = np.full((max(num_rows, old_rows), max(num_blocks, old_blocks)), NO_PAGE, dtype=np.int32)
        table[:old_rows, :old_blocks] = self._table
        self._table = table

    def _vacate(self, num_pages: int, *, in_pieces: bool) -> int:
        """Leave no page in use, nor free, from `num_pages` on, or from the number on that a piece gets to; which."""
        if self.num_used > num_pages:
            raise PoolExhausted(self.num_used, num_pages, num_pages, len(self._row_of))
        step = max(1, _MOVED_BYTES[self.data.device.type] // self.page_bytes)
        if in_pieces:
            num_pages = max(num_pages, self.num_pages - GIVEN_BACK * step)
            beyond = self._table[self._table >= num_pages]
            if len(beyond) > step:
                num_pages = int(np.partition(beyond, -step - 1)[-step - 1]) + 1
        free = self._free[: self._num_free]
        free = free[free < num_pages]
        rows, blocks = np.nonzero(self._table >= num_pages)
        left = len(free) - len(rows)
        sources, targets = self._table[rows, blocks], free[left:]
        for start in range(0, len(sources), step):
            source, target = (
                torch.from_numpy(pages[start : start + step].astype(np.int64)).to(self.data.device)
                for pages in (sources, targets)
            )
            self.data.index_copy_(0, target, self.data.index_select(0, source))
        self._table[rows, blocks] = targets
        self.num_moves += 1
        self._free[:left] = free[:left]
        self._num_free = left
        return num_pages

    def _take(self, count: int) -> np.ndarray:
        if count > self._num_free:
            raise PoolExhausted(count, self._num_free, self.num_pages, len(self._row_of))
        pages = self._free[self._num_free - count : self._num_free][::-1].copy()
        if count and self._memory is not None and (reached := int(pages.max()) + 1) > self._num_reached:
            self._memory.reach(reached * self.page_bytes)
            self._num_reached = reached
        self._num_free -= count
        if self._bytes is not None:
            self._bytes[pages] = 0
        else:
            self.data.index_fill_(0, torch.from_numpy(pages).to(self.data.device, torch.int64), 0)
        return pages

    def _give_back(self, pages: np.ndarray) -> None:
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def _clear(self, blocks: np.ndarray) -> int:
        if not len(blocks) or not self._row_of:
            return 0
        rows = self._rows(None)[:, None]
        pages = self._table[rows, blocks]
        pages = pages[pages != NO_PAGE]
        self._table[rows, blocks] = NO_PAGE
        self._give_back(pages)
        return len(pages)

    def _check_fits(self, page: torch.Tensor) -> None:
        shape, dtype = self.data.shape[1:], self.data.dtype
        assert page.shape == shape, f"a page of {list(page.shape)} does not fit one of {list(shape)}"
        assert page.dtype == dtype, f"a page of {page.dtype} does not fit one of {dtype}"

    def _page(self, layer: int, block: BlockId) -> PageId:
        row = self.page_of(layer)
        page = int(row[block]) if 0 <= block < len(row) else NO_PAGE
        assert page != NO_PAGE, f"block {block} has no page in layer {layer}"
        return page

    def _page_index(self, layer: int, block_ids: np.ndarray | Sequence[BlockId]) -> torch.Tensor:
        pages = self.page_of(layer)[_as_ids(block_ids)]
        assert (pages != NO_PAGE).all(), f"some of the blocks have no page in layer {layer}"
        return torch.from_numpy(pages.astype(np.int64)).to(self.data.device)


def _as_ids(block_ids: np.ndarray | Sequence[BlockId]) -> np.ndarray:
    blocks = np.asarray(block_ids, dtype=np.int64)
    assert not len(blocks) or blocks.min() >= 0, f"block {blocks.min()} is no block"
    return blocks
