"""The few things that numba's Python cannot say: bit casts, 16-bit floats, and a tile of a matrix product.

How it works: each function here is a numba intrinsic, a short piece of LLVM code put straight into the kernel that
calls it. Everything is written with LLVM's portable vectors, so it runs on any processor; where the processor has
AVX512-BF16, the bfloat16 tile uses its dot product. `LANES`, `TILE_VECTORS` and `TILE_ROWS` follow from the vector
registers of the processor, and with them the shape of packed weights: packed weights never leave the machine.

`kernel` is the decorator of every kernel. Its on-disk cache is valid for exactly the sources of this package:
numba itself looks only at the file of the outermost function, and would run stale code after a change elsewhere.
"""

import hashlib
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT = ir.FloatType()
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _cpu_features() -> frozenset[str]:
    """What the processor can do, as numba will compile for it (`NUMBA_CPU_FEATURES` included)."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


_FEATURES = _cpu_features()
HAS_BF16_DOT = "avx512bf16" in _FEATURES and "avx512f" in _FEATURES
if "avx512f" in _FEATURES:
    LANES, TILE_VECTORS, TILE_ROWS = 16, 4, 6
elif "avx" in _FEATURES:
    LANES, TILE_VECTORS, TILE_ROWS = 8, 2, 6
else:
    LANES, TILE_VECTORS, TILE_ROWS = 4, 4, 4
PANEL = LANES * TILE_VECTORS
"""Columns of one panel of a packed matrix: what a tile computes at once."""


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DIGEST = _source_digest()


def kernel(function):
    """Compile with numba on first use: no GIL, cached on disk, sums may be reordered but NaN and infinity survive."""
    dispatcher = njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})(function)
    return _stamp(dispatcher)


def exact_kernel(function):
    """Like `kernel`, but every operation in the order written; multiply and add may still fuse."""
    return _stamp(njit(nogil=True, cache=True, fastmath={"contract"})(function))


def _stamp(dispatcher):
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = _DIGEST
    return dispatcher


# -- scalars ------------------------------------------------------------------------------------------------


@intrinsic
def float_from_bits(typingctx, bits):
    """The float32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.int32), codegen


@intrinsic
def floor32(typingctx, x):
    """The largest whole float32 not above x."""

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOAT, [FLOAT]), "llvm.floor.f32")
        return builder.call(function, args)

    return types.float32(types.float32), codegen


@intrinsic
def widen(typingctx, element):
    """The float32 value of an element of any storage type."""

    def codegen(context, builder, signature, args):
        return _widen(builder, signature.args[0], args[0])

    return types.float32(element), codegen


@intrinsic
def narrow(typingctx, like, x):
    """The float32 `x` rounded to nearest even, as an element of the array `like`."""

    def codegen(context, builder, signature, args):
        element, value = signature.args[0].dtype, args[1]
        if element == types.float32:
            return value
        if element == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), I16)
        assert element == types.uint16, element
        bits = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16))
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, I32(0x7FC0), rounded), I16)

    return like.dtype(like, types.float32), codegen


@intrinsic
def depth_step(typingctx, like):
    """How many depths lie side by side in a packed matrix of this storage type."""

    def codegen(context, builder, signature, args):
        return I64(2 if signature.args[0].dtype == types.uint16 else 1)

    return types.intp(like), codegen


def _widen(builder, element, value):
    if element == types.float32:
        return value
    if element == types.int16:
        return builder.fpext(builder.bitcast(value, ir.HalfType()), FLOAT)
    assert element == types.uint16, element
    return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), FLOAT)


_LOG2_E, _HALF, _ONE = np.float32(1.4426950408889634), np.float32(0.5), np.float32(1.0)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP_MIN, _EXP_MAX, _ZERO = np.float32(-87.3), np.float32(88.0), np.float32(0.0)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


