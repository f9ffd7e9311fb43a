"""Whatever fails inside one request ends that request only, and tells its client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from runtime import FinishReason, TextAssembler, Tokenizer
from tests.api.scripted import ScriptedEngine, in_background, post, wait_until

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
BAD: dict[str, Any] = {"messages": [{"role": "user", "content": "my secret: BREAK"}]}


class PanicException(BaseException):
    """What pyo3 makes of a panic in Rust code."""


FAULTS = [
    ValueError,
    RecursionError,
    MemoryError,
    StopIteration,
    StopAsyncIteration,
    PanicException,
    SystemExit,
    KeyboardInterrupt,
]


def last_error(text: str) -> dict[str, Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    error = json.loads(data[-1])["error"]
    assert isinstance(error, dict)
    return error


def test_a_fault_in_the_tokenizer_or_the_template(
    base: str,
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode = Tokenizer.encode_chat
    fault: type[BaseException]

    def faulty(tokenizer: Tokenizer, messages: list[Any], **options: Any) -> Any:
        if "BREAK" in messages[-1]["content"]:
            raise fault(messages[-1]["content"])
        return encode(tokenizer, messages, **options)

    monkeypatch.setattr(Tokenizer, "encode_chat", faulty)
    engine.say("fine")
    for fault in FAULTS:
        for stream in (False, True):
            caplog.clear()
            response = post(base, {**BAD, "stream": stream}, headers={"x-request-id": "find-me"})
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "internal_error"
            assert response.headers["x-should-retry"] == "false"
            assert "find-me" in caplog.text
            if fault is not StopIteration:  # which Python renames on its way out of a coroutine
                assert fault.__name__ in caplog.text
            assert "secret" not in response.text + caplog.text
        assert post(base, HELLO).json()["choices"][0]["message"]["content"] == "fine"


def test_a_fault_in_the_detokenizer_or_the_stop_matcher(
    base: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = TextAssembler.feed
    fault: type[BaseException]

    def faulty(assembler: TextAssembler, *arguments: Any) -> Any:
        if assembler._stops and assembler.num_tokens == 5:
            raise fault
        return feed(assembler, *arguments)

    monkeypatch.setattr(TextAssembler, "feed", faulty)
    engine.say("one two three four five six seven eight nine ten " * 3)
    engine.seconds_per_token = 0.002
    others: list[str] = []

    def neighbour() -> None:
        others.append(post(base, {**HELLO, "stream": True}).text)

    for each in FAULTS:
        fault = each
        engine.aborted.clear()
        with in_background(neighbour):
            wait_until(lambda: engine.num_live == 1)
            plain = post(base, {**HELLO, "stop": "x"})
            streamed = post(base, {**HELLO, "stop": "x", "stream": True})
        assert (plain.status_code, plain.json()["error"]["code"]) == (500, "internal_error")
        assert streamed.status_code == 200
        assert last_error(streamed.text)["code"] == "internal_error"
        assert "[DONE]" not in streamed.text
        assert others.pop().endswith("data: [DONE]\n\n")
        assert engine.num_live == 0
        assert len(engine.aborted) == 2


def test_numbers_that_overflowed_are_an_error_that_says_so(
    base: str, client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.say("half an ans", stop=False)
    engine.fails_with = FinishReason.NOT_FINITE
    plain = post(base, HELLO)
    assert (plain.status_code, plain.json()["error"]["code"]) == (500, "not_finite")
    assert "NaN" in plain.json()["error"]["message"]
    assert plain.headers["x-should-retry"] == "false"
    stream = client.chat.completions.create(model="deepseek-r1", stream=True, **HELLO)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "not_finite"
