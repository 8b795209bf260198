"""The product with int8 weights: groups of `GROUP` depths of a column share a scale; x and the sums keep their precision.

How it works: a weight is ``q * scale``, q from -127 to 127. The integers are widened to the storage type of x, which
holds them exactly, and multiplied with x as any weight is; the sum of each group is then scaled and added, in float32. So
int8 costs what rounding the weights costs, and nothing else. Up to `TILE_ROWS` rows are one tile, which widens in
registers: memory then delivers half the bytes of bfloat16. More rows widen a group of a panel once, into scratch that stays in
the first-level cache, and share it among their tiles. With matrix registers (`amx`) those multiply what was widened, and only up to
`NEAR_ROWS` rows are left to vectors, which sum as the registers do: even and odd depths apart, `DEPTH` at a time.

A panel is its groups one after the other; a group is its integers (as in `products.pack`: depths in `Unit`s, but each
vector of columns by itself), then a bfloat16 scale for each column. The last group of a panel may be shorter.

What is never true: two of these ways differ in a bit; they multiply and add the same numbers in the same order.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.amx import DEPTH, ROWS, amx_configure, amx_release, amx_tile_16, amx_tile_32
from runtime.kernels.lanes import (
    FLOAT,
    FLOATS,
    HAS_AMX,
    HAS_BF16_DOT,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    PANEL,
    TILE_ROWS,
    TILE_VECTORS,
    Unit,
    compile_for_c,
    constant,
    fma,
    in_order,
    intrinsic,
    kernel,
    narrow,
    offset,
    pointer,
    prefetch_line,
    splat,
    widen,
)
from runtime.kernels.tiles import CACHE_LINE, WholeLine, run_depth

GROUP = 64
"""Depths that share a scale; even, so that pairs stay together."""
SCALE_BYTES = 2
LARGEST = 127
NEAR_ROWS = 2
"""With matrix registers: rows whose sums, even and odd apart, fit the vector registers."""
PANELS_AT_ONCE = 8
"""Panels that are quantised together; bounds what is in float32 meanwhile."""
SMALLEST_SCALE = 1e-30
"""A group with a smaller scale is all zero: near the end of the exponents scales are not exact enough."""


# -- packing ------------------------------------------------------------------------------------------------


def panel_bytes(depth: int) -> int:
    """The size of one packed panel."""
    return (depth + SCALE_BYTES * -(-depth // GROUP)) * PANEL


def fill_panels(
    packed: torch.Tensor, first: int, width: int, weight: torch.Tensor, rest: Callable[[], None] = lambda: None
) -> None:
    """Quantise `weight` ``[N, K]`` into columns [first, first + width) of each panel of `packed`, int8 ``[panels, bytes]``.

    `rest` is called after each `PANELS_AT_ONCE` panels.

    Symmetric, to the nearest. A scale is rounded to bfloat16, by 1/512 at most, so nothing exceeds `LARGEST` by more
    than half a step, and nothing needs to be clipped.

    Raises:
        ValueError: when a weight is not finite.
    """
    for panel in range(0, len(packed), PANELS_AT_ONCE):
        some = packed[panel : panel + PANELS_AT_ONCE]
        _fill_some(some, first, width, weight[panel * width : (panel + len(some)) * width])
        rest()


def _fill_some(packed: torch.Tensor, first: int, width: int, weight: torch.Tensor) -> None:
    num_rows, depth = weight.shape
    num_groups, rest = divmod(depth, GROUP)
    padding = (0, -depth % GROUP, 0, len(packed) * width - num_rows)
    whole = torch.nn.functional.pad(weight.float(), padding).unflatten(1, (-1, GROUP))
    scales = (torch.maximum(whole.amax(-1), -whole.amin(-1)) / LARGEST).to(torch.bfloat16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a weight that is infinite or not a number cannot be quantised; serve without --quantize")
    factors = torch.where(scales > SMALLEST_SCALE, 1.0 / scales.float(), 0.0)
    integers = (whole * factors[:, :, None]).round_().to(torch.int8)
    unit = 2 if weight.dtype is torch.bfloat16 else 1
    begin = num_groups * (GROUP + SCALE_BYTES) * PANEL
    if num_groups:
        groups = packed[:, :begin].unflatten(1, (num_groups, -1))
        _fill(groups, first, width, unit, integers[:, :num_groups], scales[:, :num_groups])
    if rest:
        _fill(packed[:, None, begin:], first, width, unit, integers[:, num_groups:, :rest], scales[:, num_groups:])


def _fill(
    groups: torch.Tensor, first: int, width: int, unit: int, integers: torch.Tensor, scales: torch.Tensor
) -> None:
    """Fill groups of one length, ``[panels, groups, bytes]``, from ``[rows, groups, depths]`` and ``[rows, groups]``."""
    num_panels, (_, _, length) = len(groups), integers.shape
    lines = groups[:, :, : length * PANEL].unflatten(2, (-1, TILE_VECTORS, unit, LANES))
    integers = integers.unflatten(2, (-1, unit)).unflatten(0, (num_panels, -1, LANES))
    lines[:, :, :, first // LANES : (first + width) // LANES] = integers.permute(0, 3, 4, 1, 5, 2)
    places = groups[:, :, length * PANEL :].view(torch.bfloat16)
    places[:, :, first : first + width] = scales.unflatten(0, (num_panels, width)).transpose(1, 2)


# -- tiles --------------------------------------------------------------------------------------------------


class _Int8Line:
    """As `WholeLine`, of integers that are widened in registers."""

    num_prefetches = max(1, 2 * PANEL // CACHE_LINE)
    prefetch_level = 1
    """Integers come in half as many lines as bfloat16 while there is twice as much to do with each: here the first level has the time, and is the
    faster one (3.4 instead of 5.3 ms with one row, on a Zen 4)."""

    @staticmethod
    def num_bytes(unit: Unit) -> int:
        return unit.depth * PANEL

    @staticmethod
    def terms(builder, unit: Unit, address):
        terms = [[_floats(builder, unit, address, j, i) for j in range(TILE_VECTORS)] for i in range(unit.depth)]
        if unit.paired and HAS_BF16_DOT:
            return unit.terms(builder, [_pair(builder, low, high) for low, high in zip(*terms, strict=True)])
        return terms


def _floats(builder, unit: Unit, line, j: int, i: int):
    """The integers of vector `j` of the columns at depth `i` of the line, as float32."""
    place = offset(builder, line, (j * unit.depth + i) * LANES, 1)
    stored = builder.load(pointer(builder, place, ir.VectorType(I8, LANES)), align=1)
    return builder.sitofp(builder.sext(stored, INTS), FLOATS)


def _pair(builder, low, high):
    """Two bfloat16 in each lane, out of floats that bfloat16 holds exactly."""
    return builder.or_(builder.bitcast(high, INTS), builder.lshr(builder.bitcast(low, INTS), constant(I32, 16)))


@intrinsic
def _widen_line(typingctx, like, line, target):
    """A line of integers, to the line that `WholeLine` reads, both given by their addresses."""

    def codegen(context, builder, signature, args):
        unit = Unit(signature.args[0].dtype)
        for j in range(TILE_VECTORS):
            floats = [_floats(builder, unit, args[1], j, i) for i in range(unit.depth)]
            stored = _pair(builder, *floats) if unit.paired else narrow(builder, unit.element, floats[0])
            place = pointer(builder, offset(builder, args[2], j, unit.size * LANES), stored.type)
            builder.store(stored, place, align=unit.align)
        return context.get_dummy_value()

    return types.void(like, types.intp, types.intp), codegen


def _make_tile(num_rows: int, kind):
    @intrinsic
    def tile(typingctx, like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, pace):
        """out[i, :PANEL] = (out[i, :PANEL] if add else 0) + scales * (x[i, :depth] @ panel), for i < num_rows."""
        signature = types.void(like, *[types.intp] * 7, types.boolean, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            _, x, x_stride, w, depth, scales, out, out_stride, add, ahead, pace = args
            grid = [(i, j) for i in range(num_rows) for j in range(TILE_VECTORS)]
            zero = constant(FLOAT, 0.0)
            sums = {place: cgutils.alloca_once_value(builder, zero) for place in grid}
            x_rows = [builder.add(x, builder.mul(x_stride, I64(i))) for i in range(num_rows)]
            run_depth(builder, Unit(signature.args[0].dtype), kind, x_rows, w, depth, sums, ahead, pace)
            out_rows = [builder.add(out, builder.mul(out_stride, I64(i))) for i in range(num_rows)]
            scaled = _load_scales(builder, scales)
            for i, row in enumerate(out_rows):
                _add_scaled(builder, [builder.load(sums[i, j]) for j in range(TILE_VECTORS)], scaled, row, add)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_near_1, _near_2, _near_3, _near_4 = (_make_tile(num_rows, _Int8Line) for num_rows in (1, 2, 3, 4))
_near_5, _near_6 = (_make_tile(num_rows, _Int8Line) if num_rows <= TILE_ROWS else _near_4 for num_rows in (5, 6))
_wide_2, _wide_3, _wide_4 = (_make_tile(num_rows, WholeLine) for num_rows in (2, 3, 4))
_wide_5, _wide_6 = (_make_tile(num_rows, WholeLine) if num_rows <= TILE_ROWS else _wide_4 for num_rows in (5, 6))


def _load_scales(builder, scales):
    """The scales of a group at this address, a vector each of float32 for the vectors of a panel's columns."""
    stored = ir.VectorType(I16, LANES)
    places = [pointer(builder, offset(builder, scales, j, SCALE_BYTES * LANES), stored) for j in range(TILE_VECTORS)]
    return [widen(builder, types.uint16, builder.load(place, align=2)) for place in places]


