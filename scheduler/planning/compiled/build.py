"""How the planner's loops are compiled: `kernel` for what Python calls, `part` for what kernels call. The laws that
these share with numpy (`cost`, `traffic`, `convoy`) are told to numba here; they stay Python functions.

The cache on disk is valid for exactly the sources of the planner. numba itself looks at the file of the outermost function only, and
would run stale code after a change of a law elsewhere. Where no directory for a cache can be written to, everything
works without one, and is compiled anew by every process.
"""

import hashlib
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.extending import overload, register_jitable

from scheduler.planning import convoy, cost, traffic

REAL, INT = types.float64, types.int64
F1, F2, F3, F4 = (types.Array(REAL, ndim, "C") for ndim in (1, 2, 3, 4))
I1, I2 = (types.Array(INT, ndim, "C") for ndim in (1, 2))
"""Types of arguments: a number, and arrays that are contiguous and may be written to."""
KERNELS: list[tuple[Any, tuple[Any, ...]]] = []
"""Every kernel with the types of the arguments that it is called with."""
_PLANNING = Path(__file__).parent.parent


def kernel(*arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile for these types of arguments in `compile_all`, or on first use: no interpreter's lock, cached on disk where that is possible.

    No kernel calls another, only parts. numba keeps a kernel's constants under its name; a caller read from disk brings those that it needs
    itself, and the kernel, read after it, would miss the others (0.68: "'descr' is NULL").
    """

    def decorate(function: Callable[..., Any]) -> Any:
        options = {"nogil": True, "error_model": "numpy"}
        try:
            compiled = njit(cache=True, **options)(function)
        except RuntimeError:  # no directory that numba knows of can be written to
            compiled = njit(**options)(function)
        cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
        if cache_file is not None and hasattr(cache_file, "_source_stamp"):
            cache_file._source_stamp = _DIGEST
        KERNELS.append((compiled, arguments))
        return compiled

    return decorate


def is_cached() -> bool | None:
    """Whether every kernel is here or on disk already; None where there is no disk to look at, or this version of numba does not say."""
    try:
        return all(
            arguments in compiled.overloads
            or compiled._cache._index_key(arguments, compiled.targetctx.codegen())
            in compiled._cache._cache_file._load_index()
            for compiled, arguments in KERNELS
        )
    except (AttributeError, OSError):
        return None
    except (EOFError, ValueError, pickle.UnpicklingError):  # it is damaged, and will be written anew
        return False


def compile_all() -> None:
    """Compile every kernel, or read it from disk, unless that was done."""
    for compiled, arguments in KERNELS:
        if arguments not in compiled.overloads:
            compiled.compile(arguments)


def part(function: Callable[..., Any]) -> Any:
    """Compiled with the kernels that call it."""
    options = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(**options)(function)


@part
def sort_by(values, order):
    """``order``, some indices of ``values``, ascending by these; Shell's method, since numba takes longer to compile one of its own sorts than
    all that sorts here."""
    gap = 1
    while gap < len(order) // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for at in range(gap, len(order)):
            moved, to = order[at], at
            while to >= gap and values[order[to - gap]] > values[moved]:
                order[to] = order[to - gap]
                to -= gap
            order[to] = moved
        gap //= 3


@overload(cost.pick)
def _pick_of_numbers(condition, yes, no):
    return lambda condition, yes, no: yes if condition else no


@overload(cost.power)
def _power_of_numbers(x, p):
    return lambda x, p: x * x * (x * x) if p == 4.0 else x**p


@overload(cost.root)
def _root_of_numbers(x, p):
    return lambda x, p: math.sqrt(math.sqrt(x)) if p == 4.0 else x ** (1.0 / p)


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PLANNING.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DIGEST = _source_digest()
for _law in (
    convoy.slow_weight,
    convoy.weighted,
    convoy.round_seconds,
    cost.corner,
    cost.layer_amounts,
    traffic.piece_of,
    traffic.step_of,
):
    register_jitable(error_model="numpy")(_law)
