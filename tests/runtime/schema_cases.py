"""200 JSON schemas in the style of schema test suites: each keyword alone and with others."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

INTEGER: Schema = {"type": "integer", "minimum": -99, "maximum": 99}
NAME: Schema = {"type": "string", "maxLength": 6}


def record(required: bool = True, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": list(properties)} if required else {})


def array(items: Schema, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def schemas() -> list[Schema]:
    """Every schema allows an answer of a few dozen tokens."""
    return [*_plain(), *_texts(), *_numbers(), *_arrays(), *_objects(), *_choices(), *_references()]


def _plain() -> list[Schema]:
    consts = [None, True, False, 0, -7, 12.5, "", "a", "ü", "你好", '"', "\\", "</think>", "\n"]
    enums = [
        *[["red", "green", "blue"], [1, 2, 3], [True], [None, "none"], ["a", 1, None, False]],
        *[["naïve", "😀", "日本"], [[1], [2]], [{"a": 1}, {"b": [None]}], [0.5, -0.5], ["", " "]],
    ]
    types: list[Schema] = [{"type": "null"}, {"type": "boolean"}, {"type": ["null", "boolean"]}]
    return [
        *({"const": value} for value in consts),
        *({"enum": values} for values in enums),
        *types,
        *(record(value={"const": value}) for value in consts[:6]),
        *(record(value={"enum": values}) for values in enums[:4]),
    ]


def _texts() -> list[Schema]:
    patterns = [
        *["^[a-z]{3}$", "^\\d{4}-\\d{2}$", "^(yes|no)$", "^[A-Z][a-z]{1,5}$", "^a+b$", "^x?y?z?$"],
        *["^[0-9a-f]{8}$", "^\\w{1,4}$", "^[^a-z\\x00-\\x1f]{2}$", "^[äöü]{2}$", "ab$", "^ab"],
    ]
    formats = ["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname"]
    lengths = [(0, 0), (1, 1), (0, 5), (3, 3), (2, 8), (10, 12)]
    return [
        *({"type": "string", "minLength": low, "maxLength": high} for low, high in lengths),
        *({"type": "string", "pattern": pattern, "maxLength": 12} for pattern in patterns),
        *(record(value={"type": "string", "format": name}) for name in formats),
        *(record(value={"type": "string", "pattern": pattern}) for pattern in patterns[:8]),
    ]


def _numbers() -> list[Schema]:
    ranges = [(0, 0), (0, 9), (-5, 5), (10, 20), (-1000, -900), (99, 101), (1, 100000)]
    return [
        *({"type": "integer", "minimum": low, "maximum": high} for low, high in ranges),
        *(
            record(value={"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high})
            for low, high in ranges[1:]
        ),
        *({"type": "number", "minimum": low, "maximum": high} for low, high in ranges),
        *({"type": "integer", "multipleOf": step, "minimum": 0} for step in (2, 5, 10)),
        record(value={"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
        record(value={"type": ["integer", "null"], "minimum": 0, "maximum": 5}),
    ]


def _arrays() -> list[Schema]:
    sizes = [(0, 0), (0, 1), (1, 1), (2, 2), (1, 3), (4, 5)]
    return [
        *(array(INTEGER, low, high) for low, high in sizes),
        *(array({"type": "boolean"}, low, high) for low, high in sizes),
        *(array(array(INTEGER, 1, 2), low, high) for low, high in sizes[:5]),
        *(record(value=array(NAME, low, high)) for low, high in sizes),
        *(array({"enum": ["a", "b", "c"]}, low, high) for low, high in sizes),
        {
            "type": "array",
            "prefixItems": [INTEGER, NAME, {"type": "boolean"}],
            "items": False,
            "minItems": 3,
        },
        {"type": "array", "prefixItems": [NAME], "items": INTEGER, "minItems": 1, "maxItems": 3},
    ]


def _objects() -> list[Schema]:
    keys = ["a", "a b", "ключ", "键", "😀", "$ref", "x-y", "0", '"', "é"]
    opened: Schema = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
    return [
        *(record(**{key: INTEGER}) for key in keys),
        *(record(False, **dict.fromkeys(keys[:count], INTEGER)) for count in (1, 2, 4)),
        *(record(**dict.fromkeys(keys[:count], NAME)) for count in (2, 3, 5)),
        {**record(False, a=INTEGER, b=NAME, c={"type": "boolean"}), "required": ["b"]},
        {**opened, "additionalProperties": False},
        {"type": "object", "additionalProperties": INTEGER, "maxProperties": 2},
        {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": NAME},
        record(person=record(name=NAME, age=INTEGER), tags=array(NAME, 1, 2)),
        record(a=record(b=record(c=record(d=record(e=INTEGER))))),
        record(rows=array(record(x=INTEGER, y=INTEGER), 1, 2)),
        record(where=record(city=NAME, code={"type": "string", "pattern": "^[0-9]{5}$"})),
        record(id={"type": "string", "format": "uuid"}, on={"type": "string", "format": "date"}),
        {**record(b=INTEGER), "title": "T", "description": "D", "$comment": "C", "default": {}},
        record(empty=record()),
        *(record(**{key: array(NAME, 1, 2)}) for key in keys[:4]),
        *(array(record(**{key: INTEGER}), 1, 1) for key in keys[4:8]),
    ]


def _choices() -> list[Schema]:
    kinds: list[Schema] = [INTEGER, NAME, {"type": "boolean"}, {"type": "null"}, array(INTEGER)]
    cat = record(kind={"const": "cat"}, lives=INTEGER)
    dog = record(kind={"const": "dog"}, name=NAME)
    return [
        *({"anyOf": kinds[:count]} for count in range(1, 6)),
        *({"oneOf": kinds[:count]} for count in range(1, 6)),
        *(record(value={"anyOf": [kind, {"type": "null"}]}) for kind in kinds[:3]),
        {"anyOf": [cat, dog]},
        {"oneOf": [cat, dog]},
        array({"anyOf": [cat, dog]}, 1, 2),
        {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 8}]},
        {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
        {
            "allOf": [
                {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                {"properties": {"b": NAME}, "required": ["b"]},
            ],
            "maxProperties": 2,
        },
        {"anyOf": [{"const": 1}, {"const": "one"}, {"enum": [None, "eins"]}]},
        {"type": "object", "anyOf": [cat, dog]},
    ]


def _references() -> list[Schema]:
    tree = record(False, value=INTEGER, left={"$ref": "#/$defs/tree"})
    chain = {"anyOf": [{"type": "null"}, record(next={"$ref": "#/$defs/chain"})]}
    nested = {"anyOf": [INTEGER, array({"$ref": "#/$defs/nested"}, 0, 2)]}
    parts: Schema = {"name": NAME, "count": INTEGER, "both": record(a={"$ref": "#/$defs/name"})}
    return [
        *({"$ref": f"#/$defs/{name}", "$defs": parts} for name in parts),
        *(record(value={"$ref": f"#/$defs/{name}"}) | {"$defs": parts} for name in parts),
        *(
            array({"$ref": f"#/definitions/{name}"}, 1, 2) | {"definitions": {name: parts[name]}}
            for name in ("name", "count")
        ),
        {"$ref": "#/$defs/tree", "$defs": {"tree": {**tree, "required": ["value"]}}},
        {"$ref": "#/$defs/chain", "$defs": {"chain": chain}},
        {"$ref": "#/$defs/nested", "$defs": {"nested": nested}},
        record(a={"$ref": "#/$defs/a~1b"}) | {"$defs": {"a/b": INTEGER}},
        record(a={"$ref": "#/$defs/%C3%A4"}) | {"$defs": {"ä": NAME}},
        *(
            record(a={"$ref": "#/$defs/x"}, b=kind) | {"$defs": {"x": kind}}
            for kind in [INTEGER, NAME]
        ),
        *(
            {"anyOf": [{"$ref": "#/$defs/name"}, kind], "$defs": parts}
            for kind in [INTEGER, array(NAME)]
        ),
    ]
