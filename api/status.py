"""What `midflight serve` says on the terminal while it starts, and when it is up.

On a terminal the progress is one line that is written over; into a file or a pipe each change is a line of its own.
"""

import time
from collections.abc import Callable
from typing import TextIO

from scheduler.request import Health


class StartupReporter:
    """Prints a line when what there is to say has changed."""

    def __init__(self, out: TextIO, now: Callable[[], float] = time.monotonic):
        self._out = out
        self._now = now
        self._began_s = now()
        self._is_terminal = out.isatty()
        self._shown = ""

    def update(self, health: Health) -> None:
        """Show how far the start has come."""
        self.say(progress_line(health), passing=True)

    def say(self, line: str, passing: bool = False) -> None:
        """Show a line; a `passing` one gives way to the next on a terminal."""
        if line == self._shown:
            return
        if self._is_terminal:
            self._out.write("\r\x1b[K" + line + ("" if passing else "\n"))
        else:
            self._out.write(line + "\n")
        self._shown = line
        self._out.flush()

    def ready(
        self, url: str, model: str, layout: dict, has_api_key: bool, has_admin_key: bool, is_public: bool
    ) -> None:
        """The address, the layout and a line to try."""
        self.say(f"serving {model} after {self._now() - self._began_s:.1f} s")
        for line in ready_lines(url, model, layout, has_api_key, has_admin_key, is_public):
            self._out.write(line + "\n")
        self._out.flush()


def progress_line(health: Health) -> str:
    """One line for one state of the start."""
    what = health.status.replace("_", " ")
    if health.status == "waiting_for_workers":
        what += f": {health.workers_joined} of {health.workers_wanted} joined"
    elif health.status == "loading" and health.units_total:
        what += f": {health.units_loaded} of {health.units_total} units"
    return f"{what} ({health.detail})" if health.detail else what


def ready_lines(
    url: str, model: str, layout: dict, has_api_key: bool, has_admin_key: bool, is_public: bool
) -> list[str]:
    """What to know once the server is up: where it is, who serves what, and a request to paste."""
    lines = []
    for stage in layout.get("stages") or []:
        start, stop = stage["layers"]
        lines.append(f"  {stage['worker']}: layers {start} to {stop - 1} of {layout['num_layers']}")
    lines.append(f"address: {url}    status page: {url}/    stop: Ctrl-C")
    if is_public and not (has_api_key and has_admin_key):
        missing = "--api-key and --admin-key" if not has_api_key and not has_admin_key else "--admin-key"
        missing = "--api-key" if has_admin_key else missing
        lines.append(f"warning: anyone who reaches this address may use it; set {missing}")
    key = " -H 'Authorization: Bearer '$MIDFLIGHT_API_KEY" if has_api_key else ""
    lines.append(
        f"try: curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        '-d \'{"stream": true, "messages": [{"role": "user", "content": "What is a pipeline?"}]}\''
    )
    return lines
