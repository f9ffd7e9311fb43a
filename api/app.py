"""The routes. Each is reached with and without ``/v1`` (see `api.guard.canonical_path`)."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from api.auth import Auth
from api.chat import chat_completions
from api.errors import on_http_exception
from api.guard import Guard
from api.state import ServerState
from runtime import EngineDead

__all__ = ["ServerState", "create_app"]


def create_app(state: ServerState) -> Starlette:
    """The ASGI application that serves ``state``."""
    needs_key = state.keys is not None
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/models", models),
            Route("/models/{name:path}", model),
            Route("/chat/completions", chat_completions, methods=["POST"]),
        ],
        middleware=[
            Middleware(Guard, needs_key=needs_key, allowed_origins=state.allowed_origins),
            Middleware(Auth, keys=state.keys),
        ],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.state.server = state
    return app


async def health(request: Request) -> JSONResponse:
    """200 while the engine can answer. Needs no key."""
    state: ServerState = request.app.state.server
    if not state.engine.healthy:
        raise EngineDead("The engine is not running.")
    return JSONResponse({"status": "ok"})


async def models(request: Request) -> JSONResponse:
    state: ServerState = request.app.state.server
    data = [model_object(state, name) for name in state.model_names]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> JSONResponse:
    state: ServerState = request.app.state.server
    return JSONResponse(model_object(state, state.check_model(request.path_params["name"])))


def model_object(state: ServerState, name: str) -> dict[str, Any]:
    """A model in the document's words; an alias names the main model as its root."""
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "fathom",
        "permission": None,
        "root": state.model_names[0],
        "parent": None,
        "max_model_len": state.max_model_len,
    }
