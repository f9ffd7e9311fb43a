"""The JSON of a chat request and what it means to the chat template and the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from api.fields import FAIL_FAST, INT32_MAX, PARTS, TEXT, Body, Integer, parse, show
from api.response_format import ResponseFormat, grammar_of
from api.sampling_fields import NumLogprobs, SamplingFields, sampling_params
from api.tools import ToolChoice, Tools, check_tools
from runtime import BadRequest, GenerationDefaults, SamplingParams

MAX_MESSAGES = 2048
MAX_VARIABLES_CHARS = 65_536  # of chat_template_kwargs as JSON

THINKING_VARIABLES = ("thinking", "enable_thinking")
"""Names in chat templates for the switch: DeepSeek's and Qwen's."""


def _content_kind(value: object) -> str:
    return PARTS if isinstance(value, list) else TEXT


NumTokens = Annotated[Integer, Field(ge=0)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


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
    prefix: bool | None = None  # DeepSeek's: the answer goes on with this message's text


class Thinking(Body):
    type: Literal["enabled", "disabled", "auto", "adaptive"]  # the last two leave it to the server
    budget_tokens: NumTokens | None = None  # Anthropic's


class Reasoning(Body):
    enabled: bool | None = None
    effort: ReasoningEffort | None = None
    max_tokens: NumTokens | None = None  # OpenRouter's


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FAIL_FAST]
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking_budget: NumTokens | None = None
    thinking_token_budget: NumTokens | None = None  # vLLM's
    break_thought_loops: bool | None = None
    repetition_detection: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def continues_final_message(self) -> bool:
        """Whether the answer goes on with the text of the last message."""
        return bool(self.continue_final_message or self.messages[-1].prefix)


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """A checked request. Raises `BadRequest` naming the field by its JSON path."""
    request = parse(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        raise BadRequest(
            "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value"
        )
    check_tools(request.tools, request.tool_choice)
    _check_continuation(request)
    return request


def _check_continuation(request: ChatRequest) -> None:
    """Raises `BadRequest` unless what is to be continued is the last message, an assistant's."""
    last = len(request.messages) - 1
    for index, message in enumerate(request.messages):
        if message.prefix and (index < last or message.role != "assistant"):
            raise BadRequest(
                "prefix may only be set on the last message, and it must be an assistant's",
                param=f"messages[{index}].prefix",
                code="invalid_value",
            )
    if not request.continues_final_message:
        return
    if request.messages[last].role != "assistant":
        raise BadRequest(
            "continue_final_message needs a last message with the role 'assistant', got "
            f"{request.messages[last].role!r}",
            param="continue_final_message",
            code="invalid_value",
        )
    if request.messages[last].tool_calls:
        raise BadRequest(
            "a message that is to be continued cannot have tool_calls",
            param=f"messages[{last}].tool_calls",
            code="invalid_value",
        )
    if request.add_generation_prompt:
        raise BadRequest(
            "add_generation_prompt opens a new answer, so it cannot be true while the last message "
            "is continued",
            param="add_generation_prompt",
            code="invalid_value",
        )


def chat_sampling(request: ChatRequest, defaults: GenerationDefaults) -> SamplingParams:
    """How to sample an answer. Raises `BadRequest` for a value out of range."""
    params = sampling_params(
        request,
        defaults,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return replace(
        params,
        grammar=grammar_of(request.response_format),
        thinking_budget=_thinking_budget(request),
        break_loops=bool(request.break_thought_loops or request.repetition_detection),
    )


def _thinking_budget(request: ChatRequest) -> int | None:
    """Tokens the thought may have; the first of its names that is set counts.

    Raises `BadRequest` for one in ``chat_template_kwargs`` that is no such number, also where
    another counts.
    """
    variable = (request.chat_template_kwargs or {}).get("thinking_budget")
    is_number = isinstance(variable, int | float) and not isinstance(variable, bool)
    if variable is not None and not (is_number and variable >= 0 and variable == variable // 1):
        raise BadRequest(
            "Invalid 'chat_template_kwargs.thinking_budget': it must be an integer of at least 0, "
            f"got {show(variable)}.",
            param="chat_template_kwargs.thinking_budget",
            code="invalid_value",
        )
    for budget in (
        request.thinking_budget,
        request.thinking_token_budget,
        request.thinking.budget_tokens if request.thinking else None,
        request.reasoning.max_tokens if request.reasoning else None,
        variable,
    ):
        if budget is not None:
            return int(min(budget, INT32_MAX))
    return None


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
    if request.thinking is not None and request.thinking.type in ("enabled", "disabled"):
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
        fields = message.model_dump(exclude_none=True, exclude={"content", "reasoning", "prefix"})
        if message.reasoning and not message.reasoning_content:
            fields["reasoning_content"] = message.reasoning
        messages.append({**fields, "content": content})
    return messages
