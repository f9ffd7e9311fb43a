"""The JSON of a chat request, typed strictly, and what it means to the engine.

Integers pass for floats and integral floats for integers; booleans and strings never pass for
numbers. ``null`` means absent, unknown fields are ignored: every real client sends some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from api.errors import shorten
from runtime import INT64_MAX, INT64_MIN, BadRequest, GenerationDefaults, SamplingParams

INT32_MAX = 2**31 - 1
MAX_CHOICES = 8
MAX_MESSAGES = 2048
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_SALT_CHARS = 256
MAX_PRIORITY = 1000
MAX_VARIABLES_CHARS = 65_536  # of chat_template_kwargs as JSON
PARTS = "<parts>"  # names of union branches; no JSON field is called so
TEXT = "<text>"

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

ERROR_CODES = {
    "missing": "missing_required_parameter",
    "literal_error": "invalid_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_long": "string_above_max_length",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}
OWN_ERRORS = frozenset(
    {
        "invalid_type",
        "integer_below_min_value",
        "integer_above_max_value",
        "decimal_below_min_value",
        "decimal_above_max_value",
        "object_above_max_properties",
    }
)


OBJECT_ERRORS = frozenset({"dict_type", "model_attributes_type", "model_type"})


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("invalid_type", "Input should be a number")
    try:
        return float(value)
    except OverflowError:
        side = "below_min" if value < 0 else "above_max"
        raise PydanticCustomError(f"decimal_{side}_value", "Input is out of range") from None


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise PydanticCustomError("invalid_type", "Input should be an integer")
    if not INT64_MIN <= value <= INT64_MAX:
        side = "below_min" if value < 0 else "above_max"
        raise PydanticCustomError(f"integer_{side}_value", "Input should fit 64 bits")
    return int(value)


def _list_of_one(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError(
            "object_above_max_properties",
            f"Input should have at most {MAX_LOGIT_BIAS} entries",
        )
    return value


def _text_or_object(value: object) -> object:
    if not isinstance(value, str | dict):
        raise PydanticCustomError("invalid_type", "Input should be a string or an object")
    return value


def _content_kind(value: object) -> str:
    return PARTS if isinstance(value, list) else TEXT


FAIL_FAST = Field(fail_fast=True)  # a list of a million mistakes is one mistake
Number = Annotated[float, BeforeValidator(_number)]
Integer = Annotated[int, BeforeValidator(_integer)]
Strings = Annotated[list[str], FAIL_FAST, BeforeValidator(_list_of_one)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ToolChoice = Annotated[Any, BeforeValidator(_text_or_object)]


class Body(BaseModel):
    """Base of all parts of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


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


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Body):
    """``POST /v1/chat/completions``."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FAIL_FAST]
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(_few)] | None = None
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    min_tokens: Integer | None = None
    stop: Strings | None = None
    stop_token_ids: (
        Annotated[list[Integer], Field(max_length=MAX_STOP_TOKEN_IDS), FAIL_FAST] | None
    ) = None
    ignore_eos: bool | None = None
    seed: Integer | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], FAIL_FAST] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Annotated[Integer, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] | None = None
    user: str | None = None
    user_id: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """A checked request. Raises `BadRequest` naming the field by its JSON path."""
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from None
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
                f"{_show(variables[name])}.",
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


def sampling_params(request: ChatRequest, defaults: GenerationDefaults) -> SamplingParams:
    """How to sample: the client's values, else the checkpoint's, else neutral ones.

    Raises `BadRequest` for a value out of range.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return SamplingParams(
        max_tokens=None if max_tokens is None else min(max_tokens, INT32_MAX),
        temperature=_first(request.temperature, defaults.temperature, 1.0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=int(_first(request.top_k, defaults.top_k, 0)),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias or {}),
        seed=request.seed,
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        logprobs=logprobs,
    )


def cache_namespace(request: ChatRequest, key_id: str | None) -> str:
    """Whose prompts may share cached pages: a digest of the key, the user and the salt."""
    parts = [key_id, request.cache_salt, request.user, request.user_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _first(asked: float | None, default: float | None, neutral: float) -> float:
    if asked is not None:
        return asked
    return neutral if default is None else default


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token_id in biases:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) <= 9):
            raise BadRequest(
                f"logit_bias maps token ids to numbers; {shorten(token_id)!r} is not a token id",
                param="logit_bias",
                code="invalid_value",
            )
    return tuple({int(token_id): bias for token_id, bias in biases.items()}.items())


def _bad_request(error: ErrorDetails) -> BadRequest:
    """The first complaint of pydantic in the API's words."""
    kind, value = error["type"], error["input"]
    path = _path(error["loc"])
    if kind in OWN_ERRORS:
        code = kind
    elif value is None and isinstance(error["loc"][-1], str):
        code = "missing_required_parameter"
    else:
        code = ERROR_CODES.get(kind, "invalid_type")
    if code == "missing_required_parameter":
        return BadRequest(f"Missing required parameter: '{path}'.", param=path, code=code)
    why = "Input should be an object" if kind in OBJECT_ERRORS else error["msg"]
    return BadRequest(f"Invalid '{path}': {why}, got {_show(value)}.", param=path, code=code)


def _path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in (PARTS, TEXT):
            path += f".{shorten(part)}" if path else part
    return path


def _show(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        return "a number of more than 64 bits"
    return shorten(json.dumps(value, ensure_ascii=False))
