"""Runs `fathom serve` on a case as a user does, but imports torch once for all of them.

``python -m tests.runtime.corpus.command`` is a server that imports everything, then forks a process
for each line of its input; the engine process is a fork too. Nothing else differs from the command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import api.__main__
import runtime.engine_process
from tests.runtime.corpus import BAD
from tests.runtime.corpus.case import limited_memory

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 20
OPTIONS = "--port 0 --no-key --device cpu --threads 1 --max-model-len 64 --kv-cache-memory 64MiB"


@dataclass(frozen=True, slots=True)
class Result:
    returncode: int  # negative: the signal that ended it
    stdout: str
    stderr: str
    peak_bytes: int  # of command or engine, above what the imports take


class CommandServer:
    """The client's end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.corpus.command"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serve(self, name: str, folder: Path) -> Result:
        """`fathom serve FOLDER` on the written case of ``BAD``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, str(folder)]) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


class ForkedEngine:
    """Stands in for the `subprocess.Popen` of the engine process."""

    def __init__(self, command: list[str], **options: Any) -> None:
        arguments = command[command.index("--fd") :]
        self.pid = fork(lambda: runtime.engine_process.main(arguments))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def fork(run: Callable[[], object]) -> int:
    """The id of a process that runs this and ends with the code it exits with."""
    if pid := os.fork():
        return pid
    signal.alarm(LIMIT_SECONDS)
    code: object = 0
    try:
        with limited_memory():
            run()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def run_command(name: str, folder: Path, outputs: list[Path]) -> None:
    for stream, output in zip((sys.stdout, sys.stderr), outputs, strict=True):
        with output.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    case = BAD[name]
    with (
        case.reading(folder) as path,
        patch.object(subprocess, "Popen", ForkedEngine),
    ):
        sys.argv = ["fathom", "serve", str(path), "--dtype", case.dtype, *OPTIONS.split()]
        api.__main__.main()


def peak_kilobytes(pid: int) -> tuple[int, int]:
    """``(exit code, peak)`` of a process and those it waited for."""
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss


def import_everything() -> None:
    """What the command imports while it runs, by a run that fails."""
    sys.argv = ["fathom", "serve", "./nothing", "--port", "0", "--no-key"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        api.__main__.main()


def main() -> None:
    import_everything()
    _, of_imports = peak_kilobytes(fork(lambda: None))
    for line in sys.stdin:
        name, folder = json.loads(line)
        outputs = [Path(folder).parent / file for file in ("stdout", "stderr")]
        returncode, peak = peak_kilobytes(fork(lambda: run_command(name, Path(folder), outputs)))  # noqa: B023
        result = Result(
            returncode,
            *(output.read_text(errors="replace") for output in outputs),
            peak_bytes=max(peak - of_imports, 0) << 10,
        )
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
