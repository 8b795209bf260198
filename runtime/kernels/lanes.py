"""What every kernel is built from: the processor's vectors, the `kernel` decorator and the emitters of LLVM code.

How it works: numba compiles plain Python, but cannot be told about vector registers, 16-bit floats or bit casts. So the
inner loops are numba intrinsics: Python functions that write LLVM code, with the emitters below, straight into the
kernel that calls them. They are written with LLVM's portable vectors and run on any processor; where it has AVX512-BF16,
bfloat16 uses its dot product, and where it has AMX, its matrix registers (`amx`). `LANES`, `TILE_VECTORS` and `TILE_ROWS` follow from the vector registers of the processor,
and with them the shape of packed weights: packed weights never leave the machine.

The on-disk cache of a `kernel` is valid for exactly the sources of this package: numba itself looks only at the file of
the outermost function, and would run stale code after a change elsewhere.
"""

import contextlib
import ctypes
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, extending, njit, types
from numba.core import cgutils, sigutils
from numba.core.ccallback import CFunc
from numba.np.arrayobj import populate_array

FLOAT, HALF = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


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
    chosen = getattr(config, "CPU_FEATURES", None)
    if chosen is not None:
        return frozenset(name[1:] for name in chosen.split(",") if name.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _may_use_amx() -> bool:
    """Ask the kernel for the matrix registers' state, once for all threads of the process (Linux 5.16 and later)."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQ_XCOMP_PERM, _XTILEDATA) == 0
    return False


_ARCH_PRCTL, _REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18
_FEATURES = _cpu_features()
HAS_BF16_DOT = "avx512bf16" in _FEATURES and "avx512f" in _FEATURES
HAS_AMX = HAS_BF16_DOT and {"amx-tile", "amx-bf16"} <= _FEATURES and _may_use_amx()
"""Whether there are matrix registers for bfloat16, and this process may use them."""
HAS_SCALE = "avx512f" in _FEATURES
HAS_HALF = "f16c" in _FEATURES or platform.machine() in ("aarch64", "arm64")
"""Whether the processor converts float16 itself; the kernels leave float16 to torch where it does not."""
if "avx512f" in _FEATURES:
    LANES, TILE_VECTORS, TILE_ROWS = 16, 4, 6
elif "avx" in _FEATURES:
    LANES, TILE_VECTORS, TILE_ROWS = 8, 2, 4  # 6 rows fit 16 registers in float32 only; widening bfloat16 spills them
else:
    LANES, TILE_VECTORS, TILE_ROWS = 4, 4, 4
PANEL = LANES * TILE_VECTORS
"""Columns of one panel of a packed matrix: what a tile computes at once."""

FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
FAST_MATH = {"contract", "reassoc", "nsz"}
"""Sums may be reordered; NaN and infinity keep their meaning."""
LOWEST = -3.0e38
"""Stands for minus infinity where only a maximum is looked for."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile with numba on first use: no GIL, cached on disk."""
    return _stamp(njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST_MATH)(function))


