"""The newest openai package against the embedded model and the real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import Served

PROMPTS = [
    "hello",
    "介绍一下 Python 编程语言",
    "What is 7 + 5?",
    "Who are you?",
    "Count from 1 to 5.",
]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base, api_key=served.key, max_retries=0) as client:
        yield client


def asked(prompt: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "deepseek-r1", "messages": messages, "temperature": 0, **options}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fathom-tiny", "deepseek-r1"]
    assert client.models.retrieve("fathom-tiny").owned_by == "fathom"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streaming_changes_nothing(client: openai.OpenAI, prompt: str) -> None:
    plain = client.chat.completions.create(**asked(prompt))
    message = plain.choices[0].message
    assert message.content
    text = thought = ""
    usage = None
    options = asked(prompt, stream=True, stream_options={"include_usage": True})
    with client.chat.completions.create(**options) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                thought += getattr(choice.delta, "reasoning_content", None) or ""
    assert (text, thought) == (message.content, message.to_dict()["reasoning_content"])
    assert usage is not None and plain.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usage, name) == getattr(plain.usage, name)
    # The second answer may find the prompt's pages in the cache.
    assert usage.prompt_tokens_details is not None and plain.usage.prompt_tokens_details is not None
    cached = [u.prompt_tokens_details.cached_tokens for u in (plain.usage, usage)]
    assert cached[0] <= cached[1] < plain.usage.prompt_tokens


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**asked("hello")) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    plain = client.chat.completions.create(**asked("hello"))
    assert final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_alone_and_among_others(served: Served) -> None:
    async def answers() -> tuple[str | None, list[str | None]]:
        async with openai.AsyncOpenAI(base_url=served.base, api_key=served.key) as client:

            async def answer(seed: int) -> str | None:
                options = asked("hello", temperature=1.5, top_p=1, seed=seed, max_tokens=40)
                completion = await client.chat.completions.create(**options)
                return completion.choices[0].message.to_json()

            alone = await answer(7)
            return alone, await asyncio.gather(*(answer(seed) for seed in range(12)))

    alone, together = asyncio.run(answers())
    assert together[7] == alone
    assert len(set(together)) > 2


def test_logprobs_of_the_most_likely_token(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**asked("hello", logprobs=True, top_logprobs=3))
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the most likely"
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3


def test_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        client.with_options(api_key="sk-wrong").chat.completions.create(**asked("hello"))
    assert wrong_key.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**asked("hello", model="gpt-5"))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as range_error:
            client.chat.completions.create(**asked("hello", temperature=3, stream=stream))
        assert range_error.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as too_long:
            client.chat.completions.create(**asked("long " * 9000, stream=stream))
        assert too_long.value.code == "context_length_exceeded"
        assert "8192" in too_long.value.message
    with pytest.raises(openai.NotFoundError) as route:
        client.embeddings.create(model="deepseek-r1", input="x")
    assert route.value.code == "unknown_url"


def test_leaving_frees_the_engine_for_the_next(client: openai.OpenAI) -> None:
    long = asked("hello", temperature=1, extra_body={"ignore_eos": True})
    for _ in range(70):  # more than the engine runs at once
        stream = client.chat.completions.create(**long, stream=True)
        next(iter(stream))
        stream.close()
    answer = client.with_options(timeout=20).chat.completions.create(**asked("hello", max_tokens=3))
    assert answer.choices[0].finish_reason == "length"
