"""Vector loops for attention: scores of a run of keys, softmax weights, weighted sums of values, packing.

How it works: each is a numba intrinsic over addresses, in vectors of `LANES`; what does not fill a vector is loaded
under a mask, so nothing outside the operands is read. Float scratch that is *written* is written in whole vectors: it
must have room up to the next multiple of `LANES`.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from runtime.kernels.lanes import (
    FLOAT,
    I16,
    I32,
    I64,
    LANES,
    PANEL,
    Unit,
    call,
    constant,
    emit_narrow,
    emit_widen,
    offset,
    pointer,
    splat,
)

_FLOATS = ir.VectorType(FLOAT, LANES)
_LOWEST = -3.0e38


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """Copy `count` bytes from the address `source` to `target`."""

    def codegen(context, builder, signature, args):
        target, source, count = args
        byte = ir.IntType(8)
        cgutils.raw_memcpy(builder, pointer(builder, target, byte), pointer(builder, source, byte), count, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def prefetch(typingctx, address, count):
    """Ask for the `count` bytes at an address to be brought into the cache; any address will do."""

    def codegen(context, builder, signature, args):
        address, count = args
        byte = ir.IntType(8)
        with cgutils.for_range(builder, builder.udiv(builder.add(count, I64(63)), I64(64))) as loop:
            place = pointer(builder, offset(builder, address, loop.index, 64), byte)
            call(builder, "llvm.prefetch.p0", ir.VoidType(), place, I32(0), I32(3), I32(1))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def score_keys(typingctx, like, query, keys, stride, count, head_dim, out):
    """out[i] = query . key i for i < LANES; keys lie `stride` bytes apart, those from `count` on repeat the last.

    `head_dim` is even; query and keys are of the storage type of `like`.
    """

    def codegen(context, builder, signature, args):
        _, query, keys, stride, count, head_dim, out = args
        unit = Unit(signature.args[0].dtype)
        sums = [cgutils.alloca_once_value(builder, constant(FLOAT, 0.0, LANES)) for _ in range(LANES)]
        last = builder.sub(count, I64(1))
        places = []
        for i in range(LANES):
            index = builder.select(builder.icmp_signed("<", last, I64(i)), last, I64(i))
            places.append(builder.add(keys, builder.mul(index, stride)))

        def body(first, mask):
            q_terms = unit.terms(builder, [_load(builder, unit, query, first, mask)])
            for place, total in zip(places, sums, strict=True):
                k_terms = unit.terms(builder, [_load(builder, unit, place, first, mask)])
                for q_term, k_term in zip(q_terms, k_terms, strict=True):
                    builder.store(unit.multiply_add(builder, q_term[0], k_term[0], builder.load(total)), total)

        _for_span(builder, builder.udiv(head_dim, I64(unit.depth)), body)
        scores = _sum_lanes(builder, [builder.load(total) for total in sums])
        builder.store(scores, pointer(builder, out, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 6), codegen


@intrinsic
def find_top(typingctx, scores, low, high):
    """The largest of the float32 scores[low:high], -3e38 for none."""

    def codegen(context, builder, signature, args):
        scores, low, high = args
        top = cgutils.alloca_once_value(builder, constant(FLOAT, _LOWEST, LANES))

        def body(first, _):
            inside = _inside(builder, first, low, high)
            value = _masked_load(builder, _FLOATS, offset(builder, scores, first, 4), inside, _LOWEST)
            builder.store(_larger(builder, builder.load(top), value), top)

        _for_vectors(builder, low, high, body)
        vector = builder.load(top)
        result = builder.extract_element(vector, I32(0))
        for i in range(1, LANES):
            result = _larger(builder, result, builder.extract_element(vector, I32(i)))
        return result

    return types.float32(types.intp, types.intp, types.intp), codegen


@intrinsic
def weigh(typingctx, like, scores, low, high, stop, scale, top, out):
    """out[j] = exp((scores[j] - top) * scale) for low <= j < high and 0 elsewhere in [0, stop); returns their sum.

    `out` is an address of the storage type of `like`, written up to a multiple of `LANES`. No score exceeds `top`.
    """

    def codegen(context, builder, signature, args):
        _, scores, low, high, stop, scale, top, out = args
        unit_size = 4 if signature.args[0].dtype == types.float32 else 2
        sums = cgutils.alloca_once_value(builder, constant(FLOAT, 0.0, LANES))
        scales, tops = splat(builder, scale), splat(builder, top)

        def body(first, _):
            inside = _inside(builder, first, low, high)
            value = _masked_load(builder, _FLOATS, offset(builder, scores, first, 4), inside, _LOWEST)
            weight = _exp_of_negative(builder, builder.fmul(builder.fsub(value, tops), scales))
            weight = builder.select(inside, weight, constant(FLOAT, 0.0, LANES))
            builder.store(builder.fadd(builder.load(sums), weight), sums)
            stored = emit_narrow(builder, signature.args[0].dtype, weight)
            builder.store(stored, pointer(builder, offset(builder, out, first, unit_size), stored.type), align=2)

        _for_vectors(builder, I64(0), stop, body)
        return builder.extract_element(_sum_lanes(builder, [builder.load(sums)] * LANES), I32(0))

    return types.float32(like, *[types.intp] * 4, types.float32, types.float32, types.intp), codegen


def _make_mix(group: int):
    @intrinsic
    def mix(typingctx, like, weights, weights_stride, values, stride, count, head_dim, sums, sums_stride):
        """sums[g, :head_dim] += weights[g, :count] @ values[:count, :head_dim], for g < group.

        Weights and sums are float32, values of the storage type of `like`; strides are in bytes.
        """

        def codegen(context, builder, signature, args):
            _, weights, weights_stride, values, stride, count, head_dim, sums, sums_stride = args
            element = signature.args[0].dtype
            size = 4 if element == types.float32 else 2
            stored = ir.VectorType({4: FLOAT, 2: I16}[size], LANES)
            weight_rows = [builder.add(weights, builder.mul(weights_stride, I64(g))) for g in range(group)]
            sum_rows = [builder.add(sums, builder.mul(sums_stride, I64(g))) for g in range(group)]

            def run(first, mask, width):
                places = {
                    (g, i): pointer(
                        builder, offset(builder, sum_rows[g], builder.add(first, I64(i * LANES)), 4), _FLOATS
                    )
                    for g in range(group)
                    for i in range(width)
                }
                totals = {at: cgutils.alloca_once_value(builder, constant(FLOAT, 0.0, LANES)) for at in places}
                for at, place in places.items():
                    builder.store(builder.load(place, align=4), totals[at])
                with cgutils.for_range(builder, count) as loop:
                    row = offset(builder, builder.add(values, builder.mul(loop.index, stride)), first, size)
                    parts = []
                    for i in range(width):
                        part = _masked_load(builder, stored, offset(builder, row, i * LANES, size), mask, 0)
                        parts.append(emit_widen(builder, element, part))
                    for g in range(group):
                        weight = builder.load(pointer(builder, offset(builder, weight_rows[g], loop.index, 4), FLOAT))
                        weight = splat(builder, weight)
                        for i in range(width):
                            total = builder.load(totals[g, i])
                            total = call(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, weight, parts[i], total)
                            builder.store(total, totals[g, i])
                for at, place in places.items():
                    builder.store(builder.load(totals[at]), place, align=4)

            wide = builder.udiv(head_dim, I64(4 * LANES))
            with cgutils.for_range(builder, wide) as loop:
                run(builder.mul(loop.index, I64(4 * LANES)), None, 4)
            done = builder.mul(wide, I64(4 * LANES))
            _for_span(builder, builder.sub(head_dim, done), lambda first, mask: run(builder.add(done, first), mask, 1))
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 8), codegen

    return mix


mix_1, mix_2, mix_3, mix_4 = (_make_mix(group) for group in (1, 2, 3, 4))


@intrinsic
def scale_floats(typingctx, target, count, factor):
    """Multiply the `count` float32 at an address by a factor; writes up to a multiple of `LANES`."""

    def codegen(context, builder, signature, args):
        target, count, factor = args
        factors = splat(builder, factor)

        def body(first, _):
            place = pointer(builder, offset(builder, target, first, 4), _FLOATS)
            builder.store(builder.fmul(builder.load(place, align=4), factors), place, align=4)

        _for_vectors(builder, I64(0), count, body)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), codegen


@intrinsic
def store_scaled(typingctx, like, source, count, factor, target):
    """target[:count] = source[:count] * factor, from float32 to the storage type of `like`; writes no more than that."""

    def codegen(context, builder, signature, args):
        _, source, count, factor, target = args
        element = signature.args[0].dtype
        size = 4 if element == types.float32 else 2
        factors = splat(builder, factor)

        def body(first, mask):
            value = _masked_load(builder, _FLOATS, offset(builder, source, first, 4), mask, 0.0)
            stored = emit_narrow(builder, element, builder.fmul(value, factors))
            _masked_store(builder, stored, offset(builder, target, first, size), mask)

        _for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(like, types.intp, types.intp, types.float32, types.intp), codegen


@intrinsic
def pack_keys(typingctx, like, places, shift, head_dim, target):
    """Transpose the `LANES` keys at addresses ``places[i] + shift`` into one vector column of a panel at `target`."""

    def codegen(context, builder, signature, args):
        _, places, shift, head_dim, target = args
        unit = Unit(signature.args[0].dtype)
        place_of = pointer(builder, places, I64)
        keys = [builder.add(builder.load(builder.gep(place_of, [I64(i)])), shift) for i in range(LANES)]
        num_units = builder.udiv(head_dim, I64(unit.depth))

        def body(first, mask):
            lines = _transpose(builder, [_load(builder, unit, key, first, mask) for key in keys])
            for i, line in enumerate(lines):
                index = builder.add(first, I64(i))

                def store(line=line, index=index):
                    place = pointer(builder, offset(builder, target, index, unit.size * PANEL), unit.vector)
                    builder.store(line, place, align=2)

                if mask is None:
                    store()
                else:
                    with builder.if_then(builder.icmp_signed("<", index, num_units)):
                        store()

        _for_span(builder, num_units, body)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 4), codegen


@intrinsic
def pack_value(typingctx, like, first_value, second_value, has_second, count, target):
    """Put one line of values (bfloat16: two, side by side, the second 0 unless `has_second`) into a panel's line.

    `count` is the number of elements, at most `PANEL`.
    """

    def codegen(context, builder, signature, args):
        _, first_value, second_value, has_second, count, target = args
        unit = Unit(signature.args[0].dtype)
        stored = ir.VectorType(I16 if unit.paired else unit.stored, LANES)
        size = 2 if unit.paired else unit.size

        def body(first, mask):
            value = _masked_load(builder, stored, offset(builder, first_value, first, size), mask, 0)
            if unit.paired:
                other = _masked_load(builder, stored, offset(builder, second_value, first, size), mask, 0)
                other = builder.select(has_second, other, stored(None))
                order = [i // 2 + LANES * (i % 2) for i in range(2 * LANES)]
                value = builder.shuffle_vector(value, other, ir.VectorType(I32, 2 * LANES)(order))
            builder.store(value, pointer(builder, offset(builder, target, first, unit.size), value.type), align=2)

        _for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(like, types.intp, types.intp, types.boolean, types.intp, types.intp), codegen


# -- emitters -----------------------------------------------------------------------------------------------


def _for_span(builder, count, body):
    """body(first, mask) for each whole vector of [0, count), mask None, then for the rest under its mask."""
    whole = builder.udiv(count, I64(LANES))
    with cgutils.for_range(builder, whole) as loop:
        body(builder.mul(loop.index, I64(LANES)), None)
    first = builder.mul(whole, I64(LANES))
    with builder.if_then(builder.icmp_signed("<", first, count)):
        body(first, _inside(builder, first, first, count))


def _for_vectors(builder, low, high, body):
    """body(first, None) for each vector, at a multiple of `LANES`, that has a lane in [low, high)."""
    start = builder.udiv(low, I64(LANES))
    stop = builder.udiv(builder.add(high, I64(LANES - 1)), I64(LANES))
    with cgutils.for_range(builder, stop, start=start) as loop:
        body(builder.mul(loop.index, I64(LANES)), None)


def _inside(builder, first, low, high):
    """The mask of lanes i with low <= first + i < high."""
    lanes = ir.VectorType(I32, LANES)(list(range(LANES)))
    index = builder.add(splat(builder, builder.trunc(first, I32)), lanes)
    above = builder.icmp_signed(">=", index, splat(builder, builder.trunc(low, I32)))
    return builder.and_(above, builder.icmp_signed("<", index, splat(builder, builder.trunc(high, I32))))


def _load(builder, unit, address, first, mask):
    """LANES units of a row of elements, from unit `first` on."""
    return _masked_load(builder, unit.vector, offset(builder, address, first, unit.size), mask, 0)


def _masked_load(builder, vector, address, mask, default):
    place = pointer(builder, address, vector)
    if mask is None:
        return builder.load(place, align=2)
    name = f"llvm.masked.load.{_suffix(vector)}.p0"
    return call(builder, name, vector, place, I32(2), mask, constant(vector.element, default, LANES))


def _masked_store(builder, value, address, mask):
    place = pointer(builder, address, value.type)
    if mask is None:
        builder.store(value, place, align=2)
        return
    call(builder, f"llvm.masked.store.{_suffix(value.type)}.p0", ir.VoidType(), value, place, I32(2), mask)


def _suffix(vector):
    return f"v{vector.count}{'f32' if vector.element == FLOAT else vector.element}"


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _sum_lanes(builder, vectors):
    """A vector whose lane i is the sum of the lanes of vectors[i]; there are `LANES` of them."""
    even = ir.VectorType(I32, LANES)(list(range(0, 2 * LANES, 2)))
    odd = ir.VectorType(I32, LANES)(list(range(1, 2 * LANES, 2)))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
        ]
    return vectors[0]


def _transpose(builder, rows):
    """The transpose of a square of `LANES` vectors."""
    stride = 1
    while stride < LANES:
        turned = list(rows)
        for i in range(LANES):
            if i & stride:
                continue
            a, b = rows[i], rows[i + stride]
            low = [j if not j & stride else LANES + j - stride for j in range(LANES)]
            high = [j + stride if not j & stride else LANES + j for j in range(LANES)]
            turned[i] = builder.shuffle_vector(a, b, ir.VectorType(I32, LANES)(low))
            turned[i + stride] = builder.shuffle_vector(a, b, ir.VectorType(I32, LANES)(high))
        rows, stride = turned, 2 * stride
    return rows


def _exp_of_negative(builder, x):
    """e to the power of x <= 0, within 2 units in the last place; 0 below -87.3."""

    def fma(a, b, c):
        return call(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, a, b, c)

    def number(value):
        return constant(FLOAT, value, LANES)

    smallest = number(-87.3)
    vanishes = builder.fcmp_ordered("<", x, smallest)
    x = builder.select(vanishes, smallest, x)
    n = call(builder, f"llvm.floor.v{LANES}f32", _FLOATS, fma(x, number(1.4426950408889634), number(0.5)))
    r = fma(n, number(2.12194440e-4), fma(n, number(-0.693359375), x))
    p = number(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, number(coefficient))
    p = builder.fadd(fma(p, builder.fmul(r, r), r), number(1.0))
    ints = ir.VectorType(I32, LANES)
    power = builder.shl(builder.add(builder.fptosi(n, ints), constant(I32, 127, LANES)), constant(I32, 23, LANES))
    return builder.select(vanishes, number(0.0), builder.fmul(p, builder.bitcast(power, _FLOATS)))
