"""Several threads for one kernel: they enter the same function and divide its work among them.

How it works: a kernel hands a function and its arguments to `on_team`, and every member of the team calls it, with `me` before the
arguments: the team's memory, the member's number and how many there are. Each takes its `share`; where one needs what the
others made, all meet at a `barrier`. The calling thread is member 0. The others never return to Python: they are in a compiled loop,
look for work for some microseconds and then sleep (a futex), so that nothing of it waits for the interpreter and a
worker at rest costs nothing. Who waits at a barrier for long sleeps, too: the system can then give its core to the member that it
had taken the core from.

A team does one thing at a time. A thread that comes while it is busy, one that has said `work_alone` (a shadow's, so that a step never
comes to a team that is taken), and a team of one do the work alone, with the same result: no bit depends on how many members there are.

What is never true: a member leaves the function by itself. What one must not do (a missing page), all find out by
themselves, from what nobody changes.
"""

import ctypes
import platform
import sys
import threading

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from runtime.kernels.clock import nanoseconds
from runtime.kernels.lanes import I32, I64, call, intrinsic, kernel, part, pointer

_LINE = 64
"""Bytes of a cache line: what different members write lies in different ones."""
_START, _DONE, _MEET, _JOB, _MEMBERS = range(5)
"""Lines of a team's memory. The first three are gates: how often it was passed, and how many sleep before it. Then what is to be done:
function, arguments, whether the team has something to do, its size. From `_MEMBERS` on a line of each member: the barriers it has met at."""
_WORK_NS, _MEET_NS = 100_000, 300_000
"""How long to look for work, and for the others at a barrier, before sleeping. To be woken takes a core 20 to 150 us: who slept
at one barrier is late at the next, where the others would go to sleep in turn. (With 10 to 40 us a step of 300 ms took 25 more.)"""
_LOOKS = 16
"""Looks at a gate for each look at the clock."""
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
_WAIT, _WAKE = 128, 129


# -- what kernels call --------------------------------------------------------------------------------------


@part
def barrier(me):
    """Wait until all members have come here; what they wrote before can be read after."""
    team, member, size = me
    if size > 1:
        meetings = _add(team + (_MEMBERS + member) * _LINE, 1) + 1
        _pass_on(team + _MEET * _LINE)
        _wait_until(team + _MEET * _LINE, meetings * size, _MEET_NS)


@part
def share(me, count):
    """This member's part of `count` pieces, as (first, stop)."""
    return me[1] * count // me[2], (me[1] + 1) * count // me[2]


@intrinsic
def on_team(typingctx, team, body, args):
    """``body(me, *args)`` by every member of `team`, an int64 array (`current`); what it returned to the caller, int64, or 0.

    `body` is a kernel that returns int64 or nothing, `args` a tuple.
    """
    inner = types.UniTuple(types.intp, 3), *args.types
    made = typingctx.resolve_function_type(body, inner, {})
    assert made.return_type in (types.int64, types.none), f"{body} returns {made.return_type}"

    def codegen(context, builder, signature, values):
        start = builder.ptrtoint(context.make_array(team)(context, builder, values[0]).data, I64)
        given = cgutils.unpack_tuple(builder, values[2])
        kept = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in given]))
        for index, value in enumerate(given):
            builder.store(value, cgutils.gep_inbounds(builder, kept, 0, index))
        compiled = body.dispatcher.overloads[inner]
        context.active_code_library.add_linking_library(compiled.library)
        name = f"{builder.function.name}.{compiled.fndesc.mangled_name}"
        entry = ir.Function(builder.module, ir.FunctionType(I64, [I64] * 4), name=builder.module.get_unique_name(name))
        entry.linkage = "internal"
        inside = ir.IRBuilder(entry.append_basic_block())
        me = cgutils.pack_array(inside, entry.args[:3])
        source = pointer(inside, entry.args[3], kept.type.pointee)
        again = [inside.load(cgutils.gep_inbounds(inside, source, 0, index)) for index in range(len(given))]
        function = context.declare_function(builder.module, compiled.fndesc)
        _, result = context.call_conv.call_function(inside, function, made.return_type, made.args, [me, *again])
        inside.ret(I64(0) if made.return_type == types.none else result)
        operands = start, builder.ptrtoint(entry, I64), builder.ptrtoint(kept, I64)
        return context.compile_internal(builder, _run, _RUN, operands)

    return types.int64(team, body, args), codegen


# -- what it is made of -------------------------------------------------------------------------------------


def _run(team, function, arguments):
    """As `on_team`, for the addresses of all three."""
    job = team + _JOB * _LINE
    size = _read(job + 24)
    if size == 1 or not _take(job + 16):
        return _enter(function, team, 0, 1, arguments)
    _write(job, function)
    _write(job + 8, arguments)
    _pass_on(team + _START * _LINE)
    result = _enter(function, team, 0, size, arguments)
    _wait_until(team + _DONE * _LINE, _load(team + _START * _LINE) * (size - 1), _MEET_NS)
    _free(job + 16)
    return result


_RUN = types.int64(types.intp, types.intp, types.intp)


@kernel
def _serve(team, member):
    """A member's life: do what there is to do, until it is told to end."""
    job, started = team + _JOB * _LINE, 0
    while True:
        started += 1
        _wait_until(team + _START * _LINE, started, _WORK_NS)
        function = _read(job)
        if function == 0:
            return
        _enter(function, team, member, _read(job + 24), _read(job + 8))
        _pass_on(team + _DONE * _LINE)