def _add_scaled(builder, sums, scales, row, add):
    """out[:PANEL] = (out[:PANEL] if add else 0) + sums * scales, for the row of out at this address."""
    for j, (total, scale) in enumerate(zip(sums, scales, strict=True)):
        place = builder.gep(pointer(builder, row, FLOATS), [I64(j)])
        before = builder.select(add, builder.load(place, align=4), constant(FLOAT, 0.0))
        builder.store(fma(builder, total, scale, before), place, align=4)


def _make_even_odd(num_rows: int):
    @intrinsic
    def tile(typingctx, x, x_stride, w, depth, scales, out, out_stride, add, ahead):
        """As the near tiles, for bfloat16 and a multiple of `DEPTH`, bit for bit what matrix registers make of it."""
        signature = types.void(*[types.intp] * 7, types.boolean, types.intp)

        def codegen(context, builder, signature, args):
            x, x_stride, w, depth, scales, out, out_stride, add, ahead = args
            unit, zero = Unit(types.uint16), constant(FLOAT, 0.0)
            grid = [(i, j) for i in range(num_rows) for j in range(TILE_VECTORS)]
            totals = {place: cgutils.alloca_once_value(builder, zero) for place in grid}
            parts = [{place: cgutils.alloca_once(builder, FLOATS) for place in grid} for _ in range(unit.depth)]
            x_rows = [builder.add(x, builder.mul(x_stride, I64(i))) for i in range(num_rows)]
            line_bytes = _Int8Line.num_bytes(unit)
            with cgutils.for_range(builder, builder.udiv(depth, I64(DEPTH))) as outer:
                for part in parts:
                    for place in grid:
                        builder.store(zero, part[place])
                lines = I64(DEPTH // unit.depth)
                with cgutils.for_range(builder, lines) as inner:
                    at = builder.add(builder.mul(outer.index, lines), inner.index)
                    for k in range(_Int8Line.num_prefetches):
                        index = builder.add(builder.mul(at, I64(_Int8Line.num_prefetches)), I64(k))
                        prefetch_line(builder, offset(builder, ahead, index, CACHE_LINE))
                    line = offset(builder, w, at, line_bytes)
                    pairs = [
                        builder.load(pointer(builder, offset(builder, row, at, unit.size), I32), align=unit.align)
                        for row in x_rows
                    ]
                    for depth_of, part in enumerate(parts):
                        terms = [_floats(builder, unit, line, j, depth_of) for j in range(TILE_VECTORS)]
                        for i, pair in enumerate(pairs):
                            upper = builder.and_(pair, I32(-65536)) if depth_of else builder.shl(pair, I32(16))
                            factor = splat(builder, builder.bitcast(upper, ir.FloatType()))
                            for j, term in enumerate(terms):
                                total = builder.load(part[i, j])
                                builder.store(fma(builder, factor, term, total), part[i, j])
                for place in grid:
                    even, odd = (in_order(builder, builder.load(part[place])) for part in parts)
                    both = in_order(builder, builder.fadd(even, odd))
                    total = in_order(builder, builder.fadd(builder.load(totals[place]), both))
                    builder.store(total, totals[place])
            scaled = _load_scales(builder, scales)
            for i in range(num_rows):
                row = builder.add(out, builder.mul(out_stride, I64(i)))
                _add_scaled(builder, [builder.load(totals[i, j]) for j in range(TILE_VECTORS)], scaled, row, add)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_even_odd_1, _even_odd_2 = (_make_even_odd(num_rows) for num_rows in (1, NEAR_ROWS))


@intrinsic
def _add_scaled_rows(typingctx, num_rows, sums, scales, out, out_stride, add):
    """out[i, :PANEL] = (out[i, :PANEL] if add else 0) + sums[i] * scales, for sums that lie one after the other."""

    def codegen(context, builder, signature, args):
        num_rows, sums, scales, out, out_stride, add = args
        scaled = _load_scales(builder, scales)
        with cgutils.for_range(builder, num_rows) as loop:
            line = pointer(builder, offset(builder, sums, loop.index, PANEL * 4), FLOATS)
            totals = [builder.load(builder.gep(line, [I64(j)]), align=4) for j in range(TILE_VECTORS)]
            _add_scaled(builder, totals, scaled, builder.add(out, builder.mul(out_stride, loop.index)), add)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, types.boolean), codegen


