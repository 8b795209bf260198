"""The tile: a few rows of x times one panel of packed weights, wholly in registers.

How it works: the sums of `num_rows` rows and `PANEL` columns stay in vector registers while the depth runs by; each
step loads one line of the panel and, per row, one element (in bfloat16 one pair) of x that it spreads over all lanes.
A tile of `TILE_ROWS` rows fills the registers, and reads the panel as few times as they allow. A single tile reads memory
as it goes, which the processor foresees. Several that share a piece of a panel ask the second-level cache for the piece that
follows it in memory, each for its part: multiplying and reading memory overlap, which is worth a fifth of the time with 8 rows.

The tiles are compiled once per storage type, into a function that kernels call by its address (`tile_address`, then
`tile_rows`): code inside a kernel is compiled anew with each kernel above it, and the tiles are most of the code.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.amx import DEPTH, ROWS, amx_configure, amx_release, amx_tile_16, amx_tile_32
from runtime.kernels.lanes import (
    FLOAT,
    FLOATS,
    HAS_AMX,
    I8,
    I64,
    PANEL,
    TILE_ROWS,
    TILE_VECTORS,
    Unit,
    compile_for_c,
    constant,
    intrinsic,
    kernel,
    offset,
    pointer,
    prefetch_line,
    splat,
)

CACHE_LINE = 64


def _make_tile(num_rows: int):
    @intrinsic
    def tile(typingctx, like, x, x_stride, w, depth, out, out_stride, add, ahead, pace):
        """out[i, :PANEL] = (out[i, :PANEL] if add else 0) + x[i, :depth] @ panel, for i < num_rows.

        `x`, `w`, `out` are addresses; strides are in bytes; `depth` is even; `like` is an array of x's storage type.
        Meanwhile, for every `CACHE_LINE` read of the panel, the cache is asked for the line `pace` bytes further than
        the last, from `ahead` on: with a `pace` of 0 for the same one, which costs nothing that can be measured.
        """
        signature = types.void(like, *[types.intp] * 6, types.boolean, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            _, x, x_stride, w, depth, out, out_stride, add, ahead, pace = args
            grid = [(i, j) for i in range(num_rows) for j in range(TILE_VECTORS)]
            zero = constant(FLOAT, 0.0)
            sums = {place: cgutils.alloca_once_value(builder, zero) for place in grid}
            x_rows = [builder.add(x, builder.mul(x_stride, I64(i))) for i in range(num_rows)]
            run_depth(builder, Unit(signature.args[0].dtype), WholeLine, x_rows, w, depth, sums, ahead, pace)
            out_rows = [
                pointer(builder, builder.add(out, builder.mul(out_stride, I64(i))), FLOATS) for i in range(num_rows)
            ]
            with builder.if_then(add):
                for i, j in grid:
                    before = builder.load(builder.gep(out_rows[i], [I64(j)]), align=4)
                    builder.store(builder.fadd(before, builder.load(sums[i, j])), sums[i, j])
            for i, j in grid:
                builder.store(builder.load(sums[i, j]), builder.gep(out_rows[i], [I64(j)]), align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile


class WholeLine:
    """How a tile reads a line of a panel, `Unit.depth` depths of all its columns, in the storage type of x."""

    num_prefetches = TILE_VECTORS
    prefetch_level = 2

    @staticmethod
    def num_bytes(unit: Unit) -> int:
        return unit.size * PANEL

    @staticmethod
    def terms(builder, unit: Unit, address):
        """The operands of the multiply-adds: per multiply-add a list of `TILE_VECTORS` vectors."""
        line = pointer(builder, address, unit.vector)
        weights = [builder.load(builder.gep(line, [I64(j)]), align=4) for j in range(TILE_VECTORS)]
        return unit.terms(builder, weights)


def run_depth(builder, unit, kind, x_rows, w, depth, sums, ahead, pace):
    """sums[i, j] += x_rows[i] @ the panel at w, whose lines are of this `kind`; asks for lines from `ahead` on."""
    with cgutils.for_range(builder, builder.udiv(depth, I64(unit.depth))) as loop:
        w_terms = kind.terms(builder, unit, offset(builder, w, loop.index, kind.num_bytes(unit)))
        for j in range(kind.num_prefetches):
            index = builder.add(builder.mul(loop.index, I64(kind.num_prefetches)), I64(j))
            prefetch_line(builder, builder.add(ahead, builder.mul(index, pace)), kind.prefetch_level)
        for i, row in enumerate(x_rows):
            place = pointer(builder, offset(builder, row, loop.index, unit.size), unit.stored)
            x_terms = unit.terms(builder, [splat(builder, builder.load(place, align=unit.align))])
            for x_term, w_term in zip(x_terms, w_terms, strict=True):
                for j in range(TILE_VECTORS):
                    total = unit.multiply_add(builder, x_term[0], w_term[j], builder.load(sums[i, j]))
                    builder.store(total, sums[i, j])


tile_1, tile_2, tile_3, tile_4 = (_make_tile(num_rows) for num_rows in (1, 2, 3, 4))
tile_5, tile_6 = (_make_tile(num_rows) if num_rows <= TILE_ROWS else tile_4 for num_rows in (5, 6))


@kernel
def _rows(like, num_rows, x, x_stride, w, depth, out, out_stride, add):
    num_tiles = (num_rows + TILE_ROWS - 1) // TILE_ROWS
    block_bytes = depth * PANEL * like.itemsize
    first = 0
    for i in range(num_tiles):
        stop = (i + 1) * num_rows // num_tiles
        x_tile, out_tile = x + first * x_stride, out + first * out_stride
        pace = CACHE_LINE // num_tiles if num_tiles > 1 else 0
        ahead = w + block_bytes + i * pace * (block_bytes // CACHE_LINE)
        if stop - first == 1:
            tile_1(like, x_tile, x_stride, w, depth, out_tile, out_stride, add, ahead, pace)
        elif stop - first == 2:
            tile_2(like, x_tile, x_stride, w, depth, out_tile, out_stride, add, ahead, pace)
        elif stop - first == 3:
            tile_3(like, x_tile, x_stride, w, depth, out_tile, out_stride, add, ahead, pace)
        elif stop - first == 4:
            tile_4(like, x_tile, x_stride, w, depth, out_tile, out_stride, add, ahead, pace)
        elif stop - first == 5:
            tile_5(like, x_tile, x_stride, w, depth, out_tile, out_stride, add, ahead, pace)
        else:
            tile_6(like, x_tile, x_stride, w, depth, out_tile, out_stride, add, ahead, pace)
        first = stop


_FLOAT32, _BFLOAT16, _FLOAT16 = (np.empty(1, dtype) for dtype in (np.float32, np.uint16, np.int16))


@kernel
def _amx_rows(num_rows, x, x_stride, w, depth, out, out_stride, add):
    """As `_rows`, by matrix registers; what is left of the depth by vectors."""
    whole = depth - depth % DEPTH
    if whole > 0:
        num_tiles = (num_rows + 2 * ROWS - 1) // (2 * ROWS)
        block_bytes = depth * PANEL * 2
        pace, shaped = CACHE_LINE // num_tiles, 0
        for i in range(num_tiles):
            first = i * 2 * ROWS
            count, x_tile, out_tile = min(2 * ROWS, num_rows - first), x + first * x_stride, out + first * out_stride
            ahead = w + block_bytes + i * pace * (block_bytes // CACHE_LINE)
            shape = 2 * ROWS if count == ROWS else count
            if shape != shaped:
                amx_configure(shape)
                shaped = shape
            if count <= ROWS:
                amx_tile_16(x_tile, x_stride, w, whole, out_tile, out_stride, add)
            else:
                amx_tile_32(x_tile, x_stride, w, whole, out_tile, out_stride, add, ahead, pace)
        amx_release()
    if whole < depth:
        place = w + whole * PANEL * 2
        _rows(_BFLOAT16, num_rows, x + whole * 2, x_stride, place, depth - whole, out, out_stride, add or whole > 0)


def _rows_float32(num_rows, x, x_stride, w, depth, out, out_stride, add):
    _rows(_FLOAT32, num_rows, x, x_stride, w, depth, out, out_stride, add)


def _rows_bfloat16(num_rows, x, x_stride, w, depth, out, out_stride, add):
    if HAS_AMX:
        _amx_rows(num_rows, x, x_stride, w, depth, out, out_stride, add)
    else:
        _rows(_BFLOAT16, num_rows, x, x_stride, w, depth, out, out_stride, add)


def _rows_float16(num_rows, x, x_stride, w, depth, out, out_stride, add):
    _rows(_FLOAT16, num_rows, x, x_stride, w, depth, out, out_stride, add)


_FUNCTIONS = {
    np.dtype(np.float32): _rows_float32,
    np.dtype(np.uint16): _rows_bfloat16,
    np.dtype(np.int16): _rows_float16,
}


@cache
def tile_address(storage_dtype: np.dtype) -> int:
    """The tiles of a storage type, compiled now or loaded from the disk cache, for `tile_rows`."""
    return compile_for_c(_FUNCTIONS[storage_dtype], types.void(*[types.intp] * 7, types.boolean))


@intrinsic
def tile_rows(typingctx, tiles, num_rows, x, x_stride, w, depth, out, out_stride, add):
    """Any number of rows against one panel, spread evenly over tiles; `tiles` from `tile_address`, the rest as in `tile`."""

    def codegen(context, builder, signature, args):
        tiles, *operands, add = args
        operands.append(builder.zext(add, I8))
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(pointer(builder, tiles, kind), operands)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, types.boolean), codegen
