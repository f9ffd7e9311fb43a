"""Completions as the real openai client sees them, streamed and not."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
import tokenizers

from api.limits import Limits
from runtime import FinishReason, Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, post, scripted_state, serve
from tests.api.test_chat import sse_events

PROMPT = "Say hello, 你好 🙂"


def ask(base: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{base}/completions", json={"prompt": PROMPT, **body}, verify=False)


def refusal(base: str, **body: Any) -> tuple[str | None, str]:
    answer = ask(base, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["code"]


def say(engine: ScriptedEngine, text: str) -> list[int]:
    engine.token_ids = [*engine.tokenizer.encode(text), min(engine.tokenizer.eos_token_ids)]
    return engine.token_ids


def test_a_plain_answer_has_the_documents_fields(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    say(engine, "Hello there")
    raw = client.completions.create(model="deepseek-r1", prompt=PROMPT).to_dict()
    [(prompt_ids, params)] = engine.submitted
    assert prompt_ids == engine.tokenizer.encode(PROMPT)
    assert params.max_tokens == 16
    assert str(raw.pop("id")).startswith("cmpl-")
    assert isinstance(created := raw.pop("created"), int) and created > 1_700_000_000
    assert raw == {
        "object": "text_completion",
        "model": "deepseek-r1",
        "system_fingerprint": "fp_0123456789",
        "choices": [{"index": 0, "text": "Hello there", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(engine.token_ids),
            "total_tokens": len(prompt_ids) + len(engine.token_ids),
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "prompt_cache_hit_tokens": 0,
            "prompt_cache_miss_tokens": len(prompt_ids),
        },
    }


def test_a_stream_on_the_wire(base: str, engine: ScriptedEngine) -> None:
    say(engine, "Hello there")
    answer = ask(base, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = sse_events(answer.text)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "text_completion" and chunks[0]["id"].startswith("cmpl-")
    *growing, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(engine.token_ids)
    assert all(chunk["usage"] is None for chunk in growing)
    entries = [chunk["choices"][0] for chunk in growing]
    assert "".join(entry["text"] for entry in entries) == "Hello there"
    assert [entry["finish_reason"] for entry in entries] == [None] * (len(entries) - 1) + ["stop"]


def test_thoughts_stay_in_the_text(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer.think_start_id is not None and tokenizer.think_end_id is not None
    thought = [tokenizer.think_start_id, *tokenizer.encode("\nHm.\n"), tokenizer.think_end_id]
    engine.token_ids = [*thought, *tokenizer.encode("\n\nYes"), min(tokenizer.eos_token_ids)]
    answer = client.completions.create(model="deepseek-r1", prompt="<think>\nA: ")
    assert answer.choices[0].text == "<think>\nHm.\n</think>\n\nYes"
    assert engine.submitted[0][0][0] == tokenizer.think_start_id, "a prompt is read as it is"


def test_thoughts_of_a_tokenizer_that_calls_their_marks_special(tokenizer: Tokenizer) -> None:
    described = json.loads(tokenizer._backend.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["special"] or token["content"] in ("<think>", "</think>")
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    assert backend.get_added_tokens_decoder()[tokenizer.think_start_id].special
    marked = Tokenizer(
        backend, special_tokens={}, add_bos=False, chat=None, eos_token_ids=frozenset({1})
    )
    state = scripted_state(marked)
    say(engine_of(state), "<think>a</think>b")
    with serve(state) as base:
        assert ask(base).json()["choices"][0]["text"] == "<think>a</think>b"


@pytest.mark.parametrize("echo", [False, True])
def test_several_prompts_and_choices(
    client: openai.OpenAI, engine: ScriptedEngine, echo: bool
) -> None:
    say(engine, "!")
    engine.num_cached = 1
    prompts = ["One", "Two, 两", "Three"]
    answer = client.completions.create(
        model="deepseek-r1", prompt=prompts, n=2, seed=7, echo=echo, user="ann"
    )
    encoded = [engine.tokenizer.encode(prompt) for prompt in prompts]
    assert [prompt_ids for prompt_ids, _ in engine.submitted] == [
        encoded[0],
        encoded[0],
        encoded[1],
        encoded[1],
        encoded[2],
        encoded[2],
    ]
    # a prompt's answers do not depend on its place among others
    assert [params.seed for _, params in engine.submitted] == [7, 8] * 3
    assert len(set(engine.namespaces)) == 1
    assert [choice.index for choice in answer.choices] == list(range(6))
    asked = [prompt if echo else "" for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == [text + "!" for text in asked]
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == sum(map(len, encoded))
    assert answer.usage.completion_tokens == 6 * len(engine.token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3, "once for each prompt"


def test_token_ids(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    say(engine, "!")
    for prompt, expected in (([5, 6, 7], [[5, 6, 7]]), ([[5], [6, 7]], [[5], [6, 7]])):
        engine.submitted.clear()
        answer = client.completions.create(model="deepseek-r1", prompt=prompt, echo=True)
        assert [prompt_ids for prompt_ids, _ in engine.submitted] == expected
        texts = [b"".join(map(engine.tokenizer.token_bytes.__getitem__, ids)) for ids in expected]
        shown = [text.decode(errors="replace") + "!" for text in texts]
        assert [choice.text for choice in answer.choices] == shown


def test_the_first_token_that_the_tokenizer_adds(tokenizer: Tokenizer) -> None:
    state = scripted_state(_with_bos(tokenizer))
    bos = tokenizer.encode("<｜begin▁of▁sentence｜>")
    hello = tokenizer.encode("hello")
    engine = engine_of(state)
    say(engine, "!")
    engine.token_ids = engine.token_ids[1:]  # without the one of its own
    with serve(state) as base:
        for body, read, shown in (
            ({}, bos + hello, "hello"),
            ({"add_special_tokens": False}, hello, "hello"),
            (
                {"prompt": "<｜begin▁of▁sentence｜>hello"},
                bos + hello,
                "<｜begin▁of▁sentence｜>hello",
            ),
        ):
            engine.submitted.clear()
            choice = ask(base, **{"prompt": "hello", "echo": True, **body}).json()["choices"][0]
            assert (engine.submitted[0][0], choice["text"]) == (read, f"{shown}!")
        scored = ask(base, prompt="hello", echo=True, logprobs=0).json()["choices"][0]
        assert scored["logprobs"]["tokens"][0] == "<｜begin▁of▁sentence｜>"
        assert scored["logprobs"]["text_offset"][:2] == [0, 0]
        assert scored["text"] == "hello!"


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(
        tokenizer._backend,
        special_tokens={"bos_token": "<｜begin▁of▁sentence｜>"},
        add_bos=True,
        chat=None,
        eos_token_ids=tokenizer.eos_token_ids,
    )


def test_a_suffix_is_asked_for_with_the_familys_markers(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    say(engine, "b")
    answer = client.completions.create(model="deepseek-r1", prompt="a", suffix="c")
    assert answer.choices[0].text == "b"
    marked = "<｜fim▁begin｜>a<｜fim▁hole｜>c<｜fim▁end｜>"
    [(prompt_ids, _)] = engine.submitted
    assert prompt_ids == engine.tokenizer.encode(marked)
    vocabulary = engine.tokenizer._backend.get_vocab()
    assert prompt_ids[0] == vocabulary["<｜fim▁begin｜>"]
    assert prompt_ids[-1] == vocabulary["<｜fim▁end｜>"]


def test_a_model_without_markers_says_so(tokenizer: Tokenizer) -> None:
    plain = _with_bos(tokenizer)
    plain._infill = None
    state = scripted_state(plain)
    say(engine_of(state), "!")
    with serve(state) as base:
        answer = ask(base, prompt="a", suffix="c").json()["error"]
        assert (answer["param"], answer["code"]) == ("suffix", "unsupported_value")
        assert "<｜fim▁begin｜>" in answer["message"]
        assert ask(base, prompt="a", suffix="").status_code == 200


def test_logprobs_of_the_answer(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    text = "Hello 🙂 there"
    token_ids = say(engine, text)
    answer = client.completions.create(model="deepseek-r1", prompt=PROMPT, logprobs=2)
    written = answer.choices[0].logprobs
    assert written is not None and written.tokens is not None
    assert written.top_logprobs is not None and written.text_offset is not None
    pieces = [engine.tokenizer.token_bytes[token_id] for token_id in token_ids[:-1]]
    assert len(written.tokens) == len(pieces), "the end of the sequence is no text"
    assert written.token_logprobs == [-0.25 * (i + 1) for i in range(len(pieces))]
    ends = [b"".join(pieces[:i]).decode(errors="ignore") for i in range(len(pieces))]
    assert written.text_offset == [len(end) for end in ends]
    for token, piece in zip(written.tokens, pieces, strict=True):
        assert (
            token == piece.decode() if token[:6] != "bytes:" else token.count("\\x") == len(piece)
        )
    assert any(token.startswith("bytes:\\x") for token in written.tokens)
    for token, best in zip(written.tokens, written.top_logprobs, strict=True):
        assert token in best, "the token's own logprob is always there"
        assert len(best) == 3


def test_logprobs_of_the_prompt(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    say(engine, "!")
    prompt_ids = engine.tokenizer.encode(PROMPT)
    answer = client.completions.create(
        model="deepseek-r1", prompt=PROMPT, logprobs=1, echo=True, max_tokens=0
    )
    [(_, params)] = engine.submitted
    assert (params.prompt_logprobs, params.max_tokens) == (1, 1)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    written = choice.logprobs
    assert written is not None and written.top_logprobs is not None
    assert written.token_logprobs == [None, *(-0.5 * i for i in range(1, len(prompt_ids)))]
    assert written.top_logprobs[0] is None and all(written.top_logprobs[1:])
    pieces = [engine.tokenizer.token_bytes[token_id] for token_id in prompt_ids]
    ends = [b"".join(pieces[:i]).decode(errors="ignore") for i in range(len(pieces))]
    assert written.text_offset == [len(end) for end in ends]


def test_an_echoed_prompt_needs_no_scores(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    say(engine, "!")
    answer = client.completions.create(
        model="deepseek-r1", prompt=PROMPT, echo=True, extra_body={"max_tokens": 0}
    )
    assert (answer.choices[0].text, answer.choices[0].logprobs) == (PROMPT, None)
    assert engine.submitted[0][1].prompt_logprobs is None
    assert (
        client.completions.create(model="deepseek-r1", prompt=PROMPT, logprobs=1).choices[0].text
        == "!"
    )
    assert engine.submitted[1][1].prompt_logprobs is None, "nor does one that is not shown"


def test_a_token_of_half_a_character_in_a_prompt(base: str, engine: ScriptedEngine) -> None:
    """It ends with the prompt: what the answer begins with is a character of its own."""
    half = engine.tokenizer.encode("🙂")[:1]
    assert engine.tokenizer.token_bytes[half[0]].decode(errors="ignore") == ""
    say(engine, "!")
    for logprobs in (None, 0):
        choice = ask(base, prompt=half, echo=True, logprobs=logprobs).json()["choices"][0]
        assert choice["text"] == "\N{REPLACEMENT CHARACTER}!"
    assert choice["logprobs"]["text_offset"] == [0, 1]


def streamed(client: openai.OpenAI, **options: Any) -> tuple[list[dict[str, Any]], Any]:
    """The choices and the usage that the chunks of a stream add up to."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.completions.create(**options):
        usage = chunk.usage or usage
        for part in chunk.choices:
            choice = choices.setdefault(
                part.index,
                {"index": part.index, "text": "", "logprobs": None, "finish_reason": None},
            )
            choice["text"] += part.text
            for name, values in part.logprobs.to_dict().items() if part.logprobs else ():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(name, []).extend(values)  # type: ignore[arg-type]
            choice["finish_reason"] = part.finish_reason or choice["finish_reason"]
    return [choices[index] for index in sorted(choices)], usage


