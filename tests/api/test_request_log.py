"""The log: one line per request, without anything private, whatever standard error is worth."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.keys import KeyStore
from api.limits import Limits
from api.output import JsonFormatter, LogHandler, Output, TextFormatter
from runtime import FinishReason, Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, post, scripted_state, serve, wait_until
from tests.api.test_disconnects import send_raw

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "my secret plan"}]}


class Lines(logging.Handler):
    """The fields of each request's line."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def fields(self, count: int) -> list[dict[str, Any]]:
        """Those of ``count`` requests; waits, since a line comes after the answer."""
        wait_until(lambda: len(self.records) >= count)
        assert len(self.records) == count
        return [record.fields for record in self.records]  # type: ignore[attr-defined]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger = logging.getLogger("fathom.requests")
    handler = Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


def test_a_flood_is_not_one_of_lines(tokenizer: Tokenizer, lines: Lines, tmp_path: Path) -> None:
    store = KeyStore.open(tmp_path / "home" / "keys.db")
    limits = Limits(failed_keys=2)
    state = replace(scripted_state(tokenizer), keys=store, limits=limits)
    with serve(state) as base:
        statuses = [httpx.get(f"{base}/{'x' * 2000}").status_code for _ in range(20)]
        logged = lines.fields(statuses.count(401))
    store.close()
    assert 2 <= statuses.count(401) < 10 < statuses.count(429)
    assert {len(line["path"]) for line in logged} == {256}


def test_one_line_per_request_with_its_counts_times_and_outcome(
    tokenizer: Tokenizer, lines: Lines, tmp_path: Path
) -> None:
    store = KeyStore.open(tmp_path / "home" / "keys.db")
    secret = store.create("ann")
    state = replace(scripted_state(tokenizer), keys=store)
    engine = engine_of(state)
    engine.say("ok")
    engine.num_cached = 2
    key = {"authorization": f"Bearer {secret}"}
    with serve(state) as base:
        for stream in (False, True):
            post(base, {**HELLO, "stream": stream}, headers={**key, "x-request-id": "mine"})
        for path in ("/health", "/ready", "/v1/ready"):
            assert httpx.get(base.replace("/v1", path)).status_code == 200
        post(base, HELLO)
        post(base, {**HELLO, "n": 99}, headers=key)
        httpx.get(f"{base}/models", headers={"host": "evil.example"})
        httpx.get(f"{base}/mod%0Aels?key=sk-no", headers=key)
        logged = lines.fields(6)
    store.close()
    for good in logged[:2]:
        assert good["id"] == "mine"
        assert good["key"] == secret.split("-")[2]
        assert (good["method"], good["path"]) == ("POST", "/v1/chat/completions")
        assert (good["status"], good["outcome"]) == (200, "ok")
        assert good["prompt_tokens"] == len(engine.submitted[0][0])
        assert (good["cached_tokens"], good["completion_tokens"]) == (2, len(engine.token_ids))
        assert 0 <= good["queue_ms"] <= good["ttft_ms"] <= good["total_ms"] < 20_000
    rest = [(line["status"], line["outcome"], line["prompt_tokens"]) for line in logged[2:]]
    assert rest == [
        (401, "missing_api_key", None),
        (400, "integer_above_max_value", None),
        (421, "unknown_host", None),
        (404, "unknown_url", None),
    ]
    for formatter in (TextFormatter(), JsonFormatter()):
        text = [formatter.format(record) for record in lines.records]
        assert not any("\n" in line for line in text)
        whole = "".join(text)
        assert "secret" not in whole and secret[-43:] not in whole and "sk-no" not in whole
    assert json.loads(JsonFormatter().format(lines.records[0]))["completion_tokens"] > 0


def test_how_answers_that_went_wrong_end(base: str, engine: ScriptedEngine, lines: Lines) -> None:
    engine.say("half", stop=False)
    engine.fails_with = FinishReason.NOT_FINITE
    for stream in (False, True):
        post(base, {**HELLO, "stream": stream})
        engine.seconds_per_token = 0.01
    engine.say("and so on " * 100)
    for stream in (False, True):
        num_before = len(engine.submitted)
        with send_raw(base, {**HELLO, "stream": stream}):
            wait_until(lambda: len(engine.submitted) > num_before)  # noqa: B023 - used at once
            time.sleep(0.1)
    logged = lines.fields(4)
    assert [(line["status"], line["outcome"]) for line in logged] == [
        (500, "not_finite"),
        (200, "not_finite"),
        (None, "client_gone"),
        (200, "client_gone"),
    ]
    assert all(line["completion_tokens"] > 0 for line in logged)


def test_a_client_cannot_forge_or_flood_a_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": 'a status=200\n"b"', "id": "x" * 10_000, "key": None, "status": 404}
    line = TextFormatter().format(record)
    assert line.count("\n") == 0
    assert line.endswith("key=- status=404")
    assert r'path="a status=200\n\"b\""' in line
    assert len(line) < 5000
    entry = json.loads(JsonFormatter().format(record))
    assert entry["path"] == 'a status=200\n"b"'
    assert len(entry["id"]) < 5000


def test_an_output_that_nobody_reads_holds_up_nobody_and_counts_what_is_lost() -> None:
    reader, writer = os.pipe()
    output = Output(max_waiting=20)
    with os.fdopen(writer, "w") as pipe:
        handler = LogHandler(output, pipe)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger("fathom")
        logger.addHandler(handler)
        try:
            for number in range(300):
                logger.warning("%d %s", number, "x" * 4000)
            assert output.num_dropped > 200
            started = time.monotonic()
            output.close(0.05)
            assert time.monotonic() - started < 5
            with os.fdopen(reader, "rb") as read_end:  # now somebody reads
                text = b""
                while b"lines were lost" not in text:
                    text += os.read(read_end.fileno(), 65536)
                assert text.startswith(b"0 xxx")
        finally:
            logger.removeHandler(handler)
            output.put(lambda: None)


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_an_output_that_is_gone_is_no_reason_to_stop() -> None:
    output = Output()
    done = threading.Event()
    broken, closed = Broken(), io.StringIO()
    closed.close()

    def leave() -> None:
        raise SystemExit(1)  # what rich makes of a broken pipe

    for stream in (broken, closed, None):
        handler = LogHandler(output, stream)
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "hello", None, None))
    output.put(leave)
    output.put(done.set)
    assert done.wait(10)
    output.close()
