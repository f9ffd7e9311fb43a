"""How a model is told of functions it may call, and shown the calls it made.

Most releases ignore ``tools`` in their templates although the models were taught to call functions,
and each family in a format of its own. `ToolChat` stands around a checkpoint's renderer, finds out
by trial what it does with calls, and adds what is missing.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.chat_template import ChatRenderer, Message
from runtime.errors import BadRequest
from runtime.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    DSML_BLOCKS,
    HERMES_BEGIN,
    HERMES_END,
    SEP,
)

Tool = Mapping[str, Any]


class ToolFormat(enum.Enum):
    """How calls are written; see `runtime.tool_calls`."""

    V3 = enum.auto()
    V31 = enum.auto()
    DSML = enum.auto()
    HERMES = enum.auto()


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """What a checkpoint's renderer does with functions and calls."""

    format: ToolFormat | None  # None: the model was not taught to call
    shows_tools: bool = False  # it writes the functions into the prompt itself
    shows_calls: bool = False  # it writes earlier calls and their results
    wants_objects: bool = False  # arguments of earlier calls as objects, not as JSON
    keeps_text: bool = False  # text beside calls does not make it drop one of them
    block: str = DSML_BLOCKS[0]  # of `ToolFormat.DSML`

    @property
    def format_to_force(self) -> ToolFormat:
        """The format to ask for where there must be a call: any model can be led to write one."""
        return self.format or ToolFormat.HERMES


V31_TOOLS = f"""\
## Tools
You have access to the following tools:

%s
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{CALLS_BEGIN}{CALL_BEGIN}tool_call_name{SEP}tool_call_arguments{CALL_END}\
{{additional_tool_calls}}{CALLS_END}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""
"""What V3.1 and V3.2-Exp were trained to read; their releases have it in words only."""

V3_TOOLS = f"""\
## Tools

These functions can be called:

%s
To call one, write its name and its arguments as JSON in exactly this form:
{CALLS_BEGIN}{CALL_BEGIN}function{SEP}NAME
```json
{{"argument": "value"}}
```{CALL_END}{CALLS_END}
Several calls stand behind each other before {CALLS_END}. Call a function only where it helps.
"""

HERMES_TOOLS = f"""\
## Tools

These functions can be called:

%s
To call one, write its name and its arguments as JSON in exactly this form:
{HERMES_BEGIN}
{{"name": "NAME", "arguments": {{"argument": "value"}}}}
{HERMES_END}
Several calls stand behind each other. Call a function only where it helps.
"""


def tools_text(form: ToolFormat, tools: Sequence[Tool]) -> str:
    """What a model reads about its functions where its template says nothing."""
    functions = [tool["function"] for tool in tools]
    if form == ToolFormat.V31:
        entries = [
            f"### {function['name']}\nDescription: {function.get('description') or ''}\n\n"
            f"Parameters: {_json(function.get('parameters') or {})}\n"
            for function in functions
        ]
        return V31_TOOLS.replace("%s", "\n".join(entries))
    text = V3_TOOLS if form == ToolFormat.V3 else HERMES_TOOLS
    return text.replace("%s", "".join(f"{_json(function)}\n" for function in functions))


class ToolChat:
    """A `ChatRenderer` that knows functions and calls, around one that may not."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer

    @functools.cached_property
    def style(self) -> ToolStyle:
        """Found by rendering a few short conversations, once."""
        return _find_style(self._renderer)

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Earlier calls and results as the template takes them, else as readable text.

        Raises `BadRequest` where the renderer does.
        """
        if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
            messages = self._with_calls(messages)
        return self._renderer.prepare(messages)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt. Functions in ``tools`` come into it whatever the renderer does with them."""
        tools = variables.get("tools")
        if not tools or (self.style.shows_tools and self.style.format is not None):
            return self._renderer.render(messages, variables)
        text = tools_text(self.style.format_to_force, tools)
        if messages and messages[0]["role"] == "system":
            first = messages[0] | {"content": f"{messages[0].get('content') or ''}\n\n{text}"}
            messages = [first, *messages[1:]]
        else:
            messages = [{"role": "system", "content": text}, *messages]
        return self._renderer.render(messages, {**variables, "tools": None})

    def _with_calls(self, messages: Sequence[Message]) -> list[Message]:
        if not self.style.shows_calls:
            return _readable(messages)
        shown: list[Message] = []
        for message in messages:
            if not message.get("tool_calls"):
                shown.append(message)
                continue
            calls = [{"type": "function"} | call for call in message["tool_calls"]]
            if self.style.wants_objects:
                calls = [_with_object(call) for call in calls]
            if message.get("content") and not self.style.keeps_text:
                shown.append({name: message[name] for name in message if name != "tool_calls"})
                message = {"role": message["role"], "content": None}
            shown.append(message | {"tool_calls": calls})
        return shown


