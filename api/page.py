"""The page at ``/``: a chat and the engine's figures for a browser, from files in ``api/page/``.

The files hold nothing, so they are given out before a key is asked for; what the page asks of the
API carries the key that its reader entered.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

FOLDER = Path(__file__).parent / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
START = "index.html"
FILES = (
    "api.js",
    "app.js",
    "chat.js",
    "connection.js",
    "figures.js",
    "icon.svg",
    "markdown.js",
    "settings.js",
    "store.js",
    "style.css",
    "theme.js",
    "turns.js",
    "words.js",
)
"""What the start page loads, each at ``/page/NAME``."""
PATHS = {"/": START} | {f"/page/{name}": name for name in FILES}

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again: a new server has a new page
}


class Page:
    """Answers GET and HEAD for the page's own paths; everything else goes to ``app``.

    Reads the files once. Raises `OSError` if one is missing from the installation.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._files = {path: _file(name) for path, name in PATHS.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            found = self._files.get(scope["path"])
            if found is not None:
                data, headers = found
                await _answer(Request(scope), data, headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _answer(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    asked = request.headers.get("if-none-match", "")
    if headers["ETag"] in [tag.strip().removeprefix("W/") for tag in asked.split(",")]:
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(len(data))})
    return Response(data, headers=headers)


def _file(name: str) -> tuple[bytes, dict[str, str]]:
    path = FOLDER / name
    data = path.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    return data, {**HEADERS, "Content-Type": CONTENT_TYPES[path.suffix], "ETag": tag}
