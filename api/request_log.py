"""One line in the log for every request when it ends: who, what, how many, how long, how it ended.

Never a prompt, an answer, a key or a header of the client's beyond the request id.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNLOGGED_PATHS = frozenset({"/health", "/ready"})
UNLOGGED_OUTCOMES = frozenset({"too_many_failed_keys"})
"""A flood of wrong keys would be one of lines too; those within the limit are logged."""
MAX_PATH_CHARS = 256
OK = "ok"
CLIENT_GONE = "client_gone"

logger = logging.getLogger("fathom.requests")


@dataclass(slots=True)
class RequestRecord:
    """What is known about a request so far; it lies in ``scope["record"]`` for the routes to fill.

    Times are seconds of the monotonic clock.
    """

    arrived: float = field(default_factory=time.monotonic)
    submitted: float | None = None
    first_token: float | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_completion_tokens: int | None = None
    outcome: str | None = None  # an error's code, if the status cannot tell

    def note_token(self) -> None:
        """The first call is the time of the first token."""
        if self.first_token is None:
            self.first_token = time.monotonic()

    def milliseconds(self, end: float | None) -> int | None:
        return None if end is None else round(1000 * (end - self.arrived))


class RequestLog:
    """Wraps the whole application, the guard too, so that refused requests are logged as well."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope["record"] = RequestRecord()
        path = scope["path"][:MAX_PATH_CHARS]  # as it was sent; the guard rewrites it
        status: int | None = None
        complete = False

        async def send_watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                if status is not None and status >= 400 and record.outcome is None:
                    record.outcome = _error_code(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, send_watched)
        finally:
            outcome = record.outcome or (OK if complete else CLIENT_GONE)
            if scope["path"] not in UNLOGGED_PATHS and outcome not in UNLOGGED_OUTCOMES:
                entry = scope.get("api_key")
                fields = {
                    "id": scope.get("request_id"),
                    "key": None if entry is None else entry.public_id,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "prompt_tokens": record.num_prompt_tokens,
                    "cached_tokens": record.num_cached_tokens,
                    "completion_tokens": record.num_completion_tokens,
                    "queue_ms": record.milliseconds(record.submitted),
                    "ttft_ms": record.milliseconds(record.first_token),
                    "total_ms": record.milliseconds(time.monotonic()),
                    "outcome": outcome,
                }
                logger.info("request", extra={"fields": fields})


def _error_code(body: bytes) -> str | None:
    """The code in an error envelope of ours."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