@kernel
def _rows(like, pair, num_rows, x, x_stride, w, depth, out, out_stride, add, scratch):
    scales = w + depth * PANEL
    block_bytes = (depth + SCALE_BYTES) * PANEL
    ahead = w + block_bytes
    if num_rows == 1:
        _near_1(like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, CACHE_LINE)
    elif num_rows == 2:
        _near_2(like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, CACHE_LINE)
    elif num_rows == 3:
        _near_3(like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, CACHE_LINE)
    elif num_rows == 4:
        _near_4(like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, CACHE_LINE)
    elif num_rows == 5 and TILE_ROWS >= 5:
        _near_5(like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, CACHE_LINE)
    elif num_rows == 6 and TILE_ROWS >= 6:
        _near_6(like, x, x_stride, w, depth, scales, out, out_stride, add, ahead, CACHE_LINE)
    else:
        for line in range(depth // pair):
            _widen_line(like, w + line * pair * PANEL, scratch + line * pair * PANEL * like.itemsize)
        _share(like, num_rows, x, x_stride, scratch, depth, scales, out, out_stride, add, ahead, block_bytes)


@kernel
def _share(like, num_rows, x, x_stride, w, depth, scales, out, out_stride, add, ahead, ahead_bytes):
    num_tiles = (num_rows + TILE_ROWS - 1) // TILE_ROWS
    first = 0
    for i in range(num_tiles):
        stop = (i + 1) * num_rows // num_tiles
        x_tile, out_tile = x + first * x_stride, out + first * out_stride
        pace = CACHE_LINE // num_tiles
        near = ahead + i * pace * (ahead_bytes // CACHE_LINE)
        if stop - first == 2:
            _wide_2(like, x_tile, x_stride, w, depth, scales, out_tile, out_stride, add, near, pace)
        elif stop - first == 3:
            _wide_3(like, x_tile, x_stride, w, depth, scales, out_tile, out_stride, add, near, pace)
        elif stop - first == 4:
            _wide_4(like, x_tile, x_stride, w, depth, scales, out_tile, out_stride, add, near, pace)
        elif stop - first == 5:
            _wide_5(like, x_tile, x_stride, w, depth, scales, out_tile, out_stride, add, near, pace)
        else:
            _wide_6(like, x_tile, x_stride, w, depth, scales, out_tile, out_stride, add, near, pace)
        first = stop


@intrinsic
def _ask_for(typingctx, place):
    """Ask the cache for the line at this address."""

    def codegen(context, builder, signature, args):
        prefetch_line(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@kernel
def _amx_rows(num_rows, x, x_stride, w, depth, out, out_stride, add, scratch):
    """As `_rows`, by matrix registers where the depth is a multiple of `DEPTH`; half the scratch is for a tile's sums."""
    scales = w + depth * PANEL
    ahead = w + (depth + SCALE_BYTES) * PANEL
    if depth % DEPTH > 0:
        _rows(_BFLOAT16, 2, num_rows, x, x_stride, w, depth, out, out_stride, add, scratch)
    elif num_rows == 1:
        _even_odd_1(x, x_stride, w, depth, scales, out, out_stride, add, ahead)
    elif num_rows == NEAR_ROWS:
        _even_odd_2(x, x_stride, w, depth, scales, out, out_stride, add, ahead)
    else:
        for line in range(depth // 2):
            _ask_for(ahead + 2 * line * PANEL)
            _ask_for(ahead + 2 * line * PANEL + CACHE_LINE)
            _widen_line(_BFLOAT16, w + 2 * line * PANEL, scratch + 4 * line * PANEL)
        sums, shaped = scratch + GROUP * PANEL * 2, 0
        for first in range(0, num_rows, 2 * ROWS):
            count, x_tile, out_tile = min(2 * ROWS, num_rows - first), x + first * x_stride, out + first * out_stride
            shape = 2 * ROWS if count == ROWS else count
            if shape != shaped:
                amx_configure(shape)
                shaped = shape
            if count <= ROWS:
                amx_tile_16(x_tile, x_stride, scratch, depth, sums, PANEL * 4, False)
            else:
                amx_tile_32(x_tile, x_stride, scratch, depth, sums, PANEL * 4, False, scratch, 0)
            _add_scaled_rows(count, sums, scales, out_tile, out_stride, add)
        amx_release()


def _rows_float32(num_rows, x, x_stride, w, depth, out, out_stride, add, scratch):
    _rows(_FLOAT32, 1, num_rows, x, x_stride, w, depth, out, out_stride, add, scratch)


def _rows_bfloat16(num_rows, x, x_stride, w, depth, out, out_stride, add, scratch):
    if HAS_AMX:
        _amx_rows(num_rows, x, x_stride, w, depth, out, out_stride, add, scratch)
    else:
        _rows(_BFLOAT16, 2, num_rows, x, x_stride, w, depth, out, out_stride, add, scratch)


def _rows_float16(num_rows, x, x_stride, w, depth, out, out_stride, add, scratch):
    _rows(_FLOAT16, 1, num_rows, x, x_stride, w, depth, out, out_stride, add, scratch)


_FLOAT32, _BFLOAT16, _FLOAT16 = (np.empty(1, dtype) for dtype in (np.float32, np.uint16, np.int16))
_FUNCTIONS = {
    np.dtype(np.float32): _rows_float32,
    np.dtype(np.uint16): _rows_bfloat16,
    np.dtype(np.int16): _rows_float16,
}


@cache
def quantized_tile_address(storage_dtype: np.dtype) -> int:
    """As `tile_address`, of the tiles for int8 weights and x of this storage type; for `quantized_rows`."""
    return compile_for_c(_FUNCTIONS[storage_dtype], types.void(*[types.intp] * 7, types.boolean, types.intp))


@intrinsic
def quantized_rows(typingctx, tiles, num_rows, x, x_stride, w, depth, out, out_stride, add, scratch):
    """Any number of rows against one group of a panel; `scratch` has room for the group in float32."""

    def codegen(context, builder, signature, args):
        tiles, *operands, add, scratch = args
        operands += [builder.zext(add, I8), scratch]
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(pointer(builder, tiles, kind), operands)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, types.boolean, types.intp), codegen


@intrinsic
def is_quantized(typingctx, w):
    """Whether a packed weight holds integers; known when the kernel is compiled."""

    def codegen(context, builder, signature, args):
        return ir.IntType(1)(int(signature.args[0].dtype == types.int8))

    return types.boolean(w), codegen
