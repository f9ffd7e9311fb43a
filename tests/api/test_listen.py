"""What the start says about where the server listens, and who may hear it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.keys import KeyStore
from api.listen import listening_on
from api.serve import ServeOptions, banner, open_keys
from runtime import ConfigError

ANY = ("0.0.0.0", 8000)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyStore]:
    monkeypatch.setenv("FATHOM_HOME", str(tmp_path / "home"))
    store = KeyStore.open()
    yield store
    store.close()


def options(host: str = "127.0.0.1", **others: object) -> ServeOptions:
    return ServeOptions(host, 8000, ("fathom-tiny",), **others)  # type: ignore[arg-type]


def test_an_open_address_needs_a_key_that_works(store: KeyStore) -> None:
    with pytest.raises(ConfigError, match="fathom keys create"):
        open_keys(options("0.0.0.0"))
    store.create("ann")
    store.revoke("ann")
    with pytest.raises(ConfigError, match="fathom keys create"):
        open_keys(options("0.0.0.0"))
    store.create("bob")
    opened = open_keys(options("0.0.0.0"))
    assert opened is not None
    opened.close()
    with pytest.raises(ConfigError, match="--no-key is for this machine only"):
        open_keys(options("0.0.0.0", needs_key=False))


def test_clear_text_on_a_network_is_warned_of(store: KeyStore) -> None:
    store.create("ann")
    text = banner(options("0.0.0.0"), ANY, store)
    assert "can be read on this network" in text
    assert "--tls-cert" in text
    assert "listening on 0.0.0.0:8000" in text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    assert not re.search(r"sk-\w+-[0-9a-f]{8}", text), "a lasting key cannot be shown again"
    pem = Path("x.pem")
    safe = banner(options("0.0.0.0", tls_certificate=pem, tls_key=pem), ANY, store)
    assert "can be read on this network" not in safe
    assert "curl https://127.0.0.1:8000/v1" in safe
    assert "can be read" not in banner(options(), ("127.0.0.1", 8000), store)


def test_the_page_is_named_where_a_browser_can_reach_it(store: KeyStore) -> None:
    assert " http://127.0.0.1:9/ " in banner(options("localhost"), ("127.0.0.1", 9), store)
    pem = Path("x.pem")
    safe = options("::1", tls_certificate=pem, tls_key=pem)
    assert " https://[::1]:9/ " in banner(safe, ("::1", 9, 0, 0), store)
    assert "browser" not in banner(options(uds=Path("/run/socket")), "/run/socket", store)


def test_the_request_to_try_fits_the_address(store: KeyStore) -> None:
    assert "curl http://[::1]:9/v1/" in banner(options("::1"), ("::1", 9, 0, 0), store)
    assert "serving  http://127.0.0.1:9/v1" in banner(options("localhost"), ("127.0.0.1", 9), store)
    unix = banner(options(uds=Path("/run/my socket")), "/run/my socket", store)
    assert "curl --unix-socket '/run/my socket' http://localhost/v1/chat" in unix
    assert "Ctrl-C stops the server." in unix


def test_a_unix_socket_is_this_users_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening_on("", 0, path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        assert listener.getsockname() == str(path)
    assert not path.exists()
    with listening_on("", 0, path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as another:
            another.bind(str(path))
    assert path.exists(), "another server has it now"
