"""The OpenAPI 3.1 document of this server, at ``GET /openapi.json``.

What a chat request may be comes from the models in `api.schemas`, with the limits that are checked
elsewhere added; answers are written out here. Tests hold the document against the server, field by
field and with random requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from api.openapi_completions import completion_answer_schemas, completion_request_schemas
from api.openapi_parts import (
    JSON,
    REFERENCE,
    Schema,
    body_of,
    clean,
    closed_object,
    limit_sampling,
    or_null,
    reference,
)
from api.schemas import ChatRequest

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
    "timings": "Say how long the answer took, as the header 'X-Fathom-Timings: 1' does too.",
    "timings_per_token": "The same as timings.",
    "add_generation_prompt": "Whether the template opens a new answer; true if left out.",
    "continue_final_message": "The answer goes on with the text of the last message, which must be "
    "an assistant's without tool calls; prefix in that message, and in no other, says the same. "
    "If it has reasoning_content, the answer goes on behind that thought, or inside it if there is "
    "no text. add_generation_prompt cannot be true then.",
    "tools": "Functions that the model may call. A model that was not taught to call any is told "
    "of them only if tool_choice asks for a call.",
    "tool_choice": "A function must be one of tools. Without tools it means nothing.",
    "parallel_tool_calls": "false ends the answer behind the first call.",
    "chat_template_kwargs": "Variables of the chat template, at most 65,536 characters of JSON. "
    "Names that the server sets itself, as messages and tools, are refused.",
}

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
    schemas = {**_request_schemas(model_names), **_answer_schemas(model_names)}
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


def _request_schemas(model_names: Sequence[str]) -> Schema:
    """`ChatRequest` and its parts, as strict as the server and no stricter."""
    root = ChatRequest.model_json_schema(ref_template=REFERENCE)
    parts: Schema = root.pop("$defs")
    schemas: Schema = {name: clean(part) for name, part in parts.items()}
    request = schemas["ChatRequest"] = clean(root)
    request["description"] = "A chat request."
    fields = request["properties"]
    limit_sampling(fields, model_names)
    choices: Schema = {"enum": ["none", "auto", "required", None]}
    fields["tool_choice"] = {"anyOf": [choices, reference("NamedTool")]}
    switch = {"type": ["boolean", "null"]}
    fields["chat_template_kwargs"]["anyOf"][0]["properties"] = {
        "thinking": switch,
        "enable_thinking": switch,
        "thinking_budget": {"type": ["integer", "null"], "minimum": 0},
    }
    for name, description in DESCRIPTIONS.items():
        fields[name]["description"] = description
    request["anyOf"] = [  # top_logprobs needs logprobs
        {"properties": {"top_logprobs": {"enum": [0, None]}}},
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    ]
    open_object: Schema = {"type": "object", "additionalProperties": True}
    described = {**open_object, "properties": {"schema": open_object}, "required": ["schema"]}
    schemas["ResponseFormat"]["anyOf"] = [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        _needs("json_schema", json_schema=described),
        _needs("regex", regex={"type": "string"}),
        _needs("regex", pattern={"type": "string"}),
        _needs("grammar", grammar={"type": "string"}),
    ]
    schemas |= _message_schemas(schemas.pop("Message"))
    return schemas | completion_request_schemas(model_names)


def _needs(kind: str, **fields: Schema) -> Schema:
    """A response format of this type has these fields, not null."""
    return {"properties": {"type": {"const": kind}, **fields}, "required": list(fields)}


def _message_schemas(message: Schema) -> Schema:
    """Only an assistant's message may be without content: it may be all thought or tool calls."""
    fields: Schema = message["properties"]
    roles: list[str] = fields["role"]["enum"]
    parts = {"type": "array", "items": reference("TextPart")}
    text = {"type": "string"}
    assistant = fields | {
        "role": {"const": "assistant"},
        "content": {"anyOf": [text, parts, {"type": "null"}]},
    }
    others = fields | {
        "role": {"enum": [role for role in roles if role != "assistant"]},
        "prefix": {"enum": [False, None]},
        "content": {"anyOf": [text, parts]},
    }
    return {
        "Message": {"anyOf": [reference("AssistantMessage"), reference("OtherMessage")]},
        "AssistantMessage": {**message, "properties": assistant, "required": ["role"]},
        "OtherMessage": {**message, "properties": others, "required": ["role", "content"]},
    }


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
    finish_reason: Schema = {"enum": ["stop", "length", "tool_calls"]}
    token: Schema = {
        "token": text,
        "logprob": {"type": "number", "maximum": 0},
        "bytes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
    }
    tops: Schema = {"type": "array", "items": reference("TopLogprob"), "maxItems": 20}
    tokens: Schema = {"type": ["array", "null"], "items": reference("TokenLogprob")}
    choice: Schema = {
        "index": count,
        "message": reference("AnswerMessage"),
        "logprobs": or_null("Logprobs"),
        "finish_reason": finish_reason,
    }
    delta: Schema = {
        "role": {"const": "assistant"},
        "content": text,
        "reasoning_content": text,
        "reasoning": text,
        "tool_calls": {"type": "array", "items": reference("AnswerToolCallDelta"), "minItems": 1},
    }
    call: Schema = {
        "id": text,
        "type": {"const": "function"},
        "function": closed_object({"name": text, "arguments": text}),
    }
    call_parts: Schema = {"index": count, "function": closed_object({"arguments": text})}
    chunk_choice: Schema = {
        "index": count,
        "delta": closed_object(delta, optional=delta),
        "logprobs": reference("Logprobs"),
        "finish_reason": {"enum": [*finish_reason["enum"], None]},
    }
    usage: Schema = {
        "prompt_tokens": count,
        "completion_tokens": count,
        "total_tokens": count,
        "prompt_tokens_details": closed_object({"cached_tokens": count}),
        "completion_tokens_details": closed_object({"reasoning_tokens": count}),
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
    message: Schema = {
        **delta,
        "content": {"type": ["string", "null"]},
        "tool_calls": {"type": "array", "items": reference("AnswerToolCall"), "minItems": 1},
        "refusal": nothing,
    }
    some = ("reasoning_content", "reasoning", "tool_calls")
    completion: Schema = {
        **head,
        "object": {"const": "chat.completion"},
        "choices": {"type": "array", "items": closed_object(choice), "minItems": 1},
        "usage": reference("Usage"),
        "timings": reference("Timings"),
    }
    chunk: Schema = {
        **head,
        "object": {"const": "chat.completion.chunk"},
        "choices": {"type": "array", "items": closed_object(chunk_choice, optional=["logprobs"])},
        "usage": or_null("Usage"),
        "timings": reference("Timings"),
    }
    events: Schema = {
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [reference("ChatCompletionChunk"), reference("Error")]},
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
        "Model": closed_object(model),
        "ModelList": closed_object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": reference("Model"), "minItems": 1},
            }
        ),
        "ChatCompletion": closed_object(completion, optional=["timings"]),
        "AnswerMessage": closed_object(message, optional=some),
        "AnswerToolCall": closed_object(call),
        "AnswerToolCallDelta": {
            "description": "The first of a call has its id and name; arguments are joined.",
            "anyOf": [closed_object({"index": count, **call}), closed_object(call_parts)],
        },
        "ChatCompletionChunk": closed_object(chunk, optional=["usage", "timings"]),
        "ChatEvent": {
            "description": "One event of a stream. The last is [DONE], or an Error in its place.",
            **closed_object(event, optional=["event"]),
        },
        "Logprobs": closed_object(logprobs, optional=["reasoning_content"]),
        "TokenLogprob": closed_object({**token, "top_logprobs": tops}),
        "TopLogprob": closed_object(token),
        "Usage": closed_object(usage),
        "Timings": closed_object(_timings()),
        "Metrics": {"type": "string"},
        "Stats": closed_object(_stats(name)),
        "Health": closed_object({"status": {"const": "ok"}}),
        "Ready": closed_object({"status": {"const": "ready"}, "model": name}),
        "NotReady": closed_object({"error": closed_object(error), **progress}),
        "Document": {**closed_object(document), "additionalProperties": True},
        "Error": closed_object({"error": closed_object(error)}),
        **completion_answer_schemas(head),
    }


