"""The usage ledger: what keys used is written down, and nothing about it stops a request."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.cli import main
from api.keys import KeyStore
from api.ledger import Ledger, LedgerRow, Usage, ledger_path, read_ledger
from api.running import Running
from runtime import ConfigError, Tokenizer
from tests.api.scripted import engine_of, post, scripted_state, serve, wait_until

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
DAY = 20_000
NOON = DAY * 86_400 + 43_200.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return home / "usage.db"


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "fathom.api")
    return lambda: [record.getMessage() for record in caplog.records]


def test_what_was_added_is_read_back_by_day_key_and_model(path: Path) -> None:
    now = NOON
    one = Ledger(path, "tiny", clock=lambda: now)
    other = Ledger(path, "large", clock=lambda: now)
    one.add("ann", Usage(1, 10, 4, 0))
    one.add("ann", Usage(0, 0, 0, 7))
    one.write()
    one.add("bob", Usage(1, 5, 0, 1))
    other.add("ann", Usage(1, 100, 0, 100))
    now += 86_400
    one.add("ann", Usage(1, 1, 1, 1))
    one.close()
    other.close()
    rows = [
        LedgerRow(DAY, "ann", "large", 1, 100, 0, 100),
        LedgerRow(DAY, "ann", "tiny", 1, 10, 4, 7),
        LedgerRow(DAY, "bob", "tiny", 1, 5, 0, 1),
        LedgerRow(DAY + 1, "ann", "tiny", 1, 1, 1, 1),
    ]
    assert read_ledger(path, DAY) == rows
    assert read_ledger(path, DAY + 1) == rows[3:]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_tokens_of_today_are_those_of_all_servers(path: Path) -> None:
    now = NOON
    one = Ledger(path, "tiny", clock=lambda: now)
    one.add("ann", Usage(1, 10, 10, 5))
    assert one.tokens_today("ann") == 15  # at once, and cached tokens are not counted twice
    one.write()
    one.add("ann", Usage(0, 0, 0, 1))
    assert one.tokens_today("ann") == 16
    with contextlib.closing(Ledger(path, "large", clock=lambda: now)) as other:
        assert other.tokens_today("ann") == 15  # what is written down, already at its start
        other.add("ann", Usage(1, 1000, 0, 0))
    one.write()
    assert one.tokens_today("ann") == 1016
    assert one.tokens_today("bob") == 0
    assert one.seconds_left_today == 43_200
    now += 43_200
    assert one.tokens_today("ann") == 0
    one.close()


def test_a_locked_file_holds_up_nothing_and_loses_nothing(
    path: Path, errors: Callable[[], list[str]]
) -> None:
    ledger = Ledger(path, "tiny", clock=lambda: NOON)
    ledger.add("ann", Usage(1, 1, 0, 1))
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = threading.Thread(target=ledger.write)
        writing.start()
        started = time.monotonic()
        for number in range(1000):
            ledger.add("ann", Usage(0, 0, 0, 1))
            assert ledger.tokens_today("ann") == 3 + number  # what is being written counts too
        assert writing.is_alive() or time.monotonic() - started > 0.5
        writing.join()
        ledger.write()
        assert ledger.tokens_today("ann") == 1002
        assert len(errors()) == 1 and "locked" in errors()[0]
        other.rollback()
    ledger.write()
    assert len(errors()) == 2 and "again" in errors()[1]
    ledger.close()
    assert read_ledger(path, DAY) == [LedgerRow(DAY, "ann", "tiny", 1, 1, 0, 1001)]


def damage(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)


DAMAGES: list[Callable[[Path], object]] = [
    damage,
    lambda path: path.chmod(0o644),
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), path.symlink_to("/dev/full")),
    lambda path: path.parent.chmod(0o500) if os.geteuid() else damage(path),
]


@pytest.mark.parametrize("break_it", DAMAGES)
def test_a_broken_file_is_one_line_in_the_log(
    path: Path, errors: Callable[[], list[str]], break_it: Callable[[Path], object]
) -> None:
    Ledger(path, "tiny", clock=lambda: NOON).close()
    break_it(path)
    try:
        ledger = Ledger(path, "tiny", clock=lambda: NOON)
        for _ in range(3):
            ledger.add("ann", Usage(1, 1, 0, 1))
            ledger.write()
        assert ledger.tokens_today("ann") == 6
        ledger.close()
        assert len(errors()) == 1
        assert "kept in memory" in errors()[0]
    finally:
        path.parent.chmod(0o700)


def test_a_full_disk_is_one_line_in_the_log(
    path: Path, errors: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(path, "tiny", clock=lambda: NOON)
    connection = ledger._connect()
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {num_pages}")
    monkeypatch.setattr(ledger, "_disconnect", lambda: None)  # another would have no limit
    for number in range(2000):
        ledger.add(f"key-{number}", Usage(1, 1, 0, 1))
    ledger.write()
    ledger.write()
    assert len(errors()) == 1 and "full" in errors()[0]
    assert ledger.tokens_today("key-7") == 2
    connection.execute("PRAGMA max_page_count = 100000")
    ledger.write()
    assert len(read_ledger(path, DAY)) == 2000
    monkeypatch.undo()
    ledger.close()


def test_a_file_that_was_removed_is_made_again(path: Path) -> None:
    ledger = Ledger(path, "tiny", clock=lambda: NOON)
    for file in path.parent.iterdir():
        file.unlink()
    ledger.add("ann", Usage(1, 2, 0, 3))
    ledger.close()
    assert read_ledger(path, DAY) == [LedgerRow(DAY, "ann", "tiny", 1, 2, 0, 3)]


KILLED = """
import sys, time
from pathlib import Path
from api.ledger import Ledger, Usage
ledger = Ledger(Path(sys.argv[1]), "tiny")
ledger.start()
while True:
    ledger.add("ann", Usage(1, 1, 0, 1))
    print("x", flush=True)
    time.sleep(0.001)
