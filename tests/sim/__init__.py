"""The real scheduler and workers over a simulated clock, network and model."""

import functools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

SEEDS_PER_BLOCK = 50
"""Seeds of one test case; `--seeds` is rounded up to a multiple of it."""


def of_seeds(check: Callable[[int], Counter[str]], seeds: Iterable[int]) -> Counter[str]:
    """What `check` counts, over all `seeds`, on all cores; it must be a function of a module.

    Raises:
        AssertionError: naming the first seed that failed, and what it said.
    """
    return sum(_pool().map(functools.partial(_named, check), seeds, chunksize=5), Counter())


@functools.cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def _named(check: Callable[[int], Counter[str]], seed: int) -> Counter[str]:
    try:
        return check(seed)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
