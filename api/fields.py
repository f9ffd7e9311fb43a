"""The types of JSON fields, strict as OpenAI's, and the one error for what does not fit them.

Integers pass for floats and integral floats for integers; booleans and strings never pass for
numbers. ``null`` means absent, unknown fields are ignored: every real client sends some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from api.errors import shorten
from runtime import INT64_MAX, INT64_MIN, BadRequest

INT32_MAX = 2**31 - 1
PARTS = "<parts>"  # names of union branches; no JSON field is called so
TEXT = "<text>"

ERROR_CODES = {
    "missing": "missing_required_parameter",
    "out_of_range": "invalid_value",
    "literal_error": "invalid_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_long": "string_above_max_length",
    "string_pattern_mismatch": "invalid_value",
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


def text_or_object(value: object) -> object:
    if not isinstance(value, str | dict):
        raise PydanticCustomError("invalid_type", "Input should be a string or an object")
    return value


FAIL_FAST = Field(fail_fast=True)  # a list of a million mistakes is one mistake
Number = Annotated[float, BeforeValidator(_number)]
Integer = Annotated[int, BeforeValidator(_integer)]
Strings = Annotated[list[str], FAIL_FAST, BeforeValidator(_list_of_one)]


class Body(BaseModel):
    """Base of all parts of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


Parsed = TypeVar("Parsed", bound=Body)


def parse(model: type[Parsed], body: Mapping[str, Any]) -> Parsed:
    """The checked body. Raises `BadRequest` naming the field by its JSON path."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from None


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
    return BadRequest(f"Invalid '{path}': {why}, got {show(value)}.", param=path, code=code)


def _path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in (PARTS, TEXT):
            path += f".{shorten(part)}" if path else part
    return path


def show(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        return "a number of more than 64 bits"
    return shorten(json.dumps(value, ensure_ascii=False))
