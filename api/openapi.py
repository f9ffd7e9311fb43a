"""The OpenAPI 3.1 document of this server, at ``GET /openapi.json``.

What a chat request may be comes from the models in `api.schemas`, with the limits that are checked
elsewhere added; answers are written out here. Tests hold the document against the server, field by
field and with random requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.fields import INT32_MAX
from api.sampling_fields import MAX_LOGIT_BIAS
from api.schemas import ChatRequest
from runtime import INT64_MAX, INT64_MIN, MAX_STOP_CHARS, MAX_STOP_STRINGS

Schema = dict[str, Any]

JSON = "application/json"
REFERENCE = "#/components/schemas/{model}"

RANGES: dict[str, Schema] = {
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"minimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": INT32_MAX},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 10},
    "min_tokens": {"minimum": 0, "maximum": INT32_MAX},
}
"""What `runtime.SamplingParams` checks and the models of `api.schemas` do not."""

DESCRIPTIONS = {
    "temperature": "0 always takes the most likely token. Left out: what the checkpoint says.",
    "top_k": "0 and -1 are off.",
    "logit_bias": "Token ids, below the size of the vocabulary, and what to add to their logits.",
    "max_tokens": "More than the context has room for is cut to that room.",
    "max_completion_tokens": "The newer name of max_tokens; if both are there this one counts.",
    "stop": "The answer ends before any of these; it does not hold them.",
    "stop_token_ids": "The answer ends at any of these; each is below the size of the vocabulary.",
    "n": "Answers to generate.",
    "top_logprobs": "More than 0 needs logprobs to be true.",
    "stream": "Answer with server-sent events.",
    "tools": "Tools are accepted and not called yet.",
    "chat_template_kwargs": "Variables of the chat template, at most 65,536 characters of JSON. "
    "Names that the server sets itself, as messages and tools, are refused.",
}

PYDANTIC_LIMITS = {"ge": "minimum", "le": "maximum"}
"""Where a validator of our own comes first, pydantic leaves its limits under its own names."""

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
    "429": "Too many requests wait, or too many wrong keys were sent.",
    "431": "The headers are too long or too many.",
    "500": "The server or the engine failed while it worked on this request.",
    "503": "The model is being loaded or replaced, or the server stops or is overloaded.",
}
ERROR_TYPES = ["invalid_request_error", "rate_limit_error", "server_error"]


def openapi_document(model_names: Sequence[str], *, needs_key: bool) -> Schema:
    """The document of a server with these models; with ``needs_key`` it asks for a key."""
    schemas = {**_request_schemas(model_names), **_answer_schemas(model_names)}
    document: Schema = {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "Fathom",
            "version": "1",
            "description": "Chat completions as the OpenAI API has them, from a model on this "
            "machine. Paths are reached with and without /v1. Fields that the server does not "
            "know are ignored, and null stands for a field that is left out. Bodies are at most 64 "
            "levels deep.",
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

    completion = _response("The answer.", "ChatCompletion")
    completion["content"]["text/event-stream"] = {"schema": _reference("ChatEvent")}
    chat = operation("createChatCompletion", "Answer a conversation.", completion, "404")
    chat["requestBody"] = {
        "required": True,
        "content": {JSON: {"schema": _reference("ChatRequest")}},
    }
    model = operation("getModel", "One model.", _response("The model.", "Model"), "404")
    model["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {"enum": list(model_names)}}
    ]
    document = _response("The document.", "Document")
    health = _response("The server's process lives.", "Health")
    ready = operation(
        "getReady",
        "Whether requests are answered.",
        _response("The model is loaded and answers.", "Ready"),
        is_open=True,
    )
    ready["responses"]["503"] = _response("Not now.", "NotReady", JSON, _error_headers("503"))
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/models": {
            "get": operation("listModels", "The models.", _response("The models.", "ModelList"))
        },
        "/v1/models/{name}": {"get": model},
        "/health": {
            "get": operation("getHealth", "Whether the server lives.", health, is_open=True)
        },
        "/ready": {"get": ready},
        "/openapi.json": {"get": operation("getDocument", "This document.", document)},
    }


def _request_schemas(model_names: Sequence[str]) -> Schema:
    """`ChatRequest` and its parts, as strict as the server and no stricter."""
    root = ChatRequest.model_json_schema(ref_template=REFERENCE)
    parts: Schema = root.pop("$defs")
    schemas: Schema = {name: _clean(part) for name, part in parts.items()}
    request = schemas["ChatRequest"] = _clean(root)
    request["description"] = "A chat request."
    fields = request["properties"]
    for name, limits in RANGES.items():
        fields[name]["anyOf"][0].update(limits)
    fields["model"] = {"enum": [*model_names, None]}
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    texts = {"type": "array", "items": text, "maxItems": MAX_STOP_STRINGS}
    fields["stop"] = {"anyOf": [text, texts, {"type": "null"}]}
    fields["stop_token_ids"]["anyOf"][0]["items"] = {"type": "integer", "minimum": 0}
    fields["logit_bias"]["anyOf"][0] = {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_LOGIT_BIAS,
    }
    fields["tool_choice"] = {"type": ["string", "object", "null"], "additionalProperties": True}
    switch = {"type": ["boolean", "null"]}
    fields["chat_template_kwargs"]["anyOf"][0]["properties"] = {
        "thinking": switch,
        "enable_thinking": switch,
    }
    for name, description in DESCRIPTIONS.items():
        fields[name]["description"] = description
    request["anyOf"] = [  # top_logprobs needs logprobs
        {"properties": {"top_logprobs": {"enum": [0, None]}}},
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    ]
    schemas["ResponseFormat"]["properties"]["type"]["enum"] = ["text"]
    schemas |= _message_schemas(schemas.pop("Message"))
    return schemas


def _message_schemas(message: Schema) -> Schema:
    """Only an assistant's message may be without content: it may be all thought or tool calls."""
    fields: Schema = message["properties"]
    roles: list[str] = fields["role"]["enum"]
    parts = {"type": "array", "items": _reference("TextPart")}
    text = {"type": "string"}
    assistant = fields | {
        "role": {"const": "assistant"},
        "content": {"anyOf": [text, parts, {"type": "null"}]},
    }
    others = fields | {
        "role": {"enum": [role for role in roles if role != "assistant"]},
        "content": {"anyOf": [text, parts]},
    }
    return {
        "Message": {"anyOf": [_reference("AssistantMessage"), _reference("OtherMessage")]},
        "AssistantMessage": {**message, "properties": assistant, "required": ["role"]},
        "OtherMessage": {**message, "properties": others, "required": ["role", "content"]},
    }


