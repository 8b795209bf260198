"""A step as tensors on the device: what attention and the writing of pages read, uploaded at once.

How it works: the host knows every number of a step (`PlannedBatch`, the page tables), so it lays them out in one block of
bytes and uploads that in one copy, out of pinned memory on CUDA. What captured graphs read lies at a fixed address, with a twin on the host
(`Twins`). A decode step can be *padded* to more rows: the padding repeats the row with the shortest context, token, position, pages and
all, so that what a padded row writes is what its original writes, to the same place. Any other step is padded with tokens that belong
to no row and have no place.

Entries of a row's page table beyond its context repeat its first page, which exists and is finite: kernels may read
a masked position, and a NaN survives a weight of zero. (Only where attention reads no entry beyond does a graph's table hold what steps before
have left there.)

What is never true: a kernel needs a number that only the host has, or the host one that only the device has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvstore.page_pool import PagePool
from runtime.batch import LayerKV, StepBatch
from runtime.cuda.spans import QUERIES

_ALIGNMENT = 16


@dataclass(slots=True)
class PagedStep:
    """R rows and T tokens over the pages of some layers. Everything is on the device but the plain numbers."""

    query_starts: torch.Tensor
    """int32 ``[R + 1]``."""
    context_lens: torch.Tensor
    """int32 ``[R]``."""
    tables: torch.Tensor
    """int32 ``[num_layers, R, B]``: pages. Every entry that attention reads is a page that exists."""
    slots: torch.Tensor
    """int64 ``[num_layers, T]``: where K goes, as a row of `flat_pool`; V goes `block_size` rows later. Negative: nowhere, for
    which `write` is not made."""
    row_of_layer: dict[int, int]
    """Layer to its index in `tables` and `slots`."""
    max_query: int
    """At least the longest row."""
    max_context: int
    """At least the longest context, at most ``B * block_size``."""
    blocks: torch.Tensor | None = None
    """int32 ``[2, N]``, of `query_blocks`, perhaps padded with rows -1; None in a decode step."""
    lens: tuple[np.ndarray, np.ndarray] | None = None
    """`query_starts` and `context_lens` on the host; None where a capture must not ask for them."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """Room for what a back end derives once per step."""

    @property
    def is_decode(self) -> bool:
        """Whether every row is one token."""
        return self.max_query == 1

    def write(self, k: torch.Tensor, v: torch.Tensor, kv: LayerKV) -> None:
        """Put k and v, ``[T, num_kv_heads, head_dim]``, into their pages."""
        flat, slots = flat_pool(kv.data), self.slots[self.row_of_layer[kv.layer]]
        flat.index_copy_(0, slots, k)
        block_size = kv.data.shape[2]
        flat.narrow(0, block_size, len(flat) - block_size).index_copy_(0, slots, v)

    def pages(self, layer: int) -> torch.Tensor:
        """int32 ``[R, B]``, contiguous."""
        return self.tables[self.row_of_layer[layer]]


def flat_pool(data: torch.Tensor) -> torch.Tensor:
    """A page pool as rows ``[num_pages * 2 * block_size, num_kv_heads, head_dim]``: K then V of each page. A view."""
    return data.view(-1, *data.shape[3:])


def within_rows(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows with so many entries laid end to end: the row of each entry and its place within the row, ``[sum]`` each."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def query_blocks(query_starts: np.ndarray) -> np.ndarray:
    """int32 ``[2, N]``: the tokens of all rows in blocks of at most `QUERIES` of one row; its row, and its first token."""
    rows, places = within_rows(-(-np.diff(query_starts) // QUERIES))
    return np.stack([rows, query_starts[rows] + QUERIES * places]).astype(np.int32)


class Twins:
    """Arrays of fixed shapes, zero at first, twice: on the host, in `here`, to be written, and on the device, in `there`, to be read.

    `send` may be called again only when what it queued before is done.
    """

    def __init__(self, arrays: Mapping[str, tuple[tuple[int, ...], Any]], device: torch.device) -> None:
        """`arrays`: name to shape and NumPy dtype."""
        offsets, total = {}, 0
        for name, (shape, dtype) in arrays.items():
            offsets[name] = total
            total += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self.nbytes = total
        self.here: dict[str, np.ndarray] = {}
        self.there: dict[str, torch.Tensor] = {}
        self._pinned: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in arrays.items():
            stop = offsets[name] + math.prod(shape) * np.dtype(dtype).itemsize
            self.here[name] = self._host.numpy()[offsets[name] : stop].view(dtype).reshape(shape)
            wanted = torch.from_numpy(self.here[name]).dtype
            self.there[name] = self._device[offsets[name] : stop].view(wanted).view(shape)
            self._pinned[name] = self._host[offsets[name] : stop].view(wanted).view(shape)

    def send(self) -> None:
        """Copy all of it, on the current stream. Nothing is waited for."""
        self._device.copy_(self._host, non_blocking=True)

    def send_part(self, name: str, part: slice) -> None:
        """Copy these entries, along the first axis, of one array."""
        self.there[name][part].copy_(self._pinned[name][part], non_blocking=True)


class Upload:
    """Arrays to be put on the device in one copy. `array` makes room for one, `send` uploads, `tensor` finds it there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sizes: list[tuple[tuple[int, ...], Any, int]] = []
        self._num_bytes = 0
        self._there: torch.Tensor | None = None

    def add(self, array: np.ndarray) -> int:
        """The place of `array`, for `tensor`."""
        array = np.ascontiguousarray(array)
        self._sizes.append((array.shape, array, self._num_bytes))
        self._num_bytes += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        return len(self._sizes) - 1

    def send(self) -> None:
        """Upload what was added. The copy runs on the current stream and is not waited for."""
        is_cuda = self._device.type == "cuda"
        host = torch.empty(max(1, self._num_bytes), dtype=torch.uint8, pin_memory=is_cuda)
        raw = host.numpy()
        for _, array, offset in self._sizes:
            raw[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        # Torch's pinned memory is reused only when the copies that read it are done.
        self._there = host.to(self._device, non_blocking=True) if is_cuda else host

    def tensor(self, place: int) -> torch.Tensor:
        assert self._there is not None, "send first"
        shape, array, offset = self._sizes[place]
        piece = self._there[offset : offset + array.nbytes]
        return piece.view(torch.from_numpy(array[:0]).dtype).view(shape)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` on the device. On CUDA nothing is waited for."""
    sent = Upload(device)
    place = sent.add(array)
    sent.send()
    return sent.tensor(place)


@dataclass(frozen=True, slots=True)
class HostStep:
    """The numbers of a step before they are uploaded. Shapes as in `PagedStep`, and ``positions``: int64 ``[T]``."""

    positions: np.ndarray
    query_starts: np.ndarray
    context_lens: np.ndarray
    tables: np.ndarray
    slots: np.ndarray


def host_step(batch: StepBatch, positions: np.ndarray, pool: PagePool, layers: Sequence[int]) -> HostStep:
    """The numbers of `batch` over the pages of `layers`, all of which have pages for its blocks."""
    starts, contexts, block_size = batch.query_starts, batch.context_lens, pool.block_size
    num_blocks = -(-contexts // block_size)
    width = max(1, int(num_blocks.max(initial=1)))
    blocks = batch.block_tables[:, :width]
    beyond = np.arange(width, dtype=np.int32)[None, :] >= num_blocks[:, None]
    blocks = np.where(beyond, blocks[:, :1], blocks)
    tables = pool.pages_of(layers, blocks)
    rows = np.repeat(np.arange(len(contexts)), np.diff(starts))
    pages = tables[:, rows, positions // block_size].astype(np.int64)
    slots = pages * (2 * block_size) + positions % block_size
    return HostStep(positions, starts.astype(np.int32), contexts.astype(np.int32), tables, slots)


def pad_decode(step: HostStep, num_rows: int) -> np.ndarray:
    """Which row of a decode step each of `num_rows` rows is: int64 ``[num_rows]``."""
    rows = len(step.context_lens)
    assert int(step.query_starts[-1]) == rows, "only decode steps are padded"
    assert rows <= num_rows, f"{rows} rows do not fit in {num_rows}"
    source = np.full(num_rows, int(step.context_lens.argmin()), dtype=np.int64)
    source[:rows] = np.arange(rows)
    return source


def attach(
    batch: StepBatch, pool: PagePool, layers: Sequence[int], device: torch.device, tokens: np.ndarray | None = None
) -> torch.Tensor | None:
    """Give `batch` its step as tensors, and its positions on the device, for `layers` of `pool`.

    `tokens`, an array of any kind, is uploaded in the same copy and returned.
    """
    host = host_step(batch, batch.positions.cpu().numpy(), pool, layers)
    sent = Upload(device)
    is_decode = int(host.query_starts[-1]) == len(host.context_lens)
    arrays = [host.positions, host.slots, host.query_starts, host.context_lens, host.tables]
    arrays += [] if is_decode else [query_blocks(host.query_starts)]
    places = [sent.add(array) for array in arrays]
    place = None if tokens is None else sent.add(tokens)
    sent.send()
    batch.positions, slots, starts, contexts, tables, *blocks = (sent.tensor(place) for place in places)
    batch.paged = PagedStep(
        query_starts=starts,
        context_lens=contexts,
        tables=tables,
        slots=slots,
        row_of_layer={layer: row for row, layer in enumerate(layers)},
        max_query=int(np.diff(host.query_starts).max(initial=1)),
        max_context=int(host.context_lens.max(initial=1)),
        blocks=blocks[0] if blocks else None,
        lens=(host.query_starts, host.context_lens),
    )
    return None if place is None else sent.tensor(place)
