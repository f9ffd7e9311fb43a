"""Chat completions in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence

from api.openapi_parts import (
    COUNT,
    NOTHING,
    REFERENCE,
    TEXT,
    Schema,
    array_of,
    clean,
    closed_object,
    event_schema,
    limit_sampling,
    or_null,
    reference,
)
from api.schemas import ChatRequest
from runtime import MAX_TOP_LOGPROBS

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


def chat_request_schemas(model_names: Sequence[str]) -> Schema:
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
    return schemas | _message_schemas(schemas.pop("Message"))


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


def chat_answer_schemas(head: Schema) -> Schema:
    """The answers; ``head`` are the fields that every answer begins with."""
    finish_reason: Schema = {"enum": ["stop", "length", "tool_calls"]}
    token: Schema = {
        "token": TEXT,
        "logprob": {"type": "number", "maximum": 0},
        "bytes": array_of({**COUNT, "maximum": 255}),
    }
    tops: Schema = {**array_of(reference("TopLogprob")), "maxItems": MAX_TOP_LOGPROBS}
    tokens: Schema = {**array_of(reference("TokenLogprob")), "type": ["array", "null"]}
    logprobs: Schema = {"content": tokens, "reasoning_content": tokens, "refusal": NOTHING}
    delta: Schema = {
        "role": {"const": "assistant"},
        "content": TEXT,
        "reasoning_content": TEXT,
        "reasoning": TEXT,
        "tool_calls": {**array_of(reference("AnswerToolCallDelta")), "minItems": 1},
    }
    call: Schema = {
        "id": TEXT,
        "type": {"const": "function"},
        "function": closed_object({"name": TEXT, "arguments": TEXT}),
    }
    call_part: Schema = {"index": COUNT, "function": closed_object({"arguments": TEXT})}
    message: Schema = {
        **delta,
        "content": {"type": ["string", "null"]},
        "tool_calls": {**array_of(reference("AnswerToolCall")), "minItems": 1},
        "refusal": NOTHING,
    }
    choice: Schema = {
        "index": COUNT,
        "message": reference("AnswerMessage"),
        "logprobs": or_null("Logprobs"),
        "finish_reason": finish_reason,
    }
    growing: Schema = {
        "index": COUNT,
        "delta": closed_object(delta, optional=delta),
        "logprobs": or_null("Logprobs"),
        "finish_reason": {"enum": [*finish_reason["enum"], None]},
    }
    completion: Schema = {
        **head,
        "object": {"const": "chat.completion"},
        "choices": {**array_of(closed_object(choice)), "minItems": 1},
        "usage": reference("Usage"),
        "timings": reference("Timings"),
    }
    chunk: Schema = {
        **head,
        "object": {"const": "chat.completion.chunk"},
        "choices": array_of(closed_object(growing)),
        "usage": or_null("Usage"),
        "timings": reference("Timings"),
    }
    return {
        "ChatCompletion": closed_object(completion, optional=["timings"]),
        "AnswerMessage": closed_object(
            message, optional=["reasoning_content", "reasoning", "tool_calls"]
        ),
        "AnswerToolCall": closed_object(call),
        "AnswerToolCallDelta": {
            "description": "The first of a call has its id and name; arguments are joined.",
            "anyOf": [closed_object({"index": COUNT, **call}), closed_object(call_part)],
        },
        "ChatCompletionChunk": closed_object(chunk, optional=["usage", "timings"]),
        "ChatEvent": event_schema("ChatCompletionChunk"),
        "Logprobs": closed_object(logprobs, optional=["reasoning_content"]),
        "TokenLogprob": closed_object({**token, "top_logprobs": tops}),
        "TopLogprob": closed_object(token),
    }
