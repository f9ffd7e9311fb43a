"""The head of a request on its raw bytes: its size, and what two servers could read differently.

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


class StrictConnection(h11.Connection):
    """h11 that meets the head of a request only after `head_error` let it pass."""

    def __init__(self, limits: Limits) -> None:
        longest = limits.request_line + limits.header + 8
        super().__init__(h11.SERVER, max_incomplete_event_size=longest)
        self.limits = limits
        self.refusal: HttpError | None = None
        self.asked_head = False

    def next_event(self) -> Any:
        """As h11's. Before it raises `h11.RemoteProtocolError`, it sets ``refusal``."""
        if self.their_state is h11.IDLE:
            data, _ = self.trailing_data
            self.asked_head = data.startswith(b"HEAD ")
            self.refusal = head_error(data, self.limits)
            if self.refusal is not None:
                raise h11.RemoteProtocolError(str(self.refusal))
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            # What follows a colon is the client's own text, which may hold a key.
            self.refusal = invalid(shorten(str(error).partition(":")[0]))
            raise


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
