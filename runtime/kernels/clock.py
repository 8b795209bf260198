"""How long the parts of a fused kernel take, for whoever asks: the clock, read from inside compiled code.

How it works: a kernel gets an int64 array ``spent``. When it is empty, as usual, nothing is read and nothing is written;
else the nanoseconds of each part are added to the part's entry. The clock is that of `time.perf_counter_ns`, read by the
C library without a system call, some 20 ns each.
"""

import time

from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.lanes import I32, I64, intrinsic, part

PRODUCTS, ATTENTION, LM_HEAD = range(3)
"""The entries of `spent`. What is in none of them is everything else."""
NUM_PARTS = 3

_CLOCK = getattr(time, "CLOCK_MONOTONIC", 1)


@intrinsic
def nanoseconds(typingctx):
    """The monotonic clock, int64."""

    def codegen(context, builder, signature, args):
        times = ir.LiteralStructType([I64, I64])
        place = cgutils.alloca_once(builder, times)
        read = ir.FunctionType(I32, [I32, times.as_pointer()])
        builder.call(cgutils.get_or_insert_function(builder.module, read, "clock_gettime"), [I32(_CLOCK), place])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, place, 0, index)) for index in (0, 1))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)

    return types.int64(), codegen


@part
def start_clock(spent):
    """When a part begins; 0 when nobody asks."""
    return nanoseconds() if len(spent) else 0


@part
def add(spent, what, begun):
    """The part that began at `begun` has ended."""
    if len(spent):
        spent[what] += nanoseconds() - begun