def test_a_stream_adds_up_to_the_plain_answer(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    for seed in range(12):
        adds_up(client, engine, seed)


def adds_up(client: openai.OpenAI, engine: ScriptedEngine, seed: int) -> None:
    rng = random.Random(seed)
    say(engine, rng.choice(["Hello, 你好 🙂 and so on", "A\nB\nSTOP here", "🙂" * 5]))
    engine.batch = rng.choice([1, 3])
    options: dict[str, Any] = {
        "model": "deepseek-r1",
        "prompt": rng.choice([PROMPT, ["One", "🙂两"], [5, 6, 7], [[300, 9], [8]]]),
        "n": rng.choice([1, 3]),
        "echo": rng.random() < 0.6,
        "logprobs": rng.choice([None, 0, 3]),
        "stop": rng.choice([None, ["STOP", "🙂🙂"], "\n"]),
        "max_tokens": rng.choice([1, 4, 50]),
    }
    plain = client.completions.create(**options)
    choices, usage = streamed(client, **options)
    assert choices == [choice.to_dict() for choice in plain.choices], options
    assert usage == plain.usage, options
    assert engine.num_live == 0


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (None, "missing_required_parameter"),
        ("", "invalid_value"),
        ([], "empty_array"),
        ([[]], "empty_array"),
        (["a"] * 129, "array_above_max_length"),
        ([[5]] * 129, "array_above_max_length"),
        (5, "invalid_type"),
        (True, "invalid_type"),
        ({}, "invalid_type"),
        (["a", 5], "invalid_type"),
        ([5, "a"], "invalid_type"),
        ([[5], "a"], "invalid_type"),
        ([[5], 6], "invalid_type"),
        ([True], "invalid_type"),
        ([1.5], "invalid_type"),
        ([-1], "invalid_value"),
        ([10**400], "invalid_value"),
        ([2048], "invalid_value"),
        (["a", ""], "invalid_value"),
        ([[5], [2048]], "invalid_value"),
        ([5] * 512, "context_length_exceeded"),
        (["a", "hello " * 400], "context_length_exceeded"),
        ("hello " * 100_000, "context_length_exceeded"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_prompts_that_are_refused(
    refusing: tuple[str, ScriptedEngine], prompt: object, code: str
) -> None:
    base, engine = refusing
    assert refusal(base, prompt=prompt) == ("prompt", code)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"max_tokens": 0}, ("max_tokens", "integer_below_min_value")),
        ({"max_tokens": -1, "echo": True}, ("max_tokens", "integer_below_min_value")),
        ({"logprobs": 21}, ("logprobs", "integer_above_max_value")),
        ({"logprobs": True}, ("logprobs", "invalid_type")),
        ({"logprobs": -1}, ("logprobs", "integer_below_min_value")),
        ({"best_of": 2}, ("best_of", "unsupported_value")),
        ({"n": 2, "best_of": 1}, ("best_of", "unsupported_value")),
        ({"suffix": 5}, ("suffix", "invalid_type")),
        ({"suffix": "x", "echo": True}, ("echo", "invalid_value")),
        ({"suffix": "x", "prompt": [5]}, ("suffix", "invalid_value")),
        ({"echo": 1}, ("echo", "invalid_type")),
        ({"temperature": 3}, ("temperature", "decimal_above_max_value")),
        ({"add_special_tokens": "no"}, ("add_special_tokens", "invalid_type")),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_fields_that_are_refused(
    refusing: tuple[str, ScriptedEngine], body: dict[str, Any], error: tuple[str, str]
) -> None:
    base, engine = refusing
    assert refusal(base, **body) == error
    assert engine.submitted == []


