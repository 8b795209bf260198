"""The inner loops of attention, as numba intrinsics over addresses: scores, softmax weights, mixing, packing.

How it works: `score_keys` takes one query against `LANES` keys and sums across lanes by a tree; `mix` adds up values for
a group of heads that share them; `weigh` turns scores into weights. For prefill, `pack_keys` and `pack_values` lay a
context out in the panels that tiles read. Strides are in bytes. Float scratch is written in whole vectors: it must have
room up to the next multiple of `LANES`. Operands are never read beyond their end.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.lanes import (
    FLOAT,
    FLOATS,
    HAS_SCALE,
    I16,
    I32,
    I64,
    LANES,
    LOWEST,
    PANEL,
    Unit,
    constant,
    exp_of_negative,
    fma,
    fold,
    for_span,
    for_vectors,
    intrinsic,
    lanes_inside,
    larger,
    load_wide,
    masked_load,
    offset,
    pointer,
    power_of_two,
    prefetch_line,
    size_of,
    splat,
    store_narrow,
    sum_of,
    sums_of,
)

_ADDRESS = types.intp
_LOG2_E = 1.4426950408889634


@intrinsic
def score_keys(typingctx, like, queries, keys, stride, count, shape, out, out_stride, ahead, pace):
    """out[h, i] = query h . key i of its KV head, for all heads and i < LANES; keys from `count` on repeat the last.

    `shape` is (num_kv_heads, group, head_dim), head_dim even. Queries, and the KV heads of a key, lie side by side, all
    of the storage type of `like`. Meanwhile the second-level cache is asked for as many keys from `ahead` on, each at a place for every
    head, `pace` bytes apart.
    """

    def codegen(context, builder, signature, args):
        _, queries, keys, stride, count, shape, out, out_stride, ahead, pace = args
        num_kv_heads, group, head_dim = cgutils.unpack_tuple(builder, shape)
        unit = Unit(signature.args[0].dtype)
        num_units = builder.udiv(head_dim, I64(unit.depth))
        last = builder.sub(count, I64(1))
        shifts = []
        for i in range(LANES):
            index = builder.select(builder.icmp_signed("<", last, I64(i)), last, I64(i))
            shifts.append(builder.mul(index, stride))
        totals = [cgutils.alloca_once(builder, FLOATS) for _ in range(LANES)]
        with cgutils.for_range(builder, num_kv_heads) as kv_heads:
            places = [builder.add(keys, shift) for shift in shifts]
            places = [offset(builder, place, builder.mul(kv_heads.index, num_units), unit.size) for place in places]
            with cgutils.for_range(builder, group) as members:
                head = builder.add(builder.mul(kv_heads.index, group), members.index)
                query = offset(builder, queries, builder.mul(head, num_units), unit.size)
                line = builder.add(ahead, builder.mul(head, pace))
                for i, total in enumerate(totals):
                    builder.store(constant(FLOAT, 0.0), total)
                    prefetch_line(builder, builder.add(line, builder.mul(stride, I64(i))), level=2)

                def body(first, mask, query=query, places=places):
                    q_terms = unit.terms(builder, [unit.load(builder, query, first, mask)])
                    for place, total in zip(places, totals, strict=True):
                        k_terms = unit.terms(builder, [unit.load(builder, place, first, mask)])
                        for q_term, k_term in zip(q_terms, k_terms, strict=True):
                            builder.store(unit.multiply_add(builder, q_term[0], k_term[0], builder.load(total)), total)

                for_span(builder, num_units, body)
                scores = sums_of(builder, [builder.load(total) for total in totals])
                place = builder.add(out, builder.mul(head, out_stride))
                builder.store(scores, pointer(builder, place, FLOATS), align=4)
        return context.get_dummy_value()

    sizes = types.UniTuple(types.intp, 3)
    return types.void(like, _ADDRESS, _ADDRESS, types.intp, types.intp, sizes, *[types.intp] * 4), codegen


def _whole_or_part(builder, first, low, high, body):
    """body(first, mask) for a vector, with the mask of its lanes in [low, high), None when all of them are."""
    below = builder.icmp_signed(">=", first, low)
    is_whole = builder.and_(below, builder.icmp_signed("<=", builder.add(first, I64(LANES)), high))
    with builder.if_else(is_whole, likely=True) as (then, otherwise):
        with then:
            body(first, None)
        with otherwise:
            body(first, lanes_inside(builder, first, low, high))


@intrinsic
def find_top(typingctx, scores, low, high):
    """The largest of the float32 scores[low:high], `LOWEST` for none."""

    def codegen(context, builder, signature, args):
        scores, low, high = args
        top = cgutils.alloca_once_value(builder, constant(FLOAT, LOWEST))

        def body(first, inside):
            value = masked_load(builder, FLOATS, offset(builder, scores, first, 4), inside, LOWEST)
            builder.store(larger(builder, builder.load(top), value), top)

        for_vectors(builder, low, high, lambda first: _whole_or_part(builder, first, low, high, body))
        return fold(builder, builder.load(top), larger)

    return types.float32(_ADDRESS, types.intp, types.intp), codegen


@intrinsic
def weigh(typingctx, like, scores, low, high, stop, scale, top, out):
    """out[j] = exp((scores[j] - top) * scale) for low <= j < high and 0 elsewhere in [0, stop); returns their sum.

    `out` is of the storage type of `like` and written up to a multiple of `LANES`. No score exceeds `top`.
    """

    def codegen(context, builder, signature, args):
        _, scores, low, high, stop, scale, top, out = args
        element = signature.args[0].dtype
        power = exp_of_negative
        if HAS_SCALE and element != types.float32:  # its rounding is lost in that of the weights
            power, scale = power_of_two, builder.fmul(scale, FLOAT(_LOG2_E))
        total = cgutils.alloca_once_value(builder, constant(FLOAT, 0.0))
        scales, tops = splat(builder, scale), splat(builder, top)

        def body(first, inside):
            value = masked_load(builder, FLOATS, offset(builder, scores, first, 4), inside, LOWEST)
            weight = power(builder, builder.fmul(builder.fsub(value, tops), scales))
            if inside is not None:
                weight = builder.select(inside, weight, constant(FLOAT, 0.0))
            builder.store(builder.fadd(builder.load(total), weight), total)
            store_narrow(builder, element, weight, out, first, None)

        for_vectors(builder, I64(0), stop, lambda first: _whole_or_part(builder, first, low, high, body))
        return sum_of(builder, builder.load(total))

    return types.float32(like, _ADDRESS, *[types.intp] * 3, types.float32, types.float32, _ADDRESS), codegen


@intrinsic
def shrink(typingctx, difference):
    """exp(difference) for a difference <= 0."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(exp_of_negative(builder, splat(builder, args[0])), I32(0))

    return types.float32(types.float32), codegen


