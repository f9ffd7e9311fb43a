"""Requests that are right in most places and wrong in some, for `tests.fuzz.raw_http`."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"FOO"]
ODD_METHODS = [b"", b"get", b"G T", b"G\x00T", b"X" * 5000, b"\xff\xfe", b"PRI"]
TARGETS = [b"/v1/chat/completions", b"/health", b"/v1/models", b"/v1/models/fathom-tiny", b"/nope"]
ODD_TARGETS = [
    b"",
    b"*",
    b"/%00",
    b"/v1%2fmodels",
    b"/%ff%fe",
    b"//",
    b"/../../etc/passwd",
    b"http://evil.example/v1/models",
    b"evil.example:443",
    b"/v1/models?" + b"q" * 3000,
    b"/" + b"x" * 5000,
    b"/\xc3\xa9",
    b"/#fragment",
    b"/v1/models/%E2%82%AC/\\",
]
VERSIONS = [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.10", b"HTTP/1.1 x", b""]
LINE_ENDS = [b"\n", b"\r", b"\r\r\n", b"", b"\n\r"]
HOSTS = [b"evil.example", b"", b"localhost:99999999", b"[::1", b"a/?x=", b"127.0.0.1@evil", b"\xe9"]
LENGTHS = [b"-1", b"+5", b"0x10", b"5, 5", b"five", b"", b"9" * 5000, b"1e3", b"99999999999", b" "]
CODINGS = [b"gzip", b"chunked, chunked", b"xchunked", b"CHUNKED", b"identity", b"\x0bchunked", b""]
ODD_HEADERS = [
    b"A: b\r\n folded",
    b" A: first",
    b"A : b",
    b": no name",
    b"no colon",
    b"A: \x00\x01\x02",
    b"A: b\rC: d",
    b"A: " + b"x" * 17_000,
    b"\r\n".join([b"A: b"] * 120),
    b"\xff\xfe: \xff",
    b"Host: localhost",
    b"Transfer-Encoding: chunked",
    b"Content-Length: 3",
    b"Expect: 100-continue",
    b"Expect: nothing",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA",
    b"Connection: keep-alive, close",
    b"Origin: null",
    b"Origin: http://[",
    b"Origin: http://localhost:3000",
    b"Access-Control-Request-Headers: \xe9\x80",
    b"X-Request-Id: \xe9",
    b"X-Request-Id: fine",
    b"Content-Type: text/plain",
    b"Content-Type: ;;;",
    b"Authorization: Bearer \xff",
    b"Authorization:",
    b"Trailer: A",
    b"TE: trailers",
]
ENDS = ["read"] * 16 + ["half close", "leave", "reset"]


@dataclass
class Case:
    """One connection: pieces, the pause after each in seconds, and what the client does then."""

    pieces: list[bytes]
    pauses: list[float]
    then: str
    has_bodies: bool | None = True  # whether answers have bodies; None if it is hard to tell


def make_case(chance: random.Random) -> Case:
    """A connection's worth of bytes, all of it decided by ``chance``."""
    method = b"HEAD" if chance.random() < 0.02 else None
    first = data = make_request(chance, method)
    while chance.random() < 0.1:  # pipelined
        data += make_request(chance, method)
    if chance.random() < 0.25:
        data = mutate(chance, data)
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data) + 1)]
    has_bodies: bool | None = True
    if method is not None or b"HEAD" in data:
        has_bodies = False if data == first and data.startswith(b"HEAD ") else None
    num_cuts = chance.choice([0, 0, 0, 1, 2, 5])
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(num_cuts))
    starts, ends = [0, *cuts], [*cuts, len(data)]
    pieces = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    pauses = [chance.choice([0.0, 0.0, 0.001, 0.01, 0.1]) for _ in pieces]
    if chance.random() < 0.02:
        pauses[-1] = 0.8
    return Case(pieces, pauses, chance.choice(ENDS), has_bodies)


