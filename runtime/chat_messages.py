"""Messages of a conversation in the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.chat_template import Message
from runtime.control_tokens import THINK_END, THINK_START


def prepare_message(message: Message, *, has_thoughts: bool) -> Message:
    """A message as templates know it: without the role ``developer``, and without ``""``.

    With ``has_thoughts`` an assistant's text up to its last ``</think>`` becomes its
    ``reasoning_content``, unless it brings one.
    """
    prepared = dict(message)
    if prepared.get("role") == "developer":
        prepared["role"] = "system"
    content = prepared.get("content")
    if not content:  # templates tell an answer from calls by this
        prepared["content"] = None if prepared.get("tool_calls") else ""
    is_split = has_thoughts and prepared.get("role") == "assistant"
    if is_split and isinstance(content, str) and THINK_END in content:
        thought, _, prepared["content"] = content.rpartition(THINK_END)
        if not prepared.get("reasoning_content"):
            prepared["reasoning_content"] = thought.lstrip().removeprefix(THINK_START).strip()
    return prepared


def with_open_thought(message: Message) -> Message:
    """A message that is to be continued; a thought at its start that is not closed is no text."""
    content = message.get("content")
    if isinstance(content, str) and THINK_END not in content:
        before, found, thought = content.partition(THINK_START)
        if found and not before.strip():
            return message | {"content": "", "reasoning_content": thought.lstrip("\n")}
    return message


def num_chars(value: Any) -> int:
    """Characters of all texts in ``value``, however deep."""
    total = 0
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, Mapping):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            pending += part
    return total
