"""`fathom serve` as a user starts it, on a free port of this machine, for benchmarks of HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.own_environment import without_engine_settings

START_SECONDS = 600.0  # large checkpoints load for long
STOP_SECONDS = 30.0
TICKS = os.sysconf("SC_CLK_TCK")


class ServerDied(Exception):
    """Our own server did not start; the message has its last lines."""


class OwnServer:
    """A running server: its URL, and the processor time it took so far."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self._pids = [process.pid, *_children(process.pid)]

    def cpu_seconds(self) -> tuple[float, float]:
        """Of the process that speaks HTTP, and of the engine's."""
        server, *engines = [_cpu_seconds(pid) for pid in self._pids]
        return server, sum(engines)


@contextlib.contextmanager
def own_server(model: str, flags: Sequence[str]) -> Iterator[OwnServer]:
    """A server of ``model`` that is ready, without keys. Raises `ServerDied`."""
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as home:
        log = Path(home) / "serve.log"
        command = [sys.executable, "-m", "api", "serve", model, "--port", "0", "--no-key", *flags]
        environment = {**without_engine_settings(), "FATHOM_HOME": home, "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield OwnServer(process, _wait(process, log))
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the server prints once the model is loaded."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.poll() is not None:
            raise ServerDied(f"the server ended: {' | '.join(text.splitlines()[-4:])}"[:600])
        if "Ctrl-C" in text and (found := re.search(r"https?://\S+/v1", text)):
            return found[0]
        time.sleep(0.05)
    raise ServerDied(f"the server was not ready after {START_SECONDS:g} s")


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        return [int(child) for child in text.split()]
    return []


def _cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0
