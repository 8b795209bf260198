"""Matrix products with packed weights: one kernel for any number of rows, at memory speed for few of them.

How it works: a weight ``[N, K]`` is packed once, at load, into panels of `PANEL` columns: ``[N / PANEL, K, PANEL]``,
in bfloat16 two depths side by side, ``[N / PANEL, K / 2, PANEL, 2]``. A product walks the panels one after the other,
so that a single row streams the weights through memory front to back; with more rows, tiles of up to `TILE_ROWS`
of them share a panel while it is in the cache. The members of a team (`team`) divide the panels. What comes out of a panel goes through an epilogue (bias, residual,
SiLU) while it is still in the first-level cache. The packed copy is the only copy.

What is never true: a result never depends on how many rows or threads share the product, since every output element is
summed front to back by itself.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch

from runtime.kernels import storage
from runtime.kernels.lanes import HAS_AMX, PANEL, address, depth_step, kernel, part
from runtime.kernels.quantized import GROUP, SCALE_BYTES, fill_panels, is_quantized, panel_bytes, quantized_rows
from runtime.kernels.spans import add_floats, store_scaled, store_silu_mul, store_sum
from runtime.kernels.team import current, num_threads, on_team, share
from runtime.kernels.tiles import tile_rows
from runtime.pages import empty

ROW_BLOCK = 192
"""Rows that pass through all panels together; bounds the scratch and keeps activations in the cache."""
DEPTH_BLOCK_BYTES = 512
"""How much of a row is summed up at once: bounds what a panel takes of the caches, and how rounding errors add up."""
AMX_DEPTH_BLOCK_BYTES = 4096
"""The same with matrix registers, which want long ways, read from the second-level cache and sum in sixteen parts."""
BLOCK_BYTES = 1 << 19
"""How much of a weight is packed at a time: what was just read is still in the second-level cache."""
DIVIDED_ROWS = 16
"""Rows from which two members of a team may divide a panel's rows: with fewer it costs more to read the panel twice."""
PLAIN, ADD, SILU_MUL = 0, 1, 2
"""What `product` does with the sums of a row."""

_ONE = np.float32(1.0)


