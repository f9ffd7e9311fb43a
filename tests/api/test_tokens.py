"""What the model reads of a text or a conversation, and what its ids stand for."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from runtime import Tokenizer
from tests.api.scripted import MAX_MODEL_LEN, ScriptedEngine

MESSAGES = [{"role": "user", "content": "hello, 你好 🙂"}]
TEXT = "hello, 你好 🙂 <think>"


def call(base: str, path: str, **body: Any) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{base}{path}", content=json.dumps(body), headers=headers, verify=False)


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta"])
def test_a_text_and_back(base: str, tokenizer: Tokenizer, prefix: str) -> None:
    root = base.removesuffix("/v1") + prefix
    tokens = tokenizer.encode(TEXT)
    assert tokens[-1] == tokenizer.think_start_id
    answer = call(root, "/tokenize", prompt=TEXT, model="deepseek-r1").json()
    assert answer == {"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens}
    back = call(root, "/detokenize", tokens=tokens, model="deepseek-r1").json()
    assert back == {"prompt": TEXT, "content": TEXT}


def test_a_conversation_is_counted_as_chat_reads_it(
    base: str, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.say("Hi")
    for more in ({}, {"chat_template_kwargs": {"thinking": False}}, {"enable_thinking": False}):
        engine.submitted.clear()
        assert call(base, "/chat/completions", messages=MESSAGES, **more).status_code == 200
        answer = call(base, "/tokenize", messages=MESSAGES, **more).json()
        assert answer["tokens"] == engine.submitted[0][0]
        assert answer["count"] == len(answer["tokens"])
    opened = call(base, "/tokenize", messages=MESSAGES).json()["tokens"]
    closed = call(base, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert opened[: closed["count"]] == closed["tokens"] and len(opened) > closed["count"]
    assert len(engine.submitted) == 1, "the engine has no part in it"


def test_the_names_of_llama_cpp(base: str, tokenizer: Tokenizer) -> None:
    answer = call(base, "/tokenize", content="a 🙂", with_pieces=True).json()
    tokens = tokenizer.encode("a 🙂", add_special_tokens=False)
    assert [token["id"] for token in answer["tokens"]] == tokens
    data = b"".join(
        bytes(token["piece"]) if isinstance(token["piece"], list) else token["piece"].encode()
        for token in answer["tokens"]
    )
    assert data == "a 🙂".encode()
    assert any(isinstance(token["piece"], list) for token in answer["tokens"])
    added = call(base, "/tokenize", content="a", add_special=True).json()["tokens"]
    assert added == tokenizer.encode("a")


def test_what_is_empty_and_what_is_no_text(base: str, tokenizer: Tokenizer) -> None:
    assert call(base, "/tokenize", prompt="").json()["tokens"] == []
    assert call(base, "/detokenize", tokens=[]).json()["prompt"] == ""
    half = tokenizer.encode("🙂")[:1]
    assert call(base, "/detokenize", tokens=half).json()["prompt"] == "\ufffd"
    long = call(base, "/tokenize", prompt="hello " * 600).json()
    assert long["count"] > long["max_model_len"], "more than fits is counted too"


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": 5}, "prompt", "invalid_type"),
        ("/tokenize", {"prompt": "x y " * 300_000}, "prompt", "context_length_exceeded"),
        ("/tokenize", {"messages": []}, "messages", "empty_array"),
        ("/tokenize", {"messages": MESSAGES, "model": "gpt-5"}, "model", "model_not_found"),
        ("/tokenize", {"prompt": "a", "model": "gpt-5"}, "model", "model_not_found"),
        (
            "/tokenize",
            {"prompt": "a", "add_special_tokens": 1},
            "add_special_tokens",
            "invalid_type",
        ),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": ["5"]}, "tokens[0]", "invalid_type"),
        ("/detokenize", {"tokens": [2048]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [5] * 131_073}, "tokens", "array_above_max_length"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refusals(
    refusing: tuple[str, ScriptedEngine], path: str, body: dict[str, Any], param: str, code: str
) -> None:
    answer = call(refusing[0], path, **body)
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_it_waits_its_turn_as_chat_does(base: str, engine: ScriptedEngine) -> None:
    engine.max_live = 0
    assert call(base, "/tokenize", prompt="a").status_code == 429
    engine.state = "failing"
    assert call(base, "/detokenize", tokens=[5]).status_code == 503
