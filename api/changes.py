"""``/admin/layout`` and ``/admin/transitions``: asking for another layout, following the change, aborting it.

What is asked for is checked by `scheduler.wishes`, since only the scheduler knows the present layout and its workers. Here
are the shape of the body, and which error becomes which status: a wish that makes no sense is 400 and names the field,
one that cannot be granted now is 409.
"""

import functools
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from api.context import CONTEXT, json_response, read_body
from api.errors import ApiError, shown
from scheduler.transition import Refused
from scheduler.wishes import LayoutError

_OPTIONS = ("strategy", "queue", "deadline_s", "bytes_per_s")
_LAYOUT_FIELDS = ("layers", "stages", *_OPTIONS)
_MAX_MESSAGE = 600
"""Of what makes no sense, which may be as long as what was sent; a refusal is ours, and is said in full."""


async def change_layout(request: web.Request) -> web.Response:
    """202, the id of the change and whether it waits; with ``?wait=true`` 200 and its report, once it has ended."""
    wait = _wait(request)
    wish = await read_wish(request, _LAYOUT_FIELDS)
    return await _begin(request, wait, functools.partial(request.app[CONTEXT].engine.change_layout, wish))


async def drain_worker(request: web.Request) -> web.Response:
    """Move everything off a worker. Answers as `change_layout`; 404 when there is no such worker."""
    wait, name = _wait(request), request.match_info["name"]
    wish = await read_wish(request, _OPTIONS)
    return await _begin(request, wait, functools.partial(request.app[CONTEXT].engine.drain_worker, name, wish))


async def resume_worker(request: web.Request) -> web.Response:
    """A drained worker may have layers again; 404 when there is no such worker."""
    name = request.match_info["name"]
    try:
        request.app[CONTEXT].engine.resume_worker(name)
    except LayoutError as error:
        raise _invalid(error) from None
    return json_response({"name": name, "drained": False})


async def transitions(request: web.Request) -> web.Response:
    """The reports of the last changes, newest first."""
    return json_response({"transitions": request.app[CONTEXT].engine.changes_view()[::-1]})


async def transition(request: web.Request) -> web.Response:
    return json_response(_view(request, _id(request)))


async def abort_transition(request: web.Request) -> web.Response:
    """200 and the report when the change is aborted or on its way to that, 409 when it is too late for that."""
    engine, change = request.app[CONTEXT].engine, _id(request)
    view = _view(request, change)
    if not engine.abort_change(change):
        if view["outcome"] in ("running", "queued"):
            why = "the last of it has begun to flip and only goes forward from there"
        else:
            why = f"it has ended: {view['outcome']}"
        raise ApiError(f"transition {change} cannot be aborted: {why}", status=409, code="too_late")
    return json_response(_view(request, change))


async def _begin(request: web.Request, wait: bool, ask: Callable[[], int]) -> web.Response:
    try:
        change = ask()
    except LayoutError as error:
        raise _invalid(error) from None
    except Refused as error:
        raise ApiError(str(error), status=409, code="refused") from None
    if wait:
        report = await request.app[CONTEXT].engine.wait_change(change)
        if report["outcome"] in ("running", "queued"):
            message = f"the server is shutting down, and transition {change} ends with it"
            raise ApiError(message, status=503, code="shutting_down")
        return json_response(report)
    answer = {"id": change, "outcome": _view(request, change)["outcome"]}
    return json_response(answer, status=202, headers={"Location": f"/admin/transitions/{change}"})


async def read_wish(request: web.Request, fields: tuple[str, ...]) -> dict[str, Any]:
    """The body, a JSON object with none but these fields; 400 otherwise."""
    raw = await read_body(request)
    try:
        wish = msgspec.json.decode(raw) if raw.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(wish, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    for name in wish:
        if name not in fields:
            raise ApiError(f"{shown(name)} is no field of this request; there are {', '.join(fields)}", param=name[:60])
    return wish


def _wait(request: web.Request) -> bool:
    text = request.query.get("wait", "false").lower()
    if text not in ("true", "1", "false", "0"):
        raise ApiError(f"wait: {shown(text)} is neither true nor false", param="wait")
    return text in ("true", "1")


def _id(request: web.Request) -> int:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _unknown(text)
    return int(text)


def _view(request: web.Request, change: int) -> dict[str, Any]:
    view = request.app[CONTEXT].engine.change_view(change)
    if view is None:
        raise _unknown(change)
    return view


def _unknown(change: object) -> ApiError:
    message = f"there is no transition {shown(change)}, or its report is not kept any more; see /admin/transitions"
    return ApiError(message, status=404, param="id", code="transition_not_found")


def _invalid(error: LayoutError) -> ApiError:
    status = 404 if error.param == "worker" else 400
    return ApiError(_short(error), status=status, param=error.param, code="invalid_layout")


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."
