"""Functions in chat requests: what prompts show, what clients get, and calls that have to be."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from api.app import ServerState
from runtime import (
    FinishReason,
    Generation,
    SamplingParams,
    TokenEvent,
    Tokenizer,
    check_grammar,
)
from runtime.constraints import Constraints
from tests.api.json_schema import mistake
from tests.api.scripted import ScriptedEngine, engine_of, post, scripted_state, serve
from tests.api.test_chat import sse_events
from tests.runtime import chat_templates
from tests.runtime.test_prompts import write_folder
from tests.runtime.test_tool_calls import WRITERS, dumps, write_dsml, write_v3

HELLO: list[Any] = [{"role": "user", "content": "Weather?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "北京"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": CITY}}
TOOLS: list[Any] = [WEATHER, TIME]
CALLS = [("weather", {"city": "Oslo", "days": 2}), ("time", {"city": "北京"})]
FAMILIES = {"V3": chat_templates.V3, "V3.1": chat_templates.V31, "DSML": None}


def open_webui_tools() -> list[dict[str, Any]]:
    """As many and as long as Open WebUI sends with every chat."""
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{i}",
                "description": "Looks something up for the user. " * 12,
                "parameters": {
                    "type": "object",
                    "properties": {
                        "query": {"type": "string", "description": "What to look for."},
                        "count": {"type": "integer", "default": 5},
                        "tags": {"type": "array", "items": {"type": "string"}},
                    },
                    "required": ["query"],
                },
            },
        }
        for i in range(36)
    ]


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def taught(family: str, tmp_path: Path) -> Iterator[tuple[str, ScriptedEngine]]:
    """A server of a model that calls functions; it does not think before it answers."""
    yield from served(tmp_path, FAMILIES[family])


def served(folder: Path, template: str | None) -> Iterator[tuple[str, ScriptedEngine]]:
    state = scripted_state(Tokenizer.load(write_folder(folder, template)))
    engine = engine_of(state)
    engine.info = replace(engine.info, max_model_len=4096)
    with serve(state) as base:
        yield base, engine


def script(engine: ScriptedEngine, text: str, *, stop: bool = True) -> None:
    engine.token_ids = engine.tokenizer.encode(text, add_special_tokens=False)
    if stop:
        engine.token_ids.append(min(engine.tokenizer.eos_token_ids))


def ask(base: str, **more: Any) -> dict[str, Any]:
    response = post(base, {"messages": HELLO, "tools": TOOLS, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def told(message: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls", [])
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    functions = [call["function"] for call in calls]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


# -- answers ---------------------------------------------------------------------------------------


def test_calls_on_the_wire(taught: tuple[str, ScriptedEngine], family: str) -> None:
    base, engine = taught
    script(engine, "Let me look.\n\n" + WRITERS[family](CALLS))
    [choice] = ask(base)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    assert told(choice["message"]) == CALLS
    assert set(choice["message"]["tool_calls"][0]) == {"id", "type", "function"}

    response = post(base, {"messages": HELLO, "tools": TOOLS, "stream": True})
    *data, done = sse_events(response.text)
    assert done == "[DONE]"
    deltas = [json.loads(item)["choices"][0] for item in data]
    assert deltas[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
    parts = [part for one in deltas for part in one["delta"].get("tool_calls", [])]
    heads = [part for part in parts if "id" in part]
    assert [part["index"] for part in heads] == [0, 1]
    assert [part["function"] for part in heads] == [
        {"name": "weather", "arguments": ""},
        {"name": "time", "arguments": ""},
    ]
    assert all(part["type"] == "function" for part in heads)
    rest = [part for part in parts if "id" not in part]
    assert all(set(part) == {"index", "function"} for part in rest)
    assert all(set(part["function"]) == {"arguments"} for part in rest)
    assert len(rest) > len(heads), "arguments come in fragments"


def test_no_text_beside_calls_is_null(taught: tuple[str, ScriptedEngine], family: str) -> None:
    base, engine = taught
    script(engine, WRITERS[family](CALLS[:1]))
    [choice] = ask(base)["choices"]
    assert choice["message"]["content"] is None
    assert told(choice["message"]) == CALLS[:1]


def test_a_stream_adds_up_to_the_answer(taught: tuple[str, ScriptedEngine], family: str) -> None:
    base, engine = taught
    rng = random.Random(family)
    client = openai.OpenAI(base_url=base, api_key="none", max_retries=0)
    with client:
        for _ in range(12):
            calls = [
                (rng.choice(["weather", "time"]), {"city": rng.choice(["x" * 40, '"<{中🙂\n'])})
                for _ in range(rng.randrange(3))
            ]
            text = f"Text {rng.choice(['STO', '<b>', ''])}\n" + WRITERS[family](calls) * bool(calls)
            script(engine, text, stop=rng.random() < 0.7)
            engine.batch = rng.choice([1, 2, 7, 1000])
            options: dict[str, Any] = {
                "model": "deepseek-r1",
                "messages": HELLO,
                "tools": TOOLS,
                "stop": ["STOP", "weather"],
                "logprobs": rng.random() < 0.5,
                "n": rng.choice([1, 2]),
                "parallel_tool_calls": rng.random() < 0.7,
            }
            whole = client.chat.completions.create(**options).to_dict()
            folded = fold_calls(client.chat.completions.create(**options, stream=True))
            for choice in whole["choices"]:  # type: ignore[attr-defined]
                message = choice["message"]
                entries = (choice["logprobs"] or {}).get("content") or []
                assert folded[choice["index"]] == {
                    "content": message["content"] or "",
                    "calls": [
                        (call["function"]["name"], call["function"]["arguments"])
                        for call in message.get("tool_calls", [])
                    ],
                    "logprobs": [entry["logprob"] for entry in entries],
                    "finish_reason": choice["finish_reason"],
                }
                if options["logprobs"] and calls and options["parallel_tool_calls"]:
                    shown = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
                    texts = [text for _, call in calls for text in call.values()]
                    assert all(text in shown or dumps(text) in shown for text in texts)


def fold_calls(stream: Any) -> dict[int, dict[str, Any]]:
    """What a client adds up, written apart from the server's own fold."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for part in chunk.choices:
            choice = choices.setdefault(part.index, {"content": "", "calls": [], "logprobs": []})
            choice["content"] += part.delta.content or ""
            for call in part.delta.tool_calls or []:
                if call.id:
                    choice["calls"].append((call.function.name, call.function.arguments))
                else:
                    name, arguments = choice["calls"][call.index]
                    choice["calls"][call.index] = name, arguments + call.function.arguments
            if part.logprobs:
                choice["logprobs"] += [entry.logprob for entry in part.logprobs.content or []]
            choice["finish_reason"] = part.finish_reason
    return choices


