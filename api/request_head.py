"""The head of a request on its raw bytes: its size, and what two servers could read differently.

And of its body, how small its chunks are.

h11 itself takes lines that end in LF alone, continued headers, equal lengths given twice, a length
beside chunks, and a head of any size if it comes in one write.
"""

from __future__ import annotations

import re
from typing import Any

import h11

from api.errors import HttpError, shorten
from api.limits import Limits

BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
CONTROL_CHARACTER = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
VERSION = re.compile(rb" HTTP/1\.[01]$")
FREE_CHUNKS = 1024
MIN_CHUNK_BYTES = 64
"""The least average of a body's chunks after the first `FREE_CHUNKS`: each takes h11 some 10 us."""


class StrictConnection(h11.Connection):
    """h11 that meets the head of a request only after `head_error` let it pass."""

    def __init__(self, limits: Limits) -> None:
        longest = limits.request_line + limits.header + 8
        super().__init__(h11.SERVER, max_incomplete_event_size=longest)
        self.limits = limits
        self.refusal: HttpError | None = None
        self.asked_head = False
        self.num_chunks = 0  # of the request's body, and their bytes
        self.num_chunk_bytes = 0

    def next_event(self) -> Any:
        """As h11's. Before it raises `h11.RemoteProtocolError`, it sets ``refusal``."""
        if self.their_state is h11.IDLE:
            self.num_chunks = self.num_chunk_bytes = 0
            data, _ = self.trailing_data
            self.asked_head = data.startswith(b"HEAD ")
            self.refusal = head_error(data, self.limits)
            if self.refusal is not None:
                raise h11.RemoteProtocolError(str(self.refusal))
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            # What follows a colon is the client's own text, which may hold a key.
            self.refusal = invalid(shorten(str(error).partition(":")[0]))
            raise
        if isinstance(event, h11.Data):
            self._count_chunk(event)
        return event

    def send(self, event: Any) -> Any:
        """As h11's. An answer that begins before the request's body came says that it is the last.

        h11 is not told so: it would have uvicorn close at once, and with a close the system drops
        the answer if the body is still coming.
        """
        data = super().send(event)
        is_early = isinstance(event, h11.Response) and self.their_state is h11.SEND_BODY
        if is_early and b"\r\nconnection: close\r\n" not in data.lower():
            return data.removesuffix(b"\r\n") + b"connection: close\r\n\r\n"
        return data

    def _count_chunk(self, event: h11.Data) -> None:
        if event.chunk_start:
            low = self.num_chunk_bytes < MIN_CHUNK_BYTES * self.num_chunks
            if low and self.num_chunks >= FREE_CHUNKS:
                self.refusal = invalid(
                    f"The body's first {self.num_chunks} chunks have less than {MIN_CHUNK_BYTES} "
                    "bytes on average; send larger chunks"
                )
                raise h11.RemoteProtocolError(str(self.refusal))
            self.num_chunks += 1
        self.num_chunk_bytes += len(event.data)


def head_error(data: bytes, limits: Limits) -> HttpError | None:
    """What is wrong with the head of a request that ``data`` begins with, as far as it has come.

    Whether the lines themselves are well formed is left to h11.
    """
    line_end = data.find(b"\r\n")
    line_length = line_end if line_end >= 0 else len(data.removesuffix(b"\r"))
    if line_length > limits.request_line:
        return HttpError(
            414,
            f"The request line has more than {limits.request_line} bytes.",
            code="request_line_too_long",
        )
    if line_end < 0:
        return _character_error(data)
    start = line_end + 2
    end = data.find(b"\r\n\r\n", line_end)
    # All header lines with their ends; of an unfinished head its last CR may end no line.
    num_bytes = end + 2 - start if end >= 0 else len(data) - start - 1
    if num_bytes > limits.header:
        return too_large(f"The request's headers have more than {limits.header} bytes.")
    head = data if end < 0 else data[: end + 2]
    lines = head[start:].split(b"\r\n")[:-1]
    if len(lines) > limits.headers:
        return too_large(f"The request has more than {limits.headers} headers.")
    return _character_error(head) or (_framing_error(head[:line_end], lines) if end >= 0 else None)


def _character_error(head: bytes) -> HttpError | None:
    if BARE_LINE_FEED.search(head):
        return invalid("A line ends in LF alone; lines of a request end in CR LF")
    if CONTROL_CHARACTER.search(head):
        return invalid("The request's head holds a control character")
    return None


def _framing_error(request_line: bytes, lines: list[bytes]) -> HttpError | None:
    """Refuses what two servers could read as different requests."""
    if not VERSION.search(request_line):
        return invalid("The request line does not end in HTTP/1.1 or HTTP/1.0")
    if any(line.startswith((b" ", b"\t")) for line in lines):
        return invalid("A header is continued on a second line")
    values: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        values.setdefault(name.lower(), []).append(value.strip(b" \t"))
    lengths = values.get(b"content-length", [])
    codings = values.get(b"transfer-encoding", [])
    num_hosts = len(values.get(b"host", []))
    if num_hosts != 1:
        return invalid(f"The request has {num_hosts} Host headers, not one")
    if lengths and codings:
        return invalid("The request has both Content-Length and Transfer-Encoding")
    if lengths and (len(lengths) > 1 or not CONTENT_LENGTH.fullmatch(lengths[0])):
        return invalid("Content-Length is not one number")
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        return invalid("Transfer-Encoding is not 'chunked'")
    if codings and request_line.endswith(b"1.0"):
        return invalid("HTTP/1.0 has no Transfer-Encoding")
    return None


def invalid(why: str) -> HttpError:
    return HttpError(400, f"{why}.", code="invalid_http")


def too_large(message: str) -> HttpError:
    return HttpError(431, message, code="headers_too_large")
