"""Renders a checkpoint's own chat template, which is a program from a stranger.

It runs in jinja's immutable sandbox with the names that transformers gives a template, and with
bounds on what it can build: a template that breaks them fails the request, not the process.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.config import is_there, one_line, read_file
from runtime.errors import BadRequest, CheckpointError

Message = dict[str, Any]
"""``role``, ``content`` (text or None) and whatever else the template reads."""

RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "documents",
        "eos_token",
        "messages",
        "pad_token",
        "raise_exception",
        "range",
        "strftime_now",
        "tools",
    }
)
"""Names of a template that a client cannot set through ``chat_template_kwargs``."""

MAX_RENDERED_CHARS = 8_000_000
MAX_RANGE_STEPS = 1_000_000  # over all range() calls of one rendering
FORMATTING_METHODS = frozenset({"format", "format_map"})
PADDING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
PADDING_FILTERS = frozenset({"batch", "center", "format", "indent"})
TEMPLATE_FILE = "chat_template.jinja"


class ChatRenderer(Protocol):
    """Makes one prompt of a conversation."""

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """What `render` will read. Text that this uncovers, as of JSON in a text, is still a
        client's: the caller looks for control tokens in it after this. Raises `BadRequest`.
        """

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt. Raises `BadRequest` if the conversation has none."""


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses the operators that build something huge from something small."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # jinja wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str) and name in FORMATTING_METHODS:
            _require_narrow(text)
        if isinstance(text, str) and name in PADDING_METHODS:
            _require_small(text, *args, *kwargs.values())
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateError("** is not available in a chat template")
        if operator == "%":
            _require_narrow(left)
        size = max(_num_items(left), _num_items(right))
        if operator == "*":  # a sequence repeated by a number
            size *= max((abs(n) for n in (left, right) if isinstance(n, int)), default=1)
        if size > MAX_RENDERED_CHARS:
            raise jinja2.TemplateError(f"{operator} builds more than {MAX_RENDERED_CHARS} items")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks an assistant's text for training; a prompt is the text inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja asks for a set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _require_narrow(form: Any) -> None:
    """Refuses to format what is padded to something huge."""
    if isinstance(form, str) and re.search(r"\d{7}|%[-+ #0]*\*", form):
        raise jinja2.TemplateError("a format that pads to millions of characters")


def _require_small(value: Any, *widths: Any) -> None:
    """Refuses to pad ``value``, or each of its lines or items, to something huge."""
    width = max((abs(n) for n in widths if isinstance(n, int)), default=0)
    if width * max(_num_items(value), 1) > MAX_RENDERED_CHARS:
        raise jinja2.TemplateError(f"padded to more than {MAX_RENDERED_CHARS} characters")


def _bounded(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which then builds nothing huge."""

    @functools.wraps(apply)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _require_narrow(args[0])
        else:
            value = next((arg for arg in args if isinstance(arg, str | list | tuple)), None)
            _require_small(value, *args, *kwargs.values())
        return apply(*args, **kwargs)

    return bounded


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str) -> None:
        """Raises `CheckpointError` with ``where`` and the line of what does not compile."""
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        environment.filters["tojson"] = _to_json
        environment.filters |= {
            name: _bounded(name, environment.filters[name]) for name in PADDING_FILTERS
        }
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            why = f"line {error.lineno}: {one_line(error.message or '')}"
            raise CheckpointError(f"{where}: chat template: {why}") from None
        except (RecursionError, MemoryError):
            raise CheckpointError(f"{where}: chat template: nested too deeply") from None
        except (SyntaxError, ValueError) as error:  # of the Python that jinja makes of it
            why = one_line(getattr(error, "msg", None) or str(error))
            raise CheckpointError(f"{where}: chat template: {why}") from None

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """A template reads messages as they are."""
        return list(messages)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt. Raises `BadRequest` (``template_error``) with the template's complaint.

        Some templates want no content as None and some as "": where None fails, "" is tried.
        """
        try:
            return self._render(messages, variables)
        except BadRequest:
            if all(message.get("content") is not None for message in messages):
                raise
        filled = [message | {"content": message.get("content") or ""} for message in messages]
        return self._render(filled, variables)

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        names = self._special_tokens | {"tools": None, "documents": None} | dict(variables)
        names |= {"messages": list(messages), "range": _bounded_range()}
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(names):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    raise jinja2.TemplateError(f"more than {MAX_RENDERED_CHARS} characters")
        except Exception as error:  # whatever a stranger's program raises
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadRequest(
                f"The model's chat template refused the messages: {reason}",
                param="messages",
                code="template_error",
            ) from None
        return "".join(parts)


def find_template(folder: Path, tokenizer_config: dict[str, Any]) -> tuple[str, str] | None:
    """``(source, file)`` of the folder's chat template, None if it ships none.

    ``chat_template.jinja`` goes before the key in tokenizer_config.json; of several named templates
    there, the one called ``default`` is taken. Raises `CheckpointError` if it cannot be read.
    """
    path = folder / TEMPLATE_FILE
    if is_there(path):
        try:
            return read_file(path).decode(), str(path)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: {error}") from None
    where = str(folder / "tokenizer_config.json")
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict)]
        value = next((e.get("template") for e in named if e.get("name") == "default"), value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise CheckpointError(
            f"{where}: chat_template: neither a text nor a list that has a 'default' template"
        )
    return value, where


def _bounded_range() -> Callable[..., range]:
    num_left = MAX_RANGE_STEPS

    def bounded_range(*bounds: int) -> range:
        nonlocal num_left
        steps = range(*bounds)
        num_left -= len(steps)
        if num_left < 0:
            raise jinja2.TemplateError(f"more than {MAX_RANGE_STEPS} steps")
        return steps

    return bounded_range


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter: no HTML escapes, non-ASCII text as it is."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