@pytest.mark.parametrize(
    ("text", "stop", "reason"),
    [
        (write_v3(CALLS), True, "tool_calls"),
        (write_v3(CALLS), False, "length"),  # cut, if only behind the last call
        (write_v3(CALLS)[:-60], False, "length"),
        ("<｜tool▁calls▁begin｜>weather?", True, "stop"),
        ("No call.", True, "stop"),
    ],
)
def test_finish_reasons(tmp_path: Path, text: str, stop: bool, reason: str) -> None:
    for base, engine in served(tmp_path, chat_templates.V3):
        script(engine, text, stop=stop)
        assert ask(base)["choices"][0]["finish_reason"] == reason


def test_broken_calls_are_text(taught: tuple[str, ScriptedEngine]) -> None:
    base, engine = taught
    text = "Look: <｜tool▁calls▁begin｜>weather(Oslo)<｜tool▁calls▁end｜> and <tool_call>."
    script(engine, text)
    [choice] = ask(base)["choices"]
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]


def test_one_call_at_a_time(taught: tuple[str, ScriptedEngine], family: str) -> None:
    base, engine = taught
    engine.seconds_per_token = 0.001
    script(engine, WRITERS[family](CALLS) + " more")
    answer = ask(base, parallel_tool_calls=False)
    [choice] = answer["choices"]
    assert told(choice["message"]) == CALLS[:1]
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] < len(engine.token_ids)
    assert engine.aborted, "the engine need not go on"


def test_a_call_after_a_thought(state: ServerState, base: str, engine: ScriptedEngine) -> None:
    """Of the embedded model, which always thinks and calls only where it has to."""
    engine.say(WRITERS["Hermes"](CALLS[:1]), thought="Hm.")
    [choice] = ask(base, tool_choice="required")["choices"]
    assert choice["message"]["reasoning_content"] == "Hm.\n"
    assert choice["message"]["content"] is None
    assert told(choice["message"]) == CALLS[:1]


def test_the_sdk_reads_streamed_calls(tmp_path: Path) -> None:
    for base, engine in served(tmp_path, None):
        script(engine, write_dsml(CALLS))
        with (
            openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client,
            client.chat.completions.stream(
                model="deepseek-r1", messages=HELLO, tools=TOOLS
            ) as stream,
        ):
            message = stream.get_final_completion().choices[0].message
        assert message.content in (None, "")
        calls = message.tool_calls or []
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == CALLS


# -- prompts ---------------------------------------------------------------------------------------


def prompt_of(engine: ScriptedEngine) -> str:
    token_ids, _ = engine.submitted[-1]
    return b"".join(engine.tokenizer.token_bytes[i] for i in token_ids).decode()


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_model_that_cannot_call_is_spared_the_tools(
    base: str, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, choice: str | None
) -> None:
    engine.say("<tool_call> is a tag.")
    plain = post(base, {"messages": HELLO}).json()
    caplog.set_level(logging.INFO, "fathom.api")
    more = {"tools": open_webui_tools(), "tool_choice": choice}
    answers = [ask(base, **more) for _ in range(2)]
    for answer in answers:
        assert answer["usage"] == plain["usage"]
        assert answer["choices"] == plain["choices"]
    logged = [line for line in caplog.messages if "tools" in line]
    assert len(logged) == (choice != "none")


