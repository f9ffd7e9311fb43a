"""What a connection may do before its request reaches the application.

uvicorn's h11 protocol waits for ever for a slow client, takes headers of any size that come in one
write, and reads framing in ways that another server may read differently. Here every connection has
one deadline at a time, and `api.request_head` checks the head of a request on its raw bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import http
import ipaddress
import resource
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import HttpError, error_response
from api.limits import DRAINED_BODIES, Limits
from api.listen import ip_literal
from api.request_head import StrictConnection, invalid

ACCEPTED_AT_ONCE = 128
"""The backlog to listen with: asyncio accepts as many before the first of them is counted."""
MAX_LINGERING = 64
"""Refused connections that are read until the client has seen why; above it they are cut."""
LINGER_SECONDS = 2.0
MAX_DISCARDED_BYTES = 1 << 20
"""What such a connection may still send: this much, or a whole body."""


def protocol_class(limits: Limits) -> type[H11Protocol]:
    """A protocol for ``uvicorn.Config(http=...)`` whose connections are counted together."""
    return type("Protocol", (Protocol,), {"limits": limits, "counts": ConnectionCounts(limits)})


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it: most shells start at 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # the system may set a lower maximum
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections(limits: Limits) -> int:
    """How many connections fit: the limit, or what leaves files for refusals and everything else.

    Without that reserve a flood would end in "too many open files", in which nobody is answered.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits.connections
    free = soft - sum(1 for _ in Path("/dev/fd").iterdir())
    reserve = min(ACCEPTED_AT_ONCE + 2 * MAX_LINGERING, free // 2)
    return max(1, min(limits.connections, free - reserve))


class ConnectionCounts:
    """The open connections of one server, all together and by address."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.max_connections = max_connections(limits)
        self.num_connections = 0
        self.num_lingering = 0
        self.by_address: Counter[str] = Counter()

    def refusal(self, address: str) -> HttpError | None:
        """Why one more connection from ``address`` is too many, or None after counting it."""
        limit = self.limits.connections_per_address
        if self.num_connections >= self.max_connections:
            return too_many(f"The server has {self.max_connections} open connections")
        if self.by_address[address] >= limit and not self._is_exempt(address):
            return too_many(f"Your address has {limit} open connections")
        self.num_connections += 1
        self.by_address[address] += 1
        return None

    def remove(self, address: str) -> None:
        self.num_connections -= 1
        self.by_address[address] -= 1
        if not self.by_address[address]:
            del self.by_address[address]

    def _is_exempt(self, address: str) -> bool:
        if self.limits.counts_loopback:
            return False
        return not address or ipaddress.ip_network(address).is_loopback


def too_many(what: str) -> HttpError:
    return HttpError(
        503, f"{what}, its limit.", code="too_many_connections", error_type="server_error"
    )


def counted_as(client: tuple[str, int] | None) -> str:
    """The address a connection counts for: of IPv6 the network, since a host has all of it."""
    if client is None:  # a socket of this machine
        return ""
    address = ip_literal(client[0])
    assert address is not None, "the system gives addresses, not names"
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Wait(enum.Enum):
    """What a connection is expected to do next; each has its own deadline."""

    ANSWER = "answer"  # our turn
    IDLE = "idle"  # the first byte of a request
    HEAD = "head"  # the rest of its head
    BODY = "body"  # its body
    LEAVE = "leave"  # it has its last answer


class Protocol(H11Protocol):
    """h11 with deadlines, counted connections, and refusals in the error envelope."""

    limits: Limits
    counts: ConnectionCounts

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = StrictConnection(self.limits)
        self.wait = Wait.ANSWER
        self.deadline: asyncio.TimerHandle | None = None
        self.stall: asyncio.TimerHandle | None = None
        self.address: str | None = None  # while it is counted
        self.refusal: HttpError | None = None
        self.entered = False
        self.num_received = 0  # bytes of the request, nearly: they come in pieces
        self.num_before = 0  # of those, bytes before the body's current window
        self.num_discarded = 0

    def enter(self, client: tuple[str, int] | None) -> HttpError | None:
        """Count the connection, or say why it is too many.

        A server may call this before the connection is made, so that a TLS handshake counts; it
        then calls `leave` if the connection is never made.
        """
        self.entered = True
        address = counted_as(client)
        self.refusal = self.counts.refusal(address)
        if self.refusal is None:
            self.address = address
        return self.refusal

    def leave(self) -> None:
        """Count the connection no longer."""
        if self.address is not None:
            self.counts.remove(self.address)
            self.address = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # The stall is watched over all that the system does not take at once. TLS needs a mark
        # above zero.
        transport.set_write_buffer_limits(high=1, low=0)
        self._set_socket_options()
        if not self.entered:
            self.enter(self.client)
        if self.refusal is not None:
            self.refuse(self.refusal)
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.deadline, self.stall):
            if timer is not None:
                timer.cancel()
        self.leave()
        if self.wait is Wait.LEAVE:
            self.counts.num_lingering -= 1

    def data_received(self, data: bytes) -> None:
        if self.wait is Wait.LEAVE:
            self.num_discarded += len(data)
            if self.num_discarded > max(MAX_DISCARDED_BYTES, self.limits.body):
                self.transport.abort()
            return
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # it said this request was its last; what follows must not spoil the answer
        self.num_received += len(data)
        super().data_received(data)
        self._expect()
        drained = DRAINED_BODIES * self.limits.body + self.limits.header
        if self.wait is Wait.BODY and self.num_received > drained:
            self.refuse(
                HttpError(
                    413,
                    f"The request body is above {self.limits.body} bytes.",
                    code="request_too_large",
                )
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger()  # nobody wants the rest of its body, and parsing it would cost
        else:
            self._expect()

    def shutdown(self) -> None:
        if self.wait is Wait.LEAVE:
            self.transport.close()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for whatever h11 refuses."""
        assert isinstance(self.conn, StrictConnection)
        self.refuse(self.conn.refusal or invalid(msg))

    def refuse(self, error: HttpError) -> None:
        """Answer with ``error`` if no answer has begun, and close once the client could read it."""
        if self.wait is Wait.LEAVE or self.transport.is_closing():
            return
        can_answer = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        if can_answer:
            self._answer(error)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        self._linger()
        if not can_answer:
            self.transport.close()

    def _linger(self) -> None:
        """Read on for a while and parse nothing: a close with unread data would reset the
        connection and could destroy the answer.
        """
        self._set_deadline(Wait.LEAVE, LINGER_SECONDS)
        self.counts.num_lingering += 1
        self._unset_keepalive_if_required()
        if self.counts.num_lingering > MAX_LINGERING:
            self.transport.close()
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _answer(self, error: HttpError) -> None:
        assert isinstance(self.conn, StrictConnection)
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        body = bytes(response.body)
        if self.conn.asked_head:
            headers = [header for header in headers if header[0] != b"content-length"]
            body = b""
        start = h11.Response(
            status_code=error.status,
            headers=headers,
            reason=http.HTTPStatus(error.status).phrase.encode(),
        )
        events = (start, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))

    def _should_upgrade(self) -> bool:
        return False  # nor a warning in the log for each request that asks

    def _expect(self) -> None:
        """Set the deadline of what the client must do now."""
        if self.wait is Wait.LEAVE or self.transport.is_closing():
            return
        # Our own deadlines replace uvicorn's single timer.
        self._unset_keepalive_if_required()
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.trailing_data[0]:
            if self.wait is not Wait.HEAD:
                self.num_received = 0
            self._set_deadline(Wait.HEAD, self.limits.header_seconds)
        elif state is h11.IDLE:
            self.num_received = 0
            self._set_deadline(Wait.IDLE, self.limits.keep_alive)
        elif state is h11.SEND_BODY:
            if self.wait is not Wait.BODY:
                self.num_before = self.num_received
            self._set_deadline(Wait.BODY, self.limits.body_seconds)
        else:
            self._set_deadline(Wait.ANSWER, None)

    def _set_deadline(self, wait: Wait, seconds: float | None) -> None:
        if wait is self.wait:
            return
        self.wait = wait
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        if seconds is not None:
            self.deadline = self.loop.call_later(seconds, self._on_deadline)

    def _on_deadline(self) -> None:
        limits = self.limits
        if self.wait is Wait.IDLE:
            self.timeout_keep_alive_handler()
        elif self.wait is Wait.HEAD:
            self.refuse(slow(f"The request's head did not end in {limits.header_seconds:g} s."))
        elif self.wait is Wait.BODY:
            num_bytes = self.num_received - self.num_before
            # While we do not read, or have not said that we will, the client is not at fault.
            waits_for_us = self.flow.read_paused or self.conn.they_are_waiting_for_100_continue
            if waits_for_us or num_bytes >= limits.body_rate * limits.body_seconds:
                self.num_before = self.num_received
                self.deadline = self.loop.call_later(limits.body_seconds, self._on_deadline)
                return
            self.refuse(
                slow(
                    f"{num_bytes} bytes of the request's body came in {limits.body_seconds:g} s; "
                    f"send at least {limits.body_rate} bytes/s."
                )
            )
        elif self.wait is Wait.LEAVE:
            self.transport.abort()

    def _watch_stall(self) -> None:
        size = self.transport.get_write_buffer_size()
        self.stall = self.loop.call_later(self.limits.stall, self._on_stall, size)

    def _on_stall(self, size_before: int) -> None:
        if self.transport.get_write_buffer_size() < size_before:
            self._watch_stall()
        else:
            self.transport.abort()

    def _set_socket_options(self) -> None:
        connection: socket.socket | None = self.transport.get_extra_info("socket")
        if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with contextlib.suppress(OSError):  # the client may be gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Also ends the close of a connection whose client reads nothing.
                milliseconds = int(1000 * self.limits.stall)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def slow(message: str) -> HttpError:
    return HttpError(408, message, code="request_timeout")