@intrinsic
def scale_floats(typingctx, target, count, factor):
    """Multiply `count` float32 by a factor, and those up to a multiple of `LANES` too."""

    def codegen(context, builder, signature, args):
        target, count, factor = args
        factors = splat(builder, factor)

        def body(first):
            value = builder.fmul(load_wide(builder, types.float32, target, first, None), factors)
            store_narrow(builder, types.float32, value, target, first, None)

        for_vectors(builder, I64(0), count, body)
        return context.get_dummy_value()

    return types.void(_ADDRESS, types.intp, types.float32), codegen


def _make_mix(group: int):
    @intrinsic
    def mix(typingctx, like, weights, weights_stride, values, stride, count, head_dim, sums, sums_stride, ahead, pace):
        """sums[g, :head_dim] += weights[g, :count] @ values[:count, :head_dim], for g < group.

        Weights and sums are float32, values of the storage type of `like`. Meanwhile the second-level cache is asked
        for as many values from `ahead` on, each at two places, `pace` bytes apart.
        """

        def codegen(context, builder, signature, args):
            _, weights, weights_stride, values, stride, count, head_dim, sums, sums_stride, ahead, pace = args
            element = signature.args[0].dtype
            weight_rows = [builder.add(weights, builder.mul(weights_stride, I64(g))) for g in range(group)]
            sum_rows = [builder.add(sums, builder.mul(sums_stride, I64(g))) for g in range(group)]

            def run(first, mask, width):
                starts = [builder.add(first, I64(i * LANES)) for i in range(width)]
                grid = [(g, i) for g in range(group) for i in range(width)]
                totals = {
                    (g, i): cgutils.alloca_once_value(
                        builder, load_wide(builder, types.float32, sum_rows[g], starts[i], None)
                    )
                    for g, i in grid
                }
                with cgutils.for_range(builder, count) as loop:
                    row = builder.add(values, builder.mul(loop.index, stride))
                    line = builder.add(ahead, builder.mul(loop.index, stride))
                    prefetch_line(builder, line, level=2)
                    prefetch_line(builder, builder.add(line, pace), level=2)
                    parts = [load_wide(builder, element, row, start, mask) for start in starts]
                    places = [pointer(builder, offset(builder, line, loop.index, 4), FLOAT) for line in weight_rows]
                    spread = [splat(builder, builder.load(place)) for place in places]
                    for g, i in grid:
                        builder.store(fma(builder, spread[g], parts[i], builder.load(totals[g, i])), totals[g, i])
                for g, i in grid:
                    store_narrow(builder, types.float32, builder.load(totals[g, i]), sum_rows[g], starts[i], None)

            wide = builder.udiv(head_dim, I64(4 * LANES))
            with cgutils.for_range(builder, wide) as loop:
                run(builder.mul(loop.index, I64(4 * LANES)), None, 4)
            done = builder.mul(wide, I64(4 * LANES))
            for_span(builder, builder.sub(head_dim, done), lambda first, mask: run(builder.add(done, first), mask, 1))
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 10), codegen

    return mix


