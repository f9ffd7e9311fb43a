"""Who is asking: exactly one bearer key, checked before the body is read or the route is known."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import HttpError, error_response
from api.keys import KeyEntry, KeyStore

OPEN_PATHS = frozenset({"/health", "/ready"})
FAILURES_PER_MINUTE = 20
MAX_ADDRESSES = 4096
"""Addresses whose failures are remembered; beyond it the one that failed longest ago is dropped."""


class Auth:
    """Lets a request through with a valid key, or any request if ``keys`` is None.

    Clients send the key as ``Authorization: Bearer KEY``; some as ``X-Api-Key: KEY``. The key's
    entry is at ``scope["api_key"]``. An address that fails more than ``failures_per_minute`` times
    gets 429 for further failures; a good key from there still works. ``clock`` gives seconds that
    only grow.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyStore | None,
        failures_per_minute: int = FAILURES_PER_MINUTE,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self.keys = keys
        self.failures = FailureLimit(failures_per_minute, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.keys is not None and scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                scope["api_key"] = authenticate(self.keys, scope["headers"])
            except HttpError as error:
                address = scope["client"][0] if scope.get("client") else ""
                if error.status != 401 or not (seconds := self.failures.add(address)):
                    raise
                await _refuse_for(seconds, scope, receive, send)
                return
        await self.app(scope, receive, send)


class FailureLimit:
    """A bucket of failures for each address, full at first and refilled evenly over a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # address -> failures left, and when that was; the latest to fail is last
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def add(self, address: str) -> float:
        """Count a failure. 0 if it is within the limit, else seconds until the next one is."""
        now = self._clock()
        left, since = self._buckets.pop(address, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        within = left >= 1
        if within:
            left -= 1
        self._buckets[address] = left, now
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return 0.0 if within else (1 - left) * 60 / self._per_minute


def authenticate(keys: KeyStore, headers: list[tuple[bytes, bytes]]) -> KeyEntry:
    """The key that the headers carry. Raises `HttpError` 401, or 503 if the store is broken."""
    authorizations = [value for name, value in headers if name == b"authorization"]
    api_keys = [value for name, value in headers if name == b"x-api-key"]
    if authorizations:
        scheme, _, secret = authorizations[0].partition(b" ")
        usable = len(authorizations) == 1 and scheme.lower() == b"bearer"
    elif api_keys:
        secret = api_keys[0]
        usable = len(api_keys) == 1
    else:
        raise HttpError(
            401,
            "No API key was sent. Send it as the header 'Authorization: Bearer YOUR_KEY'; "
            "`fathom keys create NAME` makes one.",
            code="missing_api_key",
        )
    entry = keys.authenticate(secret) if usable else None
    if entry is None:
        raise HttpError(
            401,
            "The API key is wrong, has expired or was revoked. `fathom keys create NAME` makes a "
            "new one.",
            code="invalid_api_key",
        )
    return entry


async def _refuse_for(seconds: float, scope: Scope, receive: Receive, send: Send) -> None:
    wait = math.ceil(seconds)
    error = HttpError(
        429,
        "Too many requests without a valid API key came from your address. Send a valid one, or "
        f"try again in {wait} s.",
        code="too_many_failed_keys",
        error_type="rate_limit_error",
    )
    response = error_response(error)
    response.headers["Retry-After"] = str(wait)
    await response(scope, receive, send)
