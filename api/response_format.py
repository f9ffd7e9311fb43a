"""The form a client asks its answer to have, and the grammar that stands for it."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import Field

from api.fields import Body
from runtime import BadRequest, Grammar

Value = TypeVar("Value")


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # answers always follow the schema


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama.cpp's
    regex: str | None = None
    pattern: str | None = None
    grammar: str | None = None


def grammar_of(response_format: ResponseFormat | None) -> Grammar | None:
    """None for plain text. Raises `BadRequest` for a format whose description is missing."""
    if response_format is None:
        return None
    match response_format.type:
        case "text":
            return None
        case "json_object":
            if response_format.schema_ is None:
                return Grammar("json_object")
            return Grammar("json_schema", _to_text(response_format.schema_))
        case "json_schema":
            described = _present(response_format.json_schema, "json_schema")
            return Grammar(
                "json_schema", _to_text(_present(described.schema_, "json_schema.schema"))
            )
        case "regex":
            pattern = response_format.regex
            return Grammar(
                "regex", _present(response_format.pattern if pattern is None else pattern, "regex")
            )
        case "grammar":
            return Grammar("lark", _present(response_format.grammar, "grammar"))


def _present(value: Value | None, name: str) -> Value:
    if value is None:
        path = f"response_format.{name}"
        raise BadRequest(
            f"Missing required parameter: '{path}'.",
            param=path,
            code="missing_required_parameter",
        )
    return value


def _to_text(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise BadRequest(
            "Invalid 'response_format': the schema is nested too deeply.",
            param="response_format",
            code="invalid_json_schema",
        ) from None
