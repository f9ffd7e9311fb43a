"""Chat answers as the real openai client sees them, streamed and not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from api.limits import Limits
from runtime import FinishReason, Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, post, scripted_state, serve

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
ASK = {"model": "deepseek-r1", "messages": HELLO}


def sse_events(text: str) -> list[str]:
    """The data of every event; fails on any line the clients do not take."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_plain_answer_has_the_documents_fields(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.say("Hello there, 你好 🙂", thought="A greeting.")
    answer = client.chat.completions.create(model="deepseek-r1", messages=HELLO)
    raw = answer.to_dict()
    prompt_ids, _ = engine.submitted[0]
    num_new = len(engine.token_ids)
    assert raw.pop("id").startswith("chatcmpl-")
    assert raw.pop("created") > 1_700_000_000
    usage = raw.pop("usage")
    assert raw == {
        "object": "chat.completion",
        "model": "deepseek-r1",
        "system_fingerprint": "fp_0123456789",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello there, 你好 🙂",
                    "reasoning_content": "A greeting.\n",
                    "reasoning": "A greeting.\n",
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    num_reasoning = engine.token_ids.index(engine.tokenizer.think_end_id) + 1
    assert usage == {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": num_new,
        "total_tokens": len(prompt_ids) + num_new,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        "prompt_cache_hit_tokens": 0,
        "prompt_cache_miss_tokens": len(prompt_ids),
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_on_the_wire(base: str, engine: ScriptedEngine, include_usage: bool) -> None:
    engine.say("Hello!")
    body = {**ASK, "stream": True}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    response = post(base, body, headers={"accept": "application/json"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in response.headers
    *data, done = sse_events(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(item) for item in data]
    usage_chunk = chunks.pop() if include_usage else None
    for name in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[name] for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["model"] == "deepseek-r1"
    assert all(len(chunk["choices"]) == 1 and "error" not in chunk for chunk in chunks)
    assert all(("usage" in chunk) == include_usage for chunk in chunks)
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    keys = [tuple(choice["delta"]) for choice in middle]
    assert keys == sorted(keys, reverse=True), "the thought comes before the content"
    assert set(keys) == {("reasoning_content", "reasoning"), ("content",)}
    assert all(choice["finish_reason"] is None for choice in middle)
    if usage_chunk is not None:
        assert usage_chunk["choices"] == []
        assert usage_chunk["usage"]["completion_tokens"] == len(engine.token_ids)


def fold_stream(chunks: Iterable[Any]) -> dict[str, Any]:
    """What a client would put together from a stream, written apart from the server's own fold."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.usage.to_dict() if chunk.usage else usage
        for part in chunk.choices:
            choice = choices.setdefault(
                part.index, {"content": "", "thought": "", "tokens": [], "thought_tokens": []}
            )
            choice["content"] += part.delta.content or ""
            choice["thought"] += getattr(part.delta, "reasoning_content", None) or ""
            choice["finish_reason"] = part.finish_reason
            if part.logprobs:
                raw = part.logprobs.to_dict()
                choice["tokens"] += raw.get("content") or []
                choice["thought_tokens"] += raw.get("reasoning_content") or []
    return {"choices": choices, "usage": usage}


def test_stream_and_plain_answer_are_the_same(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    chance = random.Random(5)
    for _ in range(40):
        engine.say(
            chance.choice(["one two three four five", "数一二三四五六 🙂🙃 done", "a\n\nb STOP c"]),
            thought=chance.choice(["hm", "第一步 STOP 第二步"]),
            stop=chance.random() < 0.7,
        )
        engine.batch = chance.choice([1, 3, 100])
        options: dict[str, Any] = {
            "n": chance.choice([1, 2, 3]),
            "stop": chance.choice([None, "STOP", ["four", "五"], "\n\n"]),
            "max_tokens": chance.choice([None, 1, 2, 5, 11, 200]),
            "logprobs": chance.choice([False, True]),
        }
        if options["logprobs"]:
            options["top_logprobs"] = chance.choice([0, 2])
        plain = client.chat.completions.create(model="deepseek-r1", messages=HELLO, **options)
        with client.chat.completions.create(
            model="deepseek-r1",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        ) as stream:
            folded = fold_stream(stream)
        assert plain.usage is not None
        assert folded["usage"] == plain.usage.to_dict()
        assert len(plain.choices) == options["n"]
        for choice in plain.choices:
            streamed = folded["choices"][choice.index]
            raw = choice.to_dict()
            assert streamed["content"] == choice.message.content
            assert streamed["thought"] == getattr(choice.message, "reasoning_content", "")
            assert streamed["finish_reason"] == choice.finish_reason
            logprobs: Any = raw.get("logprobs") or {}
            assert streamed["tokens"] == (logprobs.get("content") or [])
            assert streamed["thought_tokens"] == (logprobs.get("reasoning_content") or [])


def test_a_stop_string_ends_the_content_and_the_engine_is_told(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.say("alpha beta gamma delta epsilon zeta eta theta", thought="beta gamma?")
    engine.seconds_per_token = 0.002
    answer = client.chat.completions.create(model="deepseek-r1", messages=HELLO, stop=[" gamma"])
    assert answer.choices[0].message.content == "alpha beta"
    assert answer.choices[0].message.to_dict()["reasoning_content"] == "beta gamma?\n"
    assert answer.choices[0].finish_reason == "stop"
    assert engine.aborted == [0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens < len(engine.token_ids)


def test_length(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.say("a long answer that will not fit")
    answer = client.chat.completions.create(
        model="deepseek-r1", messages=HELLO, max_tokens=100, max_completion_tokens=6
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_logprobs_cover_the_shown_text(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.say("你好 🙂 there", thought="想")
    answer = client.chat.completions.create(
        model="deepseek-r1", messages=HELLO, logprobs=True, top_logprobs=2
    )
    logprobs: Any = answer.choices[0].to_dict()["logprobs"]
    shown = b"".join(bytes(entry["bytes"]) for entry in logprobs["content"])
    assert shown.decode().lstrip("\n") == answer.choices[0].message.content
    thought = b"".join(bytes(entry["bytes"]) for entry in logprobs["reasoning_content"])
    assert thought.decode() == "想\n"
    assert [len(entry["top_logprobs"]) for entry in logprobs["content"]] == [2] * len(
        logprobs["content"]
    )
    entry = logprobs["reasoning_content"][0]
    assert entry["logprob"] == -0.25
    assert entry["bytes"] == list(tokenizer.token_bytes[engine.token_ids[0]])


def test_sampling_defaults_come_from_the_checkpoint_and_explicit_values_win(
    base: str, engine: ScriptedEngine
) -> None:
    engine.say("ok")
    for extra in ({}, {"temperature": 0, "top_p": 1, "top_k": 7, "seed": 2**63 - 1, "n": 2}):
        assert post(base, {**ASK, **extra}).status_code == 200
    default, first, second = (params for _, params in engine.submitted)
    assert (default.temperature, default.top_p, default.top_k) == (0.6, 0.95, 0)
    assert (default.repetition_penalty, default.seed, default.max_tokens) == (1.0, None, None)
    assert (first.temperature, first.top_p, first.top_k, first.seed) == (0.0, 1.0, 7, 2**63 - 1)
    assert second.seed == -(2**63), "choice i gets seed + i, wrapped to 64 bits"


def test_the_prompt_is_the_templates(
    base: str, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.say("ok")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "secret thought",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "assistant", "content": "It is 42.", "reasoning": "more"},
        {"role": "user", "name": "ann", "content": "thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "HUGE", "parameters": {}}}]
    assert post(base, {"messages": messages, "tools": tools}).status_code == 200
    prompt = b"".join(tokenizer.token_bytes[i] for i in engine.submitted[0][0]).decode()
    assert prompt == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>a\nb<｜Assistant｜><｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>42"
        "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>It is 42.<｜end▁of▁sentence｜><｜User｜>thanks"
        "<｜Assistant｜><think>\n"
    )


def test_model_is_optional_and_answered_as_asked(base: str, engine: ScriptedEngine) -> None:
    engine.say("ok")
    assert post(base, {"messages": HELLO}).json()["model"] == "fathom-tiny"
    assert post(base, {"messages": HELLO, "model": None}).json()["model"] == "fathom-tiny"
    assert post(base, ASK).json()["model"] == "deepseek-r1"


def test_a_prompt_beyond_the_context_is_a_400_with_both_numbers(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="deepseek-r1",
            messages=[{"role": "user", "content": "word " * 2000}],
            stream=True,
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "512 tokens" in caught.value.message
    assert engine.num_live == 0


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ({"fails_with": FinishReason.ERROR}, 500, "engine_error"),
        ({"fails_with": FinishReason.ABORT}, 503, "engine_unavailable"),
        ({"dies": True}, 503, "engine_unavailable"),
        ({"dies": True, "batch": 100}, 503, "engine_unavailable"),  # with its last words
    ],
)
def test_an_engine_failure_is_an_error_and_never_a_done(
    base: str, client: openai.OpenAI, engine: ScriptedEngine, script: Any, status: int, code: str
) -> None:
    engine.say("half an ans", stop=False)
    for name, value in script.items():
        setattr(engine, name, value)
    plain = post(base, ASK)
    assert (plain.status_code, plain.json()["error"]["code"]) == (status, code)
    if status == 500:
        assert plain.headers["x-should-retry"] == "false"
    else:
        assert int(plain.headers["retry-after"]) > 0
    data = sse_events(post(base, {**ASK, "stream": True}).text)
    assert set(json.loads(data[-1])) == {"error"}
    stream = client.chat.completions.create(model="deepseek-r1", messages=HELLO, stream=True)
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(stream)
    assert caught.value.code == code
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("half")


def test_one_choice_that_cannot_be_queued_takes_the_others_back(
    base: str, engine: ScriptedEngine
) -> None:
    engine.say("ok")
    engine.refuses_after = 2
    response = post(base, {**ASK, "n": 3})
    assert response.status_code == 503
    assert engine.aborted == [0, 1]
    assert engine.num_live == 0


def test_a_dead_engine_is_a_503_everywhere(base: str, engine: ScriptedEngine) -> None:
    engine.state = "failing"
    response = post(base, ASK)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert int(response.headers["retry-after"]) > 0


def test_a_fault_of_ours_is_a_500_that_tells_and_logs_no_prompt(
    base: str,
    engine: ScriptedEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private = "my bank account"

    def broken(prompt_ids: object, params: object, **options: object) -> None:
        raise RuntimeError(private)

    monkeypatch.setattr(engine, "submit", broken)
    body = {"messages": [{"role": "user", "content": private}]}
    response = post(base, body, headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["type"] == "server_error"
    assert private not in response.text
    assert "find-me" in caplog.text
    assert "in broken" in caplog.text
    assert private not in caplog.text


def test_what_all_choices_say_in_a_step_and_at_the_end_is_written_at_once(
    base: str, engine: ScriptedEngine
) -> None:
    engine.say("one two three four", stop=False)
    engine.seconds_per_token = 0.02  # the choices' tokens come together
    body = {**ASK, "n": 8, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{base}/chat/completions", json=body) as response:
        writes = [part.decode() for part in response.iter_raw()]
    num_events = [len(sse_events(write)) for write in writes]
    num_steps = len(engine.token_ids)
    assert sum(num_events) >= 8 * (num_steps - 1)
    assert len(writes) < 2 * num_steps
    *_, last_choice, usage, done = sse_events(writes[-1])
    assert json.loads(last_choice)["choices"][0]["finish_reason"] == "length"
    assert json.loads(usage)["usage"]["completion_tokens"] == 8 * num_steps
    assert done == "[DONE]"


def test_silence_is_filled_with_comments(tokenizer: Tokenizer) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(ping=0.05))
    engine = engine_of(state)
    engine.say("late")
    engine.first_token_seconds = 0.3
    with serve(state) as base:
        text = post(base, {**ASK, "stream": True}).text
        assert post(base, ASK).json()["choices"][0]["message"]["content"] == "late"
    assert 3 <= text.count(": keep-alive\n\n") <= 6
    assert text.index("assistant") < text.index(": keep-alive") < text.index("reasoning")
    assert text.endswith("data: [DONE]\n\n")


def test_tokens_that_keep_coming_are_no_silence(tokenizer: Tokenizer) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(ping=1.0))
    engine = engine_of(state)
    engine.say("one two three four five six")
    engine.seconds_per_token = 1.6 / len(engine.token_ids)
    with serve(state) as base:
        assert "keep-alive" not in post(base, {**ASK, "stream": True}).text


def test_unknown_fields_are_logged_once(
    base: str, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.say("ok")
    with caplog.at_level("INFO", logger="fathom.api"):
        for _ in range(3):
            body = {**ASK, "mystery": {"a": [1]}, "user": "x", "metadata": {"k": "v"}, "stop": None}
            assert post(base, body).status_code == 200
    assert caplog.text.count("mystery") == 1
    assert "metadata" not in caplog.text
