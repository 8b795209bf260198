"""`midflight layout` and `midflight workers`: look at a running server's layout, change it, and follow the change.

A change is followed by the server's events; when their stream breaks, by asking for the report until it has ended. The
stream is opened before the change is asked for, so nothing of it is missed. Ctrl-C asks the server to abort, and waits for
what becomes of that; a second one leaves. Standard library only.
"""

import contextlib
import http.client
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO
from urllib.parse import quote

from api.client import ServerError, ask, open_url

_SILENCE_S = 60.0
"""The server says something at least every 15 s."""
_POLL_S = 0.25
_OVER = ("committed", "aborted", "refused")
_ACCEPTED = {
    "queued": "is queued behind a change that is under way",
    "running": "is under way",
    "committed": "is committed: the layout was this one already",
}
_BEFORE_FLIP = ("reserve", "prepare", "shadow", "copy")


# -- looking ---------------------------------------------------------------------------------------------------


def show_layout(url: str, admin_key: str, as_json: bool) -> int:
    """Print the layout; 1 when the server cannot be asked."""
    return _show(url + "/admin/layout", admin_key, as_json, layout_lines)


def show_workers(url: str, admin_key: str, as_json: bool) -> int:
    """Print the workers; 1 when the server cannot be asked."""
    return _show(url + "/admin/workers", admin_key, as_json, worker_lines)


def layout_lines(layout: dict[str, Any]) -> list[str]:
    """The layout for people."""
    stages = layout.get("stages") or []
    status = layout.get("status") or "serving"
    lines = [
        f"{layout.get('model')}: epoch {layout.get('epoch')}, {layout.get('num_layers')} layers, {_count(len(stages), 'stage')}"
        + f", {status.replace('_', ' ')}" * (status != "serving")
    ]
    rows = []
    for hop, stage in enumerate(stages):
        start, stop = stage["layers"]
        device = stage.get("device_name" if stage.get("pace") else "device", "")
        rows.append([str(hop), stage["worker"], f"[{start}, {stop})", f"{stop - start} layers", str(device)])
    lines += _table(rows)
    if layout.get("transition"):
        lines.append(f"transition {layout['transition']['id']}: {progress_line(layout['transition'])}")
    return lines


def worker_lines(view: dict[str, Any]) -> list[str]:
    """The workers as a table."""
    workers = view.get("workers") or []
    if not workers:
        return ["no workers"]
    rows = [["name", "status", "layers", "device", "host", "pid", "memory", "KV pages used", "sequences"]]
    for worker in workers:
        rss = worker.get("rss")
        rows.append(
            [
                worker["name"],
                str(worker.get("status", "")) + ", drained" * bool(worker.get("drained")),
                _ranges(worker.get("layers") or []),
                " ".join(dict.fromkeys(str(worker.get(key) or "") for key in ("device", "device_name"))).strip(),
                *(str(worker.get(key, "")) for key in ("host", "pid")),
                _size(rss) if rss else "",
                *(str(worker.get(key, "")) for key in ("pages_used", "num_sequences")),
            ]
        )
    return _table(rows)


# -- changing --------------------------------------------------------------------------------------------------


def change_layout(url: str, admin_key: str, wish: dict[str, Any], wait: bool, as_json: bool) -> int:
    """Ask for another layout. 0 when it was committed (or, without `wait`, accepted), else 1."""
    return _change(_Server(url, admin_key), "/admin/layout", wish, wait, as_json)


def drain_worker(url: str, admin_key: str, name: str, wish: dict[str, Any], wait: bool, as_json: bool) -> int:
    """Move everything off a worker; as `change_layout`."""
    return _change(_Server(url, admin_key), f"/admin/workers/{quote(name, safe='')}/drain", wish, wait, as_json)