def make_request(chance: random.Random, method: bytes | None = None) -> bytes:
    """One request, well formed unless one of its rules chose otherwise."""

    def rarely(probability: float = 0.04) -> bool:
        return chance.random() < probability

    target = chance.choice(ODD_TARGETS if rarely(0.1) else TARGETS)
    if method is None:
        usual = b"POST" if b"chat" in target and not rarely(0.1) else chance.choice(METHODS[:2])
        method = chance.choice(ODD_METHODS) if rarely() else usual
        if rarely(0.1):
            method = chance.choice([name for name in METHODS if name != b"HEAD"])
    space = chance.choice([b"  ", b"\t", b""]) if rarely(0.02) else b" "
    version = chance.choice(VERSIONS) if rarely() else b"HTTP/1.1"
    lines = [method + space + target + space + version]
    if not rarely(0.03):
        lines.append(b"Host: " + (chance.choice(HOSTS) if rarely() else b"localhost"))
    if not rarely(0.1):
        lines.append(b"Content-Type: application/json")
    if not rarely(0.2):
        lines.append(b"Connection: close")
    body = make_body(chance) if method in (b"POST", b"PUT", b"FOO") or rarely() else b""
    if body or rarely():
        if chance.random() < 0.3:
            coding = chance.choice(CODINGS) if rarely(0.1) else b"chunked"
            lines.append(b"Transfer-Encoding: " + coding)
            body = chunked(chance, body)
        elif not rarely():
            length = b"%d" % (len(body) + chance.choice([0] * 20 + [-1, 1, 1000]))
            lines.append(b"Content-Length: " + (chance.choice(LENGTHS) if rarely() else length))
    for _ in range(chance.choice([0, 0, 0, 0, 1, 1, 2, 4])):
        lines.insert(chance.randrange(1, len(lines) + 1), chance.choice(ODD_HEADERS))
    head = b"".join(
        line + (chance.choice(LINE_ENDS) if rarely(0.01) else b"\r\n") for line in lines
    )
    return head + (chance.choice(LINE_ENDS) if rarely(0.01) else b"\r\n") + body


def make_body(chance: random.Random) -> bytes:
    body: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    kind = chance.randrange(10)
    if kind == 0:
        depth = chance.choice([10, 63, 64, 65, 1000, 30_000])
        return b'{"a":' * depth + b"1" + b"}" * depth
    if kind == 1:
        return chance.randbytes(chance.choice([1, 10, 300]))
    if kind == 2:
        return json.dumps(body).encode() + b" " * chance.choice([99_900, 100_000, 150_000])
    if kind == 3:
        return chance.choice([b"[]", b"null", b"", b"{", b'"\\ud83d"', b'{"seed": 1e999}', b"NaN"])
    if kind == 4:
        names = ["messages", "max_tokens", "temperature", "stop", "n", "stream", "logit_bias", "x"]
        values: list[object] = [None, True, -1, 0.5, "", "x", [], {}, [[]], [{}], 10**30, "\x00"]
        body[chance.choice(names)] = chance.choice(values)
    if kind == 5:
        return mutate(chance, json.dumps(body).encode())
    body["stream"] = chance.random() < 0.3
    return json.dumps(body).encode()


def chunked(chance: random.Random, body: bytes) -> bytes:
    """The body in chunks; sometimes with a wrong size, an extension, trailers, or no end."""
    result = b""
    start = 0
    while start < len(body):
        part = body[start : start + chance.choice([1, 7, 100, 10_000, 200_000])]
        if len(result) > 20_000:
            part = body[start:]
        start += len(part)
        size = b"%x" % len(part)
        fault = chance.random()
        if fault < 0.005:
            size = chance.choice([b"", b"-1", b"0x5", b"zz", b"f" * 30, b"%x" % (len(part) + 1)])
        elif fault < 0.01:
            size += chance.choice([b";a=b", b";" + b"x" * 20_000, b" ", b"\x00", b";\n"])
        result += size + (b"\n" if chance.random() < 0.002 else b"\r\n") + part + b"\r\n"
    end = chance.random()
    if end < 0.9:
        return result + b"0\r\n\r\n"
    trailers = [b"0\r\nA: b\r\n\r\n", b"0\r\n" + b"A: b\r\n" * 9000 + b"\r\n", b"0\r\n:\r\n\r\n"]
    return result + chance.choice([*trailers, b"00\r\n\r\n", b"0\r\n", b"", b"0\n\n"])


def mutate(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, dropped, repeated or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5])):
        start = chance.randrange(len(changed) + 1)
        end = min(len(changed), start + chance.choice([1, 1, 4, 30]))
        kind = chance.randrange(4)
        if kind == 0:
            changed[start:end] = chance.randbytes(end - start)
        elif kind == 1:
            del changed[start:end]
        elif kind == 2:
            changed[start:start] = changed[start:end] * chance.choice([1, 2, 50])
        else:
            changed[start:start] = chance.choice([b"\r\n", b"\n", b"\x00", b" ", b":", b"\xff"])
    return bytes(changed)
