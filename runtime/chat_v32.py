"""The prompt of DeepSeek-V3.2, whose release has no chat template but a program that writes it.

    begin      <｜begin▁of▁sentence｜>
    system     {content}, and behind the first one {tools}
    user       <｜User｜>{content}<｜Assistant｜>{think}
    assistant  {thought}</think>{content}{calls}<｜end▁of▁sentence｜>, without {thought}</think> in
               what came before the last user message
    tool       <function_results> with a <result> for each call, then {think}

{think} says whether a thought follows: it is ``<think>`` behind the last user message and the
results after it in thinking mode, and ``</think>`` everywhere else. The format is that of the
release's ``encoding/encoding_dsv32.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.chat_template import Message
from runtime.config import show
from runtime.errors import BadRequest

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK_START, THINK_END = "<think>", "</think>"
DSML = "｜DSML｜"

TOOLS = f"""\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of \
your reply to the user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK_START}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
%s
</functions>
"""
"""What the model was trained to read before the functions' schemas, one a line."""


class V32Chat:
    """Renders a conversation; see `runtime.chat_template.ChatRenderer`."""

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Arguments of tool calls as objects. Raises `BadRequest` for what is no JSON object."""
        return [
            message
            if not message.get("tool_calls")
            else message | {"tool_calls": [_parsed(call, i) for call in message["tool_calls"]]}
            for i, message in enumerate(messages)
        ]

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt. Variables: ``thinking`` (default false) and ``tools`` (OpenAI's objects).

        Raises `BadRequest` for an unknown role and for results that do not fit the calls.
        """
        thinking = bool(variables.get("thinking", False))
        tools = _tools(variables.get("tools") or ())
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        parts = [BOS]
        if messages[0]["role"] != "system":
            parts.append(tools)
        num_calls = num_results = 0  # of the last message that is no result, and since then
        for i, message in enumerate(messages):
            is_result = message["role"] == "tool"
            num_results = num_results + 1 if is_result else 0
            num_calls = num_calls if is_result else len(message.get("tool_calls") or ())
            follows = THINK_START if thinking and i >= last_user else THINK_END
            content = message.get("content") or ""
            match message["role"]:
                case "system":
                    parts.append(content if i else content + tools)
                case "user":
                    parts.append(f"{USER}{content}{ASSISTANT}{follows}")
                case "assistant":
                    if thinking and i > last_user:
                        parts.append(f"{message.get('reasoning_content') or ''}{THINK_END}")
                    parts.append(f"{content}{_calls(message)}{EOS}")
                case "tool":
                    is_last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
                    if num_results > num_calls or (is_last and num_results < num_calls):
                        raise BadRequest(
                            f"messages[{i}]: {num_results} tool messages behind a message with "
                            f"{num_calls} tool_calls",
                            param="messages",
                            code="template_error",
                        )
                    opening = "\n\n<function_results>" if num_results == 1 else ""
                    closing = f"\n</function_results>\n\n{follows}" if is_last else ""
                    parts.append(f"{opening}\n<result>{content}</result>{closing}")
                case role:
                    raise BadRequest(
                        f"messages[{i}]: DeepSeek-V3.2 has no role {role!r}",
                        param=f"messages[{i}].role",
                        code="template_error",
                    )
        return "".join(parts)


def _parsed(call: dict[str, Any], index: int) -> dict[str, Any]:
    function = call.get("function", {})
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest(
            f"messages[{index}].tool_calls: the arguments of {show(function.get('name'))} are not "
            "a JSON object",
            param=f"messages[{index}].tool_calls",
            code="invalid_value",
        )
    return call | {"function": function | {"arguments": arguments}}


def _tools(tools: Sequence[dict[str, Any]]) -> str:
    schemas = "\n".join(_json(tool["function"]) for tool in tools)
    return "\n\n" + TOOLS.replace("%s", schemas) if tools else ""


def _calls(message: Message) -> str:
    calls = message.get("tool_calls")
    if not calls:
        return ""
    lines = [f"\n\n<{DSML}function_calls>"]
    for call in calls:
        lines.append(f'<{DSML}invoke name="{call["function"]["name"]}">')
        arguments = call["function"]["arguments"]
        # a function without parameters leaves an empty line
        lines.append("\n".join(_parameter(name, value) for name, value in arguments.items()))
        lines.append(f"</{DSML}invoke>")
    return "\n".join([*lines, f"</{DSML}function_calls>"])


def _parameter(name: str, value: Any) -> str:
    is_string = isinstance(value, str)
    return (
        f'<{DSML}parameter name="{name}" string="{"true" if is_string else "false"}">'
        f"{value if is_string else _json(value)}</{DSML}parameter>"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
