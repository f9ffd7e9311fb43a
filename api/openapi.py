"""The OpenAPI 3.1 document of this server, at ``GET /openapi.json``.

What a request may be comes from the models of requests, with the limits that are checked elsewhere
added; answers are written out. Tests hold the document against the server, field by field and with
random requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from api.openapi_chat import chat_answer_schemas, chat_request_schemas
from api.openapi_completions import completion_answer_schemas, completion_request_schemas
from api.openapi_parts import (
    COUNT,
    JSON,
    NOTHING,
    TEXT,
    Schema,
    array_of,
    body_of,
    closed_object,
    reference,
)

OPERATION_ERRORS = ("400", "403", "408", "413", "414", "421", "429", "431", "500", "503")
"""What any request may end in, whatever it asks for."""

ERRORS = {
    "400": "The request is malformed or holds a value that is not allowed.",
    "401": "No API key was sent, or one that is wrong, revoked or expired.",
    "403": "The page that asks is of an origin that is not allowed.",
    "404": "No such model.",
    "408": "The request did not arrive in time.",
    "413": "The body is too long.",
    "414": "The first line of the request is too long.",
    "421": "The request names a host that is not this server.",
    "429": "Too many requests wait, the API key has as many requests or tokens as it may have, or "
    "too many wrong keys were sent.",
    "431": "The headers are too long or too many.",
    "500": "The server or the engine failed while it worked on this request.",
    "503": "The model is being loaded or replaced, or the server stops or is overloaded.",
}
ERROR_TYPES = ["invalid_request_error", "rate_limit_error", "server_error"]


def openapi_document(model_names: Sequence[str], *, needs_key: bool) -> Schema:
    """The document of a server with these models; with ``needs_key`` it asks for a key."""
    schemas = {
        **chat_request_schemas(model_names),
        **completion_request_schemas(model_names),
        **_answer_schemas(model_names),
    }
    document: Schema = {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "Fathom",
            "version": "1",
            "description": "Completions as the OpenAI API has them, from a model on this machine. "
            "Paths are reached with and without /v1, and under /beta. Fields that the server does "
            "not know are ignored, and null stands for a field that is left out. Bodies are at "
            "most 64 levels deep.",
        },
        "servers": [{"url": "/"}],
        "paths": _paths(model_names, needs_key=needs_key),
        "components": {
            "schemas": schemas,
            "headers": _headers(),
            "responses": {
                status: _response(text, "Error", JSON, _error_headers(status))
                for status, text in ERRORS.items()
            },
        },
    }
    if needs_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
        document["security"] = [{"bearer": []}, {"apiKey": []}]
    return document


def _paths(model_names: Sequence[str], *, needs_key: bool) -> Schema:
    def operation(
        name: str, summary: str, answer: Schema, *errors: str, is_open: bool = False
    ) -> Schema:
        statuses = {*OPERATION_ERRORS, *errors}
        described: Schema = {"operationId": name, "summary": summary}
        if is_open:
            described["security"] = []
        elif needs_key:
            statuses.add("401")
        described["responses"] = {"200": answer} | {
            status: {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)
        }
        return described

    answer = _response("The answer.", "ChatCompletion")
    answer["content"]["text/event-stream"] = {"schema": reference("ChatEvent")}
    chat = operation("createChatCompletion", "Answer a conversation.", answer, "404")
    chat["requestBody"] = body_of("ChatRequest")
    text = _response("The answer.", "TextCompletion")
    text["content"]["text/event-stream"] = {"schema": reference("TextEvent")}
    completion = operation("createCompletion", "Go on with prompts.", text, "404")
    completion["requestBody"] = body_of("CompletionRequest")
    tokens = _response("The tokens.", "Tokens")
    tokenize = operation("tokenize", "Tokens of a text or a conversation.", tokens, "404")
    tokenize["requestBody"] = body_of("TokenizeRequest")
    detokenize = operation("detokenize", "The text.", _response("The text.", "Text"), "404")
    detokenize["requestBody"] = body_of("DetokenizeRequest")
    model = operation("getModel", "One model.", _response("The model.", "Model"), "404")
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": list(model_names)}}
    model["parameters"] = [name]
    engine_chat = {**chat, "operationId": "createEngineChatCompletion", "parameters": [name]}
    engine_text = {**completion, "operationId": "createEngineCompletion", "parameters": [name]}
    document = _response("The document.", "Document")
    health = _response("The server's process lives.", "Health")
    figures = _response("Prometheus' text format, 0.0.4.", "Metrics", "text/plain")
    ready = operation(
        "getReady",
        "Whether requests are answered.",
        _response("The model is loaded and answers.", "Ready"),
        is_open=True,
    )
    ready["responses"]["503"] = _response("Not now.", "NotReady", JSON, _error_headers("503"))
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/completions": {"post": completion},
        "/v1/engines/{name}/chat/completions": {"post": engine_chat},
        "/v1/engines/{name}/completions": {"post": engine_text},
        "/v1/tokenize": {"post": tokenize},
        "/v1/detokenize": {"post": detokenize},
        "/v1/models": {
            "get": operation("listModels", "The models.", _response("The models.", "ModelList"))
        },
        "/v1/models/{name}": {"get": model},
        "/health": {
            "get": operation("getHealth", "Whether the server lives.", health, is_open=True)
        },
        "/ready": {"get": ready},
        "/openapi.json": {"get": operation("getDocument", "This document.", document)},
        "/metrics": {"get": operation("getMetrics", "Figures for Prometheus.", figures)},
        "/stats": {
            "get": operation("getStats", "Figures of now.", _response("The figures.", "Stats"))
        },
    }


def _answer_schemas(model_names: Sequence[str]) -> Schema:
    name: Schema = {"enum": list(model_names)}
    head: Schema = {"id": TEXT, "created": COUNT, "model": name, "system_fingerprint": TEXT}
    model: Schema = {
        "id": name,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": TEXT,
        "permission": NOTHING,
        "root": name,
        "parent": NOTHING,
        "max_model_len": {"type": "integer", "minimum": 1},
    }
    models: Schema = {
        "object": {"const": "list"},
        "data": {**array_of(reference("Model")), "minItems": 1},
    }
    usage: Schema = {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": closed_object({"cached_tokens": COUNT}),
        "completion_tokens_details": closed_object({"reasoning_tokens": COUNT}),
        "prompt_cache_hit_tokens": COUNT,
        "prompt_cache_miss_tokens": COUNT,
    }
    error: Schema = {
        "message": TEXT,
        "type": {"enum": ERROR_TYPES},
        "param": {"type": ["string", "null"]},
        "code": TEXT,
    }
    progress: Schema = {
        "status": {"enum": ["loading", "restarting", "failing", "stopped", "draining"]},
        "phase": TEXT,
        "percent": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
    }
    document: Schema = {
        "openapi": {"const": "3.1.0"},
        "info": {"type": "object", "additionalProperties": True},
        "paths": {"type": "object", "additionalProperties": True},
    }
    return {
        **chat_answer_schemas(head),
        **completion_answer_schemas(head),
        "Usage": closed_object(usage),
        "Timings": closed_object(_timings()),
        "Model": closed_object(model),
        "ModelList": closed_object(models),
        "Metrics": TEXT,
        "Stats": closed_object(_stats(name)),
        "Health": closed_object({"status": {"const": "ok"}}),
        "Ready": closed_object({"status": {"const": "ready"}, "model": name}),
        "NotReady": closed_object({"error": closed_object(error), **progress}),
        "Document": {**closed_object(document), "additionalProperties": True},
        "Error": closed_object({"error": closed_object(error)}),
    }


def _timings() -> Schema:
    measured: Schema = {"type": ["number", "null"], "minimum": 0}
    milliseconds = dict.fromkeys(("queue_ms", "prompt_ms", "predicted_ms"), measured)
    counts = dict.fromkeys(("prompt_n", "cached_n", "predicted_n"), COUNT)
    return (
        milliseconds
        | counts
        | dict.fromkeys(("prompt_per_second", "predicted_per_second"), measured)
    )


def _stats(model_name: Schema) -> Schema:
    amount: Schema = {"type": "number", "minimum": 0}
    request: Schema = {
        "id": TEXT,
        "key_id": {"type": ["string", "null"]},
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "seconds": amount,
    }
    sequences = dict.fromkeys(("num_running", "num_waiting"), COUNT)
    pages = dict.fromkeys(("num_pages", "num_free_pages", "num_cached_pages"), COUNT)
    kinds = ("prompt_tokens_total", "cached_tokens_total", "generation_tokens_total")
    return {
        "model": model_name,
        "uptime_seconds": amount,
        **sequences,
        **pages,
        **dict.fromkeys(kinds, COUNT),
        "tokens_per_second": amount,
        "requests_total": {"type": "object", "additionalProperties": COUNT},
        "restarts": COUNT,
        "ttft_seconds_p50": {"type": ["number", "null"], "minimum": 0},
        "requests": {"type": "array", "items": closed_object(request)},
    }


def _headers() -> Schema:
    return {
        "x-request-id": {
            "description": "The request's own X-Request-Id if it has one, else a new one. Only an "
            "answer to what is no whole request has none.",
            "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        },
        "Retry-After": {
            "description": "Seconds.",
            "required": True,
            "schema": {"type": "integer", "minimum": 0},
        },
        "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
    }


def _error_headers(status: str) -> tuple[str, ...]:
    if status == "401":
        return ("x-request-id", "WWW-Authenticate")
    return ("x-request-id", "Retry-After") if status in ("429", "503") else ("x-request-id",)


def _response(
    description: str,
    schema: str,
    content_type: str = JSON,
    headers: Sequence[str] = ("x-request-id",),
) -> Schema:
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": {content_type: {"schema": reference(schema)}},
    }
