"""The first thing a request meets and the last thing an answer passes.

Path forms, foreign names and browser pages, request ids, body size, strict JSON; and whatever goes
wrong further in becomes the one error envelope here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
import traceback
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import HttpError, error_response, internal_error, invalid_json, shorten
from api.limits import DRAINED_BODIES, Limits
from api.listen import ip_literal
from api.sse import ClientGone
from runtime import BadRequest, RequestError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OWN_NAMES = LOOPBACK_NAMES | {"host.docker.internal"}
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::[0-9]{1,5})?")
AUTHORITY = re.compile(r"\Ahttps?://[^/]*", re.IGNORECASE)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
PASSED_ON = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a task or the process on purpose, and so is nobody's failed request."""

FREE_BYTES = 64 << 10
"""Of each body, which `BodyMemory` does not count: ordinary requests go on while it is full."""

NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
NOT_STRUCTURE_OR_COMMA = bytes(set(NOT_STRUCTURE) - set(b","))
STEPS = np.frombuffer(bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff"), np.int8)

logger = logging.getLogger("fathom.api")


class BodyMemory:
    """What the bodies of all requests of one application take together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class HeldBody:
    """What one request's body takes of a `BodyMemory`; it lies in ``scope["held_body"]``."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._num_counted = 0

    def grow(self, num_bytes: int) -> bool:
        """Whether there is room for ``num_bytes`` of this body, which are counted then."""
        more = max(num_bytes - FREE_BYTES, 0) - self._num_counted
        if more > 0:
            if self._memory.num_bytes + more > self._memory.max_bytes:
                return False
            self._memory.num_bytes += more
            self._num_counted += more
        return True

    def release(self) -> None:
        """The body is dropped. Idempotent."""
        self._memory.num_bytes -= self._num_counted
        self._num_counted = 0


class Guard:
    """Wraps the whole application.

    A request must name this server: a foreign name that resolves to it is a web page's way around
    its origin. ``allowed_hosts`` adds names, ``*`` any.

    With ``needs_key`` every Origin is answered: the key is the guard, and desktop clients send
    ``null`` or ``app://``. Without, any web page could talk to the server through its reader's
    browser, so only pages of this machine or this server, and ``allowed_origins``, are.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        needs_key: bool,
        allowed_origins: frozenset[str] = frozenset(),
        allowed_hosts: frozenset[str] = frozenset(),
        limits: Limits | None = None,
    ) -> None:
        self.app = app
        self.needs_key = needs_key
        self.allowed_origins = allowed_origins
        self.allowed_hosts = OWN_NAMES | {name.lower().strip("[]") for name in allowed_hosts}
        self.limits = limits or Limits()
        self.body_memory = BodyMemory(max(self.limits.bodies, self.limits.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        scope["request_id"] = request_id
        scope["limits"] = self.limits
        scope["original_path"] = scope["path"]
        scope["path"] = canonical_path(scope["path"])
        origin = headers.get("origin")
        arrived = scope["arrived"] = time.monotonic()
        held_body = scope["held_body"] = HeldBody(self.body_memory)
        started = False

        async def send_tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                answer["openai-processing-ms"] = str(round(1000 * (time.monotonic() - arrived)))
                if origin is not None and self._allows(origin, headers):
                    answer["access-control-allow-origin"] = origin
                    answer["access-control-expose-headers"] = "x-request-id, retry-after"
                    answer.add_vary_header("origin")
            await send(message)

        error: RequestError
        try:
            self._check_host(scope, headers.getlist("host"))
            if origin is not None and not self._allows(origin, headers):
                raise HttpError(
                    403, f"The origin {shorten(origin)} is not allowed.", code="origin_not_allowed"
                )
            if scope["method"] == "OPTIONS":
                await preflight(headers)(scope, receive, send_tagged)
            else:
                await self.app(scope, receive, send_tagged)
            return
        except ClientGone:
            return
        except RequestError as caught:
            error = caught
        except PASSED_ON:
            raise
        except BaseException as caught:
            # A panic in a native library is no Exception, but just as much one request's failure.
            log_fault(request_id, caught)
            error = internal_error()
        finally:
            held_body.release()
        if not started:
            await error_response(error)(scope, receive, send_tagged)

    def _allows(self, origin: str, headers: Headers) -> bool:
        return (
            self.needs_key
            or origin in self.allowed_origins
            or _host(origin) in LOOPBACK_NAMES
            or origin.lower().partition("://")[2] == headers.get("host", "").lower() != ""
        )

    def _check_host(self, scope: Scope, hosts: list[str]) -> None:
        """Raises `HttpError` 400 unless there is one Host, and 421 for a name that is not ours."""
        if len(hosts) != 1:
            raise HttpError(
                400, f"The request has {len(hosts)} Host headers, not one.", code="invalid_http"
            )
        match = HOST.fullmatch(hosts[0].lower())
        name = (match[1] or match[2]) if match else ""
        if name and ("*" in self.allowed_hosts or name in self.allowed_hosts):
            return
        local = ip_literal((scope.get("server") or ("",))[0])
        if local is not None and local == ip_literal(name):
            return
        raise HttpError(
            421,
            f"This server does not answer to the name {shorten(hosts[0])!r}. Ask for localhost or "
            "its address, or start it with `--allowed-host NAME`.",
            code="unknown_host",
        )


def canonical_path(path: str) -> str:
    """The route a client means: no doubled or trailing slashes, no ``/v1`` or ``/beta`` in front.

    ``//models``, ``/v1/models/`` and ``/v1/v1/models`` (a base URL typed too long) are ``/models``,
    and so are ``/beta/models``, where DeepSeek has what is new, and ``http://localhost/models``,
    which is how a proxy is asked.
    """
    path = AUTHORITY.sub("", path)
    parts = [part for part in path.split("/") if part]
    while parts and parts[0] in ("v1", "beta"):
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
    """The body as a JSON object, within the limits that `Guard` left in the scope.

    Raises `BadRequest` for another content type or bad JSON, `HttpError` 413 for a body that is too
    long, 408 for one that is too slow and 503 if other bodies take all memory there is for them,
    `ClientGone` if the client left first.
    """
    headers = Headers(scope=scope)
    limits: Limits = scope["limits"]
    content_type = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise BadRequest(
            f"The content type is {shorten(content_type)!r}; send 'Content-Type: "
            "application/json'.",
            code="unsupported_content_type",
        )
    spent = time.monotonic() - scope["arrived"]
    try:
        async with asyncio.timeout(limits.request_seconds - spent):
            data = await read_body(headers, receive, limits.body, scope["held_body"])
    except TimeoutError:
        raise HttpError(
            408,
            f"The request's body did not end in {limits.request_seconds:g} s.",
            code="request_timeout",
        ) from None
    return parse_json(data, limits)


async def read_body(
    headers: Headers, receive: Receive, max_bytes: int, held_body: HeldBody
) -> bytes:
    """The body, of which nothing is kept once it is clear that it is refused."""
    declared = headers.get("content-length", "")
    length = int(declared) if re.fullmatch("[0-9]{1,18}", declared) else 0
    max_drained = DRAINED_BODIES * max_bytes
    parts: list[bytes] = []
    num_bytes = 0
    has_room = True
    while length <= max_drained and num_bytes <= max_drained:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        num_bytes += len(part)
        fits = max(length, num_bytes) <= max_bytes
        has_room = has_room and (not fits or held_body.grow(num_bytes))
        if fits and has_room:
            parts.append(part)
        else:
            parts.clear()
            held_body.release()
        if not message.get("more_body", False):
            break
    if max(length, num_bytes) > max_bytes:
        raise HttpError(
            413, f"The request body is above {max_bytes} bytes.", code="request_too_large"
        )
    if not has_room:
        raise HttpError(
            503,
            "The server holds as many bytes of requests as it may. Try again later.",
            code="server_overloaded",
            error_type="server_error",
        )
    return b"".join(parts)


def parse_json(data: bytes, limits: Limits) -> dict[str, Any]:
    """Strict JSON: UTF-8 without a mark, finite numbers, text that can be encoded again.

    Raises `BadRequest`.
    """
    check_nesting(data, limits)
    try:
        body = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\ud" in data or b"\\uD" in data:
            # Only an escape can hide half a surrogate pair, which no encoder takes.
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise invalid_json("it is not UTF-8") from None
    except UnicodeEncodeError:
        raise invalid_json("a text holds half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise invalid_json(f"{error.msg} at character {error.pos}") from None
    except ValueError as error:
        why = "a number has too many digits" if "int_max_str" in str(error) else str(error)
        raise invalid_json(shorten(why)) from None
    if not isinstance(body, dict):
        raise invalid_json("it must be an object")
    return body


def check_nesting(data: bytes, limits: Limits) -> None:
    """Count arrays, objects and values before anything is made of them: many take seconds.

    For 8 MiB this takes 15 ms as text and at most 0.2 s. Raises `BadRequest`.
    """
    has_many = data.count(b",") > limits.json_values
    if data.count(b"[") + data.count(b"{") <= limits.json_depth and not has_many:
        return
    # Without escapes, only quotes decide what is inside a string and only brackets what is nested.
    dropped = NOT_STRUCTURE_OR_COMMA if has_many else NOT_STRUCTURE
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, dropped)
    bare = bare.replace(b'""', b"")
    letters = np.frombuffer(bare, np.uint8)
    if b'"' in bare:
        num_quotes = np.cumsum(letters == ord('"'), dtype=np.uint8)
        letters = letters[(num_quotes & 1) == 0]
    if np.count_nonzero(letters == ord(",")) > limits.json_values:
        raise invalid_json(f"it has more than {limits.json_values} values")
    steps = STEPS[letters[letters > ord(",")]]
    if np.cumsum(steps, dtype=np.int32).max(initial=0) > limits.json_depth:
        raise invalid_json(f"it is nested more than {limits.json_depth} deep")
    if np.count_nonzero(steps == 1) > limits.json_containers:
        raise invalid_json(f"it has more than {limits.json_containers} arrays and objects")


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
