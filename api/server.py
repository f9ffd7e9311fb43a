"""uvicorn with an end of our own: answers may finish, whoever still waits then gets an error."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import uvicorn

from api.running import Running, shutting_down

LAST_WORDS_SECONDS = 0.5
"""For the error events of answers that are ended, and for their connections to close."""
POLL_SECONDS = 0.02


class Server(uvicorn.Server):
    """uvicorn without its signal handlers. `stop` begins the end, a second call hastens it."""

    def __init__(self, config: uvicorn.Config, running: Running, drain_seconds: float) -> None:
        super().__init__(config)
        self.running = running
        self.drain_seconds = drain_seconds
        self.hurried = False

    def stop(self) -> None:
        """Accept nobody any more and let answers finish; called again, end them at once."""
        self.hurried = self.should_exit
        self.should_exit = True
        self.running.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
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
