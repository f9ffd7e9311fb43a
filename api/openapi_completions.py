"""Completions and the tokenizer in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence

from api.completion_fields import MAX_PROMPTS, CompletionRequest
from api.openapi_parts import (
    COUNT,
    REFERENCE,
    TEXT,
    TOKEN_ID,
    Schema,
    array_of,
    clean,
    closed_object,
    event_schema,
    limit_sampling,
    or_null,
    reference,
)
from api.tokens import DetokenizeRequest, TokenizeRequest

DESCRIPTIONS = {
    "prompt": "A text, token ids, or several of either. Control tokens that a text spells count as "
    "such. All are answered, or none.",
    "suffix": "The answer fills the gap between the prompt and this text, if the model has tokens "
    "to ask it for that. It needs a prompt that is text, and no echo.",
    "max_tokens": "16 if left out; 0 only with echo. More than the context has room for is cut to "
    "that room.",
    "echo": "Repeat the prompt before the answer; with logprobs, those of the prompt too.",
    "logprobs": "The logprobs of each token and of so many that were the most likely.",
    "best_of": "Answers are not ranked: it must be n.",
    "add_special_tokens": "Put the beginning-of-sequence token before a text, true if left out.",
}


def completion_request_schemas(model_names: Sequence[str]) -> Schema:
    """The bodies of requests."""
    request = clean(CompletionRequest.model_json_schema(ref_template=REFERENCE))
    del request["$defs"]  # those of chat requests are the same
    fields = request["properties"]
    limit_sampling(fields, model_names)
    texts = {"type": "string"}
    ids = {"type": "array", "items": TOKEN_ID, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
    fields["prompt"] = {"anyOf": [texts, several | {"items": texts}, ids, several | {"items": ids}]}
    for name, description in DESCRIPTIONS.items():
        fields[name]["description"] = description
    text = clean(TokenizeRequest.model_json_schema())
    tokens = clean(DetokenizeRequest.model_json_schema())
    for schema in (text, tokens):
        schema["properties"]["model"] = {"enum": [*model_names, None]}
    tokens["properties"]["tokens"]["items"] = TOKEN_ID
    text["anyOf"] = [
        {"properties": {name: {"type": "string"}}, "required": [name]}
        for name in ("prompt", "content")
    ]
    text["properties"]["messages"] = {"type": "null"}
    text["description"] = "A text. The names content and add_special are llama.cpp's."
    return {
        "CompletionRequest": {**request, "description": "Prompts to go on with."},
        "TokenizeRequest": {"anyOf": [reference("TokenizeText"), reference("ChatRequest")]},
        "TokenizeText": text,
        "DetokenizeRequest": tokens,
    }


def completion_answer_schemas(head: Schema) -> Schema:
    """The answers; ``head`` are the fields that every answer begins with."""
    logprob: Schema = {"type": "number", "maximum": 0}
    best: Schema = {"type": ["object", "null"], "additionalProperties": logprob}
    logprobs: Schema = {
        "tokens": array_of(TEXT),
        "token_logprobs": array_of({**logprob, "type": ["number", "null"]}),
        "top_logprobs": array_of(best),
        "text_offset": array_of(COUNT),
    }
    choice: Schema = {
        "index": COUNT,
        "text": {**TEXT, "description": "As the model wrote it: thoughts are not split off."},
        "logprobs": or_null("TextLogprobs"),
        "finish_reason": {"enum": ["stop", "length"]},
    }
    growing: Schema = {**choice, "finish_reason": {"enum": ["stop", "length", None]}}
    completion: Schema = {
        **head,
        "object": {"const": "text_completion"},
        "choices": {**array_of(closed_object(choice)), "minItems": 1},
        "usage": reference("Usage"),
        "timings": reference("Timings"),
    }
    chunk: Schema = {
        **completion,
        "choices": array_of(closed_object(growing)),
        "usage": or_null("Usage"),
    }
    piece: Schema = {"anyOf": [TEXT, array_of({**COUNT, "maximum": 255})]}
    token: Schema = {"anyOf": [COUNT, closed_object({"id": COUNT, "piece": piece})]}
    tokens: Schema = {
        "count": COUNT,
        "max_model_len": COUNT,
        "tokens": array_of(token),
    }
    return {
        "TextCompletion": closed_object(completion, optional=["timings"]),
        "TextCompletionChunk": closed_object(chunk, optional=["usage", "timings"]),
        "TextEvent": event_schema("TextCompletionChunk"),
        "TextLogprobs": closed_object(logprobs),
        "Tokens": closed_object(tokens),
        "Text": closed_object({"prompt": TEXT, "content": TEXT}),
    }
