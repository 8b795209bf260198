"""A client's error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Everything that goes wrong with a request ends up as an `ApiError`; `api.app` turns it into the response. A client's
mistake is never a 5xx.
"""

import msgspec
from aiohttp import web

from scheduler.request import AdmissionError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Answer `status` with `message`; `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    @classmethod
    def from_admission(cls, error: AdmissionError) -> "ApiError":
        headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
        return cls(error.message, status=error.status, param=error.param, code=error.code, headers=headers)

    @property
    def type(self) -> str:
        return _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        """The JSON body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> web.Response:
        return web.Response(body=self.body(), status=self.status, headers=self.headers, content_type="application/json")


def shown(value: object, limit: int = 60) -> str:
    """`value` as it may appear in a message: never long, whatever a client sent."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of about {value.bit_length() * 30103 // 100000} digits"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."