@kernel
def _dismiss(team):
    """End the members but the first, when they have nothing to do."""
    while not _take(team + _JOB * _LINE + 16):
        _pause()
    _write(team + _JOB * _LINE, 0)
    _pass_on(team + _START * _LINE)


@kernel
def _wait_until(gate, count, awake_ns):
    """Until the gate was passed `count` times (both are counted modulo 2 to the 32nd); asleep after so long."""
    until = nanoseconds() + awake_ns
    while nanoseconds() < until:
        for _ in range(_LOOKS):
            if _is_reached(_load(gate), count):
                return
            _pause()
    _add(gate + 4, 1)
    while True:
        seen = _load(gate)
        if _is_reached(seen, count):
            break
        _sleep(gate, seen)
    _add(gate + 4, -1)


@kernel
def _pass_on(gate):
    """Pass a gate, and wake those that sleep before it."""
    _add(gate, 1)
    if _load(gate + 4) > 0:
        _wake(gate)


@part
def _is_reached(seen, count):
    return np.int32(seen - count) >= 0


def _word(builder, place):
    return pointer(builder, place, I32)


@intrinsic
def _load(typingctx, place):
    """The int32 at an address, as others left it."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.load_atomic(_word(builder, args[0]), "seq_cst", 4), I64)

    return types.int64(types.intp), codegen


@intrinsic
def _add(typingctx, place, amount):
    """Add to the int32 at an address; what it was before."""

    def codegen(context, builder, signature, args):
        amount = builder.trunc(args[1], I32)
        return builder.sext(builder.atomic_rmw("add", _word(builder, args[0]), amount, "seq_cst"), I64)

    return types.int64(types.intp, types.intp), codegen


@intrinsic
def _take(typingctx, place):
    """Set the int32 at an address from 0 to 1; False when it is not 0."""

    def codegen(context, builder, signature, args):
        pair = builder.cmpxchg(_word(builder, args[0]), I32(0), I32(1), "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp), codegen


@intrinsic
def _free(typingctx, place):
    """Undo `_take`."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(I32(0), _word(builder, args[0]), "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def _read(typingctx, place):
    def codegen(context, builder, signature, args):
        return builder.load(pointer(builder, args[0], I64))

    return types.int64(types.intp), codegen


@intrinsic
def _write(typingctx, place, value):
    def codegen(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], I64))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _enter(typingctx, function, team, member, size, arguments):
    """Call what `on_team` made of a body."""

    def codegen(context, builder, signature, args):
        function, *operands = args
        return builder.call(pointer(builder, function, ir.FunctionType(I64, [I64] * 4)), operands)

    return types.int64(*[types.intp] * 5), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that this is a loop that waits."""

    def codegen(context, builder, signature, args):
        if platform.machine() == "x86_64":
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif platform.machine() in ("aarch64", "arm64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _sleep(typingctx, place, value):
    """Until somebody calls `_wake`, if the int32 there is still `value`; may end for no reason."""

    def codegen(context, builder, signature, args):
        _system_call(builder, args[0], _WAIT, args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _wake(typingctx, place):
    def codegen(context, builder, signature, args):
        _system_call(builder, args[0], _WAKE, I64(0x7FFFFFFF))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _system_call(builder, place, operation, value):
    """A futex; where there is none, who waits lets others go first."""
    if _FUTEX:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
        builder.call(function, [I64(_FUTEX), place, I64(operation), value, I64(0), I64(0), I64(0)])
    elif operation == _WAIT:
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield"), [])


# -- the team of this process -------------------------------------------------------------------------------


class _Team:
    """Raises (from `start`): RuntimeError when the system has no more threads; none of this team is left then."""

    def __init__(self, size: int) -> None:
        room = np.zeros((_MEMBERS + size + 1) * _LINE // 8, np.int64)
        ctypes.pythonapi.Py_IncRef(
            ctypes.py_object(room)
        )  # for good: members may look at it while the interpreter ends
        begin = -room.ctypes.data % _LINE // 8
        self.memory = room[begin : begin + (_MEMBERS + size) * _LINE // 8]
        self.memory[_JOB * _LINE // 8 + 3] = self.size = size
        self._threads: list[threading.Thread] = []

    def start(self) -> "_Team":
        start = self.memory.ctypes.data
        if self.size > 1:  # here, where an error is heard of: a member that fails would be waited for
            _serve.compile((types.int64, types.int64))
            _dismiss.compile((types.int64,))
        try:
            for member in range(1, self.size):
                thread = threading.Thread(target=_serve, args=(start, member), name=f"kernel-{member}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.end()
            raise
        return self

    def end(self) -> None:
        if self._threads:
            _dismiss(self.memory.ctypes.data)
        for thread in self._threads:
            thread.join()


_team = _nobody = _Team(1)
_caller = threading.local()


def work_alone() -> None:
    """The calling thread does without the team from now on."""
    _caller.is_alone = True


def current() -> np.ndarray:
    """The memory of the calling thread's team, for `on_team`: of this process' one, or of nobody else."""
    return (_nobody if getattr(_caller, "is_alone", False) else _team).memory


def num_threads() -> int:
    """How many threads a kernel has that the calling thread calls, itself included."""
    return 1 if getattr(_caller, "is_alone", False) else _team.size


def set_num_threads(size: int) -> None:
    """So many threads for every kernel of this process from now on; not while one runs.

    Raises:
        ValueError: when it is not positive.
        RuntimeError: when the system has no more threads; then a kernel has one.
    """
    global _team
    if size < 1:
        raise ValueError(f"{size} threads for the kernels; at least one is needed")
    if size != _team.size:
        _team.end()
        _team = _nobody
        _team = _Team(size).start()