def _clean(node: Any) -> Any:
    """A schema of pydantic without titles and defaults, with limits of 64 bits and open objects."""
    if isinstance(node, list):
        return [_clean(item) for item in node]
    if not isinstance(node, dict):
        return node
    cleaned: Schema = {}
    for key, value in node.items():
        if key == "properties":  # its keys are names of fields, as "title" may be one
            cleaned[key] = {name: _clean(field) for name, field in value.items()}
        elif key not in ("title", "default", "description"):
            cleaned[PYDANTIC_LIMITS.get(str(key), str(key))] = _clean(value)
    if "properties" in cleaned:
        cleaned.setdefault("additionalProperties", True)
    if cleaned.get("type") == "integer":
        cleaned = {"minimum": INT64_MIN, "maximum": INT64_MAX, **cleaned}
    return cleaned


def _answer_schemas(model_names: Sequence[str]) -> Schema:
    name: Schema = {"enum": list(model_names)}
    text: Schema = {"type": "string"}
    nothing: Schema = {"type": "null"}
    count: Schema = {"type": "integer", "minimum": 0}
    model: Schema = {
        "id": name,
        "object": {"const": "model"},
        "created": count,
        "owned_by": text,
        "permission": nothing,
        "root": name,
        "parent": nothing,
        "max_model_len": {"type": "integer", "minimum": 1},
    }
    head: Schema = {"id": text, "created": count, "model": name, "system_fingerprint": text}
    finish_reason: Schema = {"enum": ["stop", "length"]}
    token: Schema = {
        "token": text,
        "logprob": {"type": "number", "maximum": 0},
        "bytes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
    }
    tops: Schema = {"type": "array", "items": _reference("TopLogprob"), "maxItems": 20}
    tokens: Schema = {"type": ["array", "null"], "items": _reference("TokenLogprob")}
    choice: Schema = {
        "index": count,
        "message": _reference("AnswerMessage"),
        "logprobs": _or_null("Logprobs"),
        "finish_reason": finish_reason,
    }
    delta: Schema = {
        "role": {"const": "assistant"},
        "content": text,
        "reasoning_content": text,
        "reasoning": text,
    }
    chunk_choice: Schema = {
        "index": count,
        "delta": _object(delta, optional=delta),
        "logprobs": _reference("Logprobs"),
        "finish_reason": {"enum": [*finish_reason["enum"], None]},
    }
    usage: Schema = {
        "prompt_tokens": count,
        "completion_tokens": count,
        "total_tokens": count,
        "prompt_tokens_details": _object({"cached_tokens": count}),
        "completion_tokens_details": _object({"reasoning_tokens": count}),
        "prompt_cache_hit_tokens": count,
        "prompt_cache_miss_tokens": count,
    }
    error: Schema = {
        "message": text,
        "type": {"enum": ERROR_TYPES},
        "param": {"type": ["string", "null"]},
        "code": text,
    }
    logprobs: Schema = {"content": tokens, "reasoning_content": tokens, "refusal": nothing}
    message: Schema = {**delta, "refusal": nothing}
    thoughts = ("reasoning_content", "reasoning")
    completion: Schema = {
        **head,
        "object": {"const": "chat.completion"},
        "choices": {"type": "array", "items": _object(choice), "minItems": 1},
        "usage": _reference("Usage"),
    }
    chunk: Schema = {
        **head,
        "object": {"const": "chat.completion.chunk"},
        "choices": {"type": "array", "items": _object(chunk_choice, optional=["logprobs"])},
        "usage": _or_null("Usage"),
    }
    events: Schema = {
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [_reference("ChatCompletionChunk"), _reference("Error")]},
    }
    event: Schema = {
        "event": {"const": "message"},
        "data": {"type": "string", "anyOf": [{"const": "[DONE]"}, events]},
    }
    progress: Schema = {
        "status": {"enum": ["loading", "restarting", "failing", "stopped", "draining"]},
        "phase": text,
        "percent": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
    }
    document: Schema = {
        "openapi": {"const": "3.1.0"},
        "info": {"type": "object", "additionalProperties": True},
        "paths": {"type": "object", "additionalProperties": True},
    }
    return {
        "Model": _object(model),
        "ModelList": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": _reference("Model"), "minItems": 1},
            }
        ),
        "ChatCompletion": _object(completion),
        "AnswerMessage": _object(message, optional=thoughts),
        "ChatCompletionChunk": _object(chunk, optional=["usage"]),
        "ChatEvent": {
            "description": "One event of a stream. The last is [DONE], or an Error in its place.",
            **_object(event, optional=["event"]),
        },
        "Logprobs": _object(logprobs, optional=["reasoning_content"]),
        "TokenLogprob": _object({**token, "top_logprobs": tops}),
        "TopLogprob": _object(token),
        "Usage": _object(usage),
        "Health": _object({"status": {"const": "ok"}}),
        "Ready": _object({"status": {"const": "ready"}, "model": name}),
        "NotReady": _object({"error": _object(error), **progress}),
        "Document": {**_object(document), "additionalProperties": True},
        "Error": _object({"error": _object(error)}),
    }


def _object(properties: Schema, *, optional: Sequence[str] | Schema = ()) -> Schema:
    """An object of exactly these fields, of which only ``optional`` ones may be left out."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _reference(name: str) -> Schema:
    return {"$ref": REFERENCE.format(model=name)}


def _or_null(name: str) -> Schema:
    return {"anyOf": [_reference(name), {"type": "null"}]}


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
        "content": {content_type: {"schema": _reference(schema)}},
    }
