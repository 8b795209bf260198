"""KV on its way from one worker to another: the two ends of one move of layers.

KV is append-only, so two streams make an exact copy. The *mirror*: from some step on, all rows that steps
write, of several steps at once or of each as it ends. The *snapshot*: pages with everything that was written before that step, copied in the background, in any order.
Where both carry a row the mirror's is the newer one, and what the target has itself written for later steps is newer still;
`Incoming` therefore remembers which rows came by those ways and never lets a page of the snapshot overwrite them.

Steps are known by their ordinals, and their rows are put in place in that order, whatever order they arrive in. Rows that were
collected over some steps are read after the last of them: a row that two of them wrote is there twice, as the later one left it.
`Incoming.is_complete_through` says whether the mirror is whole up to a step, which is all that a reader must check. Checksums go with every message and are compared on arrival.

A row and a page are each one run of bytes, and are gathered and placed as such: by element, as indexing does, takes four times as long.

Never true: a row changes after it was mirrored; a snapshot page replaces a mirrored row; the rows of a
step replace those of a later one.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstore.page_pool import NO_PAGE, PagePool, checksum


class TransferError(Exception):
    """What arrived is not what was sent."""


class Outgoing:
    """The source's end: reads rows and pages of `layers` out of its pool."""

    def __init__(self, pool: PagePool, layers: Sequence[int]) -> None:
        assert len(layers), "a move of no layers"
        self._pool = pool
        self._layers = tuple(layers)
        self.block_size = pool.block_size
        self.bytes_per_block = len(layers) * pool.page_bytes
        self.bytes_per_row = self.bytes_per_block // pool.block_size

    def rows(self, blocks: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        """The KV rows at (``blocks[i]``, ``offsets[i]``): ``[num_layers, T, 2, num_kv_heads, head_dim]``, a copy."""
        data = self._pool.data
        rows = _take(_as_rows(data), _row_numbers(self._pool, self._layers, blocks, offsets))
        return rows.view(len(self._layers), len(blocks), 2, *data.shape[3:])

    def pages(self, blocks: np.ndarray) -> torch.Tensor:
        """Whole pages, ``[num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]``, a copy.

        A block that never got a page here (nothing was ever written to it) reads as zeros.
        """
        data = self._pool.data
        pages = np.full((len(self._layers), len(blocks)), NO_PAGE, dtype=np.int32)
        for row, layer in zip(pages, self._layers, strict=True):
            table = self._pool.page_of(layer)
            known = blocks < len(table)
            row[known] = table[blocks[known]]
        result = _take(data.flatten(1), np.maximum(pages, 0).ravel()).view(*pages.shape, *data.shape[1:])
        if (missing := pages == NO_PAGE).any():
            result[torch.from_numpy(missing).to(data.device)] = 0
        return result


class Incoming:
    """The target's end: writes what arrives into its own pool, where `layers` are held already.

    `to_device` brings a tensor to where the pool is; default: a plain copy.
    """

    def __init__(
        self,
        pool: PagePool,
        layers: Sequence[int],
        to_device: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        assert len(layers), "a move of no layers"
        self._to_device = to_device or (lambda tensor: tensor.to(pool.data.device))
        self._pool = pool
        self._layers = tuple(layers)
        self._newer = np.zeros((0, pool.block_size), dtype=bool)
        self._start: int | None = None
        self._through = -1
        self._early: dict[int, tuple[int, np.ndarray, np.ndarray, torch.Tensor]] = {}
        self.block_size = pool.block_size
        self.row_bytes = 0
        self.page_bytes = 0

    # -- the mirror -----------------------------------------------------------------------------------------

    def begin(self, ordinal: int) -> None:
        """The mirror starts with step `ordinal`: everything before it is the snapshot's. Saying it twice is harmless."""
        if self._start is None:
            self._start, self._through = ordinal, ordinal - 1
        assert self._start == ordinal, f"a mirror that began with step {self._start} cannot begin with {ordinal}"

    def is_complete_through(self, ordinal: int) -> bool:
        """Whether the rows of all steps up to `ordinal` are here. False while the start is not known."""
        return self._start is not None and ordinal <= self._through

    def take_rows(
        self, first: int, last: int, blocks: np.ndarray, offsets: np.ndarray, rows: torch.Tensor, check: int
    ) -> None:
        """Take the rows of steps `first` to `last`, shaped as `Outgoing.rows` gives them, once `begin` was called.

        They are written in the order of the steps, because a block may have changed hands between two of them. What
        arrives again is ignored.

        Raises:
            TransferError: the checksum differs.
        """
        assert self._start is not None, "begin first"
        if first in self._early or first <= self._through:
            return
        _verify(rows, check, f"the rows of steps {first} to {last}")
        self._early[first] = (last, blocks, offsets, rows)
        while (due := self._early.pop(self._through + 1, None)) is not None:
            self._through, blocks, offsets, rows = due
            self._write_rows(blocks, offsets, rows)

    def _write_rows(self, blocks: np.ndarray, offsets: np.ndarray, rows: torch.Tensor) -> None:
        self._pool.ensure(blocks, self._layers)
        numbers = _row_numbers(self._pool, self._layers, blocks, offsets)
        _place(_as_rows(self._pool.data), numbers, self._to_device(rows))
        self.mark_newer(blocks, offsets)
        self.row_bytes += rows.nbytes

    def mark_newer(self, blocks: np.ndarray, offsets: np.ndarray) -> None:
        """These rows are newer than any snapshot. Also for what the target's own steps write."""
        if not len(blocks):
            return
        top = int(blocks.max()) + 1
        if top > len(self._newer):
            grown = np.zeros((max(top, 2 * len(self._newer)), self._pool.block_size), dtype=bool)
            grown[: len(self._newer)] = self._newer
            self._newer = grown
        self._newer[blocks, offsets] = True

    # -- the snapshot ---------------------------------------------------------------------------------------

    def apply_pages(self, blocks: np.ndarray, pages: torch.Tensor, check: int) -> None:
        """Take whole pages, shaped as `Outgoing.pages` gives them, but for rows that are newer already.

        Raises:
            TransferError: the checksum differs.
        """
        _verify(pages, check, f"pages of {len(blocks)} blocks")
        self._pool.ensure(blocks, self._layers)
        known = blocks < len(self._newer)
        touched = np.zeros(len(blocks), dtype=bool)
        touched[known] = self._newer[blocks[known]].any(axis=1)
        device, num_bytes = self._pool.data.device, pages.nbytes
        pages = self._to_device(pages)
        mine = self._pool.pages_of(self._layers, blocks)
        whole = pages[:, _index(np.flatnonzero(~touched), device)] if touched.any() else pages
        _place(self._pool.data.flatten(1), mine[:, ~touched].ravel(), whole)
        for position in np.flatnonzero(touched):
            older = _index(np.flatnonzero(~self._newer[blocks[position]]), device)
            for index, page in enumerate(mine[:, position].tolist()):
                self._pool.data[page][:, older] = pages[index, int(position)][:, older]
        self.page_bytes += num_bytes


def _verify(tensor: torch.Tensor, expected: int, what: str) -> None:
    found = checksum(tensor)
    if found != expected:
        raise TransferError(f"{what} arrived damaged: checksum {found:08x}, sent {expected:08x}")


def _as_rows(data: torch.Tensor) -> torch.Tensor:
    """Pages ``[num_pages, 2, block_size, num_kv_heads, head_dim]`` as the K or V of a token each, ``[rows, elements]``."""
    return data.view(-1, data.shape[3] * data.shape[4])


def _row_numbers(pool: PagePool, layers: Sequence[int], blocks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Which of `_as_rows` the slots (``blocks[i]``, ``offsets[i]``) are, int64 ``[num_layers * T * 2]``."""
    pages = pool.pages_of(layers, blocks).astype(np.int64)
    first = pages * (2 * pool.block_size) + offsets
    return np.stack((first, first + pool.block_size), axis=-1).ravel()


def _take(there: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """A copy of the rows of ``there[n, elements]`` with these numbers."""
    if there.device.type == "cpu":
        return torch.from_numpy(there.view(torch.uint8).numpy()[numbers]).view(there.dtype)
    return there.index_select(0, _index(numbers, there.device))


def _place(there: torch.Tensor, numbers: np.ndarray, rows: torch.Tensor) -> None:
    """Rows into their places. On the host by NumPy, which copies rows where torch copies elements."""
    rows = rows.view(len(numbers), there.shape[1])
    if there.device.type == "cpu":
        there.view(torch.uint8).numpy()[numbers] = rows.view(torch.uint8).numpy()
        return
    if all(size * there.itemsize % 8 == 0 for size in (there.shape[1], there.storage_offset(), rows.storage_offset())):
        there, rows = there.view(torch.int64), rows.view(torch.int64)
    there.index_copy_(0, _index(numbers, there.device), rows)


def _index(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)
