"""Clients in environments of their own against the embedded model: `pytest -m clients`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Served, client_says, environment
from tests.clients.environments import InstallError
from tests.clients.open_webui import SCREENSHOTS, browse, find_chromium

pytestmark = pytest.mark.clients

MODELS = ["fathom-tiny", "deepseek-r1"]
TOLD = "The tool has answered"  # how the embedded model goes on after a tool's result
REFUSED = [
    [401, "invalid_api_key", None],
    [404, "model_not_found", "model"],
    [400, "decimal_above_max_value", "temperature"],
    [400, "decimal_above_max_value", "temperature"],
]


def assert_sum(parsed: Any) -> None:
    assert parsed["first"] in (7, 8, 9) and parsed["second"] in (5, 6), parsed


def test_openai_python(served: Served) -> None:
    said = client_says("openai", "openai_client.py", served)
    assert said["models"] == MODELS
    content, thought, reason = said["plain"]
    assert content and thought and reason == "stop"
    assert said["streamed"] == said["plain"]
    assert said["kinds"] == ["chunk", "content.delta", "content.done"]
    assert said["async"] == [content, content]
    tools = said["tools"]
    assert (tools["finish_reason"], tools["content"]) == ("tool_calls", None)
    [[call_id, name, arguments]] = tools["calls"]
    assert call_id.startswith("call_") and name == "Weather"
    assert arguments["city"] in ("Paris", "Rome") and arguments["days"] in (1, 2, 3)
    assert tools["streamed"] == [[name, arguments]]
    assert tools["after"].startswith(TOLD)
    for parsed in (said["parsed"], said["parsed_stream"]):
        assert_sum(parsed)
        assert isinstance(parsed["exact"], bool)


def test_openai_node(served: Served) -> None:
    said = client_says("openai-node", "openai_node.mjs", served)
    assert said["models"] == MODELS
    content, thought, reason = said["plain"]
    assert content and thought and reason == "stop"
    assert said["streamed"] == said["plain"]
    assert said["helper"] == content
    assert said["total_tokens"] > 10
    assert_sum(said["parsed"])
    tools = said["tools"]
    assert tools["finish_reason"] == "tool_calls"
    [call] = tools["calls"]
    assert call["function"]["arguments"] in ('{"city": "Paris"}', '{"city": "Rome"}')
    assert [each["function"] for each in tools["streamed"]] == [call["function"]]
    assert tools["after"].startswith(TOLD)
    names = ["AuthenticationError", "NotFoundError", "BadRequestError", "BadRequestError"]
    assert said["errors"] == [[name, *error] for name, error in zip(names, REFUSED, strict=True)]
    assert said["afterLeaving"] == "length"


def test_the_ai_sdk(served: Served) -> None:
    said = client_says("ai-sdk", "ai_sdk.mjs", served)
    content, thought, reason, total = said["plain"]
    assert content and thought and reason == "stop" and total > 10
    assert said["streamed"] == said["plain"]
    assert {"reasoning-delta", "text-delta", "finish"} <= set(said["kinds"])
    tools = said["tools"]
    assert tools["cities"] in (["Paris"], ["Rome"])
    assert tools["steps"] == ["tool-calls", "stop"]
    assert tools["text"].startswith(TOLD)
    assert tools["streamed"] == [tools["cities"], "tool-calls"]
    assert [error[:2] for error in said["errors"]] == [
        ["AI_APICallError", 401],
        ["AI_APICallError", 404],
        ["AI_APICallError", 400],
    ]
    words = ["API key", "'gpt-5' does not exist", "between 0 and 2"]
    assert all(word in error[2] for word, error in zip(words, said["errors"], strict=True))
    assert said["afterLeaving"] == "length"


def test_langchain(served: Served) -> None:
    said = client_says("langchain", "langchain_client.py", served)
    assert said["plain"] and said["streamed"] == said["plain"]
    counts = ("input_tokens", "output_tokens", "total_tokens")
    usages = [[said[usage][name] for name in counts] for usage in ("usage", "streamed_usage")]
    assert usages[0] == usages[1] and said["num_usages"] == 1
    assert said["usage"]["output_token_details"]["reasoning"] > 0
    assert said["metadata"]["finish_reason"] == "stop"
    assert said["metadata"]["model_name"] == "deepseek-r1"
    assert_sum(said["json_schema"])
    assert_sum(said["function_calling"])
    [[name, arguments]] = said["calls"]
    assert name == "weather" and arguments["city"] in ("Paris", "Rome")
    assert said["invalid_calls"] == []
    assert said["after"].startswith(TOLD)
    assert said["wrong_key"] == "invalid_api_key"


def test_litellm(served: Served) -> None:
    said = client_says("litellm", "litellm_client.py", served)
    for provider in ("openai", "hosted_vllm"):
        seen = said[provider]
        content, thought = seen["plain"]
        assert content and thought
        assert seen["streamed"] == seen["plain"]
        assert seen["finish_reasons"] == ["stop", "stop"]
        assert seen["usage"][0] == seen["usage"][1]
        assert seen["errors"] == [
            ["AuthenticationError", 401],
            ["NotFoundError", 404],
            ["BadRequestError", 400],
        ]


@pytest.mark.timeout(600)
def test_open_webui(served: Served, tmp_path: Path) -> None:
    environment("open-webui")
    environment("browser")
    try:
        find_chromium()
    except InstallError as error:
        pytest.fail(str(error), pytrace=False)
    seen = browse(served, tmp_path, SCREENSHOTS)
    assert seen["signIn"] == 0, "it asked for a password"
    assert seen["models"] == MODELS
    assert "7 + 5 = 12." in seen["folded"] and "Thought for" in seen["folded"]
    assert "Ones: 7 + 5" not in seen["folded"]
    assert "Ones: 7 + 5" in seen["unfolded"]
    assert seen["outside"] == []
