"""One engine process and the socket to it, as the server's event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime import wire

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, "-P", str(ROOT / "runtime" / "__main__.py"))
"""Run as a file: `-m` would import torch before the process could tie itself to the server."""
ENGINE_ENVIRONMENT = {
    # threads that wait for one another spin for a fifth of a millisecond, then sleep; by default
    # for some milliseconds, also while another process has the core of the one waited for
    "GOMP_SPINCOUNT": "20000",
    # most small tensors lie in huge pages, too; glibc reads it before Python starts
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What an engine on a CPU computes faster with, read by libraries when a process starts."""
MAX_UNSENT_BYTES = 1 << 20
"""With more on its way to an engine that does not read, requests stay with the server."""
RECEIVE_BYTES = 64 << 10
"""At once. asyncio's own 256 KiB are a new block each time, for the hundred bytes of a step."""
LEAVE_SECONDS = 0.5
"""For a process whose socket has ended to end too."""
POLL_SECONDS = 0.01


def engine_environment() -> dict[str, str]:
    """Of engine processes: ours, and `ENGINE_ENVIRONMENT` where the user chose nothing."""
    environment = {**ENGINE_ENVIRONMENT, **os.environ}
    if "OMP_WAIT_POLICY" in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        del environment["GOMP_SPINCOUNT"]  # it would win
    return environment


class EngineLink(asyncio.BufferedProtocol):
    """Starts an engine process at once and talks to it once connected.

    ``deliver`` gets each message and raises `WireError` for one that makes no sense; that ends the
    link as any other fault of the other end does. ``resume`` is called when `can_send` is true
    again. Raises `OSError` if the process cannot be started.
    """

    def __init__(
        self,
        program: Sequence[str],
        deliver: Callable[[wire.Message], None],
        resume: Callable[[], None],
    ) -> None:
        self._deliver = deliver
        self._resume = resume
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._received = bytearray()
        self.reason = ""
        """Why the link ends, once that is known better than from the process's exit code."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._socket, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(self._socket.close)
            # From this thread: the engine asks to be killed when the one that started it ends.
            self.process = subprocess.Popen(
                [*program, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches the server only, which then ends the engine
                env={**engine_environment(), "PYTHONPATH": path},
            )
            on_failure.pop_all()

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, sock=self._socket)

    # -- messages --------------------------------------------------------------------------

    @property
    def can_send(self) -> bool:
        """Whether the engine keeps up with what it is sent."""
        return self._transport is not None and not self._paused

    def send(self, message: wire.Message) -> None:
        """Send, or hold until the engine reads; nothing happens once the link has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._resume()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, num_bytes: int) -> None:
        self._received += self._buffer[:num_bytes]
        try:
            for message in wire.take_messages(self._received):
                self._deliver(message)
                if self.ended.done():
                    return
        except wire.WireError as error:
            self.reason = self.reason or f"it sent what cannot be a message: {error}"
            self.kill()

    def eof_received(self) -> None:
        self._abandon()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    # -- the end ---------------------------------------------------------------------------

    def shoot(self, reason: str, seconds: float) -> None:
        """Make a hung engine print its stacks, and kill it after ``seconds``."""
        self.reason = reason
        self.process.send_signal(signal.SIGABRT)
        asyncio.get_running_loop().call_later(seconds, self.kill)

    def kill(self) -> None:
        """Kill the process and whatever it started; the link then ends. Idempotent."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self._abandon()

    async def gone(self, seconds: float = LEAVE_SECONDS) -> str:
        """Wait for the end of the process, which is killed after ``seconds``; why it ended.

        A new engine needs the memory that this one holds, so there is no limit to the wait.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self.process.poll() is None:
            if loop.time() >= deadline:
                self.kill()
            await asyncio.sleep(POLL_SECONDS)
        self._abandon()
        return self.reason or describe_exit(self.process.returncode)

    def _abandon(self) -> None:
        """Drop the connection and what it still holds."""
        if self._transport is None:
            self._socket.close()
        else:
            self._transport.abort()
        if not self.ended.done():
            self.ended.set_result(None)


def describe_exit(returncode: int) -> str:
    """What an exit code says, negative ones being signals."""
    if returncode >= 0:
        return f"it exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"it was killed by {name}"
