"""What the parts of the OpenAPI document are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.fields import INT32_MAX
from runtime import INT64_MAX, INT64_MIN, MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOP_STRINGS

Schema = dict[str, Any]

JSON = "application/json"
REFERENCE = "#/components/schemas/{model}"
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NOTHING: Schema = {"type": "null"}

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
"""What `runtime.SamplingParams` checks and the models of requests do not."""

PYDANTIC_LIMITS = {"ge": "minimum", "le": "maximum"}
"""Where a validator of our own comes first, pydantic leaves its limits under its own names."""


TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": INT64_MAX}
"""Which ids there are depends on the model."""


def limit_sampling(fields: Schema, model_names: Sequence[str]) -> None:
    """Add to the sampling fields of a request what is checked outside its model."""
    for name, limits in RANGES.items():
        fields[name]["anyOf"][0].update(limits)
    fields["model"] = {"enum": [*model_names, None]}
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    texts = {"type": "array", "items": text, "maxItems": MAX_STOP_STRINGS}
    fields["stop"] = {"anyOf": [text, texts, {"type": "null"}]}
    fields["stop_token_ids"]["anyOf"][0]["items"] = TOKEN_ID
    fields["logit_bias"]["anyOf"][0] = {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_LOGIT_BIAS,
    }


def clean(node: Any) -> Any:
    """A schema of pydantic without titles and defaults, with limits of 64 bits and open objects."""
    if isinstance(node, list):
        return [clean(item) for item in node]
    if not isinstance(node, dict):
        return node
    cleaned: Schema = {}
    for key, value in node.items():
        if key == "properties":  # its keys are names of fields, as "title" may be one
            cleaned[key] = {name: clean(field) for name, field in value.items()}
        elif key not in ("title", "default", "description"):
            cleaned[PYDANTIC_LIMITS.get(str(key), str(key))] = clean(value)
    if "properties" in cleaned:
        cleaned.setdefault("additionalProperties", True)
    if cleaned.get("type") == "integer":
        cleaned = {"minimum": INT64_MIN, "maximum": INT64_MAX, **cleaned}
    return cleaned


def closed_object(properties: Schema, *, optional: Sequence[str] | Schema = ()) -> Schema:
    """An object of exactly these fields, of which only ``optional`` ones may be left out."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def reference(name: str) -> Schema:
    return {"$ref": REFERENCE.format(model=name)}


def or_null(name: str) -> Schema:
    return {"anyOf": [reference(name), {"type": "null"}]}


def array_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def event_schema(chunk: str) -> Schema:
    """One event of a stream of these chunks."""
    data: Schema = {
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [reference(chunk), reference("Error")]},
    }
    event: Schema = {
        "event": {"const": "message"},
        "data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]},
    }
    return {
        "description": "One event of a stream. The last is [DONE], or an Error in its place.",
        **closed_object(event, optional=["event"]),
    }


def body_of(name: str) -> Schema:
    """A request's body."""
    return {"required": True, "content": {JSON: {"schema": reference(name)}}}
