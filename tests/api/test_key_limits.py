"""What a key may use: requests at once, tokens a day; set by commands, held by running servers."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.cli import main
from api.keys import KeyEntry, KeyStore
from api.ledger import Ledger, Usage, ledger_path
from api.running import Running
from runtime import ConfigError, Tokenizer
from tests.api.scripted import (
    ScriptedEngine,
    engine_of,
    in_background,
    scripted_state,
    serve,
    wait_until,
)
from tests.api.test_keys import write_version_1

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
EVENING = 20_000 * 86_400 + 86_400 - 100.5  # 100.5 seconds before midnight UTC


@dataclass
class Limited:
    """A server, its store and its ledger, at a time that the test decides."""

    base: str
    engine: ScriptedEngine
    store: KeyStore  # of another process, as it were
    ledger: Ledger
    now: float = EVENING

    def ask(self, secret: str, body: object = HELLO) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        url = f"{self.base}/chat/completions"
        return httpx.post(url, content=content, headers=headers, verify=False, timeout=30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.db"


@pytest.fixture
def limited(tokenizer: Tokenizer, path: Path) -> Iterator[Limited]:
    clock: Callable[[], float] = lambda: limited.now if limited else EVENING  # noqa: E731
    limited: Limited | None = None
    store = KeyStore.open(path)
    ledger = Ledger(ledger_path(path), "fathom-tiny", clock=clock)
    state = replace(scripted_state(tokenizer), keys=store, running=Running(ledger))
    engine_of(state).say("hello")
    with serve(state) as base, contextlib.closing(KeyStore.open(path)) as other:
        limited = Limited(base, engine_of(state), other, ledger)
        yield limited
    ledger.close()
    store.close()


def refusal(answer: httpx.Response) -> tuple[int, str, str, str]:
    error = answer.json()["error"]
    retry = answer.headers.get("retry-after", "")
    return answer.status_code, error["code"], error["type"], retry


def test_requests_at_once(limited: Limited) -> None:
    ann = limited.store.create("ann", max_concurrency=2)
    bob = limited.store.create("bob")
    engine = limited.engine
    engine.say("and so on " * 20)
    engine.seconds_per_token = 0.1
    short = {**HELLO, "max_tokens": 1}

    def wait_and_finish() -> None:
        answer = limited.ask(ann)
        assert answer.json()["usage"]["completion_tokens"] == len(engine.token_ids)

    with in_background(wait_and_finish, wait_and_finish):
        try:
            wait_until(lambda: engine.num_live == 2)
            # before the body is parsed: it is not even JSON
            third = limited.ask(ann, b"{")
            assert refusal(third) == (429, "rate_limit_exceeded", "rate_limit_error", "1")
            assert "2 requests" in third.json()["error"]["message"]
            assert limited.ask(bob, short).status_code == 200  # nobody else is held up
            limited.store.limit("ann", {"max_concurrency": 3})
            assert limited.ask(ann, short).status_code == 200  # at once
            limited.store.limit("ann", {"max_concurrency": 1})
            assert limited.ask(ann, short).status_code == 429
            limited.store.limit("ann", {"max_concurrency": None})
            assert limited.ask(ann, short).status_code == 200
            limited.store.limit("ann", {"max_concurrency": 1})
        finally:
            engine.seconds_per_token = 0.0
    assert limited.ask(ann, short).status_code == 200  # the lower limit cut nobody


def test_a_request_that_fails_or_is_left_gives_its_place_back(limited: Limited) -> None:
    ann = limited.store.create("ann", max_concurrency=1)
    headers = {"authorization": f"Bearer {ann}"}
    assert limited.ask(ann, {**HELLO, "temperature": 9}).status_code == 400
    assert limited.ask(ann, {**HELLO, "model": "gpt-5"}).status_code == 404
    limited.engine.seconds_per_token = 60
    url = f"{limited.base}/chat/completions"
    with (
        httpx.Client(verify=False) as client,
        client.stream("POST", url, json={**HELLO, "stream": True}, headers=headers) as answer,
    ):
        lines = answer.iter_lines()  # dropping it would close the connection
        next(lines)
        assert limited.ask(ann).status_code == 429
    wait_until(lambda: limited.engine.num_live == 0)
    limited.engine.seconds_per_token = 0
    wait_until(lambda: limited.ask(ann).status_code == 200)


def test_tokens_of_a_day(limited: Limited) -> None:
    ann = limited.store.create("ann")
    usage = limited.ask(ann).json()["usage"]
    assert limited.ask(ann).status_code == 200
    used = 2 * usage["total_tokens"]
    limited.store.limit("ann", {"tokens_per_day": used + 1})
    assert limited.ask(ann).status_code == 200  # one token is left; it is not cut
    used += usage["total_tokens"]
    refused = limited.ask(ann, b"{")
    assert refusal(refused) == (429, "tokens_per_day_exceeded", "rate_limit_error", "101")
    assert f"used {used} tokens" in refused.json()["error"]["message"]
    models = httpx.get(f"{limited.base}/models", headers={"x-api-key": ann})
    assert models.status_code == 200  # what costs no tokens is not refused
    limited.store.limit("ann", {"tokens_per_day": used})
    assert limited.ask(ann).status_code == 429
    limited.store.limit("ann", {"tokens_per_day": used + 1})
    assert limited.ask(ann).status_code == 200
    assert limited.ask(ann).status_code == 429
    limited.now += 100
    assert refusal(limited.ask(ann))[3] == "1"
    limited.now += 1
    assert limited.ask(ann).status_code == 200  # the next day


def test_tokens_used_at_another_server_count(limited: Limited, path: Path) -> None:
    ann = limited.store.create("ann", tokens_per_day=1000)
    assert limited.ask(ann).status_code == 200
    other = Ledger(ledger_path(path), "large", clock=lambda: EVENING)
    other.add(ann.split("-")[2], Usage(1, 900, 0, 100))
    other.close()
    limited.ledger.write()  # as its thread does every second
    assert limited.ask(ann).status_code == 429


def test_tokens_count_while_they_come(limited: Limited) -> None:
    ann = limited.store.create("ann", tokens_per_day=len_of_prompt(limited) + 5)
    limited.engine.say("and so on " * 20)
    limited.engine.seconds_per_token = 0.02
    statuses: list[int] = []

    def long_one() -> None:
        answer = limited.ask(ann)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] > 40  # under way, and not cut

    def refused_meanwhile() -> bool:
        statuses.append(limited.ask(ann, b"{").status_code)
        return statuses[-1] == 429 and limited.engine.num_live == 1

    with in_background(long_one):
        wait_until(lambda: limited.engine.num_live == 1)
        wait_until(refused_meanwhile)


def len_of_prompt(limited: Limited) -> int:
    secret = limited.store.create("measure")
    return int(limited.ask(secret).json()["usage"]["prompt_tokens"])


# -- the store -----------------------------------------------------------------------------------


VERSION_2 = """
ALTER TABLE keys ADD COLUMN expires_at INTEGER;
ALTER TABLE keys ADD COLUMN last_used_day INTEGER;
UPDATE keys SET expires_at = 4000000000, last_used_day = 12345;
PRAGMA user_version = 2;
"""


@pytest.mark.parametrize("version", [1, 2])
def test_older_stores_get_their_limits(path: Path, version: int) -> None:
    secret = "sk-old-00000000-" + "a" * 43
    write_version_1(path, {secret: None})
    if version == 2:
        with contextlib.closing(sqlite3.connect(path)) as old:
            old.executescript(VERSION_2)
    expires_at, used = (4_000_000_000, 12_345) if version == 2 else (None, None)
    kept = KeyEntry("00000000", "old", 1_700_000_000, None, expires_at, used, None, None)
    with contextlib.closing(KeyStore.open(path)) as store:
        assert store.list() == [kept]
        assert store.authenticate(secret.encode()) == kept
        store.limit("00000000", {"max_concurrency": 4})
    with contextlib.closing(KeyStore.open(path)) as store:
        (entry,) = store.list()
        assert (entry.max_concurrency, entry.tokens_per_day) == (4, None)
    with contextlib.closing(sqlite3.connect(path)) as again:
        assert again.execute("PRAGMA user_version").fetchone() == (3,)


def test_limits_of_keys_that_are_not_there(path: Path) -> None:
    with contextlib.closing(KeyStore.open(path)) as store:
        store.create("ann")
        store.revoke("ann")
        for name in ("ann", "bob", "x" * 99, ""):
            with pytest.raises(ConfigError, match="no active key"):
                store.limit(name, {"max_concurrency": 1})


# -- the commands --------------------------------------------------------------------------------


def test_the_commands_set_show_and_lift_limits(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATHOM_HOME", str(path.parent))

    def fathom(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fathom", "keys", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out + captured.err

    def limits() -> tuple[int | None, int | None]:
        with contextlib.closing(KeyStore.open(path)) as store:
            (entry,) = store.list()
            return entry.max_concurrency, entry.tokens_per_day

    assert fathom("create", "ann", "--max-concurrency", "2", "--tokens-per-day", "1000000")[0] == 0
    assert limits() == (2, 1_000_000)
    _, listed = fathom("list")
    assert listed.splitlines()[1].endswith(
        "active, at most 2 at once, at most 1,000,000 tokens a day"
    )
    assert fathom("limit", "ann", "--max-concurrency", "none") == (0, "ann: any number at once.\n")
    assert limits() == (None, 1_000_000)
    code, text = fathom("limit", "ann", "--max-concurrency", "8", "--tokens-per-day", "5")
    assert (code, text) == (0, "ann: at most 8 at once, at most 5 tokens a day.\n")
    assert limits() == (8, 5)
    for wrong in ("0", "-1", "1.5", "x", "", "9" * 17, "1e3"):
        code, text = fathom("limit", "ann", f"--tokens-per-day={wrong}")
        assert code == 2 and text.count("\n") == 1, wrong
        assert "--tokens-per-day" in text and "between 1 and" in text
    assert fathom("create", "bob", "--max-concurrency", "0")[0] == 2
    assert limits() == (8, 5)  # and there is no bob
    code, text = fathom("limit", "ann")
    assert code == 2 and "nothing to change" in text
    assert fathom("limit", "carl", "--tokens-per-day", "5")[0] == 2