def part(function: Callable[..., Any]) -> Any:
    """A part of a kernel, taken apart for the reader: compiled as if it stood in the kernel that calls it."""
    return njit(inline="always")(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """`numba.extending.intrinsic`: `function` types its arguments and returns the emitter of its code."""
    return extending.intrinsic(function)


@intrinsic
def address(typingctx, array):
    """Where an array's elements begin."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(struct.data, I64)

    return types.intp(array), codegen


@intrinsic
def array_at(typingctx, row, index, like):
    """The array whose address and length are entries 2 * index and 2 * index + 1 of the int64 at `row`, of `like`'s dtype.

    Somebody else owns its memory and keeps it until the kernel has returned.
    """
    kind = types.Array(like.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        row, index, _ = args
        entry = pointer(builder, builder.add(row, builder.mul(index, I64(16))), I64)
        start, length = builder.load(entry), builder.load(builder.gep(entry, [I64(1)]))
        array = context.make_array(kind)(context, builder)
        item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        data = builder.inttoptr(start, array.data.type)
        populate_array(array, data, [length], [item], item, meminfo=None)
        return array._getvalue()

    return kind(types.intp, types.intp, like), codegen


def compile_for_c(function: Callable[..., Any], signature) -> int:
    """Compile a function for C callers, cached on disk like a kernel, and return its address."""
    compiled = CFunc(function, sigutils.normalize_signature(signature), {}, {"nopython": True, "fastmath": FAST_MATH})
    compiled.enable_caching()
    _stamp(compiled).compile()
    _COMPILED.append(compiled)
    assert compiled.address is not None
    return compiled.address


def _stamp(compiled):
    cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache_file is not None and hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = _DIGEST
    return compiled


def _source_digest() -> str:
    digest = hashlib.sha256(str(HAS_AMX).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DIGEST = _source_digest()
_COMPILED: list[CFunc] = []
"""Keeps the code behind every address alive."""


# -- emitters: addresses and calls --------------------------------------------------------------------------


def constant(scalar, value):
    """A vector constant with this value in every lane."""
    return ir.VectorType(scalar, LANES)([value] * LANES)


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


def prefetch_line(builder, address, level=1):
    """Ask a cache, the first or the second one, for the line at an address; any address will do.

    The first one can wait for a dozen or two of lines at a time, which limits what a core can read from memory (by a third on a Zen 4);
    the second one for more. Too many at once are dropped by the processor.
    """
    locality = I32(4 - level)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, I8), I32(0), locality, I32(1))


def splat(builder, scalar):
    """A vector with this scalar in every lane."""
    vector = ir.VectorType(scalar.type, LANES)
    value = builder.insert_element(vector(ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(value, vector(ir.Undefined), INTS([0] * LANES))


@intrinsic
def depth_step(typingctx, like):
    """How many depths lie side by side in a packed matrix of the storage type of `like`."""

    def codegen(context, builder, signature, args):
        return I64(Unit(signature.args[0].dtype).depth)

    return types.intp(like), codegen


def size_of(element) -> int:
    """Bytes of an element of this storage type."""
    return 4 if element == types.float32 else 2


# -- emitters: storage types --------------------------------------------------------------------------------


def widen(builder, element, vector):
    """The float32 values of a vector of this storage type."""
    if element == types.float32:
        return vector
    if element == types.int16:
        return builder.fpext(builder.bitcast(vector, ir.VectorType(HALF, LANES)), FLOATS)
    assert element == types.uint16, element
    return builder.bitcast(builder.shl(builder.zext(vector, INTS), constant(I32, 16)), FLOATS)


def narrow(builder, element, vector):
    """A vector of float32 rounded to nearest even, in this storage type."""
    if element == types.float32:
        return vector
    shorts = ir.VectorType(I16, LANES)
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(HALF, LANES)), shorts)
    assert element == types.uint16, element
    if HAS_BF16_DOT:
        brains = ir.VectorType(_BFloat(), LANES)
        return builder.bitcast(call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", brains, vector), shorts)
    bits = builder.bitcast(vector, INTS)
    odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(I32, 0x7FFF))), constant(I32, 16))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.trunc(builder.select(is_nan, constant(I32, 0x7FC0), rounded), shorts)


def load_wide(builder, element, address, first, mask):
    """float32 values of LANES elements of this storage type, from element `first` on; 0 where the mask is off."""
    scalar = FLOAT if element == types.float32 else I16
    place = offset(builder, address, first, size_of(element))
    return widen(builder, element, masked_load(builder, ir.VectorType(scalar, LANES), place, mask, 0))


def store_narrow(builder, element, vector, address, first, mask):
    """Store float32 values as elements of this storage type, from element `first` on, where the mask is on."""
    stored = narrow(builder, element, vector)
    place = offset(builder, address, first, size_of(element))
    if mask is None:
        builder.store(stored, pointer(builder, place, stored.type), align=2)
        return
    place = pointer(builder, place, stored.type)
    call(builder, f"llvm.masked.store.{_suffix(stored.type)}.p0", ir.VoidType(), stored, place, I32(2), mask)


def masked_load(builder, vector, address, mask, default):
    place = pointer(builder, address, vector)
    if mask is None:
        return builder.load(place, align=2)
    name = f"llvm.masked.load.{_suffix(vector)}.p0"
    return call(builder, name, vector, place, I32(2), mask, constant(vector.element, default))


def _suffix(vector):
    return f"v{vector.count}{'f32' if vector.element == FLOAT else vector.element}"


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

    def load(self, builder, address, first, mask):
        """LANES units of a row of elements, from unit `first` on."""
        return masked_load(builder, self.vector, offset(builder, address, first, self.size), mask, 0)

    def terms(self, builder, vectors):
        """The operands of the multiply-adds that one step makes of these stored vectors: a list per multiply-add."""
        if not self.paired:
            return [[widen(builder, self.element, v) for v in vectors]]
        if HAS_BF16_DOT:
            pairs = ir.VectorType(_BFloat(), 2 * LANES)
            return [[builder.bitcast(v, pairs) for v in vectors]]
        low = [builder.bitcast(builder.shl(v, constant(I32, 16)), FLOATS) for v in vectors]
        high = [builder.bitcast(builder.and_(v, constant(I32, 0xFFFF0000)), FLOATS) for v in vectors]
        return [low, high]

    def multiply_add(self, builder, a, b, total):
        """total + a * b, for a and b out of `terms`."""
        if self.paired and HAS_BF16_DOT:
            return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, a, b)
        return fma(builder, a, b, total)


# -- emitters: loops and arithmetic -------------------------------------------------------------------------


def for_span(builder, count, body):
    """body(first, mask) for each whole vector of [0, count), mask None, then for the rest under its mask."""
    whole = builder.udiv(count, I64(LANES))
    with cgutils.for_range(builder, whole) as loop:
        body(builder.mul(loop.index, I64(LANES)), None)
    first = builder.mul(whole, I64(LANES))
    with builder.if_then(builder.icmp_signed("<", first, count)):
        body(first, lanes_inside(builder, first, first, count))


def for_vectors(builder, low, high, body):
    """body(first) for each vector, at a multiple of `LANES`, that has a lane in [low, high)."""
    start = builder.udiv(low, I64(LANES))
    stop = builder.udiv(builder.add(high, I64(LANES - 1)), I64(LANES))
    with cgutils.for_range(builder, stop, start=start) as loop:
        body(builder.mul(loop.index, I64(LANES)))


def lanes_inside(builder, first, low, high):
    """The mask of lanes i with low <= first + i < high."""
    index = builder.add(splat(builder, builder.trunc(first, I32)), INTS(list(range(LANES))))
    above = builder.icmp_signed(">=", index, splat(builder, builder.trunc(low, I32)))
    return builder.and_(above, builder.icmp_signed("<", index, splat(builder, builder.trunc(high, I32))))


def fma(builder, a, b, c):
    return call(builder, f"llvm.fmuladd.v{LANES}f32", FLOATS, a, b, c)


def in_order(builder, vector):
    """The same vector, that no sum is reordered across (`FAST_MATH`)."""
    return call(builder, f"llvm.arithmetic.fence.v{LANES}f32", FLOATS, vector)


def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def sums_of(builder, vectors):
    """A vector whose lane i is the sum of the lanes of vectors[i]; there are `LANES` of them."""
    even, odd = INTS(list(range(0, 2 * LANES, 2))), INTS(list(range(1, 2 * LANES, 2)))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
        ]
    return vectors[0]


def fold(builder, vector, combine):
    """combine(builder, a, b) over all lanes of one vector, in halves; a scalar."""
    width = LANES
    while width > 1:
        width //= 2
        order = INTS([(i + width) % LANES for i in range(LANES)])
        vector = combine(builder, vector, builder.shuffle_vector(vector, vector.type(ir.Undefined), order))
    return builder.extract_element(vector, I32(0))


def sum_of(builder, vector):
    """The sum of the lanes of one vector."""
    return fold(builder, vector, lambda builder, a, b: builder.fadd(a, b))


def power_of_two(builder, x):
    """2 to the power of x <= 0, within 2e-7 of it; AVX-512 only, a third of the instructions of `exp_of_negative`."""
    assert HAS_SCALE, "no instruction that scales by powers of two"
    n = call(builder, f"llvm.rint.v{LANES}f32", FLOATS, x)
    r = builder.fsub(x, n)
    p = constant(FLOAT, 1.5403530e-4)
    for coefficient in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        p = fma(builder, p, r, constant(FLOAT, coefficient))
    name, every, nearest = "llvm.x86.avx512.mask.scalef.ps.512", I16(-1), I32(4)
    return call(builder, name, FLOATS, p, n, constant(FLOAT, 0.0), every, nearest)


def exp_of_negative(builder, x):
    """e to the power of x <= 0, within 2 units in the last place; 0 below -87.3."""
    smallest = constant(FLOAT, -87.3)
    vanishes = builder.fcmp_ordered("<", x, smallest)
    x = builder.select(vanishes, smallest, x)
    n = fma(builder, x, constant(FLOAT, 1.4426950408889634), constant(FLOAT, 0.5))
    n = call(builder, f"llvm.floor.v{LANES}f32", FLOATS, n)
    r = fma(builder, n, constant(FLOAT, -0.693359375), x)
    r = fma(builder, n, constant(FLOAT, 2.12194440e-4), r)
    p = constant(FLOAT, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(builder, p, r, constant(FLOAT, coefficient))
    p = builder.fadd(fma(builder, p, builder.fmul(r, r), r), constant(FLOAT, 1.0))
    power = builder.shl(builder.add(builder.fptosi(n, INTS), constant(I32, 127)), constant(I32, 23))
    return builder.select(vanishes, constant(FLOAT, 0.0), builder.fmul(p, builder.bitcast(power, FLOATS)))
