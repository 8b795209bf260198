"""How this worker stands behind others on the same host while it serves nothing yet (Linux; elsewhere nothing happens).

torchrun gives every worker a session of its own, and Linux makes each session a scheduling group (sched(7), "The autogroup
feature"): nice values count within a group only. A worker that loads a shadow would take as much of the processor as the
stage beside it, whatever its own nice value is. So the group's nice value is set, which needs no privilege in either direction, unlike
a thread's. Where a control group schedules instead (containers with limits), it has no effect, and none is missed: a limit is one.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from pathlib import Path

log = logging.getLogger("midflight.worker")

GROUP = Path("/proc/self/autogroup")
BEHIND = 15
"""Nice value of a group that gives way: 36 of 1,024 shares against a serving one, some 3 % of a processor that is never idle."""
TRY_AGAIN_S = 0.05
"""The kernel takes such a change only every tenth of a second on a host, from the unprivileged."""


def in_group(group: Path = GROUP) -> bool:
    """Whether this process is in its session's scheduling group. The file is empty for one that no setsid stands above since boot."""
    try:
        return bool(group.read_text().strip())
    except OSError:
        return False


def thread_gives_way() -> None:
    """Put the calling thread behind all others of this worker, for good."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Priority:
    """Of this process among those of the host. One per process; its methods are for one thread."""

    def __init__(self, group: Path = GROUP) -> None:
        self._group = group
        self._wanted = 0
        self._written = 0
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._is_possible = hasattr(os, "getsid") and os.getsid(0) == os.getpid() and in_group(group)

    def give_way(self, *, gives_way: bool) -> None:
        """Be behind others on this host, or beside them. Saying it again costs nothing."""
        wanted = BEHIND if gives_way else 0
        if wanted == self._wanted or not self._is_possible:
            return
        with self._lock:
            self._wanted = wanted
            if self._writer is None and not self._write():
                self._writer = threading.Thread(target=self._keep_trying, name="priority", daemon=True)
                self._writer.start()

    def _keep_trying(self) -> None:
        while True:
            time.sleep(TRY_AGAIN_S)
            with self._lock:
                if self._write():
                    self._writer = None
                    return

    def _write(self) -> bool:
        """Whether the matter is settled."""
        if self._wanted == self._written:
            return True
        try:
            self._group.write_text(str(self._wanted))
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            log.info("this worker cannot change its standing among others (%s); it stays as it is", error)
            self._is_possible = False
        self._written = self._wanted
        return True
