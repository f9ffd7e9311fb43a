"""The JSON of a completion request and what it means to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api.fields import Integer, parse
from api.sampling_fields import NumLogprobs, SamplingFields, sampling_params
from runtime import INT64_MAX, BadRequest, GenerationDefaults, SamplingParams

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16


def _prompts(value: object) -> list[str | list[int]]:
    """A text, token ids, or a list of several of one kind, as a list."""
    if value is None:
        raise PydanticCustomError("missing", "Input is required")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _wrong_type()
    if not value:
        raise PydanticCustomError("too_short", "Input should have at least one item")
    kind = type(value[0])
    if kind not in (str, list):
        return [_token_ids(value)]
    if not all(isinstance(item, kind) for item in value):
        raise _wrong_type()
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", f"Input should have at most {MAX_PROMPTS} prompts")
    if kind is list and not all(value):
        raise PydanticCustomError("too_short", "A list of tokens should have at least one")
    return [item if isinstance(item, str) else _token_ids(item) for item in value]


def _token_ids(values: list[Any]) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise _wrong_type()
        if not 0 <= value <= INT64_MAX:
            raise PydanticCustomError("out_of_range", "No token has such an id")
    return [int(value) for value in values]


def _wrong_type() -> PydanticCustomError:
    return PydanticCustomError(
        "invalid_type", "Input should be a string, strings, token ids or lists of token ids"
    )


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]  # as list[str | list[int]]
    suffix: str | None = None
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Integer | None = None
    add_special_tokens: bool | None = None

    @property
    def max_new_tokens(self) -> int:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """A checked request. Raises `BadRequest` naming the field."""
    request = parse(CompletionRequest, body)
    if request.max_new_tokens == 0 and not request.echo:
        raise BadRequest(
            "max_tokens may be 0 only with echo: there would be nothing to answer",
            param="max_tokens",
            code="integer_below_min_value",
        )
    if request.best_of is not None and request.best_of != request.num_choices:
        raise BadRequest(
            f"best_of must be n, which is {request.num_choices}, or be left out; got "
            f"{request.best_of}. Answers are not ranked.",
            param="best_of",
            code="unsupported_value",
        )
    if request.suffix and not all(isinstance(prompt, str) for prompt in request.prompt):
        raise BadRequest(
            "suffix needs a prompt that is text, not token ids",
            param="suffix",
            code="invalid_value",
        )
    if request.suffix and request.echo:
        raise BadRequest(
            "echo cannot be true with a suffix: the answer stands between both texts",
            param="echo",
            code="invalid_value",
        )
    return request


def completion_sampling(request: CompletionRequest, defaults: GenerationDefaults) -> SamplingParams:
    """How to sample an answer. Raises `BadRequest` for a value out of range.

    Of no token the engine draws one, that nobody sees.
    """
    params = sampling_params(
        request,
        defaults,
        max_tokens=max(request.max_new_tokens, 1),
        logprobs=request.logprobs if request.max_new_tokens else None,
    )
    return replace(params, prompt_logprobs=request.logprobs if request.echo else None)
