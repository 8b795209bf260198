"""The planner's loops as machine code, without this process compiling them while it serves.

To compile them takes a dozen seconds where nothing is on disk yet, most of them with the interpreter's lock. `prepare` leaves that to a process
of its own, behind all others of the host (``python -m scheduler.compiling``), and reads what it has made.

Never true: a plan depends on it. What is not prepared is compiled when it is first asked for.
"""

import contextlib
import os
import subprocess
import sys
import threading

from runtime.lifeline import watch
from runtime.priority import Priority
from scheduler.planning import compiled

_COMPILES_WITHIN_S = 300.0
"""On cores that serve all the while it may take minutes; nobody waits for that but an autopilot, and who asks for a plan."""
_preparing = threading.Lock()


def prepare() -> None:
    """Have all of it; nothing where that was done. For a thread that may take its time, where nothing is on disk yet."""
    with _preparing:
        compiled.load()
        if compiled.build.is_cached() is False:
            _compile_elsewhere()
        compiled.build.compile_all()


def _compile_elsewhere() -> None:
    """Fill the cache on disk by another process, which ends with this one. If it fails, this one compiles."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=_COMPILES_WITHIN_S,
            check=False,
        )


def _main() -> None:
    os.nice(19)
    Priority().give_way(gives_way=True)
    watch(os.getppid(), lambda: os._exit(1))
    compiled.load()
    compiled.build.compile_all()


if __name__ == "__main__":
    _main()