def resume_worker(url: str, admin_key: str, name: str, as_json: bool) -> int:
    """Let a drained worker have layers again; 1 when the server refuses or cannot be asked."""
    try:
        answer = _Server(url, admin_key).ask(f"/admin/workers/{quote(name, safe='')}/resume", {})
    except ServerError as error:
        print(f"midflight: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer) if as_json else f"{name} may have layers again")
    return 0


def progress_line(view: dict[str, Any]) -> str:
    """How far a transition is, in one line."""
    phase = view["phase"]
    parts = []
    if phase == "shadow" and view["loading"]:
        arriving = [_arriving(weights) for weights in view["weights"]]
        parts.append("weights: " + ("; ".join(arriving) or f"{', '.join(view['loading'])} loading"))
    if phase in ("copy", "flip") and view["snapshot_blocks"]:
        parts.append(f"snapshot {view['snapshot_blocks_arrived']} of {view['snapshot_blocks']} blocks")
    if phase == "flip":
        parts.append(f"{_count(view['sequences_flipped'], 'sequence')} over, {view['sequences_left']} left")
    hop = f" (hop {view['hop']} of {view['num_hops']})" if view["num_hops"] > 1 else ""
    return f"{view['elapsed_s']:6.2f} s  {phase}{hop}" + (": " if parts else "") + "; ".join(parts)


def report_lines(report: dict[str, Any]) -> list[str]:
    """What a change did, for people."""
    outcome = report["outcome"]
    why = f": {report['why']}" if report["why"] else ""
    lines = [f"transition {report['id']} {outcome} after {report['total_s']:.2f} s ({report['strategy']}){why}"]
    rows = []
    if report["source"]:
        rows.append(["from", f"{chain(report['source'])}, epoch {report['source_epoch']}"])
    committed = outcome == "committed"
    if committed and report["source_epoch"] == report["target_epoch"]:
        rows[0][0] = "at"
        return lines + ["  " + line for line in _table(rows)]
    rows.append(
        ["to" if committed else "wanted", chain(report["target"]) + f", epoch {report['target_epoch']}" * committed]
    )
    if committed:
        hops = f" in {report['num_hops']} hops" if report["num_hops"] > 1 else ""
        rows += [
            [
                "moved",
                f"{_count(report['layers_moved'], 'layer')}{hops}: weights {_size(report['weight_bytes'])}, KV snapshot "
                f"{_size(report['snapshot_bytes'])} ({_count(report['blocks_copied'], 'block')}), "
                f"KV mirror {_size(report['mirror_bytes'])}",
            ],
            [
                "running",
                f"{_count(report['sequences_flipped'], 'sequence')} taken over, "
                f"{_count(report['recomputed_tokens'], 'token')} recomputed, "
                f"{_count(report['dropped_requests'], 'request')} dropped"
                + (
                    f", {_count(report['cached_blocks_dropped'], 'cached block')} gone"
                    if report["cached_blocks_dropped"]
                    else ""
                ),
            ],
            ["pause", _pause(report)],
        ]
    if report["phases_s"]:
        rows.append(["time", ", ".join(f"{phase} {spent:.2f} s" for phase, spent in report["phases_s"].items())])
    return lines + ["  " + line for line in _table(rows)]


def chain(stages: list[dict[str, Any]]) -> str:
    return " | ".join(f"{stage['worker']} [{stage['layers'][0]}, {stage['layers'][1]})" for stage in stages)


class Progress:
    """Shows how far a change is: on a terminal one line, written over; elsewhere a line for each phase."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._shown: object = None

    def show(self, view: dict[str, Any]) -> None:
        line = progress_line(view)
        if self._is_terminal:
            self._out.write("\r\x1b[K" + line)
            self._out.flush()
        elif (state := (view["phase"], view["hop"])) != self._shown:
            self._shown = state
            print(line, file=self._out, flush=True)

    def say(self, line: str) -> None:
        self.clear()
        print(line, file=self._out, flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            self._out.write("\r\x1b[K")
            self._out.flush()


class _Server:
    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        return ask(self._url + path, self._key, body, method=method)

    @contextlib.contextmanager
    def events(self) -> Iterator[Iterator[dict[str, Any]]]:
        """What happens from now on, until the stream ends. Raises `ServerError` before or within it."""
        with open_url(f"{self._url}/admin/events", self._key, timeout_s=_SILENCE_S) as response:
            yield self._events(response)

    def _events(self, response: Any) -> Iterator[dict[str, Any]]:
        try:
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"the events broke off: {error}") from None


def _change(server: _Server, path: str, wish: dict[str, Any], wait: bool, as_json: bool) -> int:
    progress = Progress(sys.stderr)
    try:
        if not wait:
            answer = server.ask(path, wish)
            print(
                json.dumps(answer)
                if as_json
                else f"transition {answer['id']} {_ACCEPTED.get(answer['outcome'], 'has ended')}"
            )
            return 0
        with server.events() as events:
            change = _ask_unstopped(server, path, wish, progress)
            report = _follow(server, change, events, progress)
    except ServerError as error:
        progress.clear()
        print(f"midflight: {error}", file=sys.stderr)
        return 1
    progress.clear()
    print(json.dumps(report, indent=1) if as_json else "\n".join(report_lines(report)))
    return 0 if report["outcome"] == "committed" else 1


def _ask_unstopped(server: _Server, path: str, wish: dict[str, Any], progress: Progress) -> int:
    """The number of the change. A Ctrl-C while it is asked for is for the change, whose number is not known before."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    if threading.current_thread() is not threading.main_thread():
        return int(server.ask(path, wish)["id"])  # signals are not for it
    before = signal.signal(signal.SIGINT, stop)
    try:
        change = int(server.ask(path, wish)["id"])
    finally:
        signal.signal(signal.SIGINT, before)
    if stopped:
        _abort(server, f"/admin/transitions/{change}", progress)
    return change


def _follow(server: _Server, change: int, events: Iterator[dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """The report of the change, once it has ended."""
    path = f"/admin/transitions/{change}"
    try:
        for event in events:
            if event["type"] == "report" and event["report"]["id"] == change:
                return event["report"]
            if event["type"] == "transition" and event["transition"] and event["transition"]["id"] == change:
                progress.show(event["transition"])
            if event["type"] == "missed" and (report := server.ask(path))["outcome"] in _OVER:
                return report
    except ServerError:
        pass  # ask instead
    except KeyboardInterrupt:
        _abort(server, path, progress)
    while (report := server.ask(path))["outcome"] not in _OVER:
        if report["progress"]:
            progress.show(report["progress"])
        time.sleep(_POLL_S)
    return report


def _abort(server: _Server, path: str, progress: Progress) -> None:
    progress.say("aborting; Ctrl-C again leaves it to the server")
    try:
        server.ask(path, method="DELETE")
    except ServerError as error:
        if error.status != 409:
            raise
        progress.say(str(error))


def _show(url: str, key: str, as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> int:
    try:
        view = ask(url, key)
    except ServerError as error:
        print(f"midflight: {error}", file=sys.stderr)
        return 1
    print(json.dumps(view, indent=1) if as_json else "\n".join(lines(view)))
    return 0


def _pause(report: dict[str, Any]) -> str:
    """What running sequences felt, by what each strategy makes them wait for."""
    pause, spent = report["engine_pause_ms"], report["phases_s"]
    waits = f"{_count(report['fence_waits'], 'fence wait')} ({report['fence_wait_ms']:.1f} ms)"
    held_s = sum(spent.get(phase, 0.0) for phase in _BEFORE_FLIP)
    if report["strategy"] == "stop-copy":
        return f"all steps stopped for {held_s:.2f} s, from the start to the flip; {waits}"
    if report["strategy"] == "drain":
        return (
            f"running sequences ended first; new ones waited up to {held_s:.2f} s, from the start to the flip; {waits}"
        )
    if report["strategy"] == "recompute" and report["recomputed_tokens"]:
        tokens = _count(report["recomputed_tokens"], "token")
        return (
            f"running sequences waited until {tokens} had been prefilled again, for how long is not measured; {waits}"
        )
    if not pause:
        return f"none measured: no running sequence went over; {waits}"
    beyond = ""
    if "excess_max" in pause and "ordinary_p99" in pause:
        beyond = (
            f"; beyond the mean gap p50 {pause['excess_p50']:.1f} ms, max {pause['excess_max']:.1f} ms"
            f" (between two other steps: p99 {pause['ordinary_p99']:.1f} ms)"
        )
    return f"p50 {pause['p50']:.1f} ms, max {pause['max']:.1f} ms over {pause['count']:.0f} flips{beyond}; {waits}"


def _arriving(weights: dict[str, Any]) -> str:
    loaded, total = _size(weights["bytes_loaded"]), _size(weights["bytes_total"])
    return f"{weights['worker']} {weights['units_loaded']} of {_count(weights['units_total'], 'unit')}, {loaded} of {total}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _ranges(layers: list[int]) -> str:
    """Layer numbers as half-open ranges."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer:
            ranges[-1][1] = layer + 1
        else:
            ranges.append([layer, layer + 1])
    return " ".join(f"[{start}, {stop})" for start, stop in ranges) or "-"


def _table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
