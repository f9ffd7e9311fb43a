"""One line in the log for every request when it ends: who, what, how many, how long, how it ended.

Never a prompt, an answer, a key or a header of the client's beyond the request id.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.figures import Figures
from api.page import PATHS
from api.timings import Timings

UNLOGGED_PATHS = frozenset({"/health", "/ready", *PATHS})
POLLED_PATHS = frozenset({"/metrics", "/stats"})
"""Asked for every second or so; a good answer is not worth a line."""
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
    is_generating: bool = False  # it asks for tokens, whether it gets any or not
    finish_reasons: list[str] = field(default_factory=list)  # of its choices that came to an end
    timings: Timings | None = None  # once it is over
    outcome: str | None = None  # an error's code, if the status cannot tell

    def milliseconds(self, end: float | None) -> int | None:
        return None if end is None else round(1000 * (end - self.arrived))


class RequestLog:
    """Wraps the whole application, the guard too, so that refused requests are logged as well.

    Generating requests are also counted, in ``figures``.
    """

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self.app = app
        self.figures = figures

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
            if record.is_generating:
                count(self.figures, record, outcome)
            if is_logged(scope["path"], outcome):
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


def is_logged(path: str, outcome: str) -> bool:
    """Whether a request is worth a line; ``path`` is the route's, without ``/v1``."""
    if path in UNLOGGED_PATHS or outcome in UNLOGGED_OUTCOMES:
        return False
    return path not in POLLED_PATHS or outcome != OK


def count(figures: Figures, record: RequestRecord, outcome: str) -> None:
    """Add a generating request that is over; the times are of those that were answered."""
    figures.outcomes[outcome] += 1
    figures.finish_reasons.update(record.finish_reasons)
    if record.timings is None:
        return
    figures.generation_tokens.observe(record.num_completion_tokens or 0)
    figures.request_seconds.observe(time.monotonic() - record.arrived)
    parts = (
        (figures.queue_seconds, record.timings.queue_seconds),
        (figures.prefill_seconds, record.timings.prompt_seconds),
        (figures.decode_seconds, record.timings.predicted_seconds),
    )
    for histogram, seconds in parts:
        if seconds is not None:
            histogram.observe(seconds)


def _error_code(body: bytes) -> str | None:
    """The code in an error envelope of ours."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
