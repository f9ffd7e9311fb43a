"""Every error leaves in the one envelope: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import http
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from runtime import BadRequest, RequestError

MAX_ECHO = 200
"""Characters of a client's own input that an error message repeats."""
RETRY_SECONDS = "1"


class HttpError(RequestError):
    """An error of the HTTP layer itself: key, route, method, size."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        error_type: str = "invalid_request_error",
        retry_seconds: int | None = None,
    ) -> None:
        """``retry_seconds``: after so many the same request may do better; 1 if left out."""
        super().__init__(message, param=param, code=code)
        self.status = status
        self.error_type = error_type
        self.retry_seconds = retry_seconds


def internal_error() -> HttpError:
    """What a client learns of a fault of ours; the log has the rest under the request's id."""
    return HttpError(
        500,
        "The server failed to answer this request.",
        code="internal_error",
        error_type="server_error",
    )


def envelope(error: RequestError) -> dict[str, Any]:
    """The error as JSON. ``code`` is always a string: some clients hide a message without one."""
    return {
        "error": {
            "message": str(error),
            "type": error.error_type,
            "param": error.param,
            "code": error.code or error.error_type,
        }
    }


def error_response(error: RequestError) -> JSONResponse:
    """Status, envelope, and the headers that tell a client whether trying again can help."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif error.status == 500:
        headers["x-should-retry"] = "false"
    elif error.status in (429, 503):
        seconds = error.retry_seconds if isinstance(error, HttpError) else None
        headers["Retry-After"] = RETRY_SECONDS if seconds is None else str(seconds)
    return JSONResponse(envelope(error), status_code=error.status, headers=headers)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals: no such route, method not allowed."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {shorten(request.scope['original_path'])}"
    if error.status_code == 404:
        ours = HttpError(404, f"Unknown request URL: {where}.", code="unknown_url")
    elif error.status_code == 405:
        ours = HttpError(405, f"Method not allowed: {where}.", code="method_not_allowed")
    else:
        phrase = http.HTTPStatus(error.status_code).phrase
        ours = HttpError(error.status_code, f"{phrase}: {where}.", code="invalid_request_error")
    response = error_response(ours)
    response.headers.update(error.headers or {})
    return response


def shorten(text: str) -> str:
    """A client's input made safe to repeat: one line of at most `MAX_ECHO` characters."""
    line = "".join(letter if letter.isprintable() else "�" for letter in text[: MAX_ECHO + 1])
    return line if len(line) <= MAX_ECHO else f"{line[:MAX_ECHO]}…"


def invalid_json(why: str) -> BadRequest:
    return BadRequest(f"The request body is not valid JSON: {why}.", code="invalid_json")
