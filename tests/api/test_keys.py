"""The key store, and who gets past it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from api.cli import main
from api.errors import HttpError
from api.keys import KeyEntry, KeyStore, default_path
from api.keys_command import parse_expiry
from runtime import ConfigError, Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, scripted_state, serve, wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    store = KeyStore.open(path)
    yield store
    store.close()


def test_a_key_lives_from_create_to_revoke(store: KeyStore, path: Path) -> None:
    secret = store.create("open-webui")
    match = re.fullmatch(r"sk-open-webui-([0-9a-f]{8})-[\w-]{43}", secret)
    assert match is not None
    entry = store.authenticate(secret.encode())
    assert entry is not None
    assert (entry.name, entry.public_id, entry.revoked_at) == ("open-webui", match[1], None)
    (listed,) = store.list()  # the day of its use is written a little later
    assert replace(listed, last_used_day=None) == replace(entry, last_used_day=None)
    for wrong in (secret[:-1], secret + "A", secret.upper(), secret.replace("webui", "web"), ""):
        assert store.authenticate(wrong.encode()) is None
    assert store.authenticate("ключ-ключ-ключ-ключ-ключ".encode()) is None
    other = KeyStore.open(path)  # as another process would
    other.revoke("open-webui")
    other.close()
    assert store.authenticate(secret.encode()) is None
    (revoked,) = store.list()
    assert revoked.revoked_at is not None


def test_names(store: KeyStore) -> None:
    secret = store.create("a.b_c-D9")
    for bad in ("", "-a", "a b", "x" * 33, "ключ", "a/b", "a\n", "'; DROP TABLE keys; --"):
        with pytest.raises(ConfigError, match="not allowed"):
            store.create(bad)
    with pytest.raises(ConfigError, match="already is a key"):
        store.create("a.b_c-D9")
    for unknown in ("nobody", "", "\udcff", "a\0", "x" * 10_000, "%"):
        with pytest.raises(ConfigError, match="no active key is named") as caught:
            store.revoke(unknown)
        assert len(str(caught.value)) < 100
    first, second = store.create("by-id"), store.list()[-1].public_id
    store.revoke(second)
    assert store.authenticate(first.encode()) is None
    with pytest.raises(ConfigError, match="no active key"):
        store.revoke(second)
    store.create("by-id")  # a revoked name is free again
    assert store.authenticate(secret.encode()) is not None


def test_the_file_holds_digests_and_is_ours_alone(store: KeyStore, path: Path) -> None:
    secret = store.create("me")
    files = list(path.parent.iterdir())
    assert len(files) >= 2, "the write-ahead log is beside it"
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert secret[-43:].encode() not in file.read_bytes()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_store_that_others_can_read_is_refused(path: Path) -> None:
    KeyStore.open(path).close()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        KeyStore.open(path)
    path.chmod(0o600)
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match=f"chmod 700 {path.parent}"):
        KeyStore.open(path)


def test_what_is_not_a_key_store_is_refused_and_left_alone(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(ConfigError, match="is a link"):
        KeyStore.open(path)
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="is not a file"):
        KeyStore.open(path)
    path.rmdir()
    os.mkfifo(path, mode=0o600)
    with pytest.raises(ConfigError, match="is not a file"):
        KeyStore.open(path)
    path.unlink()
    path.touch(mode=0o600)
    with pytest.raises(ConfigError, match="is empty"):
        KeyStore.open(path)
    for version, match in ((99, "newer version"), (0, "not written by Fathom"), (3, "no such")):
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.executescript(f"CREATE TABLE IF NOT EXISTS x (y); PRAGMA user_version={version};")
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=match):
            KeyStore.open(path)
        assert path.read_bytes() == before


def test_a_store_of_another_user_is_refused(
    store: KeyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = store.create("me").encode()
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        KeyStore.open(path)
    with pytest.raises(HttpError, match="cannot be checked"):
        store.authenticate(secret)


def test_a_store_that_another_process_keeps_locked_is_refused(path: Path) -> None:
    KeyStore.open(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConfigError, match="locked"):
            KeyStore.open(path, busy_seconds=0.1)


def test_a_writer_holds_up_no_check(path: Path) -> None:
    with contextlib.closing(KeyStore.open(path, busy_seconds=0.1)) as store:
        secret = store.create("me").encode()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert store.authenticate(secret) is not None
            with pytest.raises(ConfigError, match="locked"):
                store.create("you")


VERSION_1 = """
CREATE TABLE IF NOT EXISTS keys (
    public_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest BLOB NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS active_name ON keys (name) WHERE revoked_at IS NULL;
PRAGMA user_version = 1;
"""


def write_version_1(path: Path, secrets: dict[str, int | None]) -> None:
    """A store as the first release wrote it: secret -> when it was revoked."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(VERSION_1)
        for index, (secret, revoked_at) in enumerate(secrets.items()):
            digest = hashlib.sha256(secret.encode()).digest()
            row = (f"{index:08x}", "old", digest, 1_700_000_000 + index, revoked_at)
            old.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", row)
        old.commit()


def test_a_store_of_the_first_release_is_brought_up_to_date(path: Path) -> None:
    gone, kept = "sk-old-00000000-" + "a" * 43, "sk-old-00000001-" + "b" * 43
    write_version_1(path, {gone: 1_700_000_100, kept: None})
    with contextlib.closing(KeyStore.open(path)) as store:
        assert store.authenticate(gone.encode()) is None
        entry = store.authenticate(kept.encode())
        assert entry == KeyEntry("00000001", "old", 1_700_000_001, None, None, None)
        new = store.create("new", expires_at=4_000_000_000)
    with contextlib.closing(KeyStore.open(path)) as store:
        found = store.authenticate(new.encode())
        assert found is not None
        assert found.expires_at == 4_000_000_000
        assert [each.name for each in store.list()] == ["old", "old", "new"]


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FATHOM_HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / "keys.db"
    monkeypatch.delenv("FATHOM_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path() == tmp_path / "data" / "fathom" / "keys.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "share" / "fathom" / "keys.db"


# -- time ----------------------------------------------------------------------------------------

DAY = 86400
NOON = 20_000 * DAY + DAY // 2


class Clock:
    """Wall-clock seconds that a test moves."""

    def __init__(self) -> None:
        self.now = float(NOON)

    def __call__(self) -> float:
        return self.now


def test_a_key_expires_by_the_wall_clock(path: Path) -> None:
    clock = Clock()
    with contextlib.closing(KeyStore.open(path, clock=clock)) as store:
        secret = store.create("guest", expires_at=NOON + 100).encode()
        public_id = store.list()[0].public_id
        for seconds, active in ((0, True), (99, True), (100, False), (1e9, False), (-1e9, True)):
            clock.now = NOON + seconds
            assert (store.authenticate(secret) is not None) == active, seconds
            assert store.is_active(public_id) == active, seconds
            assert store.list()[0].state(clock.now) == ("active" if active else "expired")


def test_the_name_of_an_expired_key_is_free(path: Path) -> None:
    clock = Clock()
    with contextlib.closing(KeyStore.open(path, clock=clock)) as store:
        first = store.create("guest", expires_at=NOON + 100).encode()
        with pytest.raises(ConfigError, match="already is a key"):
            store.create("guest")
        clock.now += 100
        second = store.create("guest").encode()
        assert [entry.state(clock.now) for entry in store.list()] == ["expired", "active"]
        clock.now -= 50  # a clock that goes back brings no key back
        assert store.authenticate(first) is None
        assert store.authenticate(second) is not None
        store.revoke("guest")
        assert [entry.state(clock.now) for entry in store.list()] == ["expired", "revoked"]


def test_the_day_of_the_last_use_is_written_once_a_day(path: Path) -> None:
    clock = Clock()
    KeyStore.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.executescript(
            "CREATE TABLE writes (day INTEGER); CREATE TRIGGER noted AFTER UPDATE ON keys "
            "BEGIN INSERT INTO writes VALUES (new.last_used_day); END;"
        )
    with contextlib.closing(KeyStore.open(path, clock=clock)) as store:
        secret = store.create("me").encode()
        unused = store.create("unused").encode()
        assert [entry.last_used_day for entry in store.list()] == [None, None]
        for day in (20_000, 20_001):
            for _ in range(100):
                assert store.authenticate(secret) is not None
                assert store.authenticate(unused + b"x") is None
                clock.now += 60
            wait_until(lambda day=day: store.list()[0].last_used_day == day)
            clock.now = NOON + DAY
        clock.now = NOON  # a clock that goes back writes nothing
        assert store.authenticate(secret) is not None
    with contextlib.closing(KeyStore.open(path, clock=clock)) as store:
        store.authenticate(secret)
        assert [entry.last_used_day for entry in store.list()] == [20_001, None]
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT day FROM writes").fetchall() == [(20_000,), (20_001,)]


def test_a_use_that_cannot_be_written_down_fails_no_request(path: Path) -> None:
    with contextlib.closing(KeyStore.open(path)) as store:
        secret = store.create("me").encode()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(
                "CREATE TRIGGER full BEFORE UPDATE ON keys BEGIN SELECT RAISE(FAIL, 'x'); END"
            )
        for _ in range(3):
            assert store.authenticate(secret) is not None
    with contextlib.closing(KeyStore.open(path)) as store:
        assert store.list()[0].last_used_day is None


# -- a store that breaks while it is open --------------------------------------------------------


def is_shut(store: KeyStore, secrets: Iterable[str], public_ids: Iterable[str]) -> bool:
    """Nobody is let in, everybody is told the same, and it is not cached."""
    for secret in (*secrets, "sk-unknown-00000000-" + "x" * 43):
        for _ in range(2):
            with pytest.raises(HttpError) as caught:
                store.authenticate(secret.encode())
            assert (caught.value.status, caught.value.code) == (503, "auth_unavailable")
            assert secret not in str(caught.value)
    for public_id in public_ids:
        with pytest.raises(HttpError) as caught:
            store.is_active(public_id)
        assert caught.value.code == "auth_unavailable"
    return True


@pytest.fixture
def filled(path: Path) -> Iterator[tuple[KeyStore, list[str], list[str]]]:
    """An open store of several pages, its secrets and public ids; one is lent, others revoked."""
    with contextlib.closing(KeyStore.open(path)) as before:
        secrets = [before.create("first"), before.create("last")]
        assert all(before.authenticate(secret.encode()) for secret in secrets)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        rows = [(f"{i:08x}", f"old-{i}", os.urandom(32), 1, 2) for i in range(100)]
        columns = "public_id, name, digest, created_at, revoked_at"
        other.executemany(f"INSERT INTO keys ({columns}) VALUES (?, ?, ?, ?, ?)", rows)
    with contextlib.closing(KeyStore.open(path)) as store:
        secrets.append(store.lend())
        public_ids = [secret.split("-")[2] for secret in secrets]
        assert all(store.authenticate(secret.encode()) for secret in secrets)
        assert all(store.is_active(public_id) for public_id in public_ids)
        assert not store.is_active(store.list()[-1].public_id)
        assert not store.is_active("ffffffff")
        yield store, secrets, public_ids


TICK = 40_000_000  # ns
Filled = tuple[KeyStore, list[str], list[str]]


def test_a_file_cut_short_anywhere_lets_nobody_in_and_does_not_start(
    filled: Filled, path: Path, tmp_path: Path
) -> None:
    store, secrets, public_ids = filled
    whole = path.read_bytes()
    assert len(whole) >= 5 * 4096
    copy = tmp_path / "copy" / "keys.db"
    copy.parent.mkdir(mode=0o700)
    for size in range(0, len(whole), 512):
        path.write_bytes(whole[:size])
        assert is_shut(store, secrets, public_ids), size
        copy.touch(mode=0o600)
        copy.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            KeyStore.open(copy)
        copy.unlink()
    path.write_bytes(whole)
    assert all(store.authenticate(secret.encode()) for secret in secrets), "the file is whole again"


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def one_page_of_garbage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * 4096 : 3 * 4096] = random.Random(1).randbytes(4096)
    path.write_bytes(data)


def drop_the_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE keys")


def write_newer_schema(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


DAMAGES: list[Callable[[Path], object]] = [
    garbage,
    one_page_of_garbage,
    drop_the_table,
    write_newer_schema,
    replace_by_a_copy,
    Path.unlink,
    lambda path: path.chmod(0o644),
    lambda path: path.write_bytes(b""),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_that_breaks_lets_nobody_in(
    filled: Filled, path: Path, damage: Callable[[Path], object]
) -> None:
    store, secrets, public_ids = filled
    damage(path)
    assert is_shut(store, secrets, public_ids)
    if damage not in (replace_by_a_copy, Path.unlink):
        with pytest.raises(ConfigError):
            KeyStore.open(path)


def test_damage_within_one_tick_of_the_files_clock_is_seen(
    filled: Filled, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = Path.lstat

    def coarse_lstat(path: Path) -> SimpleNamespace:
        """As before Linux 6.13: times of files move in ticks, here of 40 ms."""
        status = lstat(path)
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**fields | {"st_ctime_ns": status.st_ctime_ns // TICK * TICK})

    monkeypatch.setattr(Path, "lstat", coarse_lstat)
    store, secrets, _ = filled
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for _ in range(20):
            assert store.authenticate(secrets[0].encode()) is not None
            os.pwrite(file.fileno(), b"x" * len(whole), 0)
            assert is_shut(store, secrets[:1], [])
            os.pwrite(file.fileno(), whole, 0)


# -- processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def forked(work: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """Run ``work(pipe)`` in a child of this process: its id, and the end of its pipe to read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        yield child, reader
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)


def make_and_revoke(path: Path, label: str, pipe: int) -> None:
    """Write down what was acknowledged, and before each revocation that it may have happened."""
    store = KeyStore.open(path)
    for index in itertools.count():
        secret = store.create(f"{label}-{index}")
        os.write(pipe, f"created {secret}\n".encode())
        if index % 3 == 0:
            os.write(pipe, f"revoking {secret}\n".encode())
            store.revoke(f"{label}-{index}")
            os.write(pipe, f"revoked {secret}\n".encode())


def kill_while_it_writes(
    path: Path, label: str, num_lines: int, seconds: float
) -> list[tuple[str, str]]:
    """Kill the child ``seconds`` after it said ``num_lines``: all that it said of its secrets."""
    with forked(lambda pipe: make_and_revoke(path, label, pipe)) as (child, reader):
        said = b""
        while said.count(b"\n") < num_lines:
            assert select.select([reader], [], [], 30)[0]
            said += os.read(reader, 65536)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        said += b"".join(iter(lambda: os.read(reader, 65536), b""))
    return [(secret, word) for word, secret in map(str.split, said.decode().splitlines())]


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_what_was_acknowledged_outlives_a_killed_process(path: Path, rounds: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    last_words: dict[str, str] = {}
    num_said = 0
    write_version_1(path, {})
    for index in range(rounds):
        if index % 5 == 1:
            shutil.rmtree(path.parent)
            last_words = {}
        # the first two of five rounds may die while they migrate or make the file
        num_lines = 0 if index % 5 < 2 else chance.randrange(1, 20)
        said = kill_while_it_writes(path, f"r{index}", num_lines, chance.uniform(0, 0.01))
        last_words.update(said)
        num_said += len(said)
        with contextlib.closing(KeyStore.open(path)) as store:
            for secret, word in last_words.items():
                if word != "revoking":  # that one may have happened or not
                    found = store.authenticate(secret.encode())
                    assert (found is not None) == (word == "created"), (word, secret)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert num_said > rounds


def test_every_process_sees_a_revocation_at_once(path: Path) -> None:
    with contextlib.closing(KeyStore.open(path)) as store:
        secret = store.create("shared").encode()
    pipes = [os.pipe(), os.pipe()]

    def answer(questions: int, pipe: int) -> None:
        server = KeyStore.open(path)
        while os.read(questions, 1) == b"?":
            os.write(pipe, b"n" if server.authenticate(secret) is None else b"y")

    with contextlib.ExitStack() as stack:
        servers = [
            (ask, stack.enter_context(forked(partial(answer, questions)))[1])
            for questions, ask in pipes
        ]

        def answers() -> list[bytes]:
            for ask, _ in servers:
                os.write(ask, b"?")
            assert all(select.select([reader], [], [], 10)[0] for _, reader in servers)
            return [os.read(reader, 1) for _, reader in servers]

        assert answers() == [b"y", b"y"]
        assert answers() == [b"y", b"y"]
        with contextlib.closing(KeyStore.open(path)) as store:
            store.revoke("shared")
        assert answers() == [b"n", b"n"]
    for end in itertools.chain(*pipes):
        os.close(end)


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * DAY), ("12h", 12 * 3600), ("1h", 3600), ("36500d", 36500 * DAY)],
)
def test_times_to_live(text: str, seconds: int) -> None:
    assert parse_expiry(text, NOON + 0.7) == NOON + seconds


def test_the_last_day_of_a_key_is_a_whole_day_of_this_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        for zone, offset in (("UTC0", 0), ("XXX-8", 8), ("XXX+10", -10)):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            end = parse_expiry("2026-12-31", NOON)
            assert end == 1_798_761_599 - offset * 3600  # 2026-12-31T23:59:59 there
            assert parse_expiry("2024-10-04", NOON) > NOON - DAY  # today
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a time"),
        ("soon", "not a time"),
        ("30", "not a time"),
        ("-3d", "not a time"),
        ("３d", "not a time"),
        ("1.5h", "not a time"),
        ("20261231", "not a time"),
        ("2026-12-31T00:00", "not a time"),
        ("9" * 400 + "d", "not a time"),
        ("0d", "between 1h and 36500d"),
        ("36501d", "between 1h and 36500d"),
        ("2026-02-30", "not a day"),
        ("0000-01-01", "not a day"),
        ("2024-10-02", "in the past"),
        ("9999-12-31", "more than 36500 days"),
    ],
)
def test_times_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_expiry(text, NOON)
    assert "--expires" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.fixture
