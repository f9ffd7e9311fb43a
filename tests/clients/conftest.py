"""A real server with the embedded model, and real clients in environments of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import ALL, COMMAND, Environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True, slots=True)
class Served:
    """Where the server listens, and a key for it."""

    base: str
    key: str


@contextlib.contextmanager
def first_start(home: Path, *flags: str) -> Iterator[Served]:
    """`fathom serve` as a user starts it the first time, on a free port. It must end well."""
    log = home / "serve.log"
    command = [sys.executable, "-m", "api", "serve", "--port", "0", "--threads", "1"]
    command += ["--device", "cpu", *flags]
    with log.open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "FATHOM_HOME": str(home), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
        assert process.stdout is not None
        try:
            text = ""
            for line in process.stdout:
                text += line
                if "Ctrl-C" in line:
                    break
            base = re.search(r"http://127\.0\.0\.1:\d+/v1", text)
            key = re.search(r"sk-[\w-]+", text)
            assert base is not None and key is not None, text + log.read_text(encoding="utf-8")
            yield Served(base[0], key[0])
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.close()
            status = process.wait(timeout=30)
    assert status == 0, log.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with first_start(tmp_path_factory.mktemp("fathom-home")) as server:
        yield server


def environment(name: str) -> Environment:
    """A client's environment; the test fails with the command that makes it if it is not there."""
    found = ALL[name]
    if not found.ready:
        pytest.fail(f"the environment of {name} is not there: {COMMAND} {name}", pytrace=False)
    return found


def client_says(name: str, script: str, served: Served, *arguments: str) -> dict[str, Any]:
    """The JSON that a client's script prints; it gets the server's address and key first."""
    client = environment(name)
    # A node script comes by standard input, so that imports are looked up in its environment.
    start = ["-"] if client.pip else ["--input-type=module", "-"]
    result = subprocess.run(
        [client.interpreter, *start, served.base, served.key, *arguments],
        input=(SCRIPTS / script).read_text(encoding="utf-8"),
        cwd=client.folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONUTF8": "1", "NO_PROXY": "127.0.0.1"},
    )
    assert result.returncode == 0, result.stderr + result.stdout
    said: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return said
