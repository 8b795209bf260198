"""Health, metrics, the administration's views and the status page. Nothing here changes anything."""

import msgspec
from aiohttp import web

from api.context import CONTEXT
from api.page import PAGE

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


async def health(request: web.Request) -> web.Response:
    """200 when requests are taken, 503 with the progress while they are not."""
    view = request.app[CONTEXT].engine.health()
    serving = view.status in ("serving", "recovering")
    return _json(view, 200 if serving else 503, {} if serving else {"Retry-After": "1"})


async def metrics(request: web.Request) -> web.Response:
    body = request.app[CONTEXT].metrics.render()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def layout(request: web.Request) -> web.Response:
    return _json(request.app[CONTEXT].engine.layout_view())


async def workers(request: web.Request) -> web.Response:
    return _json({"workers": request.app[CONTEXT].engine.workers_view()})


async def stats(request: web.Request) -> web.Response:
    """The engine's counts, for the status page."""
    return _json(request.app[CONTEXT].engine.stats())


async def audit(request: web.Request) -> web.Response:
    """Every structure's own integrity check, on the head and on all workers."""
    return _json(await request.app[CONTEXT].engine.audit())


async def page(request: web.Request) -> web.Response:
    return web.Response(text=PAGE, content_type="text/html", charset="utf-8", headers=_PAGE_HEADERS)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )
