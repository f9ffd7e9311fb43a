"""The wire below the application, on real sockets: heads, framing, slow clients, many clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import resource
import selectors
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn
from starlette.types import Receive, Scope, Send

from api.connections import (
    ACCEPTED_AT_ONCE,
    ConnectionCounts,
    counted_as,
    max_connections,
    protocol_class,
)
from api.limits import Limits
from api.request_head import FREE_CHUNKS, MIN_CHUNK_BYTES
from api.running import Running
from api.server import Server
from tests.api.scripted import wait_until

LIMITS = Limits(
    body=4096,
    body_seconds=0.4,
    body_rate=1000,
    request_line=200,
    header=2000,
    headers=20,
    header_seconds=0.3,
    connections=100,
    connections_per_address=3,
    keep_alive=1.5,
    stall=0.8,
)

LARGE = 16 << 20


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """``/`` tells how long the body was, ``/slow`` after a while.

    ``/unread`` leaves the body unread, ``/large`` is sent at once, ``/flood`` never ends.
    """
    path = scope["path"]
    body = b""
    while path not in ("/unread", "/flood"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if path == "/slow":
        await asyncio.sleep(0.2)
    if path == "/large":
        await send({"type": "http.response.body", "body": b"x" * LARGE, "more_body": True})
    while path == "/flood":
        await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
        await asyncio.sleep(0)
    answer = json.dumps({"method": scope["method"], "body": len(body)}).encode()
    await send({"type": "http.response.body", "body": answer, "more_body": False})


class Peer:
    """A server and raw connections to it."""

    def __init__(self, server: Server, port: int, counts: ConnectionCounts) -> None:
        self.server = server
        self.port = port
        self.counts = counts

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, *pieces: bytes) -> bytes:
        """All that comes back until the server closes, which it must."""
        with self.connect() as connection:
            for index, piece in enumerate(pieces):
                if index:
                    time.sleep(0.02)
                connection.sendall(piece)
            return read_all(connection)

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)


@contextlib.contextmanager
def serve(
    limits: Limits,
    listener: socket.socket | None = None,
    tls: ssl.SSLContext | None = None,
    drain_seconds: float = 1.0,
) -> Iterator[Peer]:
    """On a free port, or at ``listener``."""
    if listener is None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=ACCEPTED_AT_ONCE)
    port = listener.getsockname()[1]
    protocol = protocol_class(limits)
    config = uvicorn.Config(application, http=protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    config.ssl = tls
    server = Server(config, Running(), drain_seconds)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Peer(server, port, protocol.counts)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with serve(LIMITS) as peer:
        yield peer


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def status_of(answer: bytes) -> int:
    """The status, after checking that an error is in the envelope and ends the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 200:
        assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]
        assert b"connection: close" in head.lower()
        assert b"content-type: application/json" in head.lower()
    return status


CLOSE = b"Connection: close\r\n"


def get(*headers: bytes, line: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: localhost", *headers, b"Connection: close", b"", b""])


def head_of(num_bytes: int) -> bytes:
    """A request whose header lines have this many bytes with their ends."""
    start = b"GET / HTTP/1.1\r\n"
    return get(b"A: " + b"x" * (num_bytes - (len(get(b"A: ")) - len(start) - 2)))


LONG_PATH = b"/" + b"x" * (LIMITS.request_line - len("GET / HTTP/1.1"))
NUM_OWN = 2  # headers that get() sends itself


@pytest.mark.parametrize(
    ("at_limit", "beyond", "status"),
    [
        pytest.param(
            get(line=b"GET " + LONG_PATH + b" HTTP/1.1"),
            get(line=b"GET " + LONG_PATH + b"x HTTP/1.1"),
            414,
            id="request line",
        ),
        pytest.param(head_of(LIMITS.header), head_of(LIMITS.header + 1), 431, id="bytes"),
        pytest.param(
            get(*[b"A: b"] * (LIMITS.headers - NUM_OWN)),
            get(*[b"A: b"] * (LIMITS.headers - NUM_OWN + 1)),
            431,
            id="headers",
        ),
    ],
)
def test_the_head_at_the_limit_and_one_beyond(
    peer: Peer, at_limit: bytes, beyond: bytes, status: int
) -> None:
    assert status_of(peer.ask(at_limit)) == 200
    assert status_of(peer.ask(beyond)) == status
    for cut in (1, len(at_limit) // 2, len(at_limit) - 3, len(at_limit) - 1):
        assert status_of(peer.ask(at_limit[:cut], at_limit[cut:])) == 200
        assert status_of(peer.ask(beyond[:cut], beyond[cut:])) == status
    assert b" 200 OK" in peer.ask(get(b"Content-Length: 4096") + b"x" * 4096)


@pytest.mark.parametrize("num_bytes", [100 << 10, 1 << 20])
def test_huge_heads_are_refused_in_one_write_and_unfinished(peer: Peer, num_bytes: int) -> None:
    huge = head_of(num_bytes)
    assert status_of(peer.ask(huge)) == 431
    assert status_of(peer.ask(huge[: num_bytes // 2])) == 431
    assert status_of(peer.ask(b"GET /" + b"x" * num_bytes)) == 414
    assert status_of(peer.ask(get(*[b"A: b"] * (num_bytes // 6)))) == 431


POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
LENGTH_2 = b"Content-Length: 2\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"2\r\n{}\r\n0\r\n\r\n"
FRAMINGS: dict[str, tuple[bytes, int]] = {
    "length": (POST + LENGTH_2 + CLOSE + b"\r\n{}", 200),
    "chunked": (POST + CHUNKED + CLOSE + b"\r\n" + CHUNKS, 200),
    "chunk extension": (POST + CHUNKED + CLOSE + b"\r\n2;a=b\r\n{}\r\n0\r\n\r\n", 200),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", 200),
    "length and chunked": (POST + LENGTH_2 + CHUNKED + b"\r\n" + CHUNKS, 400),
    "chunked and length": (POST + CHUNKED + LENGTH_2 + b"\r\n" + CHUNKS, 400),
    "two lengths": (POST + b"Content-Length: 3\r\n" + LENGTH_2 + b"\r\n{}", 400),
    "the same length twice": (POST + LENGTH_2 + LENGTH_2 + b"\r\n{}", 400),
    "a list of lengths": (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    "no number": (POST + b"Content-Length: two\r\n\r\n{}", 400),
    "an empty length": (POST + b"Content-Length:\r\n\r\n", 400),
    "a signed length": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "a negative length": (POST + b"Content-Length: -2\r\n\r\n{}", 400),
    "a hexadecimal length": (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
    "a length of many digits": (POST + b"Content-Length: " + b"9" * 1900 + b"\r\n\r\n", 400),
    "another coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "two codings": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS, 400),
    "nearly chunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS, 400),
    "chunked twice": (POST + CHUNKED + CHUNKED + b"\r\n" + CHUNKS, 400),
    "chunked in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nHost: a\r\n" + CHUNKED + b"\r\n" + CHUNKS,
        400,
    ),
    "no chunk size": (POST + CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    "a signed chunk size": (POST + CHUNKED + b"\r\n+2\r\n{}\r\n0\r\n\r\n", 400),
    "a chunk longer than it says": (POST + CHUNKED + b"\r\n1\r\n{}\r\n0\r\n\r\n", 400),
    "space before the colon": (POST + b"Content-Length : 2\r\n\r\n{}", 400),
    "a continued header": (get(b"A: b", b" Content-Length: 2"), 400),
    "a continued first header": (b"GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n", 400),
    "LF alone": (get().replace(b"\r\n", b"\n"), 400),
    "one LF alone": (get(b"A: b\nC: d"), 400),
    "LF LF ends the head": (POST + CHUNKED + b"\n", 400),
    "a CR inside": (get(b"A: b\rC: d"), 400),
    "a NUL inside": (get(b"A: b\x00c"), 400),
    "a control character inside": (get(b"A: b\x01c"), 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "no Host in HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", 400),
    "two Hosts": (get(b"Host: localhost"), 400),
    "no name": (get(b": b"), 400),
    "no colon": (get(b"A"), 400),
    "no version": (get(line=b"GET /"), 400),
    "another version": (get(line=b"GET / HTTP/2.0"), 400),
    "nearly a version": (get(line=b"GET / HTTP/1.1.1"), 400),
    "an empty first line": (b"\r\n" + get(), 400),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "two spaces": (get(line=b"GET  / HTTP/1.1"), 400),
}


@pytest.mark.parametrize("name", FRAMINGS)
def test_framing_that_others_could_read_differently(peer: Peer, name: str) -> None:
    request, status = FRAMINGS[name]
    answer = peer.ask(request)
    assert status_of(answer) == status
    assert len(re.findall(rb"HTTP/1\.1 [0-9]", answer)) == 1
    if status == 400:
        assert b'"invalid_http"' in answer
        assert b'"method"' not in answer, "the application saw it"


def test_an_error_does_not_repeat_a_key(peer: Peer) -> None:
    answer = peer.ask(get(b"Authorization : Bearer sk-secret"))
    assert status_of(answer) == 400
    assert b"sk-secret" not in answer


@pytest.mark.parametrize("rest", [b"Content-Length: 9\r\n\r\n", b"", b"A\r\n\r\n", b" A\r\n\r\n"])
def test_a_refused_head_request_has_no_body(peer: Peer, rest: bytes) -> None:
    answer = peer.ask(b"HEAD / HTTP/1.1\r\nHost: a\r\n" + rest)
    assert answer.startswith(b"HTTP/1.1 40")
    assert answer.endswith(b"\r\n\r\n")


def test_pipelined_requests_are_answered_in_order(peer: Peer) -> None:
    first = POST + LENGTH_2 + b"\r\n{}"
    answer = peer.ask(first + get(line=b"PUT / HTTP/1.1"))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b'"POST"') < answer.index(b'"PUT"')
    for second in (POST + LENGTH_2 + CHUNKED + b"\r\n" + CHUNKS, head_of(LIMITS.header + 1)):
        answer = peer.ask(first + second)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1 4") == 1
        assert answer.count(b'"method"') == 1


@pytest.mark.parametrize("junk", [b"\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100_000])
def test_bytes_after_a_last_request_do_not_spoil_its_answer(peer: Peer, junk: bytes) -> None:
    answer = peer.ask(get(line=b"GET /slow HTTP/1.1"), junk)
    assert answer.endswith(b'{"method": "GET", "body": 0}\r\n0\r\n\r\n')


def test_upgrades_are_declined_quietly(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    offer = get(b"Upgrade: websocket").replace(b": close", b": upgrade, close")
    assert status_of(peer.ask(offer)) == 200
    assert not caplog.records


def test_an_unfinished_head_is_answered_408(peer: Peer) -> None:
    assert status_of(peer.ask(b"GET / HTTP/1.1\r\nHost: a\r\n")) == 408
    head = get(b"A: " + b"x" * 400)
    assert status_of(trickle(peer, [head[i : i + 1] for i in range(len(head))])) == 408


def trickle(peer: Peer, pieces: list[bytes]) -> bytes:
    """What comes back for pieces sent 50 ms apart, which must not all be taken."""
    with peer.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(4096)
                connection.settimeout(10)
                return answer + read_all(connection)
    raise AssertionError("the server waited to the end")


def test_idle_connections_stay_open_longer_and_end_quietly(peer: Peer) -> None:
    request = get().replace(CLOSE, b"")
    with peer.connect() as unused, peer.connect() as used:
        for _ in range(2):
            used.sendall(request)
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += used.recv(4096)
            time.sleep(1.5 * LIMITS.header_seconds)
        assert read_all(used) == b""
        assert read_all(unused) == b""


def test_an_unfinished_second_head_is_answered_408(peer: Peer) -> None:
    request = get().replace(CLOSE, b"")
    answer = peer.ask(request + b"GET")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1 408") == 1


@pytest.mark.parametrize(
    "start", [POST + b"Content-Length: 3000\r\n\r\n", POST + CHUNKED + b"\r\n"]
)
def test_a_slow_body_is_answered_408(peer: Peer, start: bytes) -> None:
    assert status_of(peer.ask(start)) == 408
    assert status_of(peer.ask(start + b"1\r\n")) == 408
    piece = b"1\r\nx\r\n" if b"chunked" in start else b"12345"
    assert status_of(trickle(peer, [start, *[piece] * 100])) == 408  # at a tenth of the rate


def test_a_body_that_keeps_its_rate_may_take_many_windows(peer: Peer) -> None:
    pieces = [b"x" * 400] * 30  # 50 ms apart: eight times the rate, over nearly four windows
    with peer.connect() as connection:
        connection.sendall(POST + CLOSE + b"Content-Length: 12000\r\n\r\n")
        for piece in pieces:
            time.sleep(0.05)
            connection.sendall(piece)
        assert b'"body": 12000' in read_all(connection)


def test_an_early_answer_does_not_let_a_body_go_on_for_ever(peer: Peer) -> None:
    start = b"POST /unread HTTP/1.1\r\nHost: a\r\n"
    with peer.connect() as connection:  # too slow
        connection.sendall(start + b"Content-Length: 100000\r\n\r\n")
        answer = read_all(connection)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b'"body": 0' in answer
    with peer.connect() as connection:  # too long
        connection.sendall(start + CHUNKED + b"\r\n")
        endless = (b"400\r\n" + b"x" * 1024 + b"\r\n") * 100_000
        with pytest.raises(ConnectionError):
            connection.sendall(endless)


def test_chunk_framing_cannot_go_on_for_ever(peer: Peer) -> None:
    """A body within its limit, in chunks whose extensions are not."""
    with peer.connect() as connection:
        connection.sendall(POST + CHUNKED + b"\r\n")
        chunk = b"1;" + b"x" * 1000 + b"\r\nx\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                connection.sendall(chunk)
        assert status_of(read_all(connection)) == 413


def test_an_early_answer_is_the_last_and_nothing_after_it_is_parsed() -> None:
    """Deadlines of an hour: only the answer itself can end the connection."""
    start = b"POST /unread HTTP/1.1\r\nHost: localhost\r\n"
    with serve(replace(LIMITS, body_seconds=3600)) as peer:
        for headers, rest in (
            (CHUNKED, b"1\r\n \r\n" * 1000),
            (CHUNKED, b"no chunk"),
            (CHUNKED, b"0\r\n\r\n" + get()),
            (b"Content-Length: 9\r\n", b"123"),
            (b"Expect: 100-continue\r\n" + LENGTH_2, b""),
            (CLOSE + LENGTH_2, b""),
        ):
            with peer.connect() as connection:
                connection.sendall(start + headers + b"\r\n")
                answer = connection.recv(1)
                with contextlib.suppress(ConnectionError):
                    connection.sendall(rest)
                answer += read_all(connection)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert answer.endswith(b'{"method": "POST", "body": 0}\r\n0\r\n\r\n')
            assert answer.lower().count(b"connection: close") == 1


def test_an_early_answer_reaches_a_client_that_first_sends_all_of_its_body() -> None:
    limits = Limits()
    with serve(limits) as peer, peer.connect() as connection:
        connection.sendall(POST.replace(b"/", b"/unread", 1))
        connection.sendall(b"Content-Length: %d\r\n\r\n" % limits.body + b"x" * limits.body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_chunks_may_be_small_or_many() -> None:
    def chunked(num_chunks: int, num_bytes: int) -> bytes:
        chunk = b"%x\r\n" % num_bytes + b"x" * num_bytes + b"\r\n"
        return POST + CHUNKED + b"\r\n" + chunk * num_chunks + b"0\r\n\r\n"

    at_limit = chunked(FREE_CHUNKS, 1)
    with serve(Limits()) as peer:
        answer = peer.ask(at_limit + at_limit + get())
        assert answer.count(b'"body": %d}' % FREE_CHUNKS) == 2
        large = chunked(2 * FREE_CHUNKS, MIN_CHUNK_BYTES)
        num_bytes = 2 * FREE_CHUNKS * MIN_CHUNK_BYTES
        assert b'"body": %d}' % num_bytes in peer.ask(large + get())
        for beyond in (FREE_CHUNKS + 1, 30_000):
            answer = peer.ask(chunked(beyond, 1))
            assert status_of(answer) == 400
            assert b"%d chunks have less than 64 bytes on average" % FREE_CHUNKS in answer


def test_a_client_that_waits_to_be_asked_for_its_body(peer: Peer) -> None:
    with peer.connect() as connection:
        connection.sendall(POST + CLOSE + LENGTH_2 + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert b'"body": 2' in read_all(connection)


def test_a_refused_body_that_was_to_be_asked_for(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    answer = peer.ask(POST + CHUNKED + b"Expect: 100-continue\r\n\r\nzz\r\n")
    assert status_of(answer) == 400
    wait_until(lambda: peer.num_connections == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_never_reading_client_is_dropped_and_others_are_unharmed(peer: Peer) -> None:
    wait_until(lambda: peer.num_connections == 0)
    flood = get(line=b"GET /flood HTTP/1.1")
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", peer.port))
            connection.sendall(flood)
        wait_until(lambda: peer.num_connections == 10)
        while peer.num_connections:
            assert status_of(peer.ask(get())) == 200
            # Only those that are asked for here are left then; the others were dropped.
            wait_until(lambda: peer.num_connections in (0, 10))


def test_a_never_reading_client_of_a_unix_socket_is_dropped(tmp_path: Path) -> None:
    """There the system has no timeout of its own."""
    path = str(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with serve(LIMITS, listener) as peer, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(get(line=b"GET /flood HTTP/1.1"))
        wait_until(lambda: peer.num_connections == 1)
        wait_until(lambda: peer.num_connections == 0)


def test_a_slow_reader_is_not_dropped(peer: Peer) -> None:
    with peer.connect() as connection:
        connection.sendall(get(line=b"GET /large HTTP/1.1"))
        received = b""
        while part := connection.recv(1 << 20):
            received += part
            time.sleep(0.06)
    assert received.count(b"x") == LARGE


def test_300_idle_connections_against_100() -> None:
    with (
        serve(replace(LIMITS, keep_alive=3600)) as peer,
        contextlib.ExitStack() as stack,
        selectors.DefaultSelector() as selector,
    ):
        for _ in range(300):
            selector.register(stack.enter_context(peer.connect()), selectors.EVENT_READ)
        refused: list[bytes] = []
        while len(refused) < 200:
            ready = selector.select(10)
            assert ready, "nobody is refused any more"
            for key, _ in ready:
                selector.unregister(key.fileobj)
                assert isinstance(key.fileobj, socket.socket)
                refused.append(read_all(key.fileobj))
                key.fileobj.close()
        assert not selector.select(0.1), "more than 200 are refused"
        assert {status_of(answer) for answer in refused} == {503}
        assert b'"too_many_connections"' in refused[0]
        assert b"retry-after" in refused[0].lower()
        wait_until(lambda: peer.num_connections == 100)
        assert status_of(peer.ask(get())) == 503
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        wait_until(lambda: peer.num_connections == 0)
        assert status_of(peer.ask(get())) == 200


def test_connections_per_address() -> None:
    with serve(replace(LIMITS, counts_loopback=True)) as peer, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(peer.connect()) for _ in range(3)]
        assert status_of(peer.ask(get())) == 503
        connections[0].close()
        wait_until(lambda: peer.num_connections == 2)
        assert status_of(peer.ask(get())) == 200
    counts = ConnectionCounts(LIMITS)
    for _ in range(10):
        for exempt in (counted_as(("127.0.0.1", 1)), counted_as(("::1", 1)), counted_as(None)):
            assert counts.refusal(exempt) is None
    addresses = [counted_as((f"2001:db8::{index}", 1)) for index in range(4)]
    assert [counts.refusal(address) is None for address in addresses] == [True] * 3 + [False]
    assert counts.refusal(counted_as(("2001:db8:0:1::1", 1))) is None
    counts.remove(addresses[0])
    assert counts.refusal(addresses[0]) is None
    assert counted_as(("::ffff:10.0.0.1", 1)) == counted_as(("10.0.0.1", 1))
    assert counted_as(("fe80::1%eth0", 1)) == counted_as(("fe80::2", 1))


def test_the_number_of_open_files_lowers_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_files(soft: int) -> int:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
        return max_connections(Limits())

    assert with_files(100_000) == 1024
    assert with_files(resource.RLIM_INFINITY) == 1024
    assert 500 < with_files(1024) < 1024
    assert with_files(1) == 1


FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import threading
from api.limits import Limits
from tests.api.test_connections import serve
with serve(Limits(keep_alive=3600)) as peer:
    print(peer.port, flush=True)
    threading.Event().wait()
"""


@pytest.mark.slow  # importing torch in one more process takes most of it
def test_a_server_that_runs_out_of_files_recovers() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        flood = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(100)]
        before = cpu_seconds(process.pid)
        time.sleep(0.5)
        assert cpu_seconds(process.pid) - before < 0.4, "it spins"
        for connection in flood:
            connection.close()
        with socket.create_connection(address, 10) as connection:
            connection.sendall(get())
            assert status_of(read_all(connection)) in (200, 503)
        with socket.create_connection(address, 10) as connection:
            connection.sendall(get())
            assert status_of(read_all(connection)) == 200


def cpu_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_socket_options(peer: Peer) -> None:
    wait_until(lambda: peer.num_connections == 0)
    with peer.connect():
        wait_until(lambda: peer.num_connections == 1)
        (protocol,) = peer.server.server_state.connections
        connection = protocol.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 800


def test_a_stopping_server_does_not_wait_for_silent_clients() -> None:
    with contextlib.ExitStack() as stack:
        with serve(replace(LIMITS, keep_alive=3600, header_seconds=3600)) as peer:
            for start in (b"", b"GET / HT", get().replace(CLOSE, b""), b"\x00\r\n"):
                connection = stack.enter_context(peer.connect())
                connection.sendall(start)
            wait_until(lambda: peer.num_connections == 4)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 10


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's side and the client's."""
    authority = trustme.CA()
    ours, theirs = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    authority.issue_cert("localhost").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


def ask_securely(peer: Peer, context: ssl.SSLContext) -> bytes:
    with (
        peer.connect() as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secure,
    ):
        secure.sendall(get())
        return secure.recv(4096)


def test_connections_in_their_handshake_count(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    limits = replace(LIMITS, connections=2, header_seconds=600)
    with serve(limits, tls=tls[0]) as peer, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(peer.connect()) for _ in range(2)]
        with pytest.raises(OSError):
            ask_securely(peer, tls[1])
        silent[0].close()
        wait_until(lambda: peer.counts.num_connections == 1)
        assert ask_securely(peer, tls[1]).startswith(b"HTTP/1.1 200 ")
        silent[1].sendall(get())  # no handshake
        wait_until(lambda: peer.counts.num_connections == 0)
        assert not peer.counts.by_address


def test_a_stopping_server_ends_handshakes_before_it_drains(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    limits = replace(LIMITS, header_seconds=600, body_seconds=600)
    with (
        serve(limits, tls=tls[0], drain_seconds=600) as peer,
        tls[1].wrap_socket(peer.connect(), server_hostname="localhost") as unfinished,
        peer.connect() as silent,
    ):
        unfinished.sendall(POST + LENGTH_2 + b"\r\n{")
        wait_until(lambda: peer.server.server_state.tasks and peer.counts.num_connections == 2)
        peer.server.should_exit = True
        assert silent.recv(1) == b""
        unfinished.sendall(b"}")
        assert unfinished.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_handshake_has_a_deadline(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with serve(LIMITS, tls=tls[0]) as peer, peer.connect() as silent:
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1) == b""
        wait_until(lambda: peer.counts.num_connections == 0)


class FullListener(socket.socket):
    """Accepts only after the process had no file left for a while."""

    num_failures = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self.num_failures < 2:
            self.num_failures += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_files_the_server_waits_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("api.server.ACCEPT_RETRY_SECONDS", 0.1)
    listener = FullListener()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with serve(LIMITS, listener) as peer:
        assert status_of(peer.ask(get())) == 200
    [record] = caplog.records
    assert "Too many open files" in record.getMessage()
