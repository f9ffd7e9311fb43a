"""Who is let in: a full queue refuses before any work is spent, and encoding leaves others room."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from api.schemas import cache_namespace, parse_chat
from api.state import ServerState
from runtime import ChatPrompt, Tokenizer
from tests.api.scripted import ScriptedEngine, in_background, post, wait_until
from tests.api.test_disconnects import send_raw

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


class BlockedEncoding:
    """`Tokenizer.encode_chat` that waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.num_started = 0
        encode = Tokenizer.encode_chat

        def blocked(tokenizer: Tokenizer, *arguments: Any, **options: Any) -> ChatPrompt:
            self.num_started += 1
            assert self.go_on.wait(20)
            return encode(tokenizer, *arguments, **options)

        monkeypatch.setattr(Tokenizer, "encode_chat", blocked)


def test_a_full_queue_refuses_before_the_body_is_parsed(base: str, engine: ScriptedEngine) -> None:
    engine.max_live = 0
    for body in (HELLO, b"{this is not JSON", {**HELLO, "temperature": "hot"}):
        response = post(base, body)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
    engine.max_live = 2
    engine.say("ok")
    assert post(base, {**HELLO, "n": 3}).status_code == 429
    assert engine.submitted == []
    assert post(base, {**HELLO, "n": 2}).status_code == 200


def test_what_is_being_encoded_counts_and_only_two_prompts_are_at_once(
    base: str, state: ServerState, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = BlockedEncoding(monkeypatch)
    engine.say("ok")
    engine.max_live = 5
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(post(base, HELLO).status_code)

    with in_background(*[ask] * 5):
        wait_until(lambda: state.running.num_encoding == 5)
        assert post(base, HELLO).status_code == 429
        assert encoding.num_started == 2
        encoding.go_on.set()
    assert statuses == [200] * 5
    assert post(base, HELLO).status_code == 200


def test_a_client_that_leaves_before_its_turn_is_never_encoded(
    base: str, state: ServerState, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = BlockedEncoding(monkeypatch)
    engine.say("ok")

    def ask() -> None:
        assert post(base, HELLO).status_code == 200

    with in_background(ask, ask):
        wait_until(lambda: encoding.num_started == 2)
        with send_raw(base, HELLO):
            wait_until(lambda: state.running.num_encoding == 3)
        wait_until(lambda: state.running.num_encoding == 2)
        encoding.go_on.set()
    assert encoding.num_started == 2
    assert len(engine.submitted) == 2


def test_cached_tokens_are_shown(base: str, engine: ScriptedEngine) -> None:
    engine.say("ok")
    engine.num_cached = 3
    usage = post(base, {**HELLO, "n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["prompt_cache_hit_tokens"] == 3
    assert usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] - 3
    options = {"stream": True, "stream_options": {"include_usage": True}}
    data = post(base, {**HELLO, "n": 2, **options}).text.split("data: ")
    assert json.loads(data[-2])["usage"] == usage


def test_pages_are_shared_within_one_key_user_and_salt_only(
    base: str, engine: ScriptedEngine
) -> None:
    engine.say("ok")
    fields: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"user": "a"},
        {"user_id": "a"},
        {"user": "a", "cache_salt": "a"},
        {"user": "ab"},
        {"user": "a", "user_id": "b"},
    ]
    for one in fields * 2:
        assert post(base, {**HELLO, **one}).status_code == 200
    first, second = engine.namespaces[: len(fields)], engine.namespaces[len(fields) :]
    assert first == second
    assert len(set(first)) == len(fields)
    assert all(len(name) <= 64 and name.isalnum() for name in first)


def test_keys_share_no_pages() -> None:
    chat = parse_chat({**HELLO, "user": "ann"})
    assert len({cache_namespace(chat, key_id) for key_id in ["1a", "2b", "3c", None]}) == 4


def test_the_priority_reaches_the_engine(base: str, engine: ScriptedEngine) -> None:
    engine.say("ok")
    for fields in ({}, {"priority": -7, "n": 2}, {"priority": 1000}):
        assert post(base, {**HELLO, **fields}).status_code == 200
    assert engine.priorities == [0, -7, -7, 1000]
