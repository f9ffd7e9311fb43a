"""Who is let in: a full queue refuses before any work is spent, and encoding leaves others room."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.generating import json_pieces, to_json
from api.limits import Limits
from api.running import MAX_ENCODING, EncodingThreads
from api.sampling_fields import cache_namespace
from api.schemas import parse_chat
from api.state import ServerState
from runtime import ChatPrompt, Tokenizer
from tests.api.scripted import (
    ScriptedEngine,
    engine_of,
    in_background,
    post,
    scripted_state,
    serve,
    wait_until,
)
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


# -- who is encoded next -------------------------------------------------------------------------


class Encodings:
    """Encodings of several keys that end when they are told to."""

    def __init__(self) -> None:
        self.threads = EncodingThreads()
        self.started: list[str] = []
        self.ends: dict[str, threading.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    def ask(self, name: str) -> None:
        """Encode ``name``, whose first letter is its key."""
        end = self.ends[name] = threading.Event()

        def work() -> str:
            self.started.append(name)
            assert end.wait(20)
            return name

        self.tasks[name] = asyncio.create_task(self.threads.run(name[0], 20, work))

    async def end(self, name: str) -> None:
        self.ends[name].set()
        assert await self.tasks[name] == name

    async def wait(self, *names: str) -> None:
        """Until exactly these have started, in order."""
        async with asyncio.timeout(10):
            while len(self.started) < len(names):
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert self.started == list(names)


def test_keys_take_turns_and_none_has_both_threads_while_others_wait() -> None:
    async def run() -> None:
        all_of = Encodings()
        for name in ("a1", "a2", "a3", "a4", "a5", "b1", "b2", "c1"):
            all_of.ask(name)
        await all_of.wait("a1", "a2")
        await all_of.end("a1")
        await all_of.wait("a1", "a2", "b1")
        await all_of.end("a2")  # a has waited as long as c and longer than b
        await all_of.wait("a1", "a2", "b1", "a3")
        await all_of.end("a3")
        await all_of.wait("a1", "a2", "b1", "a3", "c1")
        await all_of.end("b1")
        await all_of.wait("a1", "a2", "b1", "a3", "c1", "b2")
        await all_of.end("b2")
        await all_of.wait("a1", "a2", "b1", "a3", "c1", "b2", "a4")
        await all_of.end("c1")  # only a waits: it may have both
        await all_of.wait("a1", "a2", "b1", "a3", "c1", "b2", "a4", "a5")
        await all_of.end("a4")
        await all_of.end("a5")

    asyncio.run(run())


def test_who_leaves_gives_back_its_turn() -> None:
    async def run() -> None:
        all_of = Encodings()
        for name in ("a1", "b1", "a2", "b2", "c1"):
            all_of.ask(name)
        await all_of.wait("a1", "b1")
        for name in ("a1", "a2", "b2"):  # the thread of a1 goes on and is not free
            all_of.tasks[name].cancel()
        await all_of.wait("a1", "b1")
        await all_of.end("b1")
        await all_of.wait("a1", "b1", "c1")
        all_of.ask("d1")
        await all_of.wait("a1", "b1", "c1")
        all_of.ends["a1"].set()
        await all_of.wait("a1", "b1", "c1", "d1")
        await all_of.end("c1")
        await all_of.end("d1")
        for name in ("e1", "f1", "g1"):
            all_of.ask(name)
        await all_of.wait("a1", "b1", "c1", "d1", "e1", "f1")
        all_of.ends["e1"].set()
        while all_of.threads._waiting:
            await asyncio.sleep(0)
        all_of.tasks["g1"].cancel()  # in the moment in which its turn has come
        for name in ("h1", "i1"):
            all_of.ask(name)
        await all_of.wait("a1", "b1", "c1", "d1", "e1", "f1", "h1")
        await all_of.end("f1")
        await all_of.wait("a1", "b1", "c1", "d1", "e1", "f1", "h1", "i1")
        await all_of.end("h1")
        await all_of.end("i1")

    asyncio.run(run())


def test_a_prompt_waits_for_its_encoding_no_longer_than_for_the_engine(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(queue_seconds=0.3))
    engine_of(state).say("ok")
    encoding = BlockedEncoding(monkeypatch)
    with serve(state) as base:

        def ask() -> None:
            assert post(base, HELLO).status_code == 200

        with in_background(*[ask] * MAX_ENCODING):
            wait_until(lambda: encoding.num_started == MAX_ENCODING)
            response = post(base, HELLO)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "queue_timeout"
            assert int(response.headers["retry-after"]) > 0
            encoding.go_on.set()
        assert encoding.num_started == MAX_ENCODING
        assert state.running.num_encoding == 0
        assert post(base, HELLO).status_code == 200


# -- what can never be served --------------------------------------------------------------------


def test_more_choices_than_ever_fit_are_no_full_queue(tokenizer: Tokenizer) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(queue=2))
    engine = engine_of(state)
    engine.say("ok")
    engine.info = replace(engine.info, max_num_seqs=3)
    with serve(state) as base:
        assert post(base, {**HELLO, "n": 5}).status_code == 200
        response = post(base, {**HELLO, "n": 6})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("n", "invalid_value")
    assert "n is 6" in error["message"] and "5 choices: 3 that run and 2" in error["message"]
    assert len(engine.submitted) == 5


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_hopeless_message_is_refused_unencoded(
    base: str, engine: ScriptedEngine, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the text was encoded")

    monkeypatch.setattr(Tokenizer, "_encode", encode)
    messages = [{"role": role, "content": "\U0001f468\u200d" * 200_000}, *HELLO["messages"]]
    error = post(base, {"messages": messages}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "at least" in error["message"] and "512 tokens" in error["message"]
    assert engine.submitted == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(json_values)
def test_json_in_pieces_is_json(value: Any) -> None:
    whole = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert "".join(json_pieces(value)) == whole
    assert "".join(json_pieces({"a": [to_json(value), 1]})) == f'{{"a":[{whole},1]}}'