"""


def test_a_killed_server_loses_a_second_or_two(path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        wait_until(lambda: path.exists() and sum_of(path) > 100, 60)
        process.send_signal(signal.SIGKILL)
        num_added = len(process.stdout.read().split())
    kept = sum_of(path)
    assert 100 < kept <= num_added
    Ledger(path, "tiny").close()  # nothing is left locked or damaged
    assert sum_of(path) == kept


def sum_of(path: Path) -> int:
    with contextlib.suppress(ConfigError):
        return sum(row.requests for row in read_ledger(path, 0))
    return 0


@contextlib.contextmanager
def keyed_server(tokenizer: Tokenizer, path: Path) -> Iterator[tuple[str, dict[str, str], Ledger]]:
    """A server with a ledger: its address, a key's headers, the ledger."""
    store = KeyStore.open(path.with_name("keys.db"))
    ledger = Ledger(ledger_path(store.path), "fathom-tiny")
    ledger.start()
    state = replace(scripted_state(tokenizer), keys=store, running=Running(ledger))
    engine_of(state).say("hello to you")
    engine_of(state).num_cached = 2
    headers = {"authorization": f"Bearer {store.create('ann')}"}
    with serve(state) as base:
        yield base, headers, ledger
    ledger.close()
    store.close()


def test_the_ledger_says_what_the_answers_said(tokenizer: Tokenizer, path: Path) -> None:
    with keyed_server(tokenizer, path) as (base, headers, _):
        bodies = [HELLO, {**HELLO, "n": 3}, {**HELLO, "stop": ["to"]}, {**HELLO, "max_tokens": 2}]
        usages = [post(base, body, headers=headers).json()["usage"] for body in bodies]
        assert post(base, HELLO).status_code == 401
        assert post(base, {**HELLO, "top_p": 7}, headers=headers).status_code == 400
        key_id = headers["authorization"].split("-")[2]
    (row,) = read_ledger(path, 0)
    assert (row.key_id, row.model) == (key_id, "fathom-tiny")
    assert row.requests == 4
    assert row.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert row.completion_tokens == sum(usage["completion_tokens"] for usage in usages)
    assert row.cached_tokens == 8


def test_a_broken_ledger_fails_no_request(
    tokenizer: Tokenizer, path: Path, errors: Callable[[], list[str]]
) -> None:
    with keyed_server(tokenizer, path) as (base, headers, ledger):
        wait_until(path.exists)
        path.unlink()
        path.mkdir()
        for _ in range(3):
            assert post(base, HELLO, headers=headers).status_code == 200
            ledger.write()
        assert ledger.tokens_today(headers["authorization"].split("-")[2]) > 0
    assert len(errors()) == 1


@pytest.fixture
def usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `fathom keys usage` on the ledger at ``path``: exit code, output, errors."""
    monkeypatch.setenv("FATHOM_HOME", str(path.parent))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fathom", "keys", "usage", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


def test_the_usage_command(usage: Callable[..., tuple[int, str, str]], path: Path) -> None:
    assert usage() == (0, "No key was used in the last 30 days.\n", "")
    with contextlib.closing(KeyStore.open()) as store:
        ann = store.create("ann").split("-")[2]
    now = time.time()
    ledger = Ledger(path, "tiny", clock=lambda: now)
    ledger.add(ann, Usage(2, 1234567, 16, 8))
    ledger.add("0badcafe", Usage(1, 1, 0, 1))
    ledger.write()
    now -= 10 * 86_400
    ledger.add(ann, Usage(1, 5, 0, 5))
    ledger.close()

    code, output, _ = usage("--days", "5")
    header, *rows, total = [re.split(r"  +", line.strip()) for line in output.splitlines()]
    assert code == 0
    assert header == ["day (UTC)", "key", "model", "requests", "prompt", "cached", "answer"]
    today = time.strftime("%Y-%m-%d", time.gmtime(now + 10 * 86_400))
    assert sorted(rows) == sorted(
        [
            [today, "ann", "tiny", "2", "1,234,567", "16", "8"],
            [today, "lent by a server", "tiny", "1", "1", "0", "1"],
        ]
    )
    assert total == ["all", "3", "1,234,568", "16", "9"]
    assert len(usage()[1].splitlines()) == 5
    assert max(map(len, output.splitlines())) <= 80

    found = json.loads(usage("--json", "--days", "5")[1])
    assert {"day": today, "key_id": ann, "name": "ann", "model": "tiny", "requests": 2} | {
        "prompt_tokens": 1234567,
        "cached_tokens": 16,
        "completion_tokens": 8,
    } in found
    assert len(found) == 2

    damage(path)
    code, output, problem = usage()
    assert (code, output) == (2, "")
    assert problem.count("\n") == 1 and "usage ledger cannot be read" in problem
    assert usage("--days", "0")[0] == 2
