"""uvicorn with a start and an end of our own.

Connections are accepted here, so that they count from then on and a TLS handshake has a deadline.
At the end answers may finish, and whoever still waits then gets an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Collection, Iterator
from typing import Any

import uvicorn

from api.connections import ACCEPTED_AT_ONCE, Protocol
from api.running import Running, shutting_down

LAST_WORDS_SECONDS = 0.5
"""For the error events of answers that are ended, and for their connections to close."""
POLL_SECONDS = 0.02
ACCEPT_RETRY_SECONDS = 1.0
"""How long nobody is accepted after the system could not, as without a free file."""
TLS_FAREWELL_SECONDS = 2.0

logger = logging.getLogger("fathom.api")


class Server(uvicorn.Server):
    """uvicorn without its signal handlers. `stop` begins the end, a second call hastens it.

    Its configuration must name a `protocol_class`, and `serve` be given sockets that listen.
    """

    def __init__(self, config: uvicorn.Config, running: Running, drain_seconds: float) -> None:
        super().__init__(config)
        self.running = running
        self.drain_seconds = drain_seconds
        self.hurried = False
        self.accepting: list[asyncio.Task[None]] = []
        self.connecting: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Accept nobody any more and let answers finish; called again, end them at once."""
        self.hurried = self.should_exit
        self.should_exit = True
        self.running.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            listener.setblocking(False)
            self.accepting.append(asyncio.create_task(self._accept(listener)))
        self.started = True

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        is_failing = False
        while True:
            try:
                for _ in range(ACCEPTED_AT_ONCE):
                    connection, address = await loop.sock_accept(listener)
                    is_failing = False
                    task = asyncio.create_task(self._connect(connection, address))
                    self.connecting.add(task)
                    task.add_done_callback(self.connecting.discard)
                await asyncio.sleep(0)  # without it a flood would leave no turn to others
            except ConnectionAbortedError:
                continue  # by its client
            except OSError as error:
                if not is_failing:
                    logger.warning("cannot accept connections for now: %s", error.strerror)
                is_failing = True
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)

    async def _connect(self, connection: socket.socket, address: object) -> None:
        """Make the connection, which counts from here until it is lost or its handshake failed."""
        kind: Any = self.config.http_protocol_class
        protocol = kind(config=self.config, server_state=self.server_state, app_state={})
        assert isinstance(protocol, Protocol)
        refusal = protocol.enter(address[:2] if isinstance(address, tuple) else None)
        tls = self.config.ssl
        if refusal is not None and tls is not None:
            connection.close()  # the handshake would cost more than the connection
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=tls,
                ssl_handshake_timeout=protocol.limits.header_seconds if tls else None,
                ssl_shutdown_timeout=TLS_FAREWELL_SECONDS if tls else None,
            )
        except OSError:
            pass  # the handshake failed
        finally:
            if protocol not in self.server_state.connections:
                protocol.leave()  # it was never made, or is lost already

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await cancelled(self.accepting)
        for listener in sockets or ():
            listener.close()
        await cancelled(self.connecting)  # they are still in their handshakes
        connections, tasks = self.server_state.connections, self.server_state.tasks
        for connection in list(connections):
            connection.shutdown()  # one that is idle closes, the others do after their answer
        deadline = time.monotonic() + self.drain_seconds
        while tasks and not self.hurried and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        self.running.end_all(shutting_down())
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while connections and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        for connection in list(connections):
            connection.transport.abort()  # it reads nothing, or leaves TLS without a farewell
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait until they are over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
