"""The planner's inner loops, compiled by numba: what is asked hundreds of times in one plan, on a few dozen numbers each time.

On arrays so small a call of numpy costs more than its arithmetic, and a plan was thousands of them. Here the loops are written out
and compiled on first use: machine code that lets go of the interpreter's lock, kept on disk for the next process (`build`).

    steps        the mean steps of many numbers of stages, and what units cost in them
    forecasts    one layout at many numbers of sequences in service: rates, waits, goodput
    bottlenecks  equal layers: the least busiest stage, and a split that has it
    convoys      the shortest round of whole splits: of few devices exactly, and the best of many neighbours

The laws themselves are not here: `traffic.step_of`, `cost.layer_amounts`, `convoy.round_seconds` are written for numbers and arrays
alike, numpy evaluates them elsewhere and numba compiles the very same functions into these loops.

A module is imported when it is first used, since numba takes longer to import than all of the planner. Compiling takes seconds
where nothing is on disk yet, so whoever has an event loop calls `scheduler.compiling.prepare` in another thread before it asks for a plan.

Never true: these know a `Plan`, a layout or a worker's name. Arrays of numbers go in and come out.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.planning.compiled import bottlenecks, build, convoys, forecasts, steps

__all__ = ["bottlenecks", "build", "convoys", "forecasts", "load", "steps"]
_MODULES = ("bottlenecks", "build", "convoys", "forecasts", "steps")


def load() -> None:
    """Import all of it, so that `build` knows every kernel."""
    for name in _MODULES:
        importlib.import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