def test_fields_of_other_clients_are_taken(base: str, engine: ScriptedEngine) -> None:
    say(engine, "!")
    nulls = ("suffix", "max_tokens", "echo", "logprobs", "best_of", "n", "stop", "stream_options")
    for body in (
        dict.fromkeys(nulls),
        {"n": 2, "best_of": 2},
        {"best_of": 1.0, "metadata": {}, "unknown": [1]},
        {"max_completion_tokens": 3},
        {"prompt": [5.0, 6]},
    ):
        answer = ask(base, **body)
        assert answer.status_code == 200, answer.text
    assert engine.submitted[0][1].max_tokens == 16
    assert [params.max_tokens for _, params in engine.submitted][-2] == 3


def test_all_prompts_or_none(tokenizer: Tokenizer) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(queue=2))
    engine = engine_of(state)
    say(engine, "!")
    with serve(state) as base:
        answer = ask(base, prompt=["a"] * 34, n=2)  # 64 run and 2 wait
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("prompt", "invalid_value")
        assert "34 prompts" in error["message"] and "66" in error["message"]
        engine.max_live = 3
        assert ask(base, prompt=["a"] * 4).status_code == 429
        assert engine.submitted == []
        engine.max_live, engine.refuses_after = None, 2
        assert ask(base, prompt=["a"] * 4).status_code == 503
        assert engine.num_live == 0
        engine.refuses_after = None
        assert ask(base, prompt=["a"] * 4).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 9])
