"""How many cores there are for this process to compute on."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from runtime.cgroup import core_allowance

_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Cores that this process may run on, one at least: those of its affinity, and not more than a container's limit leaves whole.

    Threads of one core count once, since they share what kernels need. A quota that is overdrawn stops all threads at once, the ones that
    wait for others as well.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    limit = core_allowance()
    return max(1, min(count_cores(allowed), math.floor(limit) if limit is not None else len(allowed)))


def count_cores(processors: Iterable[int], topology: Path = _TOPOLOGY) -> int:
    """Cores among these logical processors; each is one where the kernel does not tell."""
    return len({_siblings(topology / f"cpu{number}") or str(number) for number in processors})


def _siblings(folder: Path) -> str:
    try:
        return (folder / "topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""
