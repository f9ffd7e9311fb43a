"""Rows of the fault matrix about files: the key store, the checkpoint, full disks, clocks."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from api.keys import KeyStore
from tests.faults.bench import Bench, Row, brief, code_of, expect
from tests.faults.server_rows import start
from tests.load.client import Address
from tests.load.served import ROOT, served, wait_until
from tests.runtime.engines import TINY


def keys(home: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api", "keys", *arguments],
        cwd=ROOT,
        env={**os.environ, "FATHOM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


def pytest_row(*arguments: str) -> str:
    """The last line of a test run, which must have passed."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    last = result.stdout.strip().splitlines()[-1]
    expect(result.returncode == 0, last)
    return f"pytest {' '.join(arguments)}: {last}"


def full_disk(bench: Bench) -> str:
    """F25"""
    home = bench.folder()
    secret = keys(home, "create", "old").stdout.strip()

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    created = keys(home, "create", "new", preexec_fn=no_room)
    line = created.stderr.strip().splitlines()[-1]
    store = KeyStore.open(home / "keys.db")
    old_works = store.authenticate(secret.encode()) is not None
    names = [entry.name for entry in store.list()]
    store.close()
    seen = f"keys create: exit {created.returncode}: {line}; old key works: {old_works}"
    expect(created.returncode == 2 and old_works and names == ["old"], seen)
    expect("Traceback" not in created.stderr, created.stderr)
    return seen


def broken_keys(bench: Bench) -> str:
    """F26"""
    lines = []
    for name, spoil in {
        "garbage": lambda file: file.write_bytes(b"garbage" * 1000),
        "truncated": lambda file: file.write_bytes(file.read_bytes()[:1500]),
        "mode 0644": lambda file: file.chmod(0o644),
        "newer": lambda file: set_version(file, 99),
    }.items():
        home = bench.folder()
        keys(home, "create", "one")
        spoil(home / "keys.db")
        result = start("--port", "0", home=home)
        line = result.stderr.strip()
        lines.append(f"{name}: exit {result.returncode}")
        expect(result.returncode == 2 and "\n" not in line, f"{name}: {line}")
    with served() as server:
        file = server.home / "keys" / "keys.db"
        before = server.chat(max_tokens=5)
        for path in file.parent.iterdir():
            path.write_bytes(b"")
        after = server.chat(max_tokens=5)
        file.unlink()
        gone = server.chat(max_tokens=5)
        lines.append(f"while serving: {brief(before)}, emptied {brief(after)}, gone {brief(gone)}")
        expect(before.whole and after.status == gone.status == 503, "; ".join(lines))
        expect(code_of(gone) == "auth_unavailable", "; ".join(lines))
    return "; ".join(lines)


def set_version(file: Path, version: int) -> None:
    connection = sqlite3.connect(file)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()


def killed_key_writes(bench: Bench) -> str:
    """F27"""
    return pytest_row("tests/api/test_keys.py", "-k", "kill", "-m", "slow or not slow")


def corrupt_checkpoints(bench: Bench) -> str:
    """F28"""
    return pytest_row("tests/runtime/test_corpus.py")


def truncated_weights(bench: Bench) -> str:
    """F29"""
    folder = bench.folder() / "model"
    shutil.copytree(TINY, folder)
    with served_model(folder) as server:
        alone = server.chat(max_tokens=40).text
        for file in folder.glob("*.safetensors"):
            os.truncate(file, 100)
        same = server.chat(max_tokens=40).text == alone
    expect(same, "another answer")
    return "weights cut to 100 bytes while serving: same answer"


def vanished_model(bench: Bench) -> str:
    """F30"""
    folder = bench.folder() / "model"
    shutil.copytree(TINY, folder)
    with served_model(folder) as server:
        alone = server.chat(max_tokens=40).text
        folder.rename(folder.with_name("elsewhere"))
        same = server.chat(max_tokens=40).text == alone
        pid = server.engine_pid
        assert pid is not None
        os.kill(pid, 9)
        wait_until(lambda: server.get("/ready").status == 503, 10)
        time.sleep(8)  # a try to load it again
        lives = server.get("/health").status
        not_ready = server.get("/ready").status
        folder.with_name("elsewhere").rename(folder)
        seconds = wait_until(server.is_ready, 90)
        again = server.chat(max_tokens=40).text == alone
    seen = (
        f"serves on: {same}; engine killed: /health {lives}, /ready {not_ready}; folder back: "
        f"ready after {seconds:.1f} s, same answer: {again}"
    )
    expect(same and again and (lives, not_ready) == (200, 503), seen)
    return seen


def served_model(folder: Path):  # type: ignore[no-untyped-def]
    return served(str(folder))


def clocks(bench: Bench) -> str:
    """F31"""
    pattern = re.compile(r"\btime\.time\(|datetime\.now\(")
    sources = set((ROOT / "runtime").rglob("*.py")) - {ROOT / "runtime" / "chat_sandbox.py"}
    files = [file for file in sources if pattern.search(file.read_text())]
    expect(not files, f"wall clock in {files}")
    return "no wall clock in runtime/ but for templates' own; " + pytest_row(
        "tests/api/test_keys.py", "-k", "expir"
    )


def two_servers(bench: Bench) -> str:
    """F39"""
    home = bench.folder()
    with served(home=home) as first, served(home=home) as second:
        secret = keys(home / "keys", "create", "shared").stdout.strip()
        for server in (first, second):
            server.address = Address(server.address.host, server.address.port, secret)
            expect(server.chat(max_tokens=5).whole, "the new key does not work in both")
        keys(home / "keys", "revoke", "shared")
        statuses = [server.chat(max_tokens=5).status for server in (first, second)]
    expect(statuses == [401, 401], str(statuses))
    return f"new key works in both at once; revoked: {statuses}"


def old_keys(bench: Bench) -> str:
    """F40"""
    return pytest_row("tests/api/test_keys.py", "-k", "migrat or older or newer or version")


ROWS = [
    Row("F25", "disk full for the key store", "one line, old keys work", full_disk),
    Row("F26", "key store broken", "no start; 503 for all while serving", broken_keys),
    Row("F27", "kill -9 while keys are written", "what was said is there", killed_key_writes),
    Row("F28", "corrupt checkpoints", "refused with a reason", corrupt_checkpoints),
    Row("F29", "weights cut after the load", "no effect", truncated_weights),
    Row("F30", "model folder vanishes", "serves on; comes back", vanished_model),
    Row("F31", "clocks jump", "only key expiry follows", clocks),
    Row("F39", "two servers, one key store", "revoked in both at once", two_servers),
    Row("F40", "older and newer key stores", "migrated, refused", old_keys),
]
