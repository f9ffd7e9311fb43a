"""The key store, and who gets past it."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from api.keys import KeyStore, default_path
from runtime import ConfigError, Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, scripted_state, serve


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    store = KeyStore.open(path)
    yield store
    store.close()


def test_a_key_lives_from_create_to_revoke(store: KeyStore, path: Path) -> None:
    secret = store.create("open-webui")
    match = re.fullmatch(r"sk-open-webui-([0-9a-f]{8})-[\w-]{43}", secret)
    assert match is not None
    entry = store.authenticate(secret.encode())
    assert entry is not None
    assert (entry.name, entry.public_id, entry.revoked_at) == ("open-webui", match[1], None)
    assert store.list() == [entry]
    for wrong in (secret[:-1], secret + "A", secret.upper(), secret.replace("webui", "web"), ""):
        assert store.authenticate(wrong.encode()) is None
    assert store.authenticate("ключ-ключ-ключ-ключ-ключ".encode()) is None
    other = KeyStore.open(path)  # as another process would
    other.revoke("open-webui")
    other.close()
    assert store.authenticate(secret.encode()) is None
    (revoked,) = store.list()
    assert revoked.revoked_at is not None


def test_names(store: KeyStore) -> None:
    secret = store.create("a.b_c-D9")
    for bad in ("", "-a", "a b", "x" * 33, "ключ", "a/b", "a\n", "'; DROP TABLE keys; --"):
        with pytest.raises(ConfigError, match="not allowed"):
            store.create(bad)
    with pytest.raises(ConfigError, match="already is a key"):
        store.create("a.b_c-D9")
    with pytest.raises(ConfigError, match="no active key 'nobody'"):
        store.revoke("nobody")
    first, second = store.create("by-id"), store.list()[-1].public_id
    store.revoke(second)
    assert store.authenticate(first.encode()) is None
    with pytest.raises(ConfigError, match="no active key"):
        store.revoke(second)
    store.create("by-id")  # a revoked name is free again
    assert store.authenticate(secret.encode()) is not None


def test_the_file_holds_digests_and_is_ours_alone(store: KeyStore, path: Path) -> None:
    secret = store.create("me")
    files = list(path.parent.iterdir())
    assert len(files) >= 2, "the write-ahead log is beside it"
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert secret[-43:].encode() not in file.read_bytes()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_store_that_others_can_read_is_refused(path: Path) -> None:
    KeyStore.open(path).close()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        KeyStore.open(path)
    path.chmod(0o600)
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match=f"chmod 700 {path.parent}"):
        KeyStore.open(path)


def test_a_store_that_is_damaged_or_not_a_file_is_refused(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    path.write_bytes(b"this is not a database, not at all" * 99)
    with pytest.raises(ConfigError, match="not a usable key store"):
        KeyStore.open(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(ConfigError, match="cannot be opened"):
        KeyStore.open(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be opened"):
        KeyStore.open(path)
    path.rmdir()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="newer version"):
        KeyStore.open(path)


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FATHOM_HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / "keys.db"
    monkeypatch.delenv("FATHOM_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path() == tmp_path / "data" / "fathom" / "keys.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "share" / "fathom" / "keys.db"


# -- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def keyed(store: KeyStore, tokenizer: Tokenizer) -> Iterator[tuple[str, str, ScriptedEngine]]:
    """A server that wants a key: its address, a key, and the engine behind it."""
    state = replace(scripted_state(tokenizer), keys=store)
    engine_of(state).say("welcome")
    with serve(state) as base:
        yield base, store.create("tester"), engine_of(state)


Keyed = tuple[str, str, ScriptedEngine]


def test_ways_to_send_a_key(keyed: Keyed) -> None:
    base, secret, _ = keyed
    good = [
        {"authorization": f"Bearer {secret}"},
        {"authorization": f"bEaReR {secret}"},
        {"x-api-key": secret},
        {"authorization": f"Bearer {secret}", "x-api-key": "whatever"},
    ]
    for headers in good:
        assert httpx.get(f"{base}/models", headers=headers).status_code == 200
    missing = httpx.get(f"{base}/models")
    assert missing.json()["error"]["code"] == "missing_api_key"
    bad: list[list[tuple[str, str]]] = [
        [("authorization", f"Basic {secret}")],
        [("authorization", secret)],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {secret}x")],
        [("authorization", "Bearer " + "x" * 10_000)],
        [("authorization", f"Bearer {secret}"), ("authorization", f"Bearer {secret}")],
        [("authorization", "Bearer wrong"), ("x-api-key", secret)],
        [("x-api-key", secret), ("x-api-key", secret)],
    ]
    for pairs in bad:
        response = httpx.get(f"{base}/models", headers=pairs)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert secret not in response.text
    assert httpx.get(f"{base}/models?api_key={secret}").status_code == 401


def test_the_key_comes_before_everything_else(keyed: Keyed) -> None:
    base, secret, engine = keyed
    for method, path in (("GET", "/nope"), ("DELETE", "/models"), ("POST", "/chat/completions")):
        assert httpx.request(method, base + path, content=b"{").status_code == 401
    with socket.create_connection(("127.0.0.1", urlsplit(base).port or 80), timeout=5) as raw:
        raw.sendall(b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 401"), "the body was not waited for"
    assert engine.submitted == []
    assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(base.replace("/v1", "/health/")).status_code == 200
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{base}/nope", headers=headers).status_code == 404


def test_with_keys_every_origin_is_answered(keyed: Keyed) -> None:
    base, secret, _ = keyed
    for origin in ("null", "file://", "app://x", "https://chat.example"):
        headers = {"origin": origin, "host": "my-server.lan"}
        preflight = httpx.options(f"{base}/chat/completions", headers=headers)
        refused = httpx.get(f"{base}/models", headers=headers)
        good = httpx.get(f"{base}/models", headers={**headers, "authorization": f"Bearer {secret}"})
        assert [r.status_code for r in (preflight, refused, good)] == [204, 401, 200]
        for response in (preflight, refused, good):
            assert response.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in response.headers


def test_a_revoked_key_is_refused_at_once(keyed: Keyed, path: Path) -> None:
    base, secret, _ = keyed
    with openai.OpenAI(base_url=base, api_key=secret, max_retries=0) as client:
        assert client.models.list().data
        other = KeyStore.open(path)
        other.revoke("tester")
        other.close()
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("damage", ["overwrite", "remove", "replace"])
def test_a_broken_store_lets_nobody_in(keyed: Keyed, path: Path, damage: str) -> None:
    base, secret, _ = keyed
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{base}/models", headers=headers).status_code == 200
    if damage == "overwrite":
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE keys")
        connection.close()
    else:
        path.unlink()
    if damage == "replace":
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    response = httpx.get(f"{base}/models", headers=headers)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "auth_unavailable"
    assert "retry-after" in response.headers
