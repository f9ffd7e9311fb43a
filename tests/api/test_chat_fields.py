"""The conformance table: every field with values that pass and values that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from api.app import ServerState
from runtime import Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, post, scripted_state, serve

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
F = {"name": "f"}

TYPE = "invalid_type"
SCHEMA = "invalid_json_schema"
LOW, HIGH = "decimal_below_min_value", "decimal_above_max_value"
INT_LOW, INT_HIGH = "integer_below_min_value", "integer_above_max_value"
HUGE = 10**400
NOT_NUMBERS: list[Any] = ["1", True, [1], {}]


def number(low: float, high: float, inside: float) -> tuple[list[Any], list[tuple[Any, str]]]:
    wrong = [(low - 0.001, LOW), (high + 0.001, HIGH), (HUGE, HIGH), (-HUGE, LOW)]
    return [low, high, inside, int(high)], wrong + [(value, TYPE) for value in NOT_NUMBERS]


NOT_INTEGERS: list[tuple[Any, str]] = [(1.5, TYPE), *((value, TYPE) for value in NOT_NUMBERS)]
NOT_BOOLEANS: list[tuple[Any, str]] = [("true", TYPE), (1, TYPE), ([], TYPE)]
LIMITS: list[tuple[Any, str]] = [(0, INT_LOW), (-1, INT_LOW), (HUGE, INT_HIGH), *NOT_INTEGERS]

# field: (values that pass, values that are refused with their code)
TABLE: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "model": (
        ["fathom-tiny", "deepseek-r1"],
        [("gpt-5", "model_not_found"), ("", "model_not_found"), (1, TYPE), (["a"], TYPE)],
    ),
    "temperature": number(0, 2, 0.7),
    "top_p": number(0, 1, 0.9),
    "min_p": number(0, 1, 0.05),
    "presence_penalty": number(-2, 2, 0.5),
    "frequency_penalty": number(-2, 2, 0.5),
    "repetition_penalty": (
        [1, 0.5, 1.1, 10],
        [(0, LOW), (-1.0, LOW), *((value, TYPE) for value in NOT_NUMBERS)],
    ),
    "top_k": ([-1, 0, 1, 50, 50.0], [(-2, INT_LOW), (2**31, INT_HIGH), *NOT_INTEGERS]),
    "max_tokens": ([1, 7, 7.0, 10**12], LIMITS),
    "max_completion_tokens": ([1, 7, 7.0, 10**12], LIMITS),
    "min_tokens": ([0, 3], [(-1, INT_LOW), (HUGE, INT_HIGH), *NOT_INTEGERS]),
    "n": ([1, 2, 8, 2.0], [(0, INT_LOW), (9, INT_HIGH), *NOT_INTEGERS]),
    "seed": (
        [0, -1, 2**63 - 1, -(2**63)],
        [(2**63, INT_HIGH), (-(2**63) - 1, INT_LOW), *NOT_INTEGERS],
    ),
    "stop": (
        ["END", ["a", "b"], [], ["x"] * 16, "停止"],
        [
            ("", "invalid_value"),
            (["a", ""], "invalid_value"),
            (["x"] * 17, "array_above_max_length"),
            (1, TYPE),
            (True, TYPE),
            ({"a": 1}, TYPE),
        ],
    ),
    "stop_token_ids": (
        [[], [5, 6], [5.0]],
        [
            ([-1], "invalid_value"),
            ([10**6], "invalid_value"),
            ([1] * 1025, "array_above_max_length"),
            (5, TYPE),
            ("5", TYPE),
        ],
    ),
    "logit_bias": (
        [{}, {"5": 100, "6": -100.0}],
        [
            ({"5": 100.1}, HIGH),
            ({"5": -101}, LOW),
            ({"1000000": 1}, "invalid_value"),
            ({"hello": 1}, "invalid_value"),
            ({"-1": 1}, "invalid_value"),
            ({"²": 1}, "invalid_value"),
            ({str(i): 1 for i in range(1025)}, "object_above_max_properties"),
            ([[5, 1]], TYPE),
            ("5", TYPE),
        ],
    ),
    "logprobs": ([True, False], [*NOT_BOOLEANS, (5, TYPE)]),
    "ignore_eos": ([True, False], NOT_BOOLEANS),
    "stream": ([True, False], NOT_BOOLEANS),
    "stream_options": ([{}, {"include_usage": None}, {"new": 1}], [([], TYPE), ("a", TYPE)]),
    "response_format": (
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_object", "schema": {"type": "object"}},
            {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {}}},
            {"type": "regex", "regex": "a+"},
            {"type": "regex", "pattern": "a+"},
            {"type": "grammar", "grammar": 'start: "a"'},
        ],
        [
            ({"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}, SCHEMA),
            ({"type": "json_object", "schema": {"enum": []}}, SCHEMA),
            ({"type": "regex", "regex": "(a"}, SCHEMA),
            ({"type": "regex", "regex": "a" * 65537}, "string_above_max_length"),
            ({"type": "grammar", "grammar": "hello"}, SCHEMA),
            ("json_object", TYPE),
        ],
    ),
    "tools": (
        [
            [],
            [{"type": "function", "function": {"name": "f"}}],
            [
                {
                    "type": "function",
                    "function": {
                        "name": "a-B_9" + "n" * 59,
                        "description": None,
                        "parameters": {"type": "object", "properties": {}},
                        "strict": True,
                    },
                }
            ]
            * 128,
        ],
        [
            ({}, TYPE),
            ("f", TYPE),
            ([{"type": "function", "function": {"name": "f"}}] * 129, "array_above_max_length"),
        ],
    ),
    "tool_choice": (
        ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}],
        [(1, TYPE), (True, TYPE), ([], TYPE), ("any", "invalid_value"), ("", "invalid_value")],
    ),
    "parallel_tool_calls": ([True, False], NOT_BOOLEANS),
    "user": (["ann", "", "x" * 5000], [(5, TYPE), ({"any": "thing"}, TYPE)]),
    "user_id": (["ann", ""], [(True, TYPE), (["ann"], TYPE)]),
    "cache_salt": (
        ["", "s" * 256, "盐"],
        [("s" * 257, "string_above_max_length"), (7, TYPE), ([], TYPE)],
    ),
    "priority": (
        [-1000, 0, 1000, 5.0],
        [(-1001, INT_LOW), (1001, INT_HIGH), *NOT_INTEGERS],
    ),
    "thinking": (
        [
            {"type": "enabled", "budget_tokens": 9},
            {"type": "disabled"},
            {"type": "auto"},
            {"type": "adaptive"},
        ],
        [({"type": "on"}, "invalid_value"), (True, TYPE), ("enabled", TYPE), ([], TYPE)],
    ),
    "enable_thinking": ([True, False], NOT_BOOLEANS),
    "reasoning": (
        [{}, {"enabled": True}, {"effort": "high", "max_tokens": 9}],
        [({"enabled": 1}, TYPE), ({"effort": "some"}, "invalid_value"), ("high", TYPE)],
    ),
    "reasoning_effort": (
        ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"],
        [("some", "invalid_value"), (1, "invalid_value")],
    ),
    "chat_template_kwargs": (
        [
            {},
            {"thinking": True},
            {"enable_thinking": False},
            {"other": [1, {"a": "<think>"}]},
            {"self": 1, "": 2},
        ],
        [
            ({"thinking": "yes"}, TYPE),
            ({"enable_thinking": 1}, TYPE),
            ({"messages": []}, "invalid_value"),
            ({"chat_template": "{{ 1 }}"}, "invalid_value"),
            ({"bos_token": ""}, "invalid_value"),
            ({"namespace": 1}, "invalid_value"),
            ({"x": "y" * 70_000}, "string_above_max_length"),
            ([], TYPE),
            ("thinking", TYPE),
        ],
    ),
    "no_such_field": ([1, {"a": [None]}], []),
}

PASSING = [(name, value) for name, (good, _) in TABLE.items() for value in [*good, None]]
REFUSED = [(name, value, code) for name, (_, bad) in TABLE.items() for value, code in bad]


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


MISSING = "missing_required_parameter"
VALUE = "invalid_value"
# body, param, code: everything whose place in the body is the point
PLACES: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "messages", MISSING),
    ({"messages": None}, "messages", MISSING),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": HELLO * 2049}, "messages", "array_above_max_length"),
    ({"messages": "hello"}, "messages", TYPE),
    ({"messages": {}}, "messages", TYPE),
    ({"messages": [None]}, "messages[0]", TYPE),
    ({"messages": ["hello"]}, "messages[0]", TYPE),
    ({"messages": [{}]}, "messages[0].role", MISSING),
    ({"messages": [*HELLO, {"role": "narrator", "content": ""}]}, "messages[1].role", VALUE),
    ({"messages": [{"role": 1, "content": ""}]}, "messages[0].role", VALUE),
    ({"messages": [{"role": "user"}]}, "messages[0].content", MISSING),
    (user(None), "messages[0].content", MISSING),
    (user(5), "messages[0].content", TYPE),
    (user({"type": "text"}), "messages[0].content", TYPE),
    (user(["hello"]), "messages[0].content[0]", TYPE),
    (user([{"type": "text"}]), "messages[0].content[0].text", MISSING),
    (user([{"type": "text", "text": None}]), "messages[0].content[0].text", MISSING),
    (user([{"type": "text", "text": 1}]), "messages[0].content[0].text", TYPE),
    (
        user([{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0].content[1].type",
        VALUE,
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "messages[0].tool_calls[0].function.name",
        MISSING,
    ),
    ({"messages": HELLO, "stop": ["a", 1]}, "stop[1]", TYPE),
    ({"messages": HELLO, "stop": [None]}, "stop[0]", TYPE),
    ({"messages": HELLO, "logit_bias": {"5": "x"}}, "logit_bias.5", TYPE),
    (
        {"messages": HELLO, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        TYPE,
    ),
    ({"messages": HELLO, "response_format": {}}, "response_format.type", MISSING),
    ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type", VALUE),
    *(
        ({"messages": HELLO, "response_format": {"type": kind, **rest}}, path, MISSING)
        for kind, rest, path in [
            ("json_schema", {}, "response_format.json_schema"),
            ("json_schema", {"json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
            ("regex", {}, "response_format.regex"),
            ("grammar", {"grammar": None}, "response_format.grammar"),
        ]
    ),
    (
        {"messages": HELLO, "thinking": {"type": "enabled", "budget_tokens": -1}},
        "thinking.budget_tokens",
        INT_LOW,
    ),
    ({"messages": HELLO, "reasoning": {"max_tokens": "5"}}, "reasoning.max_tokens", TYPE),
    (
        {"messages": HELLO, "chat_template_kwargs": {"thinking_budget": 1.5}},
        "chat_template_kwargs.thinking_budget",
        VALUE,
    ),
    ({"messages": HELLO, "tools": [1]}, "tools[0]", TYPE),
    ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function", MISSING),
    ({"messages": HELLO, "tools": [{"type": "web", "function": F}]}, "tools[0].type", VALUE),
    ({"messages": HELLO, "tools": [{"function": F}]}, "tools[0].type", MISSING),
    *[
        (
            {"messages": HELLO, "tools": [{"type": "function", "function": function}]},
            f"tools[0].function.{name}",
            code,
        )
        for name, function, code in [
            ("name", {}, MISSING),
            ("name", {"name": 5}, TYPE),
            ("name", {"name": ""}, VALUE),
            ("name", {"name": "two words"}, VALUE),
            ("name", {"name": "函数"}, VALUE),
            ("name", {"name": "f\n"}, VALUE),
            ("name", {"name": "n" * 65}, VALUE),
            ("parameters", {"name": "f", "parameters": "{}"}, TYPE),
            ("parameters", {"name": "f", "parameters": []}, TYPE),
            ("description", {"name": "f", "description": 5}, TYPE),
        ]
    ],
    ({"messages": HELLO, "tool_choice": {}}, "tool_choice.type", MISSING),
    ({"messages": HELLO, "tool_choice": {"type": "web"}}, "tool_choice.type", VALUE),
    ({"messages": HELLO, "tool_choice": {"type": "function"}}, "tool_choice.function", MISSING),
    (
        {"messages": HELLO, "tool_choice": {"type": "function", "function": {}}},
        "tool_choice.function.name",
        MISSING,
    ),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", VALUE),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", INT_HIGH),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": -1}, "top_logprobs", INT_LOW),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": "2"}, "top_logprobs", TYPE),
]


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[tuple[str, ServerState]]:
    state = scripted_state(tokenizer)
    with serve(state) as base:
        yield base, state


@pytest.fixture
def scripted(server: tuple[str, ServerState]) -> Iterator[ScriptedEngine]:
    engine = engine_of(server[1])
    engine.say("fine")
    yield engine
    assert engine.num_live == 0


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."


@pytest.mark.parametrize(("name", "value"), PASSING, ids=shown)
def test_accepted(
    server: tuple[str, ServerState], scripted: ScriptedEngine, name: str, value: Any
) -> None:
    response = post(server[0], {"messages": HELLO, name: value})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("name", "value", "code"), REFUSED, ids=shown)
def test_refused(
    server: tuple[str, ServerState], scripted: ScriptedEngine, name: str, value: Any, code: str
) -> None:
    response = post(server[0], {"messages": HELLO, name: value})
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"].split("[")[0].split(".")[0]) == (code, name)
    assert len(error["message"]) < 600


@pytest.mark.parametrize(("body", "param", "code"), PLACES, ids=shown)
def test_refused_with_the_place(
    server: tuple[str, ServerState],
    scripted: ScriptedEngine,
    body: dict[str, Any],
    param: str,
    code: str,
) -> None:
    response = post(server[0], body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert "<" not in error["message"]
    assert scripted.num_live == 0


def test_a_megabyte_of_mistakes_makes_a_short_answer(
    server: tuple[str, ServerState], scripted: ScriptedEngine
) -> None:
    long = "x" * 1_000_000
    for body in (
        user([1] * 300_000),
        {"messages": HELLO, "stop": [1] * 300_000},
        {"messages": HELLO, "model": long},
        {"messages": HELLO, "temperature": long},
        {"messages": [{"role": long, "content": ""}]},
        {"messages": HELLO, "logit_bias": {long: 1}},
    ):
        response = post(server[0], body)
        assert response.status_code in (400, 404)
        assert len(response.content) < 1000


def test_fields_reach_the_engine(server: tuple[str, ServerState], scripted: ScriptedEngine) -> None:
    scripted.submitted.clear()
    body = {
        "messages": HELLO,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 2, "7": -3.5},
        "seed": 9.0,
        "stop": "END",
        "stop_token_ids": [7],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": True,
    }
    assert post(server[0], body).status_code == 200
    params = scripted.submitted[0][1]
    assert (params.min_p, params.presence_penalty, params.frequency_penalty) == (0.1, 1.0, -1.0)
    assert (params.repetition_penalty, params.seed, params.min_tokens) == (1.5, 9, 2)
    assert params.logit_bias == ((5, 2.0), (7, -3.5))
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("END",), (7,), True)
    assert params.logprobs == 0
