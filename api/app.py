"""The routes. Each is reached as it is, under ``/v1`` and under ``/beta``, see `api.guard`."""

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
from api.completions import completions
from api.errors import RETRY_SECONDS, HttpError, envelope, on_http_exception
from api.guard import Guard
from api.metrics import metrics
from api.openapi import openapi_document
from api.page import Page
from api.request_log import RequestLog
from api.state import ServerState
from api.stats import stats
from api.tokens import detokenize, tokenize

__all__ = ["ServerState", "create_app"]


def create_app(state: ServerState) -> Starlette:
    """The ASGI application that serves ``state``."""
    needs_key = state.keys is not None
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/models", models),
            Route("/models/{name:path}", model),
            Route("/chat/completions", chat_completions, methods=["POST"]),
            Route("/completions", completions, methods=["POST"]),
            Route("/engines/{name:path}/chat/completions", chat_completions, methods=["POST"]),
            Route("/engines/{name:path}/completions", completions, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/openapi.json", openapi),
            Route("/metrics", metrics),
            Route("/stats", stats),
        ],
        middleware=[
            Middleware(RequestLog, figures=state.running.figures),
            Middleware(
                Guard,
                needs_key=needs_key,
                allowed_origins=state.allowed_origins,
                allowed_hosts=state.allowed_hosts,
                limits=state.limits,
            ),
            Middleware(Page),
            Middleware(Auth, keys=state.keys, failures_per_minute=state.limits.failed_keys),
        ],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.state.server = state
    app.state.openapi = openapi_document(state.model_names, needs_key=needs_key)
    return app


async def health(request: Request) -> JSONResponse:
    """200 while the process lives, whatever its engine does. Needs no key."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> JSONResponse:
    """200 while a request would be worked on, else 503 with what is awaited. Needs no key."""
    state: ServerState = request.app.state.server
    engine = state.engine.status
    status, phase = engine.state, engine.phase
    if state.running.draining:
        status, phase = "draining", "finishing answers"
    if status == "ready":
        return JSONResponse({"status": status, "model": state.model_names[0]})
    message = f"The server is not ready, it is {status}: {phase}."
    error = HttpError(503, message, code="not_ready", error_type="server_error")
    details = {"status": status, "phase": phase, "percent": engine.percent}
    headers = {"Retry-After": RETRY_SECONDS}
    return JSONResponse({**envelope(error), **details}, 503, headers)


async def models(request: Request) -> JSONResponse:
    state: ServerState = request.app.state.server
    state.check_open()
    data = [model_object(state, name) for name in state.model_names]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> JSONResponse:
    state: ServerState = request.app.state.server
    state.check_open()
    return JSONResponse(model_object(state, state.check_model(request.path_params["name"])))


async def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.state.openapi)


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
