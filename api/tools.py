"""The functions of a chat request: what they may be, and what they mean to prompt and answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.fields import FAIL_FAST, PARTS, TEXT, Body, show, text_or_object
from runtime import BadRequest, Grammar, Tokenizer, ToolCallParser, calls_grammar, check_grammar

MAX_TOOLS = 128
NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"


class Function(Body):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


def _choice_kind(value: object) -> str:
    return PARTS if isinstance(value, dict | NamedTool) else TEXT


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), FAIL_FAST]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)] | Annotated[NamedTool, Tag(PARTS)],
    Discriminator(_choice_kind),
    BeforeValidator(text_or_object),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer may call functions."""

    tools: list[dict[str, Any]]  # as the prompt shows them
    max_calls: int | None
    grammar: Grammar | None  # of an answer that has to call

    def parser(self) -> ToolCallParser:
        """For one choice."""
        return ToolCallParser(self.max_calls)

    def check(self, tokenizer: Tokenizer) -> None:
        """Takes seconds at worst. Raises `BadRequest` for schemas the engine cannot follow."""
        if self.grammar is not None:
            with _blaming_tools():
                check_grammar(self.grammar, tokenizer)


def check_tools(tools: Sequence[Tool] | None, choice: str | NamedTool | None) -> None:
    """Raises `BadRequest` for a choice that is none of the tools. Without tools any will do."""
    if not tools or not isinstance(choice, NamedTool):
        return
    name = choice.function.name
    if all(tool.function.name != name for tool in tools):
        raise BadRequest(
            f"Invalid 'tool_choice': no function in 'tools' is called {show(name)}.",
            param="tool_choice",
            code="invalid_value",
        )


def tool_use(
    tokenizer: Tokenizer,
    tools: Sequence[Tool] | None,
    choice: str | NamedTool | None,
    *,
    parallel: bool,
) -> ToolUse | None:
    """What a checked request asks for; None if the answer is to be plain.

    A model that was not taught to call functions is told of them only where it has to call one:
    clients send dozens along with every chat, which would cost much and bring nothing.

    Raises `BadRequest` if the grammar of a call that has to be gets too long.
    """
    forced = choice == "required" or isinstance(choice, NamedTool)
    if not tools or choice == "none":
        return None
    if tokenizer.tool_style.format is None and not forced:
        return None
    shown = [tool.model_dump(exclude_none=True) for tool in tools]
    only_one = isinstance(choice, NamedTool) or not parallel
    grammar = None
    if forced:
        allowed = shown
        if isinstance(choice, NamedTool):
            name = choice.function.name
            allowed = [tool for tool in shown if tool["function"]["name"] == name]
        with _blaming_tools():
            grammar = calls_grammar(tokenizer, allowed, only_one=only_one)
    return ToolUse(shown, 1 if only_one else None, grammar)


@contextlib.contextmanager
def _blaming_tools() -> Iterator[None]:
    """A grammar made of the tools is not what the client wrote."""
    try:
        yield
    except BadRequest as error:
        raise BadRequest(
            "Invalid 'tools': their parameters do not make a grammar that this server can hold the "
            f"answer to, as tool_choice asks: {error}",
            param="tools",
            code=error.code,
        ) from None
