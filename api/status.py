"""What `midflight serve` says on the terminal: how the start goes, that it is up, what happens later, and the log.

Everything that the head writes goes through one `Terminal`, from any thread. On a terminal the progress of the start is one
line that is written over, and gives way to whatever else there is to say; into a file or a pipe each change is a line.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, TextIO

from scheduler.request import Health

PREFIX = "midflight: "


class Terminal:
    """Lines on `out`; at most one passing line, always the last."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._lock = threading.Lock()
        self._passing = ""

    def line(self, text: str) -> None:
        with self._lock:
            cleared = "\r\x1b[K" if self._passing and self._is_terminal else ""
            self._passing = ""
            self._write(f"{cleared}{text}\n")

    def say(self, text: str) -> None:
        """A line of our own, marked as such."""
        self.line(PREFIX + text)

    def say_passing(self, text: str) -> None:
        """A line that the next one replaces, where that is possible. Nothing when it is there already."""
        with self._lock:
            if text == self._passing:
                return
            self._passing = text
            self._write(f"\r\x1b[K{PREFIX}{text}" if self._is_terminal else f"{PREFIX}{text}\n")

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):  # the terminal is gone; that is no reason to stop serving
            pass


class TerminalHandler(logging.Handler):
    """The log, on the same terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._terminal.line(self.format(record))
        except Exception:
            self.handleError(record)


class StatusReporter:
    """Tells what state the server is in, once per state.

    `ready` is asked for what to say when it is up first, `uptime_s` for how long that took.
    """

    def __init__(self, terminal: Terminal, ready: Callable[[], list[str]], uptime_s: Callable[[], float]) -> None:
        self._terminal = terminal
        self._ready = ready
        self._uptime_s = uptime_s
        self._was_up = False
        self._status = ""

    def update(self, health: Health) -> None:
        status, before = health.status, self._status
        self._status = status
        if status == "serving":
            if not self._was_up:
                self._was_up = True
                first, *rest = self._ready()
                self._terminal.say(f"{first} after {self._uptime_s():.1f} s")
                for line in rest:
                    self._terminal.line("  " + line)
            elif before != "serving":
                self._terminal.say("serving again")
        elif status != "draining":
            self._terminal.say_passing(progress_line(health))


def progress_line(health: Health) -> str:
    """One line for one state of the start."""
    what = health.status.replace("_", " ")
    if health.status == "waiting_for_workers":
        what += f": {health.workers_joined} of {health.workers_wanted} joined"
    elif health.status == "loading" and health.units_total:
        what += f": {health.units_loaded} of {health.units_total} units"
    return f"{what} ({health.detail})" if health.detail else what


def ready_lines(
    url: str, layout: dict[str, Any], command: str, *, has_api_key: bool, has_admin_key: bool, is_public: bool
) -> list[str]:
    """What to know once the server is up: where it is, who serves what, and commands to paste; `command` is this program's."""
    lines = [f"serving {layout['model']} at {url}"]
    for stage in layout["stages"]:
        start, stop = stage["layers"]
        layers = f"layers {start} to {stop - 1} of {layout['num_layers']}" if stop > start else "no layer"
        device = stage["device_name"] if stage.get("pace") else stage["device"]
        lines.append(f"{stage['worker']}: {layers}, {device}")
    lines.append(f"status page: {url}/    stop: Ctrl-C")
    lines.append(f"layout: {command} layout --url {url}    another one: the same with --help")
    if is_public and not (has_api_key and has_admin_key):
        missing = [
            name
            for name, is_set in (("MIDFLIGHT_API_KEY", has_api_key), ("MIDFLIGHT_ADMIN_KEY", has_admin_key))
            if not is_set
        ]
        lines.append(f"warning: anyone who reaches this address may use it; set {' and '.join(missing)}")
    key = "-H 'Authorization: Bearer '$MIDFLIGHT_API_KEY " if has_api_key else ""
    lines.append(
        f"try: curl -N {url}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        """-d '{"stream": true, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'"""
    )
    return lines