class Rows(Protocol):
    """A weight ``[N, K]`` that comes in blocks of rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def blocks(self, num_rows: int) -> Iterator[torch.Tensor]:
        """Its rows in order, `num_rows` at a time. A block is good until the next is asked for."""
        ...


Weight: TypeAlias = torch.Tensor | Rows


@dataclass(slots=True, frozen=True)
class Packed:
    """A packed weight: `data` is flat in its storage type; `num_columns` counts the true outputs, without padding."""

    data: np.ndarray
    num_columns: int
    depth: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def pack(*weights: Weight, rest: Callable[[], None] = lambda: None) -> Packed:
    """Pack ``[N, K]`` (N outputs, as in `torch.nn.Linear`); N is padded with zeros to a whole panel.

    Several weights are packed as one that has the rows of all. `rest` is called between blocks of half a megabyte.

    Raises:
        ValueError: when K is odd.
    """
    num_columns = sum(weight.shape[0] for weight in weights)
    depth, dtype = weights[0].shape[1], weights[0].dtype
    packed = _panels(num_columns, depth, dtype, PANEL, rest)
    first = 0
    for weight in weights:
        for block in _blocks(weight, PANEL):
            _fill(packed, 0, PANEL, first, block)
            first += len(block)
            rest()
    return Packed(storage(packed.view(dtype).view(-1)), num_columns, depth)


def pack_gate_up(gate: Weight, up: Weight, rest: Callable[[], None] = lambda: None) -> Packed:
    """Pack two weights ``[I, K]`` so that each panel holds half a panel of gate, then the same columns of up.

    Rests and raises as `pack`.
    """
    half = PANEL // 2
    num_columns, depth = gate.shape
    packed = _panels(num_columns, depth, gate.dtype, half, rest)
    for begin, weight in ((0, gate), (half, up)):
        first = 0
        for block in _blocks(weight, half):
            _fill(packed, begin, half, first, block)
            first += len(block)
            rest()
    return Packed(storage(packed.view(gate.dtype).view(-1)), num_columns, depth)


def pack_int8(weight: torch.Tensor, rest: Callable[[], None] = lambda: None) -> Packed:
    """As `pack`, quantised (`runtime.kernels.quantized`), for an x of the dtype of `weight`. `rest` is called after every few panels.

    Raises:
        ValueError: when K is odd, or a weight is not finite.
    """
    return _pack_int8((weight,), PANEL, rest)


def pack_gate_up_int8(gate: torch.Tensor, up: torch.Tensor, rest: Callable[[], None] = lambda: None) -> Packed:
    """As `pack_gate_up`, quantised. Rests and raises as `pack_int8`."""
    return _pack_int8((gate, up), PANEL // 2, rest)


def _pack_int8(weights: tuple[torch.Tensor, ...], width: int, rest: Callable[[], None]) -> Packed:
    num_columns, depth = weights[0].shape
    if depth % 2:
        raise ValueError(f"a packed product needs an even number of inputs, got {depth}")
    packed = empty((-(-num_columns // width), panel_bytes(depth)), torch.int8, rest)
    for i, weight in enumerate(weights):
        fill_panels(packed, i * width, width, weight, rest)
    return Packed(packed.view(-1).numpy(), num_columns, depth)


def _blocks(weight: Weight, width: int) -> Iterable[torch.Tensor]:
    """Of at most `BLOCK_BYTES`, but for whole panels that take `width` rows each."""
    row_bytes = weight.shape[1] * weight.dtype.itemsize
    num_rows = max(1, BLOCK_BYTES // (row_bytes * width)) * width
    return weight.split(num_rows) if isinstance(weight, torch.Tensor) else weight.blocks(num_rows)


def _panels(num_columns: int, depth: int, dtype: torch.dtype, width: int, rest: Callable[[], None]) -> torch.Tensor:
    """Room for panels as ``[num_panels, units of depth, PANEL]``; a unit is a pair of bfloat16, or one element.

    Raises:
        ValueError: when `depth` is odd.
    """
    if depth % 2:
        raise ValueError(f"a packed product needs an even number of inputs, got {depth}")
    unit, num_units = (torch.int32, depth // 2) if dtype is torch.bfloat16 else (dtype, depth)
    packed = empty((-(-num_columns // width), num_units, PANEL), unit, rest)
    if num_columns % width:
        packed[-1] = 0
    return packed


def _fill(packed: torch.Tensor, begin: int, width: int, first: int, weight: torch.Tensor) -> None:
    """Columns [begin, begin + width) of each panel take the rows of `weight`, which are those of the whole from `first` on."""
    units = _units(weight)
    panel, place = divmod(first, width)
    if place:
        head, units = units.split((min(width - place, len(units)), max(0, len(units) - (width - place))))
        packed[panel, :, begin + place : begin + place + len(head)] = head.T
        panel += 1
    whole, rest = divmod(len(units), width)
    panels = units[: whole * width].view(whole, width, units.shape[1])
    packed[panel : panel + whole, :, begin : begin + width] = panels.transpose(1, 2)
    if rest:
        packed[panel + whole, :, begin : begin + rest] = units[whole * width :].T


def _units(weight: torch.Tensor) -> torch.Tensor:
    """A pair of bfloat16 is moved as one integer, which is what makes packing fast."""
    weight = weight.contiguous()
    if weight.dtype is not torch.bfloat16:
        return weight
    return (weight.clone() if weight.storage_offset() % 2 else weight).view(torch.int32)


@kernel
def product(team, tiles, x, first_row, num_rows, w, kind, bias, residual, out, out_row, num_columns, sums, widened):
    """Rows ``out_row ..`` of out = f(x[first_row : first_row + num_rows] @ w + bias), by `kind`.

    `PLAIN`: as it is. `ADD`: plus the same rows of `residual`, which may be `out`. `SILU_MUL`: silu(gate) * up, for
    weights of `pack_gate_up`, without bias. `bias` is float32, empty for none; `out` may have another storage type
    than x; `num_columns` counts the columns of out; `tiles` is the `tile_address` of x's storage type, for an int8 w its
    `quantized_tile_address`; `sums` and `widened` are scratch of `product_scratch`. `team` is `team.current()`.
    """
    operands = tiles, x, first_row, num_rows, w, kind, bias, residual, out, out_row, num_columns, sums, widened
    on_team(team, product_share, operands)


@kernel
def product_share(me, tiles, x, first_row, num_rows, w, kind, bias, residual, out, out_row, num_columns, sums, widened):
    """A member's share of `product`: some panels, the first and the last perhaps for some of the rows only."""
    full = PANEL // 2 if kind == SILU_MUL else PANEL
    panels, at_once = (num_columns + full - 1) // full, num_rows if num_rows < DIVIDED_ROWS else 1
    begin, end = share(me, panels * (num_rows // at_once))
    begin, end = begin * at_once, end * at_once
    own_sums, own_widened = sums[me[1]], widened[me[1]]
    for panel in range(begin // num_rows, (end + num_rows - 1) // num_rows):
        row, stop = max(0, begin - panel * num_rows), min(num_rows, end - panel * num_rows)
        if is_quantized(w):
            _sum_int8_panel(tiles, x, first_row + row, stop - row, w, panel, own_sums, own_widened)
        else:
            _sum_panel(tiles, x, first_row + row, stop - row, w, panel, own_sums)
        first = panel * full
        width = min(full, num_columns - first)
        for i in range(row, stop):
            total = address(own_sums) + (i - row) * PANEL * 4
            place = ((out_row + i) * num_columns + first) * out.itemsize
            if len(bias):
                add_floats(total, width, address(bias) + first * 4)
            if kind == SILU_MUL:
                store_silu_mul(out, total, total + full * 4, width, address(out) + place)
            elif kind == ADD:
                store_sum(out, total, width, address(residual) + place, address(out) + place)
            else:
                store_scaled(out, total, width, _ONE, address(out) + place)


def product_by_blocks(tiles: int, x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """out ``[T, N]`` = x ``[T, K]`` @ w + bias by this process' team, any T; the arguments are those of `product`."""
    num_columns, rows = out.shape[1], min(len(x), ROW_BLOCK)
    scratch = product_scratch(rows)
    for first in range(0, len(x), ROW_BLOCK):
        count = min(len(x) - first, ROW_BLOCK)
        product(current(), tiles, x, first, count, w, PLAIN, bias, out, out, first, num_columns, *scratch)


def product_scratch(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What a product of so many rows (`ROW_BLOCK` at most) needs: `sums` and `widened`, float32, for each member of the team."""
    members = num_threads()
    return np.empty((members, num_rows, PANEL), np.float32), np.empty((members, GROUP, PANEL), np.float32)


@part
def _sum_panel(tiles, x, first_row, num_rows, w, panel, sums):
    """sums = the rows of x @ one panel."""
    depth, size = x.shape[1], x.itemsize
    x_address = address(x) + first_row * depth * size
    longest = (AMX_DEPTH_BLOCK_BYTES if HAS_AMX and depth_step(x) == 2 else DEPTH_BLOCK_BYTES) // size
    for k in range(0, depth, longest):
        w_block = address(w) + (panel * depth + k) * PANEL * size
        block = min(longest, depth - k)
        tile_rows(tiles, num_rows, x_address + k * size, depth * size, w_block, block, address(sums), PANEL * 4, k > 0)


@part
def _sum_int8_panel(tiles, x, first_row, num_rows, w, panel, sums, widened):
    """As `_sum_panel`, for an int8 panel."""
    depth, size = x.shape[1], x.itemsize
    x_row, out = address(x) + first_row * depth * size, address(sums)
    num_groups = (depth + GROUP - 1) // GROUP
    start = address(w) + panel * (depth + SCALE_BYTES * num_groups) * PANEL
    for group in range(num_groups):
        k = group * GROUP
        place = start + (k + SCALE_BYTES * group) * PANEL
        block, room = min(GROUP, depth - k), address(widened)
        quantized_rows(tiles, num_rows, x_row + k * size, depth * size, place, block, out, PANEL * 4, k > 0, room)
