"""A cheap client of OpenAI servers: one stream per connection, on asyncio and nothing else.

What it costs is part of what a benchmark measures when the server runs on the same machine, so it
parses only what it must: of a chunk with text its arrival, of the last ones usage and errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

READ_LIMIT = 1 << 20  # bytes of a line of an event stream


class BadUrl(Exception):
    """A URL that cannot be asked."""


class Refused(Exception):
    """The server answered with an error."""


@dataclass(slots=True)
class Answer:
    """What one request brought. Times are seconds of the monotonic clock."""

    sent_at: float = 0.0
    ended_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of chunks with text, and of the end
    prompt_tokens: int = 0  # by the server's own count
    completion_tokens: int = 0
    timings: dict[str, Any] | None = None  # of servers that send llama.cpp's
    failure: str | None = None  # why it is no whole answer

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent_at

    @property
    def seconds(self) -> float:
        return self.ended_at - self.sent_at

    @property
    def seconds_per_token(self) -> float | None:
        """After the first token; None for an answer of one."""
        if self.completion_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where an API is, up to its ``/v1``."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    path: str
    key: str | None

    @classmethod
    def parse(cls, url: str, key: str | None) -> Target:
        """Raises `BadUrl`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BadUrl(f"--url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadUrl(f"--url {url!r} is not like http://127.0.0.1:8000/v1")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        default = 443 if tls else 80
        return cls(parts.hostname, port or default, tls, parts.path.rstrip("/"), key)

    def request(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {host}:{self.port}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + data


async def stream(target: Target, path: str, body: dict[str, Any], seconds: float) -> Answer:
    """Ask and read the stream to its end; never raises for what the server does."""
    answer = Answer(sent_at=time.monotonic())
    try:
        async with asyncio.timeout(seconds):
            async for data in _events(target, "POST", path, body):
                _take(answer, data, time.monotonic())
    except Refused as error:
        answer.failure = str(error)
    except TimeoutError:
        answer.failure = f"no whole answer in {seconds:g} s"
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        answer.failure = f"the connection broke ({type(error).__name__})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        answer.failure = f"not understood: {error}"[:200]
    answer.ended_at = time.monotonic()
    if answer.failure is None and not answer.arrivals:
        answer.failure = "an answer without text"
    if answer.failure is None and not answer.completion_tokens:
        answer.failure = "an answer without usage"
    return answer


async def get(target: Target, path: str, seconds: float = 30.0) -> Any:
    """The JSON of a GET. Raises `BadUrl` with the reason there is none."""
    try:
        async with asyncio.timeout(seconds):
            return json.loads("".join([part async for part in _events(target, "GET", path, None)]))
    except (OSError, asyncio.IncompleteReadError, Refused, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise BadUrl(f"{target.host}:{target.port}{target.path}{path}: {reason}"[:300]) from None


def _take(answer: Answer, data: str, now: float) -> None:
    if data == "[DONE]":
        return
    chunk = json.loads(data)
    if error := chunk.get("error"):
        message = error.get("message") if isinstance(error, dict) else error
        answer.failure = f"error: {message}"[:200]
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or choice
        text = delta.get("text") or delta.get("content") or delta.get("reasoning_content")
        if text or choice.get("finish_reason"):
            answer.arrivals.append(now)
    if usage := chunk.get("usage"):
        answer.prompt_tokens = int(usage["prompt_tokens"])
        answer.completion_tokens = int(usage["completion_tokens"])
    answer.timings = chunk.get("timings") or answer.timings


async def _events(
    target: Target, method: str, path: str, body: dict[str, Any] | None
) -> AsyncIterator[str]:
    """The ``data`` of each event; of an answer that is no stream its whole body.

    Raises `Refused` for another status than 200.
    """
    reader, writer = await asyncio.open_connection(
        target.host, target.port, ssl=target.tls, limit=READ_LIMIT
    )
    try:
        writer.write(target.request(method, path, body))
        status, headers = await _head(reader)
        parts = _body(reader, headers)
        if status != 200:
            text = b"".join([part async for part in parts]).decode(errors="replace")
            raise Refused(f"status {status}: {_message(text)}")
        if not headers.get("content-type", "").startswith("text/event-stream"):
            yield b"".join([part async for part in parts]).decode(errors="replace")
            return
        rest = b""
        async for part in parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode()
    finally:
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:120]


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    return int(lines[0].split()[1]), lower


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body, rest, is_last = b"", b"", False
        while not is_last:
            part = await reader.read(READ_LIMIT)
            if not part:
                raise asyncio.IncompleteReadError(rest, None)
            body, rest, is_last = _dechunked(rest + part)
            yield body
        return
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while part := await reader.read(READ_LIMIT):
        yield part


def _dechunked(data: bytes) -> tuple[bytes, bytes, bool]:
    """The whole chunks in front of ``data``, what follows them, and whether the last is there."""
    chunks = []
    start = 0
    while (line_end := data.find(b"\r\n", start)) >= 0:
        size = int(data[start:line_end].split(b";")[0], 16)
        if size == 0:
            return b"".join(chunks), b"", True
        chunk_start, end = line_end + 2, line_end + 2 + size
        if len(data) < end + 2:
            break
        chunks.append(data[chunk_start:end])
        start = end + 2
    return b"".join(chunks), data[start:], False
