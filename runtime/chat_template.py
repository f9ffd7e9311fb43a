"""Renders a checkpoint's own chat template, which is a program from a stranger.

It runs in jinja's immutable sandbox with the names that transformers gives a template, and with
bounds on what it can build: a template that breaks them fails the request, not the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import BadRequest, CheckpointError

Message = dict[str, Any]
"""``role``, ``content`` (text or None) and whatever else the template reads."""

MAX_RENDERED_CHARS = 8_000_000
MAX_RANGE_STEPS = 1_000_000  # over all range() calls of one rendering
TEMPLATE_FILE = "chat_template.jinja"


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses the operators that build something huge from something small."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateError("** is not available in a chat template")
        size = max(_num_items(left), _num_items(right))
        if operator == "*":  # a sequence repeated by a number
            size *= max((abs(n) for n in (left, right) if isinstance(n, int)), default=1)
        if size > MAX_RENDERED_CHARS:
            raise jinja2.TemplateError(f"{operator} builds more than {MAX_RENDERED_CHARS} items")
        return super().call_binop(context, operator, left, right)


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str) -> None:
        """Raises `CheckpointError` with ``where`` and the line of what does not compile."""
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            why = f"line {error.lineno}: {error.message}"
            raise CheckpointError(f"{where}: chat template: {why}") from None
        except RecursionError:
            raise CheckpointError(f"{where}: chat template: nested too deeply") from None

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt. Raises `BadRequest` (``template_error``) with the template's complaint."""
        names = self._special_tokens | {"tools": None, "documents": None} | variables
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
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
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