def test_none_keeps_the_tools_out(taught: tuple[str, ScriptedEngine], family: str) -> None:
    base, engine = taught
    script(engine, "No.")
    ask(base)
    assert "weather" in prompt_of(engine)
    ask(base, tool_choice="none")
    assert "weather" not in prompt_of(engine)
    ask(base, tools=[], tool_choice="required")
    ask(base, tools=None, tool_choice={"type": "function", "function": {"name": "x"}})
    assert all(params.grammar is None for _, params in engine.submitted)
    assert len({len(ids) for ids, _ in engine.submitted[1:]}) == 1


def test_history_that_a_model_broke_is_taken_back(
    taught: tuple[str, ScriptedEngine], base: str, engine: ScriptedEngine
) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": '{"city": '}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "What city?"},
    ]
    for address, scripted in (taught, (base, engine)):
        scripted.say("Oslo.")
        assert post(address, {"messages": messages, "tools": TOOLS}).status_code == 200
        assert "What city?" in prompt_of(scripted)
        assert '{"city": ' in prompt_of(scripted)


def test_a_name_that_is_no_tool(base: str) -> None:
    choice = {"type": "function", "function": {"name": "rain"}}
    response = post(base, {"messages": HELLO, "tools": TOOLS, "tool_choice": choice})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "tool_choice",
        "invalid_value",
    )
    assert error["message"] == ("Invalid 'tool_choice': no function in 'tools' is called \"rain\".")


# -- calls that have to be -------------------------------------------------------------------------


class ObedientEngine(ScriptedEngine):
    """Draws any token that the grammar allows, as the real one masks its logits."""

    async def _play(
        self, generation: Generation, params: SamplingParams, limit: int, prompt_ids: list[int]
    ) -> None:
        tokenizer = self.tokenizer
        constraint = Constraints(tokenizer).make(prompt_ids, params)
        assert constraint is not None, "the answer is free"
        rng = random.Random(generation.seq_id)
        output_ids: list[int] = []
        while True:
            if not output_ids and tokenizer.opens_thought(prompt_ids):
                token_id = tokenizer.think_end_id or 0
            else:
                bitmask = constraint.bitmask(output_ids)
                bits = np.unpackbits(bitmask.view(np.uint8), bitorder="little")
                allowed = [i for i in np.flatnonzero(bits) if i != tokenizer.think_start_id]
                token_id = int(rng.choice(allowed))
            output_ids.append(token_id)
            reason = FinishReason.STOP if token_id in tokenizer.eos_token_ids else None
            generation.deliver(TokenEvent(generation.seq_id, token_id, reason))
            if reason is not None:
                del self._live[generation.seq_id]
                return
            await asyncio.sleep(0)


EMBEDDED = "the embedded model"


@pytest.mark.parametrize("family", [EMBEDDED, *sorted(FAMILIES)])
def test_a_call_that_has_to_be(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    """Random tokens within the grammar are calls of the tools, with arguments of their schemas."""
    if family != EMBEDDED:
        tokenizer = Tokenizer.load(write_folder(tmp_path, FAMILIES[family]))
    engine = ObedientEngine(tokenizer)
    engine.info = replace(engine.info, max_model_len=4096)
    state = replace(scripted_state(tokenizer), engine=engine)
    named = {"type": "function", "function": {"name": "time"}}
    seen = set()
    with serve(state) as base:
        several: list[tuple[Any, bool]] = [("required", True)] * 8
        for choice, parallel in [*several, ("required", False), (named, True)]:
            answer = ask(base, tool_choice=choice, parallel_tool_calls=parallel)
            [part] = answer["choices"]
            calls = told(part["message"])
            assert part["finish_reason"] == "tool_calls"
            assert part["message"]["content"] is None
            assert calls
            assert len(calls) == 1 or (parallel and choice == "required")
            for name, arguments in calls:
                assert mistake(CITY, CITY, arguments) is None
                assert name in (["time"] if choice is named else ["time", "weather"])
            seen.add(len(calls))
            assert "weather" in prompt_of(engine), "the model is told of all tools"
    assert max(seen) > 1, "several calls in one answer"


def test_what_makes_no_grammar_is_refused(base: str, engine: ScriptedEngine) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(20):
        deep = {"type": "object", "properties": {f"p{i}": deep for i in range(2)}} | {"x": deep}
        if len(json.dumps(deep)) > 80_000:
            break
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    response = post(base, {"messages": HELLO, "tools": [tool], "tool_choice": "required"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert engine.submitted == []
    engine.say("fine")
    assert post(base, {"messages": HELLO, "tools": [tool]}).status_code == 200


def test_required_with_as_many_tools_as_open_webui_sends(
    base: str, state: ServerState, engine: ScriptedEngine
) -> None:
    engine.say(WRITERS["Hermes"]([("tool_3", {"query": "x"})]))
    engine.info = replace(engine.info, max_model_len=65_536)
    [choice] = ask(base, tools=open_webui_tools(), tool_choice="required")["choices"]
    assert told(choice["message"]) == [("tool_3", {"query": "x"})]
    _, params = engine.submitted[-1]
    assert params.grammar is not None
    check_grammar(params.grammar, state.tokenizer)
