"""`/stats`: the figures of now, in exactly the form that the page and `fathom top` read."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.app import ServerState
from api.keys import KeyStore
from runtime import Tokenizer
from tests.api.json_schema import mistake
from tests.api.scripted import (
    ScriptedEngine,
    engine_of,
    in_background,
    post,
    scripted_state,
    serve,
    wait_until,
)

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
KEYS = [
    *("model", "uptime_seconds", "num_running", "num_waiting", "num_pages", "num_free_pages"),
    *("num_cached_pages", "prompt_tokens_total", "cached_tokens_total", "generation_tokens_total"),
    *("tokens_per_second", "requests_total", "restarts", "ttft_seconds_p50", "requests"),
]


def stats(base: str, **headers: str) -> dict[str, Any]:
    answer = httpx.get(f"{base}/stats", headers=headers, verify=False)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_a_server_at_rest(base: str, state: ServerState) -> None:
    found = stats(base)
    assert list(found) == KEYS
    assert found["uptime_seconds"] < 60
    del found["uptime_seconds"]
    assert found == {
        "model": "fathom-tiny",
        **dict.fromkeys(("num_running", "num_waiting", "num_cached_pages", "restarts"), 0),
        "num_pages": 1024,
        "num_free_pages": 1024,
        **dict.fromkeys([key for key in KEYS if key.endswith("tokens_total")], 0),
        "tokens_per_second": 0,
        "requests_total": {},
        "ttft_seconds_p50": None,
        "requests": [],
    }
    assert httpx.get(base.replace("/v1", "/stats")).json().keys() == set(KEYS)


def test_requests_under_way_and_over(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = KeyStore.open(tmp_path / "home" / "keys.db")
    secret = store.create("ann")
    state = replace(scripted_state(tokenizer), keys=store)
    engine = engine_of(state)
    engine.say("and so on " * 20)
    engine.seconds_per_token = 0.01
    engine.num_cached = 2
    key = {"authorization": f"Bearer {secret}"}
    seen: list[dict[str, Any]] = []

    def ask(request_id: str) -> None:
        post(base, HELLO, headers={**key, "x-request-id": request_id}, timeout=30)

    def two_grow() -> bool:
        seen.append(stats(base, **key))
        return sum(row["completion_tokens"] > 2 for row in seen[-1]["requests"]) == 2

    with serve(state) as base:
        assert httpx.get(f"{base}/stats").status_code == 401
        with in_background(lambda: ask("one"), lambda: ask("two")):
            wait_until(two_grow)
        wait_until(lambda: stats(base, **key)["requests_total"] == {"ok": 2})
        after = stats(base, **key)
        document = httpx.get(f"{base}/openapi.json", headers=key).json()
    store.close()
    during = seen[-1]
    num_prompt = len(engine.submitted[0][0])
    assert {row["id"] for row in during["requests"]} == {"one", "two"}
    for row in during["requests"]:
        assert row["key_id"] == secret.split("-")[2]
        assert row["prompt_tokens"] == num_prompt
        assert 2 < row["completion_tokens"] < len(engine.token_ids)
        assert 0 < row["seconds"] < 30
    arrived = [row["seconds"] for row in during["requests"]]
    assert arrived == sorted(arrived, reverse=True)  # the oldest first
    assert during["num_running"] == 2
    assert during["tokens_per_second"] > 0
    assert after["requests"] == []
    assert after["prompt_tokens_total"] == 2 * num_prompt
    assert after["cached_tokens_total"] == 4
    assert after["generation_tokens_total"] == 2 * len(engine.token_ids)
    assert 0 < after["ttft_seconds_p50"] < 30
    for found in (during, after):
        schema = {"$ref": "#/components/schemas/Stats"}
        assert mistake(document, schema, found) is None


def test_polling_is_not_counted_as_requests(base: str) -> None:
    for _ in range(3):
        stats(base)
        httpx.get(f"{base}/models")
    assert stats(base)["requests_total"] == {}


def test_a_slow_engine_is_shown_as_it_was(
    base: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.counts = {"num_free_pages": 1000, "num_cached_pages": 7}
    assert stats(base)["num_free_pages"] == 1000

    async def never() -> dict[str, int]:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(engine, "stats", never)
    found = stats(base)
    assert (found["num_free_pages"], found["num_cached_pages"]) == (1000, 7)
    engine.state = "restarting"
    monkeypatch.undo()
    assert stats(base)["num_free_pages"] == 1024  # a dead engine holds nothing
