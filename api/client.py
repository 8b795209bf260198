"""The commands that talk to a running server: `layout`, `workers` and the `chat` prompt. Standard library only."""

import contextlib
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any

_TIMEOUT_S = 600.0
_HELP = "/exit leaves, /reset forgets the conversation, /help shows this. Ctrl-C stops an answer."


class ServerError(Exception):
    """The server could not be reached, or refused; the message is for the terminal."""


def show_layout(url: str, admin_key: str, as_json: bool) -> int:
    """Print the layout; 1 when the server cannot be asked."""
    return _show(url, "/admin/layout", admin_key, as_json, layout_lines)


def show_workers(url: str, admin_key: str, as_json: bool) -> int:
    """Print the workers; 1 when the server cannot be asked."""
    return _show(url, "/admin/workers", admin_key, as_json, worker_lines)


def layout_lines(layout: dict[str, Any]) -> list[str]:
    """The layout for people."""
    stages = layout.get("stages") or []
    lines = [
        f"{layout.get('model')}: epoch {layout.get('epoch')}, {layout.get('num_layers')} layers, {len(stages)} stages"
    ]
    rows = []
    for hop, stage in enumerate(stages):
        start, stop = stage["layers"]
        rows.append(
            [str(hop), stage["worker"], f"[{start}, {stop})", f"{stop - start} layers", str(stage.get("device", ""))]
        )
    lines += _table(rows)
    if layout.get("transition"):
        lines.append(f"transition: {json.dumps(layout['transition'])}")
    return lines


def worker_lines(view: dict[str, Any]) -> list[str]:
    """The workers as a table of whatever simple facts the server gives."""
    workers = view.get("workers") or []
    if not workers:
        return ["no workers"]
    columns = list(dict.fromkeys(key for worker in workers for key, value in worker.items() if _is_simple(value)))
    rows = [columns] + [[_cell(worker.get(column)) for column in columns] for worker in workers]
    return _table(rows)


def chat(url: str, api_key: str, system: str, parameters: dict[str, Any]) -> int:
    """Read lines, stream answers, remember the conversation. Ends with /exit or end of file."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  editing and history for input()
        print(f"{url}: {_HELP}")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(_HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _print_answer(url, api_key, {**parameters, "messages": messages, "stream": True})
            except ServerError as error:
                messages.pop()
                print(f"midflight: {error}", file=sys.stderr)
                if not interactive:
                    return 1
                continue
            messages.append({"role": "assistant", "content": answer})


def _print_answer(url: str, api_key: str, body: dict[str, Any]) -> str:
    parts: list[str] = []
    try:
        with contextlib.closing(stream_chat(url, api_key, body)) as pieces:
            for piece in pieces:
                parts.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(parts)


def stream_chat(url: str, api_key: str, body: dict[str, Any]) -> Generator[str, None, None]:
    """The pieces of text of a streamed chat completion.

    Raises:
        ServerError: unreachable, refused, or an error within the stream.
    """
    body = {key: value for key, value in body.items() if value is not None}
    with _open(f"{url}/v1/chat/completions", api_key, json.dumps(body).encode()) as response:
        try:
            for line in response:
                if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ServerError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the connection broke: {error}") from error


def _show(url: str, path: str, key: str, as_json: bool, lines: Any) -> int:
    try:
        with _open(url + path, key, None) as response:
            view = json.load(response)
    except (ServerError, ValueError) as error:
        print(f"midflight: {error}", file=sys.stderr)
        return 1
    print(json.dumps(view, indent=1) if as_json else "\n".join(lines(view)))
    return 0


@contextlib.contextmanager
def _open(url: str, key: str, body: bytes | None) -> Iterator[Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            raise ServerError(_message(error.read(), error.code)) from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"no server at {url}: {reason}; start one with `midflight serve`, or give --url") from None
    with response:
        yield response


def _message(body: bytes, status: int) -> str:
    try:
        view = json.loads(body)
        return (
            view["error"]["message"]
            if "error" in view
            else f"HTTP {status}: {view.get('detail') or view.get('status')}"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {status}"


def _table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _is_simple(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bool)) or _is_range(value)


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) for item in value)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{value[0]}, {value[1]})"
    return str(value)
