"""Talking to a running server: requests for all client commands, and the `chat` prompt. Standard library only."""

import contextlib
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any

_TIMEOUT_S, _ASK_TIMEOUT_S = 600.0, 30.0
"""Of what is generated, and of what the server says about itself."""
_HELP = "/exit leaves, /reset forgets the conversation, /help shows this. Ctrl-C stops an answer."


class ServerError(Exception):
    """The server could not be reached, or refused; the message is for the terminal.

    `status` is that of the answer; 0 when there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


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
    with open_url(f"{url}/v1/chat/completions", api_key, body) as response:
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


@contextlib.contextmanager
def open_url(
    url: str, key: str, body: dict[str, Any] | None = None, *, method: str | None = None, timeout_s: float = _TIMEOUT_S
) -> Iterator[Any]:
    """The response to a request, which is a POST if it has a body.

    Raises:
        ServerError: unreachable, or not a 2xx.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise ServerError(_message(error.read(), error.code), error.code) from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise ServerError(f"{url} did not answer within {timeout_s:g} s") from None
        raise ServerError(f"no server at {url}: {reason}; start one with `midflight serve`, or give --url") from None
    with response:
        yield response


def ask(url: str, key: str, body: dict[str, Any] | None = None, *, method: str | None = None) -> Any:
    """The JSON of the answer. Raises as `open_url`."""
    with open_url(url, key, body, method=method, timeout_s=_ASK_TIMEOUT_S) as response:
        try:
            return json.load(response)
        except (ValueError, OSError, http.client.HTTPException) as error:
            raise ServerError(f"{url} does not answer as a Midflight server does: {error}") from None


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
