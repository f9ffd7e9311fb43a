"""A client that leaves frees what the engine held for it at once, streaming or not."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.api.scripted import ScriptedEngine, post, wait_until

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def send_raw(base: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a chat request was sent."""
    address = urlsplit(base)
    assert address.hostname is not None
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection((address.hostname, address.port or 80), timeout=10)
    connection.sendall(head.encode() + data)
    return connection


@pytest.fixture
def slow(engine: ScriptedEngine) -> ScriptedEngine:
    """An engine in the middle of a long answer."""
    engine.say("and so on " * 100)
    engine.seconds_per_token = 0.01
    return engine


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_in_the_middle(base: str, slow: ScriptedEngine, stream: bool, n: int) -> None:
    with send_raw(base, {**HELLO, "stream": stream, "n": n}) as connection:
        wait_until(lambda: slow.num_live == n)
        if stream:
            received = b""
            while received.count(b"data: ") < 5:
                received += connection.recv(4096)
    wait_until(lambda: slow.num_live == 0, seconds=1)
    assert sorted(slow.aborted) == list(range(n))


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_token(base: str, slow: ScriptedEngine, stream: bool) -> None:
    slow.first_token_seconds = 60
    with send_raw(base, {**HELLO, "stream": stream}):
        wait_until(lambda: slow.num_live == 1)
    wait_until(lambda: slow.num_live == 0, seconds=1)
    assert slow.aborted == [0]


def test_a_reader_that_stopped_reading_and_then_leaves(base: str, slow: ScriptedEngine) -> None:
    slow.seconds_per_token = 0
    slow.token_ids = slow.token_ids[:1] * 400
    with send_raw(base, {**HELLO, "stream": True, "n": 8}) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        wait_until(lambda: len(slow.submitted) == 8)
    wait_until(lambda: slow.num_live == 0, seconds=1)
    slow.say("still here")
    assert post(base, HELLO).json()["choices"][0]["message"]["content"] == "still here"


def test_closing_a_stream_of_the_openai_client(client: openai.OpenAI, slow: ScriptedEngine) -> None:
    with client.chat.completions.create(
        model="deepseek-r1", messages=[{"role": "user", "content": "hi"}], stream=True
    ) as stream:
        next(iter(stream))
    wait_until(lambda: slow.num_live == 0, seconds=1)
    assert slow.aborted == [0]


def test_leaving_in_the_middle_of_the_body(base: str, engine: ScriptedEngine) -> None:
    address = urlsplit(base)
    with socket.create_connection((address.hostname, address.port or 80)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
        )
    engine.say("fine")
    assert post(base, HELLO).status_code == 200
    assert len(engine.submitted) == 1


def test_many_leave_at_random_moments(base: str, slow: ScriptedEngine) -> None:
    chance = random.Random(3)
    slow.seconds_per_token = 0.002
    for _ in range(10):
        connections = [
            send_raw(base, {**HELLO, "stream": chance.random() < 0.5, "n": chance.choice([1, 2])})
            for _ in range(8)
        ]
        for connection in connections:
            if chance.random() < 0.5:
                connection.settimeout(chance.random() / 20)
                with contextlib.suppress(TimeoutError):
                    connection.recv(1000)
            connection.close()
    wait_until(lambda: slow.num_live == 0, seconds=5)


def test_a_finished_answer_is_not_aborted(base: str, engine: ScriptedEngine) -> None:
    engine.say("done")
    for stream in (True, False):
        assert post(base, {**HELLO, "stream": stream}).status_code == 200
    assert engine.aborted == []
