"""What every picture of a benchmark begins with: matplotlib, if it is there, and without a window."""

import importlib
from typing import Any

from arms import note


def pyplot_if_there() -> Any | None:
    """`matplotlib.pyplot`; None, and a line that says why there are no pictures, without it."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        note("no pictures: matplotlib is not installed (pip install -e '.[bench]')")
        return None
    pyplot.switch_backend("Agg")
    return pyplot
