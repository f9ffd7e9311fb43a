"""openai 0.28.1, the client of the provider's document, against the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Served
from tests.clients.environments import ALL

SETUP = """\
import openai
openai.api_key = '{key}'
openai.api_base = '{base}'
"""

DOCUMENT = """\
def chat_with_gpt(prompt):
    try:
        response = openai.ChatCompletion.create(
            model="deepseek-r1",
            messages=[
                {"role": "system", "content": "你是一个知识渊博的助手。"},
                {"role": "user", "content": prompt}
            ]
        )
        message = response.choices[0].message.content
        return message
    except Exception as e:
        print(f"发生错误: {e}")
        return None
prompt = "介绍一下 Python 编程语言"
result = chat_with_gpt(prompt)
if result:
    print("模型回复:")
    print(result)
"""

STREAM = """\
import json
asked = dict(model="deepseek-r1", temperature=0, messages=[{"role": "user", "content": "hello"}])
plain = openai.ChatCompletion.create(**asked)
chunks = list(openai.ChatCompletion.create(stream=True, **asked))
assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
print(json.dumps({
    "plain": plain.choices[0].message.content,
    "thought": plain.choices[0].message.reasoning_content,
    "streamed": "".join(chunk.choices[0].delta.get("content", "") for chunk in chunks),
    "streamed_thought": "".join(
        chunk.choices[0].delta.get("reasoning_content", "") for chunk in chunks
    ),
    "finish_reason": chunks[-1].choices[0].finish_reason,
    "models": [model.id for model in openai.Model.list().data],
}))
"""

ERRORS = """\
import json
def error_of(**changes):
    asked = dict(model="deepseek-r1", messages=[{"role": "user", "content": "hello"}])
    try:
        openai.ChatCompletion.create(**{**asked, **changes})
    except openai.error.OpenAIError as error:
        body = error.json_body["error"]  # the client's own AuthenticationError has no code
        return [type(error).__name__, error.http_status, body["code"], body["param"]]
print(json.dumps([
    error_of(api_key="sk-wrong"),
    error_of(model="gpt-5"),
    error_of(temperature=3),
    error_of(temperature=3, stream=True),
]))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    client = ALL["openai-0.28"]
    client.make()
    return client.interpreter


def run(python: Path, served: Served, script: str) -> str:
    """What the script prints; its base and key are the server's."""
    setup = SETUP.format(key=served.key, base=served.base)
    result = subprocess.run(
        [python, "-"],
        input=setup + script,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONUTF8": "1", "NO_PROXY": "127.0.0.1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_documents_example_prints_an_answer(python: Path, served: Served) -> None:
    title, answer = run(python, served, DOCUMENT).split("\n", 1)
    assert title == "模型回复:"
    assert answer.strip()


def test_stream_and_plain_answer(python: Path, served: Served) -> None:
    seen: dict[str, Any] = json.loads(run(python, served, STREAM))
    assert seen["plain"] and seen["thought"]
    assert seen["streamed"] == seen["plain"]
    assert seen["streamed_thought"] == seen["thought"]
    assert seen["finish_reason"] == "stop"
    assert seen["models"] == ["fathom-tiny", "deepseek-r1"]


def test_error_classes(python: Path, served: Served) -> None:
    wrong_value = ["InvalidRequestError", 400, "decimal_above_max_value", "temperature"]
    assert json.loads(run(python, served, ERRORS)) == [
        ["AuthenticationError", 401, "invalid_api_key", None],
        ["InvalidRequestError", 404, "model_not_found", "model"],
        wrong_value,
        wrong_value,
    ]
