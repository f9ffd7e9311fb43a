"""Who is let in, how often one may fail, and that a key is seen nowhere but where it was made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from api.app import create_app
from api.auth import MAX_ADDRESSES, Auth, FailureLimit
from api.errors import HttpError
from api.keys import KeyStore
from runtime import ConfigError, Tokenizer
from tests.api.scripted import engine_of, scripted_state

Headers = list[tuple[bytes, bytes]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with contextlib.closing(KeyStore.open(tmp_path / "data" / "keys.db")) as store:
        yield store


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Door:
    """An `Auth` in front of an application that says 200: what a request gets from it."""

    def __init__(self, keys: KeyStore, clock: Clock, failures_per_minute: int = 20) -> None:
        self.auth = Auth(self.application, keys, failures_per_minute, clock=clock)

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry = scope.get("api_key")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": entry.name.encode() if entry else b""})

    def knock(
        self, headers: Headers, *, address: str | None = "10.0.0.1", path: str = "/models"
    ) -> tuple[int, dict[str, str]]:
        """Status, and the headers of an answer of its own."""
        scope = {
            "type": "http",
            "path": path,
            "headers": headers,
            "client": None if address is None else (address, 5),
        }
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was read")

        async def send(message: Any) -> None:
            sent.append(message)

        try:
            asyncio.run(self.auth(scope, receive, send))
        except HttpError as error:
            return error.status, {}
        answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answer


def bearer(secret: str) -> Headers:
    return [(b"authorization", b"Bearer " + secret.encode())]


def test_a_key_has_one_header_one_space_and_20_to_200_visible_characters(store: KeyStore) -> None:
    secret = store.create("me").encode()
    door = Door(store, Clock(), 10_000)
    assert door.knock(bearer(secret.decode()))[0] == 200
    bad = [
        b"Bearer  " + secret,
        b"Bearer\t" + secret,
        b" Bearer " + secret,
        b"Bearer " + secret + b" ",
        b"Bearer " + secret + b"\t",
        b"Bearer " + secret + b"\x00",
        b"Bearer " + secret + b"\xc3\xa9",
        b"Bearer " + secret + b", Bearer " + secret,
        b"Bearer " + secret + b" " + secret,
        b"Bearer" + secret,
        b"Token " + secret,
        secret,
        b"",
    ]
    for value in bad:
        assert door.knock([(b"authorization", value)])[0] == 401, value
    both = bearer(secret.decode())
    assert door.knock(both + both)[0] == 401
    assert door.knock([*both, (b"authorization", b"")])[0] == 401
    asked: list[bytes] = []
    store.authenticate = asked.append  # type: ignore[method-assign,assignment]
    for length in (19, 20, 200, 201):
        door.knock(bearer("x" * length))
    assert [len(each) for each in asked] == [19, 20, 200, 201]


@pytest.mark.parametrize(("length", "is_looked_up"), [(19, 0), (20, 1), (200, 1), (201, 0)])
def test_the_file_is_asked_only_for_what_could_be_a_key(
    store: KeyStore, tmp_path: Path, length: int, is_looked_up: bool
) -> None:
    (tmp_path / "data" / "keys.db").unlink()
    expected = 503 if is_looked_up else 401
    assert Door(store, Clock()).knock(bearer("x" * length))[0] == expected


def test_health_and_readiness_are_open_and_nothing_else(store: KeyStore) -> None:
    door = Door(store, Clock())
    for path in ("/health", "/ready"):
        assert door.knock([], path=path)[0] == 200
    for path in ("/health/x", "/READY", "/", "/openapi.json", "/metrics", "", "/ready\x00"):
        assert door.knock([], path=path)[0] == 401, path


def test_failures_of_one_address_are_limited_and_good_keys_are_not(store: KeyStore) -> None:
    clock = Clock()
    door = Door(store, clock)
    good, wrong = bearer(store.create("me")), bearer("sk-me-00000000-" + "x" * 43)
    assert [door.knock(wrong if i % 2 else [])[0] for i in range(20)] == [401] * 20
    for headers in (wrong, []):
        status, answer = door.knock(headers)
        assert (status, answer["retry-after"]) == (429, "3")
    assert door.knock(good)[0] == 200
    assert door.knock(wrong, address="10.0.0.2")[0] == 401
    assert door.knock(wrong, address=None)[0] == 401
    clock.now += 2.9
    assert door.knock(wrong)[0] == 429
    clock.now += 0.2
    assert [door.knock(wrong)[0] for _ in range(2)] == [401, 429]
    clock.now += 86400
    assert [door.knock(wrong)[0] for _ in range(21)] == [401] * 20 + [429]


def test_a_broken_store_counts_for_no_address(store: KeyStore, tmp_path: Path) -> None:
    door = Door(store, Clock(), 1)
    secret = bearer(store.create("me"))
    (tmp_path / "data" / "keys.db").rename(tmp_path / "elsewhere")
    assert [door.knock(secret)[0] for _ in range(5)] == [503] * 5
    (tmp_path / "elsewhere").rename(tmp_path / "data" / "keys.db")
    assert door.knock(secret)[0] == 200


def test_the_table_of_addresses_is_bounded_and_forgets_the_oldest() -> None:
    limit = FailureLimit(1, Clock())
    for index in range(MAX_ADDRESSES):
        assert limit.add(f"address {index}") == 0
    assert limit.add("address 0") == 60  # now the latest
    assert limit.add("one more") == 0
    assert limit.add("address 0") == 60
    assert limit.add("address 1") == 0, "it was forgotten"
    assert len(limit._buckets) == MAX_ADDRESSES


# -- the whole application -----------------------------------------------------------------------


def test_the_429_is_in_the_envelope_and_says_what_to_do(
    store: KeyStore, tokenizer: Tokenizer
) -> None:
    application = create_app(replace(scripted_state(tokenizer), keys=store))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application, client=("10.0.0.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get("/v1/models") for _ in range(21)]

    *refused, last = asyncio.run(ask())
    assert {response.status_code for response in refused} == {401}
    assert {response.headers["www-authenticate"] for response in refused} == {"Bearer"}
    assert last.status_code == 429
    error = last.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_failed_keys")
    assert f"in {last.headers['retry-after']} s" in error["message"]
    assert 1 <= int(last.headers["retry-after"]) <= 3
    assert last.headers["x-request-id"]


def test_a_key_is_in_no_answer_log_output_or_repr(
    store: KeyStore,
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "httpx")  # the client of this test
    state = replace(scripted_state(tokenizer), keys=store)
    engine_of(state).say("welcome")
    application = create_app(state)
    lasting, lent = store.create("me"), store.lend()
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    answers: list[httpx.Response] = []

    async def use(secret: str, client: httpx.AsyncClient) -> None:
        good = {"authorization": f"Bearer {secret}"}
        url = "/v1/chat/completions"
        for headers in (
            good,
            {"x-api-key": secret},
            {"authorization": secret},
            {"authorization": f"Basic {secret}"},
            {"authorization": f"Bearer {secret} "},
            {"authorization": f"Bearer {secret}", "x-api-key": secret},
        ):
            answers.append(await client.get("/v1/models", headers=headers))
            answers.append(await client.post(url, headers=headers, json=hello))
        answers.append(await client.get(f"/v1/models?api_key={secret}&key={secret}"))
        answers.append(await client.get(f"/v1/nope?api_key={secret}", headers=good))
        answers.append(await client.post(url, headers=good, content=b"{"))
        answers.append(await client.post(url, headers=good, json=hello | {"stream": True}))

    async def session() -> None:
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for secret in (lasting, lent):
                await use(secret, client)
            engine_of(state).submit = None  # type: ignore[method-assign,assignment]
            await use(lasting, client)
            store.revoke("me")
            await use(lasting, client)
            (tmp_path / "data" / "keys.db").write_bytes(b"broken" * 999)
            for secret in (lasting, lent):
                await use(secret, client)

    asyncio.run(session())
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 404, 500, 503}
    seen = [
        *(answer.text + str(answer.headers) for answer in answers),
        caplog.text,
        *(str(vars(record)) for record in caplog.records),
        *capfd.readouterr(),
        repr(store),
        repr(application.state.server),
    ]
    for secret in (lasting, lent):
        random_part = secret[-43:]
        for text in seen:
            assert random_part[:16] not in text
            assert random_part[-16:] not in text


def test_errors_and_reprs_of_the_store_hold_no_secret(store: KeyStore, tmp_path: Path) -> None:
    secret = store.create("me")
    entry = store.authenticate(secret.encode())
    lent = store.authenticate(store.lend().encode())
    assert entry is not None
    assert lent is not None
    texts = [repr(entry), repr(lent), repr(store), str(store.list())]
    calls = (
        lambda: store.create(secret),
        lambda: store.create("me"),
        lambda: store.revoke("sk-" + secret),
        lambda: store.revoke(secret),
        lambda: KeyStore.open(tmp_path / "data"),
    )
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.__cause__ is None
        texts.append(str(caught.value))
    assert all(secret[-43:][:16] not in text and secret[-16:] not in text for text in texts)
