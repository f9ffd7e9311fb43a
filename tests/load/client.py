"""A small HTTP client for floods: thousands of requests at once cost it little.

It reads answers of our server only: chunked streams of events, or JSON with a length.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"


@dataclass
class Answer:
    """What one request brought. ``status`` 0: the connection broke before an answer came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""  # thought and answer
    error: dict[str, Any] | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    num_chunks: int = 0
    whole: bool = False  # it came to its proper end

    @property
    def num_tokens(self) -> int:
        return 0 if self.usage is None else int(self.usage["completion_tokens"])


@dataclass(frozen=True)
class Address:
    host: str
    port: int
    key: str | None

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + data


async def connect(
    address: Address, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; with a small ``receive_buffer`` it takes little before it is read."""
    connection = socket.socket()
    connection.setblocking(False)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(connection, (address.host, address.port))
    except BaseException:
        connection.close()
        raise
    limit = 1 << 16 if receive_buffer is None else 1 << 10
    return await asyncio.open_connection(sock=connection, limit=limit)


async def ask(
    address: Address,
    body: dict[str, Any] | None = None,
    *,
    path: str = CHAT,
    leave_after: int | None = None,
) -> Answer:
    """One request, GET without a body. With ``leave_after`` it hangs up after so many chunks."""
    answer = Answer()
    writer = None
    try:
        reader, writer = await connect(address)
        writer.write(address.request("GET" if body is None else "POST", path, body))
        await _read_head(reader, answer)
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            async for event in _events(reader):
                _take_event(answer, event)
                if leave_after is not None and answer.num_chunks >= leave_after:
                    return answer
        else:
            length = int(answer.headers.get("content-length", 0))
            _take_json(answer, json.loads(await reader.readexactly(length) or b"null"))
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return answer


async def _read_head(reader: asyncio.StreamReader, answer: Answer) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    answer.status = int(head[0].split()[1])
    for line in head[1:]:
        name, _, value = line.partition(":")
        answer.headers[name.lower()] = value.strip()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The ``data`` of each event of a chunked body."""
    rest = b""
    while True:
        size = int((await reader.readline()).strip() or b"0", 16)
        if size == 0:
            return
        rest += await reader.readexactly(size)
        await reader.readexactly(2)
        *frames, rest = rest.split(b"\n\n")
        for frame in frames:
            if frame.startswith(b"data: "):
                yield frame.removeprefix(b"data: ").decode()


def _take_event(answer: Answer, event: str) -> None:
    answer.num_chunks += 1
    if event == "[DONE]":
        answer.whole = True
        return
    chunk = json.loads(event)
    answer.error = chunk.get("error", answer.error)
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk.get("choices", ()):
        delta = choice["delta"]
        answer.text += delta.get("reasoning_content", "") + (delta.get("content") or "")
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


def _take_json(answer: Answer, body: Any) -> None:
    answer.whole = True
    if not isinstance(body, dict):
        return
    answer.error = body.get("error")
    answer.usage = body.get("usage")
    for choice in body.get("choices", ()):
        message = choice["message"]
        answer.text += (message.get("reasoning_content") or "") + (message.get("content") or "")
        answer.finish_reason = choice["finish_reason"]
