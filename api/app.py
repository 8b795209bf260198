"""The HTTP application: routes, keys, request ids and errors in OpenAI's shape.

Serve it with `make_runner`: handlers are cancelled when their client goes away, and that is what aborts a request.
"""

import asyncio
import base64
import binascii
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from api import admin, changes, plans
from api.chat import chat_completions
from api.completions import completions
from api.context import CONTEXT, REQUEST_ID, ApiContext, ApiSettings, json_response
from api.errors import ApiError
from api.events import Listeners
from api.metrics import Metrics
from api.text import Text
from api.tokens import detokenize, tokenize
from api.trace import trace
from scheduler.request import Engine

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_WAITING_BODY_BYTES = 1 << 15
_log = logging.getLogger(__name__)


def build_app(engine: Engine, text: Text, settings: ApiSettings) -> web.Application:
    """The application. It may serve before the engine does: then it answers 503, and ``/health`` tells the progress."""
    app = web.Application(middlewares=[_answer, _authorise], client_max_size=settings.max_body_bytes)
    app[CONTEXT] = ApiContext(engine, text, settings, Metrics(engine), Listeners(engine))
    app.on_response_prepare.append(_sign)
    app.on_shutdown.append(_close_listeners)
    app.router.add_get("/health", admin.health)
    app.router.add_get("/metrics", admin.metrics)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{model}", model)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/detokenize", detokenize)
    app.router.add_get("/admin/layout", admin.layout)
    app.router.add_post("/admin/layout", changes.change_layout)
    app.router.add_get("/admin/transitions", changes.transitions)
    app.router.add_get("/admin/transitions/{id}", changes.transition)
    app.router.add_delete("/admin/transitions/{id}", changes.abort_transition)
    app.router.add_get("/admin/workers", admin.workers)
    app.router.add_post("/admin/workers/{name}/drain", changes.drain_worker)
    app.router.add_post("/admin/workers/{name}/resume", changes.resume_worker)
    app.router.add_get("/admin/plan", plans.plan)
    app.router.add_post("/admin/autopilot", plans.autopilot)
    app.router.add_get("/admin/events", admin.events)
    app.router.add_get("/admin/stats", admin.stats)
    app.router.add_post("/admin/audit", admin.audit)
    app.router.add_post("/admin/trace", trace)
    app.router.add_get("/", admin.page)
    return app


def make_runner(
    app: web.Application, *, keepalive_timeout_s: float = 75.0, shutdown_timeout_s: float = 2.0
) -> web.AppRunner:
    """A runner that cancels the handler of a client that goes away. The access log is off.

    `shutdown_timeout_s` is what handlers have left at the cleanup; the draining of requests is over by then.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=keepalive_timeout_s,
        shutdown_timeout=shutdown_timeout_s,
        handle_signals=False,
    )


async def models(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    views = [_model_view(name, context) for name in context.settings.model_names]
    return json_response({"object": "list", "data": views})


async def model(request: web.Request) -> web.Response:
    context, name = request.app[CONTEXT], request.match_info["model"]
    context.check_model(name)
    return json_response(_model_view(name, context))


def _model_view(name: str, context: ApiContext) -> dict[str, object]:
    view: dict[str, object] = {
        "id": name,
        "object": "model",
        "created": context.settings.started_at,
        "owned_by": "midflight",
        "root": context.model_name,
    }
    try:
        view["max_model_len"] = context.limits().max_context
    except ApiError:  # not up yet, and nothing to say about it
        view["max_model_len"] = None
    return view


# -- around every handler ------------------------------------------------------------------------------------


@web.middleware
async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id, and whatever goes wrong an answer."""
    context = request.app[CONTEXT]
    given = request.headers.get("x-request-id", "")
    request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    try:
        response = await handler(request)
    except ApiError as error:
        response = error.response()
    except web.HTTPException as error:
        response = _from_aiohttp(error, request).response()
    except asyncio.CancelledError:  # the client left while we worked
        context.metrics.client_disconnects += not _is_admin(request.path)
        raise
    except ConnectionError:  # or while we wrote; aiohttp would log it as an error of ours
        context.metrics.client_disconnects += not _is_admin(request.path)
        if request.transport is not None:
            request.transport.abort()
        return web.Response()
    except Exception:
        _log.exception("request %s failed", request[REQUEST_ID])
        response = ApiError("internal error; the server's log has the details", status=500).response()
    resource = request.match_info.route.resource
    context.metrics.count_response(resource.canonical if resource else "unknown", response.status)
    await _send_within(request, response, context.settings.send_timeout_s)
    return response


async def _send_within(request: web.Request, response: web.StreamResponse, timeout_s: float) -> None:
    """A large body may have to wait for its reader; not for ever."""
    if not isinstance(response, web.Response) or (response.content_length or 0) < _WAITING_BODY_BYTES:
        return
    try:
        async with asyncio.timeout(timeout_s):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        request.app[CONTEXT].metrics.slow_readers += 1
        if request.transport is not None:
            request.transport.abort()


def _from_aiohttp(error: web.HTTPException, request: web.Request) -> ApiError:
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    if error.status == 404:
        message = f"there is nothing at {request.path!r}"
    elif error.status == 405:
        message = f"{request.path} does not take {request.method}; use {error.headers.get('Allow', 'another method')}"
    else:
        message = error.reason
    return ApiError(message[:300], status=error.status, headers=headers)


@web.middleware
async def _authorise(request: web.Request, handler: Handler) -> web.StreamResponse:
    settings = request.app[CONTEXT].settings
    path = request.path
    if _is_admin(path):
        _check_admin_key(request, settings)
        _check_origin(request)
    elif settings.api_key and (path.startswith("/v1/") or path in ("/tokenize", "/detokenize")):
        _check_api_key(request, settings)
    return await handler(request)


def _is_admin(path: str) -> bool:
    return path == "/" or path == "/admin" or path.startswith("/admin/")


def _check_origin(request: web.Request) -> None:
    """A page from elsewhere, open in an operator's browser, must not change anything here."""
    origin = request.headers.get("Origin")
    if request.method in ("GET", "HEAD") or origin is None:
        return
    if origin.partition("://")[2] != request.headers.get("Host"):
        raise ApiError("a page from another origin may not administer this server", status=403, code="foreign_origin")


def _check_api_key(request: web.Request, settings: ApiSettings) -> None:
    if not _equal(_bearer(request), settings.api_key):
        raise ApiError(
            "a valid API key is wanted: Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _check_admin_key(request: web.Request, settings: ApiSettings) -> None:
    if not settings.admin_key:
        if settings.api_key:
            raise ApiError("administration is off: start the server with --admin-key as well", status=403)
        return
    if not _equal(_bearer(request), settings.admin_key) and not _equal(_basic_password(request), settings.admin_key):
        raise ApiError(
            "a valid admin key is wanted: Authorization: Bearer KEY, or in a browser as the password",
            status=401,
            code="invalid_admin_key",
            headers={"WWW-Authenticate": 'Basic realm="midflight", charset="UTF-8"'},
        )


def _bearer(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _basic_password(request: web.Request) -> str:
    scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode("utf-8", "surrogateescape"))


async def _close_listeners(app: web.Application) -> None:
    app[CONTEXT].listeners.close()


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    if (request_id := request.get(REQUEST_ID)) is not None:
        response.headers["x-request-id"] = request_id
