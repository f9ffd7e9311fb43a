"""Before it is ready, while it stops, when a key is revoked: what clients are told, and when."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from api.keys import KeyStore
from api.limits import Limits
from api.state import ServerState
from runtime import Tokenizer
from tests.api.scripted import (
    ScriptedEngine,
    engine_of,
    in_background,
    post,
    scripted_state,
    serve,
    serve_until_stopped,
    wait_until,
)

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = {**HELLO, "stream": True}


def get(base: str, path: str) -> httpx.Response:
    return httpx.get(base.replace("/v1", path), verify=False)


@pytest.fixture
def slow(engine: ScriptedEngine) -> ScriptedEngine:
    engine.say("and so on " * 100)
    engine.seconds_per_token = 0.01
    return engine


class Stream:
    """A streamed answer that is read as it comes."""

    def __init__(self, base: str, key: str = "none") -> None:
        self._client = httpx.Client(base_url=base, timeout=20, verify=False)
        headers = {"authorization": f"Bearer {key}"}
        self._opened = self._client.stream(
            "POST", "/chat/completions", json=STREAM, headers=headers
        )
        self._lines = self._opened.__enter__().iter_lines()
        assert next(self._lines).startswith("data: ")

    def rest(self) -> list[str]:
        data = [line.removeprefix("data: ") for line in self._lines if line.startswith("data: ")]
        self._opened.__exit__(None, None, None)
        self._client.close()
        return data


@pytest.mark.parametrize("state_name", ["loading", "restarting", "failing", "stopped"])
def test_health_is_the_process_and_ready_is_the_engine(
    base: str, engine: ScriptedEngine, state_name: str
) -> None:
    assert get(base, "/ready").json() == {"status": "ready", "model": "fathom-tiny"}
    engine.state = state_name
    assert get(base, "/health").json() == {"status": "ok"}
    response = get(base, "/ready")
    body = response.json()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert (body["status"], body["percent"]) == (state_name, 37.5)
    assert state_name in body["phase"]
    assert body["error"]["code"] == "not_ready"


def test_requests_while_the_model_loads_are_told_to_come_back(
    base: str, engine: ScriptedEngine
) -> None:
    engine.state = "loading"
    for response in (post(base, HELLO), get(base, "/v1/models"), get(base, "/v1/models/x")):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "model_loading"
        assert "38 %" in response.json()["error"]["message"]
    engine.state = "ready"
    engine.say("now")
    assert post(base, HELLO).json()["choices"][0]["message"]["content"] == "now"


def test_while_the_engine_is_replaced_requests_wait_for_it(
    base: str, engine: ScriptedEngine
) -> None:
    engine.state = "restarting"
    engine.say("later")
    assert post(base, HELLO).status_code == 200
    assert get(base, "/v1/models").status_code == 200


def test_a_stopping_server_lets_answers_finish_and_admits_nobody(
    state: ServerState, slow: ScriptedEngine
) -> None:
    slow.say("and so on " * 5)
    with serve_until_stopped(state, drain_seconds=20) as served:
        stream = Stream(served.base)
        plain = socket.create_connection(("127.0.0.1", urlsplit(served.base).port or 0))
        with plain:
            # A request that has begun when the server stops, and is complete only then.
            body = json.dumps(HELLO).encode()
            head = (
                f"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            )
            plain.sendall(head.encode() + b"\r\n\r\n" + body[:5])
            wait_until(lambda: slow.num_live == 1)
            served.stop()
            wait_until(lambda: state.running.draining)
            plain.sendall(body[5:])
            answer = plain.makefile("rb").read()
        assert b" 503 " in answer.splitlines()[0]
        assert b"server_draining" in answer
        assert stream.rest()[-1] == "[DONE]"
        served.thread.join(5)
        assert not served.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            get(served.base, "/health")
    assert slow.aborted == []


@pytest.mark.parametrize("hurried", [False, True])
def test_answers_that_outlast_the_drain_or_a_second_signal_end_with_an_error(
    state: ServerState, slow: ScriptedEngine, hurried: bool
) -> None:
    with serve_until_stopped(state, drain_seconds=60 if hurried else 0.2) as served:
        stream = Stream(served.base)
        served.stop()
        if hurried:
            served.stop()
        error = json.loads(stream.rest()[-1])["error"]
        assert (error["code"], error["type"]) == ("server_draining", "server_error")
        served.thread.join(5)
        assert not served.thread.is_alive()
    assert slow.aborted == [0]


def test_a_client_that_reads_nothing_does_not_hold_up_the_end(
    state: ServerState, slow: ScriptedEngine
) -> None:
    slow.seconds_per_token = 0
    slow.token_ids = slow.token_ids[:1] * 400
    with serve_until_stopped(state, drain_seconds=0.1) as served:
        address = urlsplit(served.base)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(("127.0.0.1", address.port))
            body = json.dumps({**STREAM, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
            head = (
                f"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            )
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: len(slow.submitted) == 8)
            served.stop()
            served.thread.join(5)
            assert not served.thread.is_alive()
            assert len(state.running) == 0, "its request ended in order, not with the loop"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore.open(tmp_path / "home" / "keys.db")
    yield store
    store.close()


def revoke(store: KeyStore, name: str) -> None:
    """As another process does: a store is for one thread at a time, and the server has this one."""
    with contextlib.closing(KeyStore.open(store.path)) as other:
        other.revoke(name)


def test_a_revoked_key_ends_its_running_answers_and_no_others(
    tokenizer: Tokenizer, store: KeyStore
) -> None:
    state = replace(scripted_state(tokenizer), keys=store)
    engine = engine_of(state)
    engine.say("and so on " * 25)
    engine.seconds_per_token = 0.01
    keys = [store.create("ann"), store.create("bob"), store.lend()]
    with serve(state) as base:
        ann, bob, lent = (Stream(base, key) for key in keys)
        revoke(store, "ann")
        error = json.loads(ann.rest()[-1])["error"]
        assert error["code"] == "key_revoked"
        assert engine.aborted == [0]
        assert bob.rest()[-1] == lent.rest()[-1] == "[DONE]"


def test_a_plain_answer_of_a_revoked_key_is_a_401(tokenizer: Tokenizer, store: KeyStore) -> None:
    state = replace(scripted_state(tokenizer), keys=store)
    engine = engine_of(state)
    engine.first_token_seconds = 60
    secret = store.create("ann")

    def revoke_later() -> None:
        wait_until(lambda: engine.num_live == 1)
        revoke(store, "ann")

    with serve(state) as base, in_background(revoke_later):
        response = post(base, HELLO, headers={"authorization": f"Bearer {secret}"})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "key_revoked")


def test_a_wrong_key_is_told_before_its_body_came_and_the_connection_ends(
    tokenizer: Tokenizer, store: KeyStore
) -> None:
    state = replace(scripted_state(tokenizer), keys=store, limits=Limits(body_seconds=3600))
    with serve(state) as base:
        client = socket.create_connection(("127.0.0.1", urlsplit(base).port or 0), timeout=10)
        with client:
            client.sendall(
                b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n"
            )
            answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"invalid_api_key" in answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_only_so_much_time(tokenizer: Tokenizer, stream: bool) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(request_seconds=0.3))
    engine = engine_of(state)
    engine.say("and so on " * 100)
    engine.seconds_per_token = 0.05
    with serve(state) as base:
        response = post(base, {**HELLO, "stream": stream})
    last = [line for line in response.text.splitlines() if line][-1].removeprefix("data: ")
    error = json.loads(last)["error"]
    assert error["code"] == "time_limit_exceeded"
    assert "0.3 seconds" in error["message"]
    assert response.status_code == (200 if stream else 500)
    assert engine.num_live == 0