def fathom(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., int]:
    """Runs `fathom keys …` in this process on the store at ``path``; its exit code."""
    monkeypatch.setenv("FATHOM_HOME", str(path.parent))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fathom", "keys", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run


def test_the_list_shows_times_and_states_and_no_secret(
    fathom: Callable[..., int], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fathom("create", "guest", "--expires", "2099-12-31") == 0
    assert fathom("create", "past", "--expires", "1h") == 0
    assert fathom("create", "open-webui") == 0
    secrets = capsys.readouterr().out.split()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE keys SET expires_at = created_at WHERE name = 'past'")
        connection.execute("UPDATE keys SET last_used_day = 20783 WHERE name = 'guest'")
        connection.execute("UPDATE keys SET created_at = 1 << 60 WHERE name = 'open-webui'")
    assert fathom("revoke", "open-webui") == 0
    capsys.readouterr()
    assert fathom("list") == 0
    listed = capsys.readouterr().out
    header, guest, past, open_webui = listed.splitlines()
    assert re.split(r"  +", header) == ["id", "name", "created", "expires", "last used", "state"]
    assert re.fullmatch(
        r"[0-9a-f]{8}  guest       \d{4}-\d\d-\d\d \d\d:\d\d  2099-12-31 23:59  2026-11-26  active",
        guest,
    )
    assert past.endswith("  never       expired")
    assert open_webui.endswith("  never             never       revoked")
    assert str(1 << 60) in open_webui
    for secret in secrets:
        assert not any(secret[-43:][i : i + 6] in listed for i in range(38))


def test_a_full_disk_behind_standard_output_is_one_line(
    fathom: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: Path,
) -> None:
    assert fathom("create", "me") == 0
    for arguments in (["list"], ["revoke", "me"], ["create", "you"]):
        capsys.readouterr()
        with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert fathom(*arguments) == 2
            with contextlib.suppress(OSError):
                full.close()
        (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("Keep this")]
        assert line.startswith("fathom: ")
        assert "No space left on device" in line
    with contextlib.closing(KeyStore.open(path)) as store:
        assert [entry.state(time.time()) for entry in store.list()] == ["revoked", "revoked"]


# -- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def keyed(store: KeyStore, tokenizer: Tokenizer) -> Iterator[tuple[str, str, ScriptedEngine]]:
    """A server that wants a key: its address, a key, and the engine behind it."""
    secret = store.create("tester")  # from now on the store is the server's: one thread at a time
    state = replace(scripted_state(tokenizer), keys=store)
    engine_of(state).say("welcome")
    with serve(state) as base:
        yield base, secret, engine_of(state)


Keyed = tuple[str, str, ScriptedEngine]


def test_ways_to_send_a_key(keyed: Keyed) -> None:
    base, secret, _ = keyed
    good = [
        {"authorization": f"Bearer {secret}"},
        {"authorization": f"bEaReR {secret}"},
        {"x-api-key": secret},
        {"authorization": f"Bearer {secret}", "x-api-key": "whatever"},
    ]
    for headers in good:
        assert httpx.get(f"{base}/models", headers=headers).status_code == 200
    missing = httpx.get(f"{base}/models")
    assert missing.json()["error"]["code"] == "missing_api_key"
    bad: list[list[tuple[str, str]]] = [
        [("authorization", f"Basic {secret}")],
        [("authorization", secret)],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {secret}x")],
        [("authorization", "Bearer " + "x" * 10_000)],
        [("authorization", f"Bearer {secret}"), ("authorization", f"Bearer {secret}")],
        [("authorization", "Bearer wrong"), ("x-api-key", secret)],
        [("x-api-key", secret), ("x-api-key", secret)],
    ]
    for pairs in bad:
        response = httpx.get(f"{base}/models", headers=pairs)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert secret not in response.text
    assert httpx.get(f"{base}/models?api_key={secret}").status_code == 401


def test_the_key_comes_before_everything_else(keyed: Keyed) -> None:
    base, secret, engine = keyed
    for method, path in (("GET", "/nope"), ("DELETE", "/models"), ("POST", "/chat/completions")):
        assert httpx.request(method, base + path, content=b"{").status_code == 401
    with socket.create_connection(("127.0.0.1", urlsplit(base).port or 80), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 401"), "the body was not waited for"
    assert engine.submitted == []
    assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(base.replace("/v1", "/health/")).status_code == 200
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{base}/nope", headers=headers).status_code == 404


def test_with_keys_every_origin_is_answered(keyed: Keyed) -> None:
    base, secret, _ = keyed
    for origin in ("null", "file://", "app://x", "https://chat.example"):
        headers = {"origin": origin}
        preflight = httpx.options(f"{base}/chat/completions", headers=headers)
        refused = httpx.get(f"{base}/models", headers=headers)
        good = httpx.get(f"{base}/models", headers={**headers, "authorization": f"Bearer {secret}"})
        assert [r.status_code for r in (preflight, refused, good)] == [204, 401, 200]
        for response in (preflight, refused, good):
            assert response.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in response.headers


def test_a_revoked_key_is_refused_at_once(keyed: Keyed, path: Path) -> None:
    base, secret, _ = keyed
    with openai.OpenAI(base_url=base, api_key=secret, max_retries=0) as client:
        assert client.models.list().data
        other = KeyStore.open(path)
        other.revoke("tester")
        other.close()
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("damage", ["overwrite", "remove", "replace"])
def test_a_broken_store_lets_nobody_in(keyed: Keyed, path: Path, damage: str) -> None:
    base, secret, _ = keyed
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{base}/models", headers=headers).status_code == 200
    if damage == "overwrite":
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE keys")
        connection.close()
    else:
        path.unlink()
    if damage == "replace":
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    response = httpx.get(f"{base}/models", headers=headers)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "auth_unavailable"
    assert "retry-after" in response.headers