def with_object_arguments(messages: Sequence[Message]) -> list[Message]:
    """For a renderer that refuses a call whose arguments are no JSON object, as a model may well
    have written one: such arguments become the one argument ``arguments``.
    """
    mended = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [_with_object(call, mends=True) for call in message["tool_calls"]]
            message = message | {"tool_calls": calls}
        mended.append(message)
    return mended


def _with_object(call: dict[str, Any], *, mends: bool = False) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
        elif mends:
            arguments = {"arguments": arguments}
    return call | {"function": function | {"arguments": arguments}}


def _readable(messages: Sequence[Message]) -> list[Message]:
    """Calls as an assistant's text and results as a user's."""
    names: dict[Any, str] = {}
    shown: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            names |= {call.get("id"): call["function"]["name"] for call in calls}
            lines = [
                f"[I call {call['function']['name']} with {call['function'].get('arguments')}]"
                for call in calls
            ]
            text = "\n".join(filter(None, [message.get("content"), *lines]))
            message = {name: message[name] for name in message if name != "tool_calls"}
            message["content"] = text
        elif message["role"] == "tool":
            name = names.get(message.get("tool_call_id"), "the function")
            text = f"[{name} returned]\n{message.get('content') or ''}"
            message = {"role": "user", "content": text}
        shown.append(message)
    return shown


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- what a renderer does ------------------------------------------------------------------------

_NAME, _VALUE, _RESULT, _TEXT = "probe_name", "probe_value", "probe_result", "probe_text"
_ARGUMENTS = {"probe_key": _VALUE}
_TOOL = {"type": "function", "function": {"name": _NAME, "parameters": {"type": "object"}}}


def _find_style(renderer: ChatRenderer) -> ToolStyle:
    def rendered(messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> str:
        variables = {"tools": tools, "add_generation_prompt": True}
        try:
            return renderer.render(renderer.prepare(messages), variables)
        except BadRequest:
            return ""

    question = {"role": "user", "content": "probe_question"}
    prompt = rendered([question])
    shows_tools = _NAME in rendered([question], [_TOOL])
    for wants_objects in (False, True):
        history = rendered([question, *_exchange(None, wants_objects)])
        parts_shown = all(part in history for part in (_NAME, _VALUE, _RESULT))
        if parts_shown and '\\"' not in history:
            break
    else:
        return ToolStyle(None, shows_tools=shows_tools)
    with_text = rendered([question, *_exchange(_TEXT, wants_objects)])
    form = _format_of(history)
    # Those that always think, and are not told of functions, were not taught to call any.
    if not shows_tools and prompt.rstrip().endswith("<think>"):
        form = None
    blocks = [block for block in DSML_BLOCKS if f"<{DSML}{block}>" in history]
    return ToolStyle(
        form,
        shows_tools=shows_tools,
        shows_calls=True,
        wants_objects=wants_objects,
        keeps_text=_TEXT in with_text and _NAME in with_text,
        block=blocks[0] if blocks else DSML_BLOCKS[0],
    )


def _exchange(text: str | None, wants_objects: bool) -> list[Message]:
    arguments = _ARGUMENTS if wants_objects else _json(_ARGUMENTS)
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": "call_0", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": _RESULT},
    ]


def _format_of(history: str) -> ToolFormat | None:
    signs = {
        f"{CALL_BEGIN}function{SEP}{_NAME}": ToolFormat.V3,
        f"{CALL_BEGIN}{_NAME}{SEP}": ToolFormat.V31,
        f'<{DSML}invoke name="{_NAME}">': ToolFormat.DSML,
        HERMES_BEGIN: ToolFormat.HERMES,
    }
    return next((form for sign, form in signs.items() if sign in history), None)
