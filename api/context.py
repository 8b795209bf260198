"""What every HTTP handler needs, made once by `api.app.build_app` and kept in the application."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from api.errors import ApiError, shown
from api.events import Listeners
from api.metrics import Metrics
from api.text import Text
from scheduler.request import AdmissionError, Engine, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Fixed facts of this server. Sizes in bytes, times in seconds."""

    model_names: tuple[str, ...]
    """The served model under all of its names; responses carry the first."""
    eos_token_ids: tuple[int, ...] = ()
    api_key: str = ""
    """Wanted as a bearer token under ``/v1``; empty: open."""
    admin_key: str = ""
    """Wanted under ``/admin`` and on the status page; empty: open, unless there is an `api_key`."""
    max_body_bytes: int = 8 << 20
    max_send_buffer_bytes: int = 1 << 20
    """Bytes that wait for one slow reader before its request is aborted."""
    body_timeout_s: float = 60.0
    send_timeout_s: float = 60.0
    """How long the end of a response may wait for a client that doesn't read."""
    heartbeat_s: float = 15.0
    """Silence on ``/admin/events`` after which a comment is sent, so that nothing between takes it for dead."""
    started_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class ApiContext:
    engine: Engine
    text: Text
    settings: ApiSettings
    metrics: Metrics
    listeners: Listeners

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` (404) when `name` is given and not served."""
        if name is not None and name not in self.settings.model_names:
            raise ApiError(
                f"model: {shown(name)} is not served here; use {self.model_name!r} or leave the field out",
                status=404,
                param="model",
                code="model_not_found",
            )

    def limits(self) -> Limits:
        """Raises `ApiError` (503) before the model is up."""
        try:
            return self.engine.limits()
        except AdmissionError as error:
            raise ApiError.from_admission(error) from None


CONTEXT = web.AppKey("context", ApiContext)
REQUEST_ID: Any = web.RequestKey("midflight_request_id", str) if hasattr(web, "RequestKey") else "midflight_request_id"


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


async def read_body(request: web.Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 when it is larger than the server takes, 408 when it doesn't arrive, 400 when it is garbled.
    """
    settings = request.app[CONTEXT].settings
    too_large = ApiError(
        f"the body is larger than {settings.max_body_bytes} bytes, the most that this server takes",
        status=413,
        code="request_too_large",
    )
    if (request.content_length or 0) > settings.max_body_bytes:
        raise too_large
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {settings.body_timeout_s:g} s", status=408, code="request_timeout"
        ) from None
    except web.RequestPayloadError as error:
        raise ApiError(f"the body cannot be read: {error}", code="invalid_body") from None
