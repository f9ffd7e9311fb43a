"""Whatever is asked for, a stream adds up to the plain answer: the real engine, random requests.

`pytest -m slow tests/api/test_streams_agree.py` tries 300 combinations of parameters.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from api.app import ServerState, create_app
from runtime import EngineClient, EngineConfig, GenerationDefaults, Tokenizer
from tests.runtime.engines import TINY, chats

CONFIG = EngineConfig(
    model=str(TINY), device="cpu", dtype="float32", max_model_len=1024, num_threads=1
)
AT_ONCE = 16
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("weather", "trip")
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "stay", "schema": PARAMETERS}}
LOGPROBS = {"content", "reasoning_content"}  # lists of a choice's logprobs
NAMED = {"type": "function", "function": {"name": "trip"}}

# what a client may send beside the messages, each with about this chance
FIELDS: list[tuple[float, dict[str, list[Any]]]] = [
    (0.8, {"temperature": [0, 0.3, 1, 1.5, 2.0]}),
    (0.3, {"top_p": [0, 0.5, 0.95, 1]}),
    (0.2, {"top_k": [-1, 1, 5, 50]}),
    (0.2, {"min_p": [0.02, 0.2]}),
    (0.2, {"presence_penalty": [-1, 0.5, 2]}),
    (0.2, {"frequency_penalty": [-0.5, 1]}),
    (0.2, {"repetition_penalty": [0.9, 1.3]}),
    (0.2, {"logit_bias": [{"5": 2, "700": -100}, {"40": 5.5}]}),
    (0.2, {"min_tokens": [1, 12]}),
    (0.4, {"stop": ["e", ["the", "。"], [" 7", "zzz", "I am"], ["\n\n"], "Hello there, how"]}),
    (0.1, {"stop_token_ids": [[13, 14, 15], [300]]}),
    (0.1, {"ignore_eos": [True]}),
    (0.3, {"n": [2, 3]}),
    (0.2, {"enable_thinking": [True, False]}),
    (0.1, {"thinking": [{"type": "enabled"}, {"type": "disabled"}]}),
    (0.2, {"thinking_budget": [0, 1, 5]}),
    (0.1, {"break_thought_loops": [True]}),
    (0.1, {"stream_options": [{"include_usage": True, "new": 1}]}),
]


def random_request(seed: int) -> dict[str, Any]:
    """A request that is the same for the same seed."""
    rng = random.Random(seed)
    body: dict[str, Any] = {"messages": rng.choice(chats()), "seed": seed}
    body["max_tokens"] = rng.choice([1, 5, 20, 40, 60])
    for chance, fields in FIELDS:
        if rng.random() < chance:
            body |= {name: rng.choice(values) for name, values in fields.items()}
    if rng.random() < 0.4:
        body |= {"logprobs": True, "top_logprobs": rng.choice([0, 1, 4])}
    shape = rng.random()
    if shape < 0.3:
        body["tools"] = TOOLS
        body["tool_choice"] = rng.choice(["auto", "none", "required", "required", NAMED])
        body["parallel_tool_calls"] = rng.choice([True, False])
        body |= {"max_tokens": rng.choice([20, 150]), "thinking_budget": 3}
    elif shape < 0.5:
        body["response_format"] = rng.choice([{"type": "json_object"}, SCHEMA])
    elif shape < 0.6:
        begun = {"role": "assistant", "content": "Well, ", "prefix": True}
        body["messages"] = [*body["messages"], begun]
    return body


def merged(text: str) -> dict[str, Any]:
    """What the events of a stream add up to, in the form of `told`."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in (json.loads(line.removeprefix("data: ")) for line in lines):
        assert usage is None, "usage comes last"
        usage = chunk["usage"]
        for part in chunk["choices"]:
            empty = {"text": "", "thought": "", "calls": {}, "finish_reason": None}
            choice = choices.setdefault(part["index"], {**empty, "logprobs": {}})
            assert choice["finish_reason"] is None, "nothing comes after the end"
            choice["finish_reason"] = part["finish_reason"]
            delta = part["delta"]
            choice["text"] += delta.get("content") or ""
            choice["thought"] += delta.get("reasoning_content") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                function = choice["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                for name, piece in call["function"].items():
                    function[name] += piece
            for name, entries in (part.get("logprobs") or {}).items():
                choice["logprobs"].setdefault(name, []).extend(entries or ())
    for choice in choices.values():
        calls = choice["calls"]
        assert sorted(calls) == list(range(len(calls)))
        choice["calls"] = [calls[index] for index in sorted(calls)]
        choice["logprobs"] = {name: found for name, found in choice["logprobs"].items() if found}
    return {"choices": choices, "usage": usage}


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """What a plain answer says."""
    choices = {}
    for choice in answer["choices"]:
        message = choice["message"]
        choices[choice["index"]] = {
            "text": message.get("content") or "",
            "thought": message.get("reasoning_content") or "",
            "calls": [call["function"] for call in message.get("tool_calls") or ()],
            "logprobs": {
                name: found for name, found in (choice["logprobs"] or {}).items() if found
            },
            "finish_reason": choice["finish_reason"],
        }
    return {"choices": choices, "usage": answer["usage"]}


async def compare(count: int) -> list[dict[str, Any]]:
    """Ask each request plainly and as a stream; the plain answers, all of which agreed."""
    engine = EngineClient(CONFIG)
    await engine.start()
    state = ServerState(
        engine=engine,
        tokenizer=Tokenizer.load(TINY),
        defaults=GenerationDefaults(temperature=0.6, top_p=0.95),
        model_names=("fathom-tiny",),
        keys=None,
        created=0,
        system_fingerprint="fp_test",
    )
    transport = httpx.ASGITransport(create_app(state))
    gate = asyncio.Semaphore(AT_ONCE)
    answers = []

    async def ask(client: httpx.AsyncClient, seed: int) -> None:
        body = random_request(seed)
        streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
        # Each has a cache of its own, so that both find the same in it.
        asked = [{**body, "cache_salt": f"{seed} plain"}, {**streaming, "cache_salt": f"{seed} s"}]
        async with gate:
            plain, stream = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=each) for each in asked)
            )
        assert plain.status_code == stream.status_code == 200, (body, plain.text, stream.text)
        expected = told(plain.json())
        assert merged(stream.text) == expected, body
        answers.append(expected)

    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", timeout=120
        ) as client:
            await asyncio.gather(*(ask(client, seed) for seed in range(count)))
    finally:
        await engine.stop()
    return answers


def check(count: int) -> None:
    answers = asyncio.run(compare(count))
    assert len(answers) == count
    choices = [choice for answer in answers for choice in answer["choices"].values()]
    # The requests must have reached every kind of thing that is compared.
    for name in ("text", "thought", "calls", "logprobs"):
        assert sum(bool(choice[name]) for choice in choices) >= count / 20, name
    assert {name for choice in choices for name in choice["logprobs"]} == LOGPROBS
    assert {choice["finish_reason"] for choice in choices} == {"stop", "length", "tool_calls"}


def test_24_random_requests() -> None:
    check(24)


@pytest.mark.slow
def test_300_random_requests() -> None:
    check(300)
