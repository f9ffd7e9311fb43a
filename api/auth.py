"""Who is asking: exactly one bearer key, checked before the body is read or the route is known."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import HttpError
from api.keys import KeyEntry, KeyStore

OPEN_PATHS = frozenset({"/health"})


class Auth:
    """Lets a request through with a valid key, or any request if ``keys`` is None.

    Clients send the key as ``Authorization: Bearer KEY``; some as ``X-Api-Key: KEY``. The key's
    entry is at ``scope["api_key"]``.
    """

    def __init__(self, app: ASGIApp, keys: KeyStore | None) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.keys is not None and scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scope["api_key"] = authenticate(self.keys, scope["headers"])
        await self.app(scope, receive, send)


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
    entry = keys.authenticate(secret.strip()) if usable else None
    if entry is None:
        raise HttpError(
            401,
            "The API key is wrong or was revoked. `fathom keys create NAME` makes a new one.",
            code="invalid_api_key",
        )
    return entry
