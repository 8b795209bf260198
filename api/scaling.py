"""The hook for an autoscaler: a command of the operator's that is run when another number of workers is wanted.

It is run by the shell with the numbers in its environment (``MIDFLIGHT_WORKERS_WANTED``, ``_PRESENT``, ``_USED``, ``_SPARE`` and the
spares' names in ``MIDFLIGHT_WORKERS_SPARE_NAMES``). One at a time, at most one every `interval_s`, and killed after
`timeout_s`; what was wanted meanwhile is told by the next run. A command that fails is a warning and tried again when its time comes.

Never true: the server waits for it.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("midflight.head")

INTERVAL_S = 30.0
TIMEOUT_S = 60.0


class Scaler:
    """Feed it the engine's events (`on_event`); `run` is its task."""

    def __init__(
        self,
        command: str,
        environment: Mapping[str, str],
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._command, self._environment = command, dict(environment)
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._wanted: dict[str, Any] | None = None
        self._told: tuple[int, tuple[str, ...]] | None = None
        self._wake = asyncio.Event()

    def on_event(self, event: dict[str, Any]) -> None:
        if event["type"] == "workers":
            self._wanted = event["workers"]
            self._wake.set()

    async def run(self) -> None:
        """Tell the command what is wanted, whenever that changes, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            workers = self._wanted
            if workers is None or (state := (workers["wanted"], tuple(workers["spare"]))) == self._told:
                continue
            if await self._tell(workers):
                self._told = state
            else:
                self._wake.set()
            await asyncio.sleep(self._interval_s)

    async def _tell(self, workers: dict[str, Any]) -> bool:
        """Whether the command took it."""
        try:
            process = await asyncio.create_subprocess_shell(
                self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env={**self._environment, **environment_of(workers)},
                start_new_session=True,
            )
        except OSError as error:  # no memory, no processes left
            log.warning("the scale command cannot be run: %s", error)
            return False
        try:
            async with asyncio.timeout(self._timeout_s):
                code = await process.wait()
        except TimeoutError:
            log.warning("the scale command did not end within %g s and was killed", self._timeout_s)
            return False
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(process.wait())
        if code:
            log.warning("the scale command ended with code %d", code)
        return code == 0


def environment_of(workers: dict[str, Any]) -> dict[str, str]:
    """What the command is told."""
    return {
        "MIDFLIGHT_WORKERS_WANTED": str(workers["wanted"]),
        "MIDFLIGHT_WORKERS_PRESENT": str(workers["present"]),
        "MIDFLIGHT_WORKERS_USED": str(workers["used"]),
        "MIDFLIGHT_WORKERS_SPARE": str(len(workers["spare"])),
        "MIDFLIGHT_WORKERS_SPARE_NAMES": " ".join(workers["spare"]),
    }
