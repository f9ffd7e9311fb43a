"""What of a format and of the limits of a thought reaches the engine, whatever it is called."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from api.app import ServerState
from runtime import Grammar, Tokenizer
from tests.api.scripted import TINY, engine_of, post, scripted_state, serve
from tests.load.served import served

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"ü": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))

FORMATS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"type": "text"}, None),
    ({"type": "json_object"}, Grammar("json_object")),
    ({"type": "json_object", "schema": SCHEMA}, Grammar("json_schema", TEXT)),
    ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, Grammar("json_schema", TEXT)),
    ({"type": "regex", "regex": "a+"}, Grammar("regex", "a+")),
    ({"type": "regex", "pattern": "a+"}, Grammar("regex", "a+")),
    ({"type": "grammar", "grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
]
BUDGETS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"thinking_budget": 0}, 0),
    ({"thinking_token_budget": 3}, 3),
    ({"thinking": {"type": "enabled", "budget_tokens": 4}}, 4),
    ({"reasoning": {"max_tokens": 5}}, 5),
    ({"chat_template_kwargs": {"thinking_budget": 6}}, 6),
    ({"thinking_budget": 2**40}, 2**31 - 1),
    # the first that says something counts
    ({"thinking_budget": 0, "thinking_token_budget": 3}, 0),
    ({"thinking_token_budget": 3, "thinking": {"type": "enabled", "budget_tokens": 4}}, 3),
    ({"thinking": {"type": "auto", "budget_tokens": 4}, "reasoning": {"max_tokens": 5}}, 4),
    ({"reasoning": {"max_tokens": 5}, "chat_template_kwargs": {"thinking_budget": 6}}, 5),
    ({"thinking_budget": None, "chat_template_kwargs": {"thinking_budget": 6}}, 6),
]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, ServerState]]:
    state = scripted_state(Tokenizer.load(TINY))
    with serve(state) as base:
        yield base, state


def submitted(server: tuple[str, ServerState], body: dict[str, Any]) -> Any:
    base, state = server
    engine_of(state).say("Hello")
    answer = post(base, {"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    return engine_of(state).submitted[-1][1]


@pytest.mark.parametrize(("response_format", "grammar"), FORMATS)
def test_a_format_becomes_a_grammar(
    server: tuple[str, ServerState], response_format: dict[str, Any], grammar: Grammar | None
) -> None:
    assert submitted(server, {"response_format": response_format}).grammar == grammar


@pytest.mark.parametrize(("body", "budget"), BUDGETS)
def test_a_thought_has_the_budget_that_was_asked_for(
    server: tuple[str, ServerState], body: dict[str, Any], budget: int | None
) -> None:
    assert submitted(server, body).thinking_budget == budget


@pytest.mark.parametrize("name", ["break_thought_loops", "repetition_detection"])
def test_loops_are_broken_if_asked(server: tuple[str, ServerState], name: str) -> None:
    assert not submitted(server, {name: False}).break_loops
    assert submitted(server, {name: True}).break_loops


@pytest.mark.slow
def test_a_deep_schema_ends_no_server_whatever_the_stacks_of_its_shell() -> None:
    """With an unlimited stack the threads of a process get less of one than with 8 MiB."""
    limits = resource.getrlimit(resource.RLIMIT_STACK)
    if limits[1] != resource.RLIM_INFINITY:
        pytest.skip("the stack cannot be unlimited here")
    parts: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(240)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**parts, "d240": {"type": "string"}}}
    resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, limits[1]))
    try:
        with served() as server:
            described = {"type": "json_schema", "json_schema": {"schema": schema}}
            answer = server.chat(response_format=described, max_tokens=1)
            assert answer.status == 200 and answer.whole
            assert server.is_ready()
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, limits)
