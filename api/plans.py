"""``GET /admin/plan`` and ``POST /admin/autopilot``: what the planner says of the load, and who may act on it.

Looking plans anew, in a thread beside the head's loop; it changes nothing.
"""

from typing import cast

from aiohttp import web

from api.changes import read_wish
from api.context import CONTEXT, json_response
from api.errors import ApiError, shown
from scheduler.planning.autopilot import MODES, Mode


async def plan(request: web.Request) -> web.Response:
    try:
        return json_response(await request.app[CONTEXT].engine.plan_view())
    except TimeoutError:
        raise ApiError(
            "the planner is still being compiled, once for this version on this machine and behind everything else; try again in half a minute",
            status=503,
            code="planner_not_ready",
            headers={"Retry-After": "30"},
        ) from None


async def autopilot(request: web.Request) -> web.Response:
    """``{"enabled": true}`` or ``{"mode": "off" | "advise" | "on"}``; answers with the mode."""
    wish = await read_wish(request, ("enabled", "mode"))
    enabled, mode = wish.get("enabled"), wish.get("mode")
    if (enabled is None) == (mode is None):
        raise ApiError('say either "enabled" (true or false) or "mode" (off, advise, on)', param="mode")
    if mode is None:
        if not isinstance(enabled, bool):
            raise ApiError(f"enabled: {shown(enabled)} is neither true nor false", param="enabled")
        mode = "on" if enabled else "off"
    if mode not in MODES:
        raise ApiError(f"mode: {shown(mode)} is none of {', '.join(MODES)}", param="mode")
    request.app[CONTEXT].engine.set_autopilot(cast("Mode", mode))
    return json_response({"mode": mode})
