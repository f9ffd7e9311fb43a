"""The JSON of a chat request and what it means to the chat template and the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from api.fields import FAIL_FAST, PARTS, TEXT, Body, Integer, TextOrObject, parse, show
from api.sampling_fields import SamplingFields, sampling_params
from runtime import BadRequest, GenerationDefaults, SamplingParams

MAX_MESSAGES = 2048
MAX_VARIABLES_CHARS = 65_536  # of chat_template_kwargs as JSON

THINKING_VARIABLES = ("thinking", "enable_thinking")
"""Names in chat templates for the switch: DeepSeek's and Qwen's."""

IGNORED_FIELDS = frozenset(
    {
        "include_reasoning",
        "metadata",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "safety_identifier",
        "separate_reasoning",
        "service_tier",
        "store",
        "thinking_budget",
        "verbosity",
    }
)
"""Fields of the API that do not change an answer of this server; not worth a line in the log."""


def _content_kind(value: object) -> str:
    return PARTS if isinstance(value, list) else TEXT


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str | None, Tag(TEXT)] | Annotated[list[TextPart], FAIL_FAST, Tag(PARTS)],
    Discriminator(_content_kind),
]


class FunctionCall(Body):
    name: str
    arguments: str = ""


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's name for it
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FAIL_FAST] | None = None
    tool_call_id: str | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]


class Thinking(Body):
    type: Literal["enabled", "disabled", "auto"]


class Reasoning(Body):
    enabled: bool | None = None
    effort: ReasoningEffort | None = None


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FAIL_FAST]
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], FAIL_FAST] | None = None
    tool_choice: TextOrObject | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """A checked request. Raises `BadRequest` naming the field by its JSON path."""
    request = parse(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        raise BadRequest(
            "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value"
        )
    if request.response_format and request.response_format.type != "text":
        raise BadRequest(
            f"response_format {request.response_format.type!r} is not supported by this version; "
            "ask for the format in the messages",
            param="response_format",
            code="unsupported_value",
        )
    return request


def chat_sampling(request: ChatRequest, defaults: GenerationDefaults) -> SamplingParams:
    """How to sample an answer. Raises `BadRequest` for a value out of range."""
    return sampling_params(
        request,
        defaults,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def unknown_fields(body: Mapping[str, Any]) -> set[str]:
    """Names in the body that mean nothing here."""
    return body.keys() - ChatRequest.model_fields.keys() - IGNORED_FIELDS


def thinking_wanted(request: ChatRequest) -> bool | None:
    """Whether the client wants a thought before the answer; None if it does not say.

    Of several spellings the first counts: ``thinking``, ``enable_thinking``, ``reasoning``,
    ``reasoning_effort``, and in ``chat_template_kwargs`` ``thinking`` or ``enable_thinking``.
    Raises `BadRequest` for one of the last two that is no boolean, also where another counts.
    """
    variables = request.chat_template_kwargs or {}
    for name in THINKING_VARIABLES:
        if not isinstance(variables.get(name), bool | None):
            raise BadRequest(
                f"Invalid 'chat_template_kwargs.{name}': it must be true or false, got "
                f"{show(variables[name])}.",
                param=f"chat_template_kwargs.{name}",
                code="invalid_type",
            )
    if request.thinking is not None and request.thinking.type != "auto":
        return request.thinking.type == "enabled"
    reasoning = request.reasoning or Reasoning()
    for switch in (request.enable_thinking, reasoning.enabled):
        if switch is not None:
            return switch
    for effort in (reasoning.effort, request.reasoning_effort):
        if effort is not None:
            return effort != "none"
    for name in THINKING_VARIABLES:
        if variables.get(name) is not None:
            return bool(variables[name])
    return None


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What else the client gives the chat template. Raises `BadRequest` for more than switches."""
    variables = request.chat_template_kwargs or {}
    try:
        num_chars = len(json.dumps(variables, ensure_ascii=False))
    except RecursionError:
        num_chars = MAX_VARIABLES_CHARS + 1
    if num_chars > MAX_VARIABLES_CHARS:
        raise BadRequest(
            "Invalid 'chat_template_kwargs': nested too deeply, or more than "
            f"{MAX_VARIABLES_CHARS} characters.",
            param="chat_template_kwargs",
            code="string_above_max_length",
        )
    return {name: variables[name] for name in variables if name not in THINKING_VARIABLES}


def template_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """The conversation as chat templates read it: ``content`` is text, absent keys are absent.

    Raises `BadRequest` for a message without content, unless the assistant's.
    """
    messages = []
    for index, message in enumerate(request.messages):
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        if content is None and message.role != "assistant":
            raise BadRequest(
                f"a message with the role {message.role!r} needs content",
                param=f"messages[{index}].content",
                code="missing_required_parameter",
            )
        fields = message.model_dump(exclude_none=True, exclude={"content", "reasoning"})
        if message.reasoning and not message.reasoning_content:
            fields["reasoning_content"] = message.reasoning
        messages.append({**fields, "content": content})
    return messages
