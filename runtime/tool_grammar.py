"""The grammar of an answer that has to call functions, in the model's own format.

It is written in llguidance's dialect of Lark: ``<[7]>`` is the token 7, ``%json`` a JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.grammar import Grammar
from runtime.tokenizer import Tokenizer
from runtime.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    HERMES_BEGIN,
    HERMES_END,
    SEP,
)
from runtime.tool_prompts import Tool, ToolFormat

Schema = Mapping[str, Any]

NEWLINE = "\n"

_SPELLING = {
    "x-guidance": {
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": True,
        "whitespace_flexible": False,
    }
}
"""JSON as models were trained to write it; what the library knows not of a schema holds nothing."""

_TEXT = r"( /[^<]+/ | /<+[^<\/]/ )*"
"""A DSML argument: anything without the start of a closing tag. The library's lexer never goes back
a byte, so what a tag begins with is a word of its own.
"""
_CONSTRAINTS = frozenset({"enum", "const", "pattern", "format", "minLength", "maxLength"})
"""Of a text; where there is one, the argument is written as JSON, which can be held to it."""


def calls_grammar(tokenizer: Tokenizer, tools: Sequence[Tool], *, only_one: bool) -> Grammar:
    """One call or more of ``tools`` and nothing else; with ``only_one``, one.

    Raises `BadRequest` if it gets too long.
    """
    style = tokenizer.tool_style
    functions = [tool["function"] for tool in tools]
    if style.format_to_force == ToolFormat.DSML:
        rules = _dsml_rules(_mark(tokenizer, DSML), style.block, functions)
        between = ""
    else:
        rules = _json_rules(tokenizer, style.format_to_force, functions)
        between = "" if style.format == ToolFormat.V31 else f"{_text(NEWLINE)} "
    names = " | ".join(f"function_{i}" for i in range(len(functions)))
    more = "" if only_one else f" ({between}call)*"
    start = f"start: opening call{more} closing"
    return Grammar("lark", "\n".join([start, f"function: {names}", *rules]))


def _json_rules(
    tokenizer: Tokenizer, form: ToolFormat, functions: Sequence[Schema]
) -> Iterator[str]:
    """Rules for the formats whose arguments are one JSON object."""

    def mark(text: str) -> str:
        return _mark(tokenizer, text)

    if form == ToolFormat.HERMES:
        yield 'opening: ""'
        yield 'closing: ""'
        newline = _text(NEWLINE)
        yield f"call: {mark(HERMES_BEGIN)} {newline} function {newline} {mark(HERMES_END)}"
    else:
        yield f"opening: {mark(CALLS_BEGIN)}"
        yield f"closing: {mark(CALLS_END)}"
        kind = f"{_text('function')} {mark(SEP)} " if form == ToolFormat.V3 else ""
        yield f"call: {mark(CALL_BEGIN)} {kind}function {mark(CALL_END)}"
    for i, function in enumerate(functions):
        name = function["name"]
        before, after = {
            ToolFormat.V3: (_text(f"{name}\n```json\n"), _text("\n```")),
            ToolFormat.V31: (f"{_text(name)} {mark(SEP)}", ""),
        }.get(form, (_text(f'{{"name": "{name}", "arguments": '), _text("}")))
        yield f"function_{i}: {before} arguments_{i} {after}"
        yield f"arguments_{i}: {_embedded(_object(function.get('parameters')))}"


def _dsml_rules(dsml: str, block: str, functions: Sequence[Schema]) -> Iterator[str]:
    """Rules for arguments as tags, in the order of the schema."""

    def tag(text: str, start: str = "<") -> str:
        return f"{_text(start)} {dsml} {_text(text)}"

    yield f"opening: {tag(f'{block}>{NEWLINE}', start=NEWLINE * 2 + '<')}"
    yield f"closing: {tag(f'{block}>', start='</')}"
    yield "call: function"
    for i, function in enumerate(functions):
        schema = _object(function.get("parameters"))
        properties, required = schema.get("properties"), schema.get("required") or ()
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        arguments = []
        for j, (name, value) in enumerate(_items(properties)):
            body = _text_body(value)
            is_text = body is not None
            flag = "true" if is_text else "false"
            opening = tag(f'parameter name="{name}" string="{flag}">')
            closing = tag(f"parameter>{NEWLINE}", start="</")
            yield f"argument_{i}_{j}: {opening} {body or f'value_{i}_{j}'} {closing}"
            if not is_text:
                whole = definitions | value if isinstance(value, dict) else value
                yield f"value_{i}_{j}: {_embedded(whole)}"
            arguments.append(f"argument_{i}_{j}{'' if name in required else '?'}")
        opening = tag(f'invoke name="{function["name"]}">{NEWLINE}')
        closing = tag(f"invoke>{NEWLINE}", start="</")
        yield f"function_{i}: {opening} {' '.join(arguments)} {closing}"


def _items(properties: Any) -> list[tuple[str, Any]]:
    return list(properties.items()) if isinstance(properties, dict) else []


def _text_body(schema: Any) -> str | None:
    """What an argument may be that is written as it is; None for one that is written as JSON."""
    if not isinstance(schema, dict):
        return None
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices):
        return f"({' | '.join(map(_text, choices))})"
    is_free = schema.get("type") == "string" and _CONSTRAINTS.isdisjoint(schema)
    return _TEXT if is_free else None


def _object(parameters: Any) -> dict[str, Any]:
    """A schema of arguments: an object whatever it says, closed unless it says that it is not.

    Models add arguments to an open object that no function takes.
    """
    schema = {**(parameters or {}), "type": "object"}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _embedded(schema: Any) -> str:
    return f"%json {_json(schema | _SPELLING if isinstance(schema, dict) else schema)}"


def _mark(tokenizer: Tokenizer, text: str) -> str:
    """A mark of a format as its one token, or as text where the vocabulary has none."""
    token_id = tokenizer.token_id(text)
    return _text(text) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return _json(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
