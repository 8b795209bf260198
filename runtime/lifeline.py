"""A process that ends with another: `watch` calls back when the process with a given id has ended.

How it works: a pidfd is opened first and the process' start time is compared afterwards, so what is watched is the
process that was meant and stays so even when its id is given to another one later. Where there is no pidfd
(before Linux 5.3, other systems), id and start time are polled.

Never true: a process that merely took over the id is never watched, and its end never calls back. A process that has
ended but was not yet reaped by its parent counts as ended.
"""

import os
import select
import threading
import time
from collections.abc import Callable

import psutil

POLL_INTERVAL_S = 0.25


def watch(pid: int, on_death: Callable[[], None], *, started: float | None = None) -> threading.Thread:
    """Call `on_death` once, in a daemon thread, when process `pid` has ended; at once if it already has.

    `started` is the process' start time in seconds since the epoch, as `start_time` gives it. Without it, `pid` must
    at least be older than this very process, as whoever started us is; a younger one has taken over the id.

    Raises:
        ValueError: `pid` is not positive, or is this process.
    """
    if pid <= 0 or pid == os.getpid():
        raise ValueError(f"cannot watch process {pid}; give the id of another process")
    thread = threading.Thread(target=_watch, args=(pid, on_death, started), name="lifeline", daemon=True)
    thread.start()
    return thread


def start_time(pid: int) -> float | None:
    """When process `pid` started, in seconds since the epoch; None when it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except psutil.NoSuchProcess:
        return None


def _watch(pid: int, on_death: Callable[[], None], started: float | None) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        on_death()
        return
    except (AttributeError, OSError):
        _poll(pid, started)
        on_death()
        return
    try:
        if _is_meant(pid, started):
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            poller.poll()
    finally:
        os.close(pidfd)
    on_death()


def _poll(pid: int, started: float | None) -> None:
    if not _is_meant(pid, started):
        return
    first = start_time(pid)
    while first is not None and start_time(pid) == first:
        time.sleep(POLL_INTERVAL_S)


def _is_meant(pid: int, started: float | None) -> bool:
    actual = start_time(pid)
    if actual is None:
        return False
    if started is not None:
        return abs(actual - started) < 0.05
    own = start_time(os.getpid())
    return own is None or actual <= own
