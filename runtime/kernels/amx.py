"""The bfloat16 tile of processors with AMX: the processor's own matrix registers instead of its vectors.

How it works: a tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 depths of x with 32 depths
of 16 columns of a packed panel and adds the products to 16 x 16 float32 sums. A panel already lies as the instruction wants it
(two depths of a column side by side), and so do the rows of x, so nothing is moved for it. Up to 16 rows take one piece of
x against all four quarters of a panel; up to 32 rows take two pieces of x against two quarters at a time, which loads half as
much for each product, and ask for memory ahead (with fewer rows the processor's own prefetcher does better). Fewer rows are the
same instructions on shorter registers: every row count sums in the same order.

The registers belong to the thread and are released after each use, so that nobody has to save them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (programming with AMX).
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.lanes import I8, I64, PANEL, TILE_VECTORS, call, intrinsic, offset, pointer, prefetch_line

ROWS = 16
"""Rows of a tile register."""
DEPTH = 32
"""Depths of one multiplication: 64 bytes of bfloat16."""
_LINE = 64
_STEP_BYTES = DEPTH * PANEL * 2
"""What one multiplication's depth takes of a panel."""
_PANEL_STRIDE = PANEL * 4
"""From one pair of depths to the next."""
_COLUMNS_AT, _ROWS_AT = 16, 48
_X, _W = 4, 6
"""The first registers for x and for the panel; the sums have the registers before them."""


@intrinsic
def amx_configure(typingctx, num_rows):
    """Shape the registers for tiles of so many rows, 1 to 32. 16 and 32 rows are the same shape. Costs some 200 cycles."""

    def codegen(context, builder, signature, args):
        (num_rows,) = args
        is_pair = builder.icmp_signed(">", num_rows, I64(ROWS))
        upper = builder.select(is_pair, I64(ROWS), num_rows)
        lower = builder.select(is_pair, builder.sub(num_rows, I64(ROWS)), num_rows)
        _configure(builder, [upper, upper, lower, lower, upper, lower, I64(ROWS), I64(ROWS)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def amx_tile_16(typingctx, x, x_stride, w, depth, out, out_stride, add):
    """out[i, :PANEL] = (out[i, :PANEL] if add else 0) + x[i, :depth] @ panel, for as many rows as were configured, 16 at most.

    `x`, `w`, `out` are addresses, strides are in bytes, `depth` is a multiple of `DEPTH`.
    """

    def codegen(context, builder, signature, args):
        x, x_stride, w, depth, out, out_stride, add = args
        places = [builder.add(out, I64(j * _LINE)) for j in range(TILE_VECTORS)]
        _begin(builder, places, out_stride, add)
        with cgutils.for_range(builder, builder.udiv(depth, I64(DEPTH))) as loop:
            _load(builder, _X, offset(builder, x, loop.index, _LINE), x_stride)
            panel = offset(builder, w, loop.index, _STEP_BYTES)
            for j in range(TILE_VECTORS):
                _load(builder, _W + j % 2, builder.add(panel, I64(j * _LINE)), I64(_PANEL_STRIDE))
                _multiply(builder, j, _X, _W + j % 2)
        _end(builder, places, out_stride)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, types.boolean), codegen


@intrinsic
def amx_tile_32(typingctx, x, x_stride, w, depth, out, out_stride, add, ahead, pace):
    """As `amx_tile_16`, for 17 to 32 rows; asks the cache for what follows, `ahead` and `pace` as in `tiles`."""

    def codegen(context, builder, signature, args):
        x, x_stride, w, depth, out, out_stride, add, ahead, pace = args
        below = builder.mul(out_stride, I64(ROWS))
        x_below = builder.add(x, builder.mul(x_stride, I64(ROWS)))
        for half in range(TILE_VECTORS // 2):
            places = [builder.add(out, I64((2 * half + j) * _LINE)) for j in range(2)]
            places += [builder.add(place, below) for place in places]
            _begin(builder, places, out_stride, add)
            with cgutils.for_range(builder, builder.udiv(depth, I64(DEPTH))) as loop:
                for i, row in enumerate((x, x_below)):
                    _load(builder, _X + i, offset(builder, row, loop.index, _LINE), x_stride)
                panel = offset(builder, w, loop.index, _STEP_BYTES)
                for j in range(2):
                    _load(builder, _W + j, builder.add(panel, I64((2 * half + j) * _LINE)), I64(_PANEL_STRIDE))
                    for i in range(2):
                        _multiply(builder, 2 * i + j, _X + i, _W + j)
                    _prefetch(builder, loop.index, 2 * half + j, ahead, pace)
            _end(builder, places, out_stride)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, types.boolean, types.intp, types.intp), codegen


@intrinsic
def amx_release(typingctx):
    """Give the registers back."""

    def codegen(context, builder, signature, args):
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


def _configure(builder, rows):
    """Registers of so many rows each, 64 bytes wide."""
    config = cgutils.alloca_once(builder, ir.ArrayType(I8, _LINE))
    start = builder.ptrtoint(config, I64)
    builder.store(ir.Constant(ir.ArrayType(I8, _LINE), None), config)
    builder.store(I8(1), pointer(builder, start, I8))
    for index, count in enumerate(rows):
        builder.store(I8(_LINE), pointer(builder, builder.add(start, I64(_COLUMNS_AT + 2 * index)), I8))
        builder.store(builder.trunc(count, I8), pointer(builder, builder.add(start, I64(_ROWS_AT + index)), I8))
    call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), pointer(builder, start, I8))


def _begin(builder, places, stride, add):
    """The sums: those that are there, or zero."""
    with builder.if_else(add) as (then, otherwise):
        with then:
            for index, place in enumerate(places):
                _load(builder, index, place, stride)
        with otherwise:
            for index in range(len(places)):
                call(builder, "llvm.x86.tilezero", ir.VoidType(), I8(index))


def _end(builder, places, stride):
    for index, place in enumerate(places):
        call(builder, "llvm.x86.tilestored64", ir.VoidType(), I8(index), pointer(builder, place, I8), stride)


def _load(builder, register, place, stride):
    call(builder, "llvm.x86.tileloadd64", ir.VoidType(), I8(register), pointer(builder, place, I8), stride)


def _multiply(builder, total, x, w):
    call(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), I8(total), I8(x), I8(w))


def _prefetch(builder, step, quarter, ahead, pace):
    """Ask for a quarter of the lines that stand for one step of the depth."""
    lines = _STEP_BYTES // _LINE
    for line in range(quarter * lines // 4, (quarter + 1) * lines // 4):
        index = builder.add(builder.mul(step, I64(lines)), I64(line))
        prefetch_line(builder, builder.add(ahead, builder.mul(index, pace)))
