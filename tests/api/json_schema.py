"""The part of JSON Schema 2020-12 that our OpenAPI document uses, checked without a library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: TYPES["number"](value) and value == value // 1,
}
# A limit holds for values of its own type and says nothing of others.
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, limit: value >= limit),
    "maximum": ("number", lambda value, limit: value <= limit),
    "exclusiveMinimum": ("number", lambda value, limit: value > limit),
    "minLength": ("string", lambda value, limit: len(value) >= limit),
    "maxLength": ("string", lambda value, limit: len(value) <= limit),
    "pattern": ("string", lambda value, limit: bool(re.search(limit.replace("$", r"\Z"), value))),
    "minItems": ("array", lambda value, limit: len(value) >= limit),
    "maxItems": ("array", lambda value, limit: len(value) <= limit),
    "maxProperties": ("object", lambda value, limit: len(value) <= limit),
    "required": ("object", lambda value, limit: value.keys() >= set(limit)),
}


def mistake(root: Schema, schema: Schema, value: Any, place: str = "") -> str | None:
    """Where and why ``value`` breaks ``schema``, a part of ``root``; None if it does not.

    Raises `KeyError` for a keyword that is not known here: ignored ones would pass anything.
    """
    for keyword, limit in schema.items():
        found = broken(root, schema, keyword, limit, value, place)
        if found:
            return found
    return None


def broken(
    root: Schema, schema: Schema, keyword: str, limit: Any, value: Any, place: str
) -> str | None:
    fails = f"{place or 'the value'}: {keyword}"
    if keyword in ("description", "contentMediaType"):
        return None
    if keyword == "$ref":
        return mistake(root, resolve(root, limit), value, place)
    if keyword == "type":
        names = [limit] if isinstance(limit, str) else limit
        return None if any(TYPES[name](value) for name in names) else f"{fails} {limit}"
    if keyword in ("enum", "const"):
        choices = limit if keyword == "enum" else [limit]
        return None if any(same(value, choice) for choice in choices) else f"{fails} {limit}"
    if keyword == "anyOf":
        reasons = [mistake(root, branch, value, place) for branch in limit]
        return None if None in reasons else f"{fails} ({'; '.join(map(str, reasons))})"
    if keyword == "contentSchema":
        try:
            parsed = json.loads(value)
        except ValueError:
            return f"{fails}, not JSON"
        return mistake(root, limit, parsed, f"{place}(parsed)")
    if keyword in ("properties", "additionalProperties", "propertyNames", "items"):
        parts = inside(schema, keyword, limit, value)
        places = ((part, item, f"{place}.{name}") for name, part, item in parts)
        return next(filter(None, (mistake(root, *part) for part in places)), None)
    kind, holds = LIMITS[keyword]
    return None if not TYPES[kind](value) or holds(value, limit) else f"{fails} {limit}"


def inside(
    schema: Schema, keyword: str, limit: Any, value: Any
) -> list[tuple[str | int, Schema, Any]]:
    """``(name, schema, value)`` of all parts of the value that the keyword speaks about."""
    if keyword == "items":
        return [(i, limit, item) for i, item in enumerate(value if isinstance(value, list) else [])]
    if not isinstance(value, dict):
        return []
    if keyword == "properties":
        return [(name, limit[name], value[name]) for name in limit.keys() & value.keys()]
    if keyword == "propertyNames":
        return [(name, limit, name) for name in value]
    others = value.keys() - schema.get("properties", {}).keys()
    rest = {True: {}, False: {"enum": []}}[limit] if isinstance(limit, bool) else limit
    return [(name, rest, value[name]) for name in others]


def same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def resolve(root: Schema, reference: str) -> Schema:
    """The schema that ``#/a/b`` names. Raises `KeyError` if it names none."""
    node = root
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node
