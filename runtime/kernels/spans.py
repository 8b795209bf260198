"""Elementwise work on a run of elements, as numba intrinsics over addresses: norms, rotary, activations, copies.

How it works: whole vectors of `LANES` first, the rest under a mask, so that nothing outside the operands is touched.
`like` is an array whose storage type the other side of the operation has; counts are elements unless they say bytes.
"""

from numba import types
from numba.core import cgutils

from runtime.kernels.lanes import (
    FLOAT,
    I8,
    constant,
    exp_of_negative,
    fma,
    for_span,
    intrinsic,
    load_wide,
    offset,
    pointer,
    splat,
    store_narrow,
    sum_of,
)

_ADDRESS = types.intp
_F32 = types.float32


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """Copy `count` bytes from the address `source` to `target`."""

    def codegen(context, builder, signature, args):
        target, source, count = args
        cgutils.raw_memcpy(builder, pointer(builder, target, I8), pointer(builder, source, I8), count, 1)
        return context.get_dummy_value()

    return types.void(_ADDRESS, _ADDRESS, types.intp), codegen


@intrinsic
def sum_of_squares(typingctx, like, source, count):
    """The sum of the squares of `count` elements of the storage type of `like`."""

    def codegen(context, builder, signature, args):
        _, source, count = args
        total = cgutils.alloca_once_value(builder, constant(FLOAT, 0.0))

        def body(first, mask):
            value = load_wide(builder, signature.args[0].dtype, source, first, mask)
            builder.store(fma(builder, value, value, builder.load(total)), total)

        for_span(builder, count, body)
        return sum_of(builder, builder.load(total))

    return _F32(like, _ADDRESS, types.intp), codegen


@intrinsic
def store_weighted(typingctx, source_like, like, source, count, factor, weight, target):
    """target = source * factor * weight; `weight` float32, `source` and `target` of the two storage types."""

    def codegen(context, builder, signature, args):
        _, _, source, count, factor, weight, target = args
        factors = splat(builder, factor)

        def body(first, mask):
            value = builder.fmul(load_wide(builder, signature.args[0].dtype, source, first, mask), factors)
            value = builder.fmul(value, load_wide(builder, _F32, weight, first, mask))
            store_narrow(builder, signature.args[1].dtype, value, target, first, mask)

        for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(source_like, like, _ADDRESS, types.intp, _F32, _ADDRESS, _ADDRESS), codegen


@intrinsic
def store_scaled(typingctx, like, source, count, factor, target):
    """target = source * factor, from float32 to the storage type of `like`."""

    def codegen(context, builder, signature, args):
        _, source, count, factor, target = args
        factors = splat(builder, factor)

        def body(first, mask):
            value = builder.fmul(load_wide(builder, _F32, source, first, mask), factors)
            store_narrow(builder, signature.args[0].dtype, value, target, first, mask)

        for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(like, _ADDRESS, types.intp, _F32, _ADDRESS), codegen


@intrinsic
def add_floats(typingctx, target, count, source):
    """target += source, both float32."""

    def codegen(context, builder, signature, args):
        target, count, source = args

        def body(first, mask):
            value = load_wide(builder, _F32, source, first, mask)
            value = builder.fadd(value, load_wide(builder, _F32, target, first, mask))
            store_narrow(builder, _F32, value, target, first, mask)

        for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(_ADDRESS, types.intp, _ADDRESS), codegen


@intrinsic
def store_sum(typingctx, like, source, count, residual, target):
    """target = source + residual; `source` float32, the others of the storage type of `like`."""

    def codegen(context, builder, signature, args):
        _, source, count, residual, target = args
        element = signature.args[0].dtype

        def body(first, mask):
            value = load_wide(builder, _F32, source, first, mask)
            value = builder.fadd(value, load_wide(builder, element, residual, first, mask))
            store_narrow(builder, element, value, target, first, mask)

        for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(like, _ADDRESS, types.intp, _ADDRESS, _ADDRESS), codegen


@intrinsic
def store_silu_mul(typingctx, like, gate, up, count, target):
    """target = silu(gate) * up, from float32 to the storage type of `like`."""

    def codegen(context, builder, signature, args):
        _, gate, up, count, target = args
        zero, one = constant(FLOAT, 0.0), constant(FLOAT, 1.0)

        def body(first, mask):
            x = load_wide(builder, _F32, gate, first, mask)
            is_negative = builder.fcmp_ordered("<", x, zero)
            decay = exp_of_negative(builder, builder.select(is_negative, x, builder.fsub(zero, x)))
            numerator = builder.select(is_negative, builder.fmul(x, decay), x)
            value = builder.fdiv(numerator, builder.fadd(one, decay))
            value = builder.fmul(value, load_wide(builder, _F32, up, first, mask))
            store_narrow(builder, signature.args[0].dtype, value, target, first, mask)

        for_span(builder, count, body)
        return context.get_dummy_value()

    return types.void(like, _ADDRESS, _ADDRESS, types.intp, _ADDRESS), codegen


@intrinsic
def rotate_head(typingctx, head, half, cos, sin):
    """Rotate the ``2 * half`` float32 of one head in place, the first half against the second."""

    def codegen(context, builder, signature, args):
        head, half, cos, sin = args
        upper = offset(builder, head, half, 4)

        def body(first, mask):
            low, high, c, s = (load_wide(builder, _F32, place, first, mask) for place in (head, upper, cos, sin))
            turned = builder.fsub(builder.fmul(low, c), builder.fmul(high, s))
            store_narrow(builder, _F32, turned, head, first, mask)
            turned = fma(builder, high, c, builder.fmul(low, s))
            store_narrow(builder, _F32, turned, upper, first, mask)

        for_span(builder, half, body)
        return context.get_dummy_value()

    return types.void(_ADDRESS, types.intp, _ADDRESS, _ADDRESS), codegen