def _timings() -> Schema:
    count: Schema = {"type": "integer", "minimum": 0}
    measured: Schema = {"type": ["number", "null"], "minimum": 0}
    milliseconds = dict.fromkeys(("queue_ms", "prompt_ms", "predicted_ms"), measured)
    counts = dict.fromkeys(("prompt_n", "cached_n", "predicted_n"), count)
    return (
        milliseconds
        | counts
        | dict.fromkeys(("prompt_per_second", "predicted_per_second"), measured)
    )


def _stats(model_name: Schema) -> Schema:
    text: Schema = {"type": "string"}
    count: Schema = {"type": "integer", "minimum": 0}
    amount: Schema = {"type": "number", "minimum": 0}
    request: Schema = {
        "id": text,
        "key_id": {"type": ["string", "null"]},
        "prompt_tokens": count,
        "completion_tokens": count,
        "seconds": amount,
    }
    sequences = dict.fromkeys(("num_running", "num_waiting"), count)
    pages = dict.fromkeys(("num_pages", "num_free_pages", "num_cached_pages"), count)
    kinds = ("prompt_tokens_total", "cached_tokens_total", "generation_tokens_total")
    return {
        "model": model_name,
        "uptime_seconds": amount,
        **sequences,
        **pages,
        **dict.fromkeys(kinds, count),
        "tokens_per_second": amount,
        "requests_total": {"type": "object", "additionalProperties": count},
        "restarts": count,
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
