"""`fathom serve` with the embedded model, run as a user runs it, for floods, faults and kills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.load.client import Address, Answer, ask
from tests.processes import is_alive

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


class Served:
    """A server process and what can be known of it from outside."""

    def __init__(self, home: Path, *flags: str, port: int = 0) -> None:
        self.home = home
        self.log = home / "serve.log"
        self.control = home / "engine.sock"
        command = [sys.executable, "-m", "tests.faults.server", "--control", str(self.control)]
        serve = ["serve", "--device", "cpu", "--threads", "1", "--port", str(port), *flags]
        self._output = self.log.open("ab")
        self.process = subprocess.Popen(
            [*command, *serve],
            cwd=ROOT,
            env={**os.environ, "FATHOM_HOME": str(home / "keys"), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self._start = self.log.stat().st_size

    def read_log(self) -> str:
        return self.log.read_bytes()[self._start :].decode(errors="replace")

    def wait_for_banner(self) -> Address:
        """Where it listens and a key for it, once it is ready."""
        wait_until(lambda: "Ctrl-C" in self.read_log() or self.process.poll() is not None, 60)
        self.address = address_in(self.read_log())
        return self.address

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine that runs now."""
        with contextlib.suppress(OSError):
            pid = self.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            living = [int(child) for child in children if is_alive(int(child))]
            return living[-1] if living else None
        return None

    def stats(self) -> dict[str, int]:
        """The engine's own counts, asked for beside the server. Raises `OSError` if it is away."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.control))
            data = b""
            while part := connection.recv(4096):
                data += part
        stats: dict[str, int] = json.loads(data)
        return stats

    def is_idle(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            stats = self.stats()
            return stats["num_sequences"] == 0 and stats["num_free_pages"] == stats["num_pages"]
        return False

    def is_ready(self) -> bool:
        return self.get("/ready").status == 200

    def get(self, path: str) -> Answer:
        return asyncio.run(ask(self.address, path=path))

    def chat(self, **fields: Any) -> Answer:
        return asyncio.run(ask(self.address, chat_body(**fields)))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the server and wait for its end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        for pid in (self.process.pid, self.engine_pid):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._output.close()


@contextlib.contextmanager
def served(*flags: str, home: Path | None = None) -> Iterator[Served]:
    """A server that is ready."""
    with contextlib.ExitStack() as stack:
        if home is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fathom-")))
        server = Served(home, *flags)
        stack.callback(server.close)
        server.wait_for_banner()
        yield server


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A greedy chat request with usage in its stream."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return {name: value for name, value in body.items() if value is not None}


def address_in(banner: str) -> Address:
    """Where a server listens and the key that it printed."""
    base = re.search(r"https?://([\d.]+):(\d+)/v1", banner)
    key = re.search(r"Bearer (sk-[\w-]+)", banner)
    assert base is not None, banner
    return Address(base[1], int(base[2]), key and key[1])


def wait_until(condition: Callable[[], object], seconds: float) -> float:
    """Poll until ``condition()`` is true; the seconds it took. Raises `TimeoutError`."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"the condition did not become true within {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - started
