"""The planner's inner loops, compiled by numba: what is asked hundreds of times in one plan, on a few dozen numbers each time.

On arrays so small a call of numpy costs more than its arithmetic, and a plan was thousands of them. Here the loops are written out
and compiled on first use: machine code that lets go of the interpreter's lock, kept on disk for the next process (`build`).

    steps        the mean steps of many numbers of stages, and what units cost in them
    forecasts    one layout at many numbers of sequences in service: rates, waits, goodput
    bottlenecks  equal layers: the least busiest stage, and a split that has it
    convoys      the shortest round of whole splits: of few devices exactly, and the best of many neighbours

The laws themselves are not here: `traffic.step_of`, `cost.layer_amounts`, `convoy.round_seconds` are written for numbers and arrays
alike, numpy evaluates them elsewhere and numba compiles the very same functions into these loops.

A module is imported when it is first used, since numba takes longer to import than all of the planner. Compiling takes a dozen seconds
where nothing is on disk yet, most of them with the interpreter's lock: whoever has an event loop calls `prepare` in another thread
before it asks for a plan. That leaves the compiling to a process of its own, behind all others of the host, and reads what it has made.

Never true: these know a `Plan`, a layout or a worker's name. Arrays of numbers go in and come out.
"""

import contextlib
import importlib
import os
import subprocess
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler.planning.compiled import bottlenecks, build, convoys, forecasts, steps

__all__ = ["bottlenecks", "build", "convoys", "forecasts", "load", "prepare", "steps"]
_COMPILES_WITHIN_S = 300.0
"""On cores that serve all the while it may take minutes; nobody waits for that but an autopilot, and who asks for a plan."""
_preparing = threading.Lock()
_MODULES = ("bottlenecks", "build", "convoys", "forecasts", "steps")


def prepare() -> None:
    """Have all of it, from disk; nothing where that was done. For a thread that may take its time, where nothing is on disk yet."""
    with _preparing:
        build = load()
        if build.is_cached() is False:
            _compile_elsewhere()
        build.compile_all()


def load() -> Any:
    """Import every module; `build`, which then knows all kernels."""
    for name in _MODULES:
        importlib.import_module(f"{__name__}.{name}")
    return importlib.import_module(f"{__name__}.build")


def _compile_elsewhere() -> None:
    """Fill the cache on disk by another process, which ends with this one. If it fails, this one compiles."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", __name__]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=_COMPILES_WITHIN_S,
            check=False,
        )


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
