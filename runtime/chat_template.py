"""Renders a checkpoint's own chat template in the sandbox of `runtime.chat_sandbox`.

A template that fails or takes too much fails the request, not the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from runtime.chat_sandbox import ChatEnvironment, budget
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
        "cycler",
        "dict",
        "documents",
        "eos_token",
        "joiner",
        "messages",
        "namespace",
        "pad_token",
        "raise_exception",
        "range",
        "strftime_now",
        "tools",
    }
)
"""Names of a template that a client cannot set through ``chat_template_kwargs``."""

MAX_RENDERED_CHARS = 8_000_000
MAX_TEMPLATE_CHARS = 1 << 18  # ten times the longest release
TEMPLATE_FILE = "chat_template.jinja"


class ChatRenderer(Protocol):
    """Makes one prompt of a conversation."""

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """What `render` will read. Text that this uncovers, as of JSON in a text, is still a
        client's: the caller looks for control tokens in it after this. Raises `BadRequest`.
        """

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt. Raises `BadRequest` if the conversation has none."""


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str) -> None:
        """Raises `CheckpointError` with ``where`` and the line of what does not compile."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"{where}: chat template: {len(source)} characters; at most {MAX_TEMPLATE_CHARS}"
            )
        self._special_tokens = special_tokens
        try:
            with budget():
                self._template = ChatEnvironment().from_string(source)
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
        names["messages"] = list(messages)
        parts: list[str] = []
        num_chars = 0
        try:
            with budget():
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
