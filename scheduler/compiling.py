"""The planner's loops as machine code, without this process compiling them while it serves.

To compile them takes a dozen seconds where nothing is on disk yet, most of them with the interpreter's lock. `prepare` leaves that to a process
of its own, behind all others of the host (``python -m scheduler.compiling``), and reads what it has made.

Never true: a plan depends on it. What is not prepared is compiled when it is first asked for.
"""

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading

from runtime.lifeline import watch
from runtime.priority import Priority
from scheduler.planning import compiled

log = logging.getLogger("midflight.planner")

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


def prepare_beside(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    """`prepare` in a thread that a process does not wait for when it ends; done when all is there, or with what went wrong."""
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def work() -> None:
        error = None
        try:
            prepare()
        except Exception as problem:
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=work, name="prepare the planner", daemon=True).start()
    return done


def _compile_elsewhere() -> None:
    """Fill the cache on disk by another process, which ends with this one. If it fails, this one compiles."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=_COMPILES_WITHIN_S,
            check=False,
        )
    except (OSError, TypeError, subprocess.TimeoutExpired) as error:  # TypeError: there is no interpreter to start
        log.info("the planner is compiled here: %s", error)
    else:
        log.debug("the planner was compiled elsewhere, with code %d", done.returncode)


def _main() -> None:
    os.nice(19)
    Priority().give_way(gives_way=True)
    watch(int(sys.argv[1]), lambda: os._exit(1))
    compiled.load()
    compiled.build.compile_all()


if __name__ == "__main__":
    _main()
