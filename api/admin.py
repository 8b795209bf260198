"""Health, metrics, the administration's views and the status page. Nothing here changes anything; `api.changes` does."""

from aiohttp import web

from api.context import CONTEXT, json_response
from api.page import HEADERS, PAGE


async def health(request: web.Request) -> web.Response:
    """200 when requests are taken, and enough workers are there for them; 503 with the progress while it is not so."""
    view = request.app[CONTEXT].engine.health()
    is_recovering = view.status == "recovering" and view.workers_joined >= view.workers_wanted
    serving = view.status == "serving" or is_recovering
    return json_response(view, 200 if serving else 503, {} if serving else {"Retry-After": "1"})


async def metrics(request: web.Request) -> web.Response:
    body = request.app[CONTEXT].metrics.render()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def layout(request: web.Request) -> web.Response:
    return json_response(request.app[CONTEXT].engine.layout_view())


async def workers(request: web.Request) -> web.Response:
    return json_response({"workers": request.app[CONTEXT].engine.workers_view()})


async def stats(request: web.Request) -> web.Response:
    """The engine's counts, for the status page."""
    return json_response(request.app[CONTEXT].engine.stats())


async def events(request: web.Request) -> web.StreamResponse:
    """What happens, as it happens: server-sent events, see `api.events`."""
    context = request.app[CONTEXT]
    settings = context.settings
    return await context.listeners.serve(request, context.metrics, settings.heartbeat_s, settings.send_timeout_s)


async def audit(request: web.Request) -> web.Response:
    """Every structure's own integrity check, on the head and on all workers."""
    return json_response(await request.app[CONTEXT].engine.audit())


async def page(request: web.Request) -> web.Response:
    return web.Response(text=PAGE, content_type="text/html", charset="utf-8", headers=HEADERS)
