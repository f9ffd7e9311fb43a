"""The requests of Cherry Studio, as measured: models, CORS, chat, its check button.

It is an Electron application, so its requests are sent as bytes instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Served

BRAND = {"HTTP-Referer": "https://cherry-ai.com", "X-Title": "Cherry Studio"}
PAGE = {"Accept": "*/*", "Sec-Fetch-Site": "cross-site", "Accept-Encoding": "gzip, deflate, br"}
OPTION = {"stream_options": {"include_usage": True}}
CHECK = [{"role": "system", "content": "test"}, {"role": "user", "content": "hi"}]


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    keys = {"Authorization": f"Bearer {served.key}", "X-Api-Key": served.key}
    headers = {**keys, **BRAND, **PAGE}
    with httpx.Client(base_url=served.base, headers=headers, timeout=30, verify=False) as client:
        yield client


def chat(messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return {"model": "deepseek-r1", "messages": messages, "stream": True, **OPTION, **options}


def read(client: httpx.Client, body: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(thought, answer, usage) of a stream, read as strictly as its schema."""
    thought = answer = ""
    usages = []
    with client.stream("POST", "/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        assert "content-encoding" not in response.headers
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        assert line.startswith("data: "), "an event line breaks version 1"
        chunk = json.loads(line.removeprefix("data: "))
        assert "error" not in chunk and isinstance(chunk["created"], int)
        if chunk.get("usage"):
            usages.append(chunk["usage"])
        for choice in chunk["choices"]:
            assert None not in choice["delta"].values()
            thought += choice["delta"].get("reasoning_content", "")
            answer += choice["delta"].get("content", "")
    [usage] = usages
    return thought, answer, usage


def test_the_list_of_models_fits_its_schema(client: httpx.Client) -> None:
    models = client.get("/models").json()["data"]
    assert [model["id"] for model in models] == ["fathom-tiny", "deepseek-r1"]
    for model in models:
        assert isinstance(model["created"], int) and isinstance(model["owned_by"], str)


def test_a_wrong_key_is_told_in_words(client: httpx.Client) -> None:
    wrong = {"Authorization": "Bearer sk-wrong", "X-Api-Key": "sk-wrong"}
    response = client.get("/models", headers=wrong)
    error = response.json()["error"]
    assert response.status_code == 401
    assert isinstance(error["code"], str), "a null or a number would hide the message"
    assert "API key" in error["message"]


@pytest.mark.parametrize("base", ["/v1", "", "/v1/", "//v1/"])
def test_every_form_of_its_host_reaches_the_chat(client: httpx.Client, base: str) -> None:
    address = str(client.base_url).removesuffix("/v1/") + base + "/chat/completions"
    body = {**chat(CHECK), "stream": False, "max_tokens": 2}
    response = client.post(address, json=body)
    assert response.status_code == 200, (address, response.text)


def test_a_second_turn_carries_the_first_thought(client: httpx.Client) -> None:
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    thought, answer, usage = read(client, chat(asked, temperature=0))
    assert thought and answer
    said = {"role": "assistant", "content": answer, "reasoning_content": thought}
    again = [*asked, said, {"role": "user", "content": "What is 7 + 5?"}]
    second_thought, second, second_usage = read(client, chat(again, temperature=0))
    assert second and second_thought != thought
    assert second_usage["prompt_tokens"] > usage["prompt_tokens"]
    bare = [*asked, {"role": "assistant", "content": answer}, again[-1]]
    assert (
        read(client, chat(bare, temperature=0))[2]["prompt_tokens"]
        == (second_usage["prompt_tokens"])
    ), "a thought of an earlier turn is no part of the prompt"


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "enabled"}, "reasoning_effort": "high"},
        {"thinking": {"type": "disabled"}},
        {"enable_thinking": True, "thinking_budget": 1000},
        {"chat_template_kwargs": {"thinking": True, "enable_thinking": True}},
        {"reasoning": {"enabled": True, "effort": "high", "exclude": False}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_the_fields_it_adds_for_some_models(client: httpx.Client, fields: dict[str, Any]) -> None:
    thought, answer, _ = read(client, chat(CHECK, temperature=0, max_tokens=16, **fields))
    assert thought or answer


def test_its_check_button_leaves_at_the_first_chunk(client: httpx.Client) -> None:
    for _ in range(70):  # more than the engine runs at once
        body = chat(CHECK, ignore_eos=True, max_tokens=7000)
        with client.stream("POST", "/chat/completions", json=body) as response:
            first = next(line for line in response.iter_lines() if line.startswith("data: "))
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]
    answer = client.post("/chat/completions", json={**chat(CHECK), "stream": False})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("origin", ["null", "file://", "app://cherry", "http://localhost:5173"])
def test_a_page_asks_before_it_sends(served: Served, origin: str) -> None:
    """A browser's preflight has no key; the answer after it, and an error, may be read too."""
    wanted = "authorization,content-type,http-referer,x-api-key,x-title"
    asking = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted,
    }
    with httpx.Client(base_url=served.base, verify=False) as page:
        allowed = page.options("/chat/completions", headers=asking)
        assert allowed.is_success
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert set(wanted.split(",")) <= {
            name.strip().lower()
            for name in allowed.headers["access-control-allow-headers"].split(",")
        }
        key = {"Authorization": f"Bearer {served.key}"}
        for status, keys in ((200, key), (401, {})):
            body = chat(CHECK, max_tokens=2)
            answer = page.post("/chat/completions", json=body, headers={"Origin": origin, **keys})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin


def test_an_application_without_an_origin_needs_no_permission(client: httpx.Client) -> None:
    response = client.post("/chat/completions", json={**chat(CHECK), "stream": False})
    assert response.status_code == 200
    assert "origin" not in response.request.headers