def test_a_failure_ends_the_answer(
    base: str, engine: ScriptedEngine, stream: bool, max_tokens: int
) -> None:
    engine.token_ids = []
    engine.fails_with = FinishReason.NOT_FINITE
    answer = ask(base, stream=stream, echo=True, max_tokens=max_tokens)
    if stream:
        answer_text = sse_events(answer.text)[-1]
    else:
        assert answer.status_code == 500
        answer_text = answer.text
    assert json.loads(answer_text)["error"]["code"] == "not_finite"


PREFIXES = ["", "/v1", "/beta", "/v1/v1", "/beta/v1", "//v1"]


def test_every_spelling_of_a_path(base: str, engine: ScriptedEngine) -> None:
    say(engine, "!")
    root = base.removesuffix("/v1")
    messages = [{"role": "user", "content": "hello"}]
    for prefix, end in itertools.product(PREFIXES, ["", "/"]):
        for path, body in (
            ("/completions", {"prompt": "a"}),
            ("/chat/completions", {"messages": messages}),
            ("/engines/deepseek-r1/completions", {"prompt": "a"}),
            ("/engines/deepseek-r1/chat/completions", {"messages": messages}),
        ):
            answer = httpx.post(f"{root}{prefix}{path}{end}", json=body, verify=False)
            assert answer.status_code == 200, (prefix, path, answer.text)
            name = "deepseek-r1" if "engines" in path else "fathom-tiny"
            assert answer.json()["model"] == name
        answer = httpx.get(f"{root}{prefix}/models{end}", verify=False)
        assert answer.status_code == 200
    assert "choices" in post(f"{root}/beta", {"messages": messages}).json()


def test_an_engine_in_the_path_is_a_model(base: str, engine: ScriptedEngine) -> None:
    say(engine, "!")

    def named(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{base}/engines/{path}", json={"prompt": "a", **body}, verify=False)

    for body in ({}, {"model": None}, {"model": "fathom-tiny"}):
        unknown = named("gpt-4/completions", **body)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert named("deepseek-r1/completions", model="fathom-tiny").json()["model"] == "fathom-tiny"
    assert named("deepseek-r1/completions", model=None).json()["model"] == "deepseek-r1"


def test_a_model_whose_name_has_slashes(tokenizer: Tokenizer) -> None:
    name = "deepseek-ai/DeepSeek-R1"
    state = replace(scripted_state(tokenizer), model_names=(name,))
    say(engine_of(state), "!")
    with serve(state) as base:
        for path in (name, name.replace("/", "%2F"), f"{name}/"):
            answer = httpx.get(f"{base}/models/{path}", verify=False)
            assert answer.json()["id"] == name
        unknown = httpx.get(f"{base}/models/deepseek-ai/other", verify=False)
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")
        path = f"{base}/engines/{name}/completions"
        assert httpx.post(path, json={"prompt": "a"}, verify=False).json()["model"] == name