mix_1, mix_2, mix_3, mix_4 = (_make_mix(group) for group in (1, 2, 3, 4))


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
            lines = _transpose(builder, [unit.load(builder, key, first, mask) for key in keys])
            for i, line in enumerate(lines):
                index = builder.add(first, I64(i))
                place = pointer(builder, offset(builder, target, index, unit.size * PANEL), unit.vector)
                if mask is None:
                    builder.store(line, place, align=2)
                    continue
                with builder.if_then(builder.icmp_signed("<", index, num_units)):
                    builder.store(line, place, align=2)

        for_span(builder, num_units, body)
        return context.get_dummy_value()

    return types.void(like, _ADDRESS, types.intp, types.intp, _ADDRESS), codegen


@intrinsic
def pack_values(typingctx, like, value, next_value, has_next, count, target):
    """Lay one line of values (bfloat16: two, side by side, the next as 0 unless `has_next`) into a panel's line.

    `count` is the number of elements, at most `PANEL`.
    """

    def codegen(context, builder, signature, args):
        _, value, next_value, has_next, count, target = args
        element = signature.args[0].dtype
        unit = Unit(element)
        stored = ir.VectorType(I16 if unit.paired else unit.stored, LANES)

        def body(first, mask):
            line = masked_load(builder, stored, offset(builder, value, first, size_of(element)), mask, 0)
            if unit.paired:
                other = masked_load(builder, stored, offset(builder, next_value, first, size_of(element)), mask, 0)
                other = builder.select(has_next, other, stored(None))
                order = [i // 2 + LANES * (i % 2) for i in range(2 * LANES)]
                line = builder.shuffle_vector(line, other, ir.VectorType(I32, 2 * LANES)(order))
            builder.store(line, pointer(builder, offset(builder, target, first, unit.size), line.type), align=2)

        for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(like, _ADDRESS, _ADDRESS, types.boolean, types.intp, _ADDRESS), codegen


def _transpose(builder, rows):
    """The transpose of a square of `LANES` vectors."""
    stride = 1
    while stride < LANES:
        turned = list(rows)
        for i in (i for i in range(LANES) if not i & stride):
            low = [LANES + j - stride if j & stride else j for j in range(LANES)]
            high = [LANES + j if j & stride else j + stride for j in range(LANES)]
            turned[i] = builder.shuffle_vector(rows[i], rows[i + stride], ir.VectorType(I32, LANES)(low))
            turned[i + stride] = builder.shuffle_vector(rows[i], rows[i + stride], ir.VectorType(I32, LANES)(high))
        rows, stride = turned, 2 * stride
    return rows
