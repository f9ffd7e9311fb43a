"""What the contract says about every request field, written by hand: the oracle of conformance.

A field's cases name the kind of the value, the value, and the code of the error if there is one.
``param`` of an error is the field itself unless a case says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TYPE, VALUE, MISSING = "invalid_type", "invalid_value", "missing_required_parameter"
LOW, HIGH = "decimal_below_min_value", "decimal_above_max_value"
INT_LOW, INT_HIGH = "integer_below_min_value", "integer_above_max_value"
LONG_ARRAY, LONG_TEXT = "array_above_max_length", "string_above_max_length"
NOT_JSON = "invalid_json"
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Case:
    """A value of a field and what becomes of it; no ``code`` means that it is accepted."""

    kind: str
    value: Any
    code: str | None = None
    param: str | None = ""  # "" is the field's own name
    status: int = 0
    beside: dict[str, Any] = field(default_factory=dict)  # other fields of the same request

    def __post_init__(self) -> None:
        if not self.status:
            object.__setattr__(self, "status", 400 if self.code else 200)

    def param_of(self, name: str) -> str | None:
        if self.code is None:
            return None
        return name if self.param == "" else self.param

    def expected(self, name: str) -> str:
        return f"{self.status} {self.param_of(name) or '-'} {self.code or '-'}"


Rows = dict[str, tuple[Case, ...]]

NULL = Case("null", None)


def no_number() -> tuple[Case, ...]:
    """NaN is no JSON at all, so it is the body's mistake and no field's."""
    return (
        Case("wrong type", [1], TYPE),
        Case("wrong type", {}, TYPE),
        Case("bool for number", True, TYPE),
        Case("string for number", "1", TYPE),
        Case("NaN", NAN, NOT_JSON, None),
        Case("Infinity", -float("inf"), NOT_JSON, None),
        NULL,
    )


def decimal(low: float, high: float, inside: float) -> tuple[Case, ...]:
    return (
        Case("valid", inside),
        Case("integer for decimal", int(high)),
        Case("edge low", low),
        Case("edge high", high),
        Case("below", low - 0.01, LOW),
        Case("above", high + 0.01, HIGH),
        *no_number(),
    )


def integer(
    low: int, high: int | None, inside: int, *, edge_low: Any = None, highest: int = 2**63 - 1
) -> tuple[Case, ...]:
    """``high`` None has no limit of its own: what does not fit 64 bits is refused."""
    top = highest if high is None else high
    return (
        Case("valid", inside),
        Case("decimal for integer", float(inside)),
        Case("edge low", low if edge_low is None else edge_low),
        Case("edge high", top),
        Case("below", low - 1, INT_LOW),
        Case("above", top + 1, INT_HIGH),
        Case("fraction", inside + 0.5, TYPE),
        *no_number(),
    )


def boolean() -> tuple[Case, ...]:
    return (
        Case("valid", True),
        Case("valid", False),
        Case("number for bool", 1, TYPE),
        Case("string for bool", "true", TYPE),
        Case("wrong type", [], TYPE),
        NULL,
    )


def text(*more: Case) -> tuple[Case, ...]:
    return (
        Case("valid", "ann"),
        Case("edge low", ""),
        Case("number for string", 5, TYPE),
        Case("bool for string", True, TYPE),
        Case("wrong type", ["ann"], TYPE),
        *more,
        NULL,
    )


def choice(*names: str) -> tuple[Case, ...]:
    return (
        *(Case("valid", name) for name in names),
        Case("unknown", "some", VALUE),
        Case("edge low", "", VALUE),
        NULL,
    )


SAMPLING: Rows = {
    "model": (
        Case("valid", "fathom-tiny"),
        Case("valid", "deepseek-r1"),
        Case("unknown", "gpt-5", "model_not_found", status=404),
        Case("edge low", "", "model_not_found", status=404),
        Case("number for string", 1, TYPE),
        Case("bool for string", True, TYPE),
        NULL,
    ),
    "temperature": decimal(0, 2, 0.7),
    "top_p": decimal(0, 1, 0.9),
    "min_p": decimal(0, 1, 0.05),
    "presence_penalty": decimal(-2, 2, 0.5),
    "frequency_penalty": decimal(-2, 2, -0.5),
    "repetition_penalty": (
        Case("valid", 1.1),
        Case("integer for decimal", 1),
        Case("edge low", 0.001),
        Case("edge high", 10),
        Case("below", 0, LOW),
        Case("below", -1.0, LOW),
        Case("above", 10.01, HIGH),
        *no_number(),
    ),
    "top_k": integer(-1, 2**31 - 1, 40),
    "max_tokens": integer(1, None, 7),
    "max_completion_tokens": integer(1, None, 7),
    "min_tokens": integer(0, 2**31 - 1, 3),
    "n": integer(1, 8, 2),
    "seed": integer(-(2**63), None, 7),
    "priority": integer(-1000, 1000, 5),
    "stop": (
        Case("valid", "END"),
        Case("valid", ["a", "停止"]),
        Case("edge low", []),
        Case("edge high", ["x"] * 16),
        Case("above", ["x"] * 17, LONG_ARRAY),
        Case("empty string", "", VALUE),
        Case("empty string", ["a", ""], VALUE),
        Case("number for string", 1, TYPE),
        Case("bool for string", True, TYPE),
        Case("wrong type", ["a", 1], TYPE, "stop[1]"),
        Case("null inside", [None], TYPE, "stop[0]"),
        NULL,
    ),
    "stop_token_ids": (
        Case("valid", [5, 6]),
        Case("edge low", []),
        Case("above", [1] * 1025, LONG_ARRAY),
        Case("not in the vocabulary", [-1], VALUE),
        Case("not in the vocabulary", [10**6], VALUE),
        Case("bool for number", [True], TYPE, "stop_token_ids[0]"),
        Case("string for number", ["5"], TYPE, "stop_token_ids[0]"),
        Case("wrong type", 5, TYPE),
        NULL,
    ),
    "logit_bias": (
        Case("valid", {"5": 1.5}),
        Case("edge low", {"5": -100}),
        Case("edge high", {"5": 100}),
        Case("empty", {}),
        Case("below", {"5": -100.1}, LOW),
        Case("above", {"5": 100.1}, HIGH),
        Case("not in the vocabulary", {"1000000": 1}, VALUE),
        Case("not a token id", {"hello": 1}, VALUE),
        Case("bool for number", {"5": True}, TYPE, "logit_bias.5"),
        Case("string for number", {"5": "1"}, TYPE, "logit_bias.5"),
        Case("NaN", {"5": NAN}, NOT_JSON, None),
        Case("wrong type", [[5, 1]], TYPE),
        NULL,
    ),
    "ignore_eos": boolean(),
    "stream": boolean(),
    "stream_options": (
        Case("valid", {"include_usage": True}, beside={"stream": True}),
        Case("valid", {"include_usage": True}),  # without stream: ignored, it harms nobody
        Case("empty", {}),
        Case("null inside", {"include_usage": None}),
        Case("number for bool", {"include_usage": 1}, TYPE, "stream_options.include_usage"),
        Case("wrong type", [], TYPE),
        Case("wrong type", "usage", TYPE),
        NULL,
    ),
    "user": text(),
    "user_id": text(),
    "cache_salt": text(
        Case("edge high", "s" * 256),
        Case("above", "s" * 257, LONG_TEXT),
    ),
    "timings": boolean(),
    "timings_per_token": boolean(),
}

HELLO = {"role": "user", "content": "hello"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "f"}}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")

CHAT: Rows = {
    **SAMPLING,
    "messages": (
        Case("valid", [HELLO]),
        Case("valid", [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
        Case("valid", [{"role": role, "content": "x"} for role in ("system", "developer", "user")]),
        Case("edge low", [], "empty_array"),
        Case("edge high", [{"role": "user", "content": ""}] * 2049, LONG_ARRAY),
        Case("unknown role", [{"role": "narrator", "content": ""}], VALUE, "messages[0].role"),
        Case("no role", [{"content": "x"}], MISSING, "messages[0].role"),
        Case("no content", [{"role": "user"}], MISSING, "messages[0].content"),
        Case("number for string", [{"role": "user", "content": 1}], TYPE, "messages[0].content"),
        Case("wrong type", "hello", TYPE),
        Case("wrong type", ["hello"], TYPE, "messages[0]"),
        Case("null", None, MISSING),
    ),
    "logprobs": boolean(),
    "top_logprobs": (
        Case("valid", 2, beside={"logprobs": True}),
        Case("edge low", 0, beside={"logprobs": True}),
        Case("edge low", 0),
        Case("edge high", 20, beside={"logprobs": True}),
        Case("without logprobs", 2, VALUE),
        Case("without logprobs", 2, VALUE, beside={"logprobs": False}),
        Case("below", -1, INT_LOW, beside={"logprobs": True}),
        Case("above", 21, INT_HIGH, beside={"logprobs": True}),
        Case("fraction", 1.5, TYPE),
        *no_number(),
    ),
    "response_format": (
        Case("valid", {"type": "text"}),
        Case("valid", {"type": "json_object"}),
        Case("valid", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
        Case(
            "bad schema",
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}},
            "invalid_json_schema",
        ),
        Case("unknown", {"type": "xml"}, VALUE, "response_format.type"),
        Case("no type", {}, MISSING, "response_format.type"),
        Case("wrong type", "json_object", TYPE),
        NULL,
    ),
    "tools": (
        Case("valid", [FUNCTION]),
        Case("edge low", []),
        Case("wrong type", [1], TYPE, "tools[0]"),
        Case("wrong type", {}, TYPE),
        NULL,
    ),
    "tool_choice": (
        Case("valid", "auto"),
        Case("valid", "none"),
        Case("valid", "auto", beside={"tools": [FUNCTION]}),
        Case("valid", "none", beside={"tools": [FUNCTION]}),
        Case("valid", "required", beside={"tools": [FUNCTION]}),
        Case("valid", NAMED, beside={"tools": [FUNCTION]}),
        Case(
            "not among the tools",
            {"type": "function", "function": {"name": "g"}},
            VALUE,
            beside={"tools": [FUNCTION]},
        ),
        Case("unknown", "sometimes", VALUE),
        Case("number for string", 1, TYPE),
        Case("bool for string", True, TYPE),
        Case("wrong type", [], TYPE),
        NULL,
    ),
    "parallel_tool_calls": boolean(),
    "thinking": (
        Case("valid", {"type": "enabled"}),
        Case("valid", {"type": "disabled"}),
        Case("valid", {"type": "auto"}),
        Case("valid", {"type": "adaptive"}),
        Case("unknown", {"type": "on"}, VALUE, "thinking.type"),
        Case("no type", {}, MISSING, "thinking.type"),
        Case("bool for object", True, TYPE),
        Case("string for object", "enabled", TYPE),
        NULL,
    ),
    "enable_thinking": boolean(),
    "reasoning": (
        Case("valid", {"enabled": True}),
        Case("valid", {"effort": "high"}),
        Case("empty", {}),
        Case("unknown", {"effort": "some"}, VALUE, "reasoning.effort"),
        Case("number for bool", {"enabled": 1}, TYPE, "reasoning.enabled"),
        Case("wrong type", "high", TYPE),
        NULL,
    ),
    "reasoning_effort": choice(*EFFORTS),
    "thinking_budget": integer(0, None, 9),
    "thinking_token_budget": integer(0, None, 9),
    "break_thought_loops": boolean(),
    "repetition_detection": boolean(),
    "chat_template_kwargs": (
        Case("valid", {"thinking": True}),
        Case("empty", {}),
        Case("string for bool", {"thinking": "yes"}, TYPE, "chat_template_kwargs.thinking"),
        Case("wrong type", [], TYPE),
        NULL,
    ),
    "add_generation_prompt": boolean(),
    "continue_final_message": (
        Case("valid", False),
        Case(
            "valid",
            True,
            beside={"messages": [HELLO, {"role": "assistant", "content": "Once"}]},
        ),
        Case("the last is the user's", True, VALUE),
        Case("number for bool", 1, TYPE),
        Case("string for bool", "true", TYPE),
        NULL,
    ),
}

COMPLETIONS: Rows = {
    **SAMPLING,
    "max_tokens": (
        *(case for case in integer(1, None, 7) if case.kind != "edge low"),
        Case("edge low", 0, beside={"echo": True}),
    ),
    "prompt": (
        Case("valid", "hello"),
        Case("valid", ["hello", "there"]),
        Case("valid", [5, 6]),
        Case("valid", [[5], [6, 7]]),
        Case("edge low", [], "empty_array"),
        Case("above", ["x"] * 129, LONG_ARRAY),
        Case("mixed", ["x", 5], TYPE),
        Case("bool for number", [True], TYPE),
        Case("wrong type", {}, TYPE),
        Case("number for string", 5, TYPE),
        Case("null", None, MISSING),
    ),
    "suffix": text(),
    "echo": boolean(),
    "logprobs": integer(0, 20, 2),
    "best_of": (
        Case("valid", 1),
        Case("valid", 2, beside={"n": 2}),
        Case("not n", 2, "unsupported_value"),
        Case("fraction", 1.5, TYPE),
        *no_number(),
    ),
    "add_special_tokens": boolean(),
}
