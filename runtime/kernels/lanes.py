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
        return emit_widen(builder, signature.args[0], args[0])

    return types.float32(element), codegen


@intrinsic
def narrow(typingctx, like, x):
    """The float32 `x` rounded to nearest even, as an element of the array `like`."""

    def codegen(context, builder, signature, args):
        return emit_narrow(builder, signature.args[0].dtype, args[1])

    return like.dtype(like, types.float32), codegen


@intrinsic
def depth_step(typingctx, like):
    """How many depths lie side by side in a packed matrix of this storage type."""

    def codegen(context, builder, signature, args):
        return I64(2 if signature.args[0].dtype == types.uint16 else 1)

    return types.intp(like), codegen


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


# -- what code emitters share -------------------------------------------------------------------------------


def emit_widen(builder, element, value):
    """The float32 value (scalar or vector) of a value of this storage type."""
    if element == types.float32:
        return value
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else None

    def shape(scalar):
        return scalar if lanes is None else ir.VectorType(scalar, lanes)

    if element == types.int16:
        return builder.fpext(builder.bitcast(value, shape(ir.HalfType())), shape(FLOAT))
    assert element == types.uint16, element
    bits = builder.shl(builder.zext(value, shape(I32)), constant(I32, 16, lanes))
    return builder.bitcast(bits, shape(FLOAT))


def emit_narrow(builder, element, value):
    """A float32 value (scalar or vector) rounded to nearest even, in this storage type."""
    if element == types.float32:
        return value
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else None

    def shape(scalar):
        return scalar if lanes is None else ir.VectorType(scalar, lanes)

    if element == types.int16:
        return builder.bitcast(builder.fptrunc(value, shape(ir.HalfType())), shape(I16))
    assert element == types.uint16, element
    bits = builder.bitcast(value, shape(I32))
    odd = builder.and_(builder.lshr(bits, constant(I32, 16, lanes)), constant(I32, 1, lanes))
    rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF, lanes)))
    rounded = builder.lshr(rounded, constant(I32, 16, lanes))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, constant(I32, 0x7FC0, lanes), rounded), shape(I16))


def constant(scalar, value, lanes=None):
    """A constant of this LLVM type, in every lane of a vector when `lanes` is given."""
    return scalar(value) if lanes is None else ir.VectorType(scalar, lanes)([value] * lanes)


def call(builder, name, result, *args):
    """Call the LLVM intrinsic function of this full name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def offset(builder, address, index, size):
    """address + index * size, for a runtime or constant index."""
    index = index if isinstance(index, ir.Value) else I64(index)
    return builder.add(address, builder.mul(index, I64(size)))


def splat(builder, scalar):
    """A vector with this scalar in every lane."""
    vector = ir.VectorType(scalar.type, LANES)
    value = builder.insert_element(vector(ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(value, vector(ir.Undefined), ir.VectorType(I32, LANES)([0] * LANES))


class Unit:
    """How a storage type is loaded for a multiply-add along the depth: bfloat16 in pairs, the others one by one."""

    def __init__(self, element) -> None:
        self.element = element
        self.paired = element == types.uint16
        self.depth = 2 if self.paired else 1
        self.stored = {types.float32: FLOAT, types.int16: I16, types.uint16: I32}[element]
        self.size = 2 if element == types.int16 else 4
        self.align = 4 if element == types.float32 else 2
        self.vector = ir.VectorType(self.stored, LANES)

    def terms(self, builder, vectors):
        """The operands of the multiply-adds that one step makes of these stored vectors: a list per multiply-add."""
        floats = ir.VectorType(FLOAT, LANES)
        if not self.paired:
            return [[emit_widen(builder, self.element, v) for v in vectors]]
        if HAS_BF16_DOT:
            pairs = ir.VectorType(_BFloat(), 2 * LANES)
            return [[builder.bitcast(v, pairs) for v in vectors]]
        low = [builder.bitcast(builder.shl(v, constant(I32, 16, LANES)), floats) for v in vectors]
        high = [builder.bitcast(builder.and_(v, constant(I32, 0xFFFF0000, LANES)), floats) for v in vectors]
        return [low, high]

    def multiply_add(self, builder, a, b, total):
        """total + a * b, for a and b out of `terms`."""
        if self.paired and HAS_BF16_DOT:
            return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, a, b)
        return call(builder, f"llvm.fmuladd.v{LANES}f32", total.type, a, b, total)
