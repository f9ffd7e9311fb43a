"""The fields about sampling that every kind of request has, and what they mean to the engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api.errors import shorten
from api.fields import FAIL_FAST, INT32_MAX, Body, Integer, Number, Strings
from runtime import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, BadRequest, GenerationDefaults, SamplingParams

MAX_STOP_TOKEN_IDS = 1024
MAX_SALT_CHARS = 256
MAX_PRIORITY = 1000
MAX_CHOICES = 8

IGNORED_FIELDS = frozenset(
    {
        "cache_prompt",
        "include_reasoning",
        "metadata",
        "modalities",
        "prediction",
        "prompt_cache_key",
        "safety_identifier",
        "separate_reasoning",
        "service_tier",
        "store",
        "verbosity",
    }
)
"""Fields of clients that do not change an answer of this server; not worth a line in the log."""

NumLogprobs = Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)]


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError(
            "object_above_max_properties",
            f"Input should have at most {MAX_LOGIT_BIAS} entries",
        )
    return value


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingFields(Body):
    """The model, how tokens are drawn, when to end, whose cache to use: for any request."""

    model: str | None = None
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
    priority: Annotated[Integer, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] | None = None
    user: str | None = None
    user_id: str | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings: bool | None = None
    timings_per_token: bool | None = None  # llama.cpp's name

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def unknown_fields(model: type[SamplingFields], body: Mapping[str, Any]) -> set[str]:
    """Names in the body of a request that mean nothing here."""
    return body.keys() - model.model_fields.keys() - IGNORED_FIELDS


def sampling_params(
    request: SamplingFields,
    defaults: GenerationDefaults,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """How to sample: the client's values, else the checkpoint's, else neutral ones.

    Raises `BadRequest` for a value out of range.
    """
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


def cache_namespace(request: SamplingFields, key_id: str | None) -> str:
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
