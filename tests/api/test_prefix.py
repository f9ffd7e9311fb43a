"""Answers that go on with the last message: DeepSeek's ``prefix`` and vLLM's switch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.scripted import ScriptedEngine, post

HELLO = {"role": "user", "content": "hello"}


def started(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("switch", ["prefix", "continue_final_message"])
def test_the_answer_goes_on(base: str, engine: ScriptedEngine, switch: str) -> None:
    engine.token_ids = [*engine.tokenizer.encode("print(1)"), min(engine.tokenizer.eos_token_ids)]
    body: dict[str, Any] = {"messages": [HELLO, started("```python\n")]}
    if switch == "prefix":
        body["messages"][1]["prefix"] = True
    else:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    answer = post(base, body).json()["choices"][0]["message"]
    assert answer["content"] == "print(1)" and "reasoning_content" not in answer
    [(prompt_ids, _)] = engine.submitted
    expected = engine.tokenizer.encode("<｜Assistant｜>```python\n")
    assert prompt_ids[-len(expected) :] == expected


def test_the_answer_goes_on_inside_a_thought(base: str, engine: ScriptedEngine) -> None:
    engine.say("Hi!", thought=" and so on")
    last = started("", prefix=True, reasoning_content="A greeting")
    answer = post(base, {"messages": [HELLO, last]}).json()["choices"][0]["message"]
    assert answer["reasoning_content"] == " and so on\n"
    assert answer["content"] == "Hi!"
    engine.submitted.clear()
    last = started("Hel", prefix=True, reasoning="A greeting")
    engine.token_ids = [*engine.tokenizer.encode("lo"), min(engine.tokenizer.eos_token_ids)]
    assert post(base, {"messages": [HELLO, last]}).json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": "lo",
        "refusal": None,
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{**HELLO, "prefix": True}]}, "messages[0].prefix"),
        ({"messages": [started("a", prefix=True), HELLO]}, "messages[0].prefix"),
        ({"messages": [HELLO], "continue_final_message": True}, "continue_final_message"),
        (
            {
                "messages": [HELLO, started("a")],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
        (
            {
                "messages": [
                    HELLO,
                    started("a", prefix=True, tool_calls=[{"function": {"name": "f"}}]),
                ]
            },
            "messages[1].tool_calls",
        ),
    ],
)
def test_what_cannot_be_continued(
    refusing: tuple[str, ScriptedEngine], body: dict[str, Any], param: str
) -> None:
    base, engine = refusing
    answer = post(base, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert engine.submitted == []


def test_prefix_false_is_no_prefix(base: str, engine: ScriptedEngine) -> None:
    engine.say("Hi")
    messages = [HELLO, started("a", prefix=False), {**HELLO, "prefix": False}]
    assert post(base, {"messages": messages, "continue_final_message": None}).status_code == 200
