"""The first thing a request meets and the last thing an answer passes.

Path forms, foreign browser pages, request ids, body size, strict JSON; and whatever goes wrong
further in becomes the one error envelope here.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import time
import traceback
from typing import Any, NoReturn
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import HttpError, error_response, internal_error, invalid_json, shorten
from api.sse import ClientGone
from runtime import BadRequest, RequestError

MAX_BODY_BYTES = 8 << 20
MAX_DRAINED_BYTES = 4 * MAX_BODY_BYTES
"""A body up to this long is read to its end before it is refused: a client that is still sending
would see a broken connection instead of the answer."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

logger = logging.getLogger("fathom.api")


class Guard:
    """Wraps the whole application.

    With ``needs_key`` every Origin is answered: the key is the guard, and desktop clients send
    ``null`` or ``app://``. Without, any web page could talk to the server through its reader's
    browser, so only pages and names of this machine, and ``allowed_origins``, are.
    """

    def __init__(
        self, app: ASGIApp, *, needs_key: bool, allowed_origins: frozenset[str] = frozenset()
    ) -> None:
        self.app = app
        self.needs_key = needs_key
        self.allowed_origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        scope["request_id"] = request_id
        scope["original_path"] = scope["path"]
        scope["path"] = canonical_path(scope["path"])
        origin = headers.get("origin")
        arrived = time.monotonic()
        started = False

        async def send_tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                answer["openai-processing-ms"] = str(round(1000 * (time.monotonic() - arrived)))
                if origin is not None and self._allows(origin):
                    answer["access-control-allow-origin"] = origin
                    answer["access-control-expose-headers"] = "x-request-id, retry-after"
                    answer.add_vary_header("origin")
            await send(message)

        error: RequestError
        try:
            self._check_source(headers, origin)
            if scope["method"] == "OPTIONS":
                await preflight(headers)(scope, receive, send_tagged)
            else:
                await self.app(scope, receive, send_tagged)
            return
        except ClientGone:
            return
        except RequestError as caught:
            error = caught
        except Exception as caught:
            log_fault(request_id, caught)
            error = internal_error()
        if not started:
            await error_response(error)(scope, receive, send_tagged)

    def _allows(self, origin: str) -> bool:
        return self.needs_key or origin in self.allowed_origins or _host(origin) in LOOPBACK_NAMES

    def _check_source(self, headers: Headers, origin: str | None) -> None:
        if self.needs_key:
            return
        # A foreign name that resolves to this machine is a web page's way around its origin.
        if _host(f"//{headers.get('host', '')}") not in LOOPBACK_NAMES:
            raise HttpError(
                421, "This server answers to localhost and 127.0.0.1 only.", code="unknown_host"
            )
        if origin is not None and not self._allows(origin):
            raise HttpError(
                403, f"The origin {shorten(origin)} is not allowed.", code="origin_not_allowed"
            )


def canonical_path(path: str) -> str:
    """The route a client means: no doubled or trailing slashes, no ``/v1``, however often.

    ``//models``, ``/v1/models/`` and ``/v1/v1/models`` (a base URL typed too long) are ``/models``.
    """
    parts = [part for part in path.split("/") if part]
    while parts and parts[0] == "v1":
        del parts[0]
    return "/" + "/".join(parts)


def preflight(headers: Headers) -> Response:
    """The answer to a browser that asks whether it may send what it is about to send."""
    answer = {
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
        "access-control-max-age": "86400",
    }
    if headers.get("access-control-request-private-network") == "true":
        answer["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=answer)


async def read_json(scope: Scope, receive: Receive) -> dict[str, Any]:
    """The body as a JSON object.

    Raises `BadRequest` for another content type or bad JSON, `HttpError` 413 for more than
    `MAX_BODY_BYTES`, `ClientGone` if the client left first.
    """
    headers = Headers(scope=scope)
    content_type = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise BadRequest(
            f"The content type is {shorten(content_type)!r}; send 'Content-Type: "
            "application/json'.",
            code="unsupported_content_type",
        )
    return parse_json(await read_body(headers, receive))


async def read_body(headers: Headers, receive: Receive) -> bytes:
    declared = headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
    parts: list[bytes] = []
    num_bytes = 0
    while length <= MAX_DRAINED_BYTES and num_bytes <= MAX_DRAINED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes <= MAX_BODY_BYTES:
            parts.append(part)
        if not message.get("more_body", False):
            break
    if max(length, num_bytes) > MAX_BODY_BYTES:
        raise HttpError(
            413, f"The request body is above {MAX_BODY_BYTES} bytes.", code="request_too_large"
        )
    return b"".join(parts)


def parse_json(data: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8 without a mark, finite numbers, text that can be encoded again.

    Raises `BadRequest`.
    """
    try:
        body = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\ud" in data or b"\\uD" in data:
            # Only an escape can hide half a surrogate pair, which no encoder takes.
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise invalid_json("it is not UTF-8") from None
    except UnicodeEncodeError:
        raise invalid_json("a text holds half a surrogate pair") from None
    except RecursionError:
        raise invalid_json("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise invalid_json(f"{error.msg} at character {error.pos}") from None
    except ValueError as error:
        why = "a number has too many digits" if "int_max_str" in str(error) else str(error)
        raise invalid_json(shorten(why)) from None
    if not isinstance(body, dict):
        raise invalid_json("it must be an object")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def log_fault(request_id: str, error: BaseException) -> None:
    """Log where our own code failed. Messages of exceptions may quote a prompt: left out."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, where)