@exact_kernel
def exp32(x):
    """e to the power of a float32, within 2 units in the last place; 0 below -87.3 (so for -inf), capped above 88."""
    x_in = _EXP_MIN if x < _EXP_MIN else (_EXP_MAX if x > _EXP_MAX else x)
    n = floor32(x_in * _LOG2_E + _HALF)
    r = (x_in - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    p = p * (r * r) + r + _ONE
    result = p * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return _ZERO if x < _EXP_MIN else result


# -- the tile -----------------------------------------------------------------------------------------------


def _make_tile(num_rows: int):
    """The product of `num_rows` rows of x with one panel of packed weights, all of it in registers."""

    @intrinsic
    def tile(typingctx, like, x, x_stride, w, depth, out, out_stride, add):
        """out[i, :PANEL] = (out[i, :PANEL] if add else 0) + x[i, :depth] @ panel, for i < num_rows.

        `x`, `w`, `out` are addresses; strides are in bytes; `depth` is even; `like` is an array of x's storage type.
        """
        signature = types.void(
            like, types.intp, types.intp, types.intp, types.intp, types.intp, types.intp, types.boolean
        )

        def codegen(context, builder, signature, args):
            _, x, x_stride, w, depth, out, out_stride, add = args
            element = signature.args[0].dtype
            vector = ir.VectorType(FLOAT, LANES)
            out_rows = [
                _pointer(builder, builder.add(out, builder.mul(out_stride, I64(i))), vector) for i in range(num_rows)
            ]
            sums = [
                [cgutils.alloca_once_value(builder, vector([0.0] * LANES)) for _ in range(TILE_VECTORS)]
                for _ in range(num_rows)
            ]
            x_rows = [builder.add(x, builder.mul(x_stride, I64(i))) for i in range(num_rows)]
            _tile_loop(builder, element, x_rows, w, depth, sums)
            with builder.if_then(add):
                for i, j in _grid(num_rows):
                    total = builder.fadd(builder.load(sums[i][j]), _load(builder, out_rows[i], j))
                    builder.store(total, sums[i][j])
            for i, j in _grid(num_rows):
                builder.store(builder.load(sums[i][j]), builder.gep(out_rows[i], [I64(j)])).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _grid(num_rows):
    return [(i, j) for i in range(num_rows) for j in range(TILE_VECTORS)]


def _tile_loop(builder, element, x_rows, w, depth, sums):
    """The loop over the depth: one element at a time, or in bfloat16 a pair at a time."""
    paired = element == types.uint16
    steps = builder.lshr(depth, I64(1)) if paired else depth
    stored = {types.float32: FLOAT, types.int16: I16, types.uint16: I32}[element]
    panel = _pointer(builder, w, ir.VectorType(stored, LANES))
    x_rows = [_pointer(builder, row, stored) for row in x_rows]
    with cgutils.for_range(builder, steps) as loop:
        base = builder.mul(loop.index, I64(TILE_VECTORS))
        weights = [_load(builder, panel, builder.add(base, I64(j))) for j in range(TILE_VECTORS)]
        terms = _terms(builder, element, weights)
        for i, row in enumerate(x_rows):
            scalar = builder.load(builder.gep(row, [loop.index]))
            scalar.align = stored_align(element)
            broadcast = _splat(builder, scalar)
            for x_term, w_term in zip(_terms(builder, element, [broadcast]), terms, strict=True):
                for j in range(TILE_VECTORS):
                    total = builder.load(sums[i][j])
                    builder.store(_multiply_add(builder, element, x_term[0], w_term[j], total), sums[i][j])


def stored_align(element) -> int:
    """The alignment in bytes of an element of this storage type; a bfloat16 row need not start on a whole pair."""
    return 4 if element == types.float32 else 2


def _terms(builder, element, vectors):
    """The operands of the multiply-adds that a step makes of these stored vectors: one list per multiply-add."""
    if element == types.float32:
        return [vectors]
    floats = ir.VectorType(FLOAT, LANES)
    if element == types.int16:
        halves = ir.VectorType(ir.HalfType(), LANES)
        return [[builder.fpext(builder.bitcast(v, halves), floats) for v in vectors]]
    if HAS_BF16_DOT:
        pairs = ir.VectorType(_BFloat(), 2 * LANES)
        return [[builder.bitcast(v, pairs) for v in vectors]]
    ints = ir.VectorType(I32, LANES)
    low = [builder.bitcast(builder.shl(v, ints([16] * LANES)), floats) for v in vectors]
    high = [builder.bitcast(builder.and_(v, ints([0xFFFF0000] * LANES)), floats) for v in vectors]
    return [low, high]


def _multiply_add(builder, element, a, b, total):
    floats = ir.VectorType(FLOAT, LANES)
    if element == types.uint16 and HAS_BF16_DOT:
        pairs = ir.VectorType(_BFloat(), 2 * LANES)
        signature = ir.FunctionType(floats, [floats, pairs, pairs])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [total, a, b])
    signature = ir.FunctionType(floats, [floats, floats, floats])
    name = f"llvm.fmuladd.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [a, b, total])


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _load(builder, pointer, index):
    value = builder.load(builder.gep(pointer, [index if isinstance(index, ir.Value) else I64(index)]))
    value.align = 4
    return value


def _splat(builder, scalar):
    vector = ir.VectorType(scalar.type, LANES)
    value = builder.insert_element(vector(ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(value, vector(ir.Undefined), ir.VectorType(I32, LANES)([0] * LANES))


tile_1, tile_2, tile_3, tile_4 = (_make_tile(num_rows) for num_rows in (1, 2, 3, 4))
tile_5, tile_6 = (_make_tile(num_rows) if num_rows <= TILE_ROWS else tile_4 for num_rows in (5, 6))
