"""The SQLite file that holds the keys: made, checked from end to end, brought to our schema."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
from pathlib import Path

from runtime import ConfigError

SCHEMA_VERSION = 3
COLUMNS = (
    "public_id, name, created_at, revoked_at, expires_at, last_used_day, "
    "max_concurrency, tokens_per_day, digest"
)
BUSY_SECONDS = 5.0
"""How long a command waits for another process that writes."""

# STRICT came with SQLite 3.37; Red Hat 9 has an older one.
STRICT = "STRICT" if sqlite3.sqlite_version_info >= (3, 37) else ""
SCHEMA = f"""
CREATE TABLE keys (
    public_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest BLOB NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER,
    expires_at INTEGER,
    last_used_day INTEGER,
    max_concurrency INTEGER,
    tokens_per_day INTEGER
) {STRICT};
CREATE UNIQUE INDEX active_name ON keys (name) WHERE revoked_at IS NULL;
PRAGMA user_version = {SCHEMA_VERSION};
"""
ADDED_COLUMNS = {2: ("expires_at", "last_used_day"), 3: ("max_concurrency", "tokens_per_day")}
"""Schema version -> what it added to the one before; all integers."""


def make(path: Path) -> None:
    """Put an empty store at ``path`` in one step, so that an empty file is never one of ours."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with contextlib.closing(attach(draft, BUSY_SECONDS)) as connection:
            connection.executescript(f"BEGIN;{SCHEMA}COMMIT;")
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.hardlink_to(draft)
    finally:
        draft.unlink()


def attach(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """A connection to a file that was not checked; makes none. Raises `sqlite3.Error`."""
    # SQLite serialises calls itself; the server may be run by another thread than the opener's.
    return sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=busy_seconds, check_same_thread=False
    )


def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """A connection to a store that was checked from end to end. Raises `sqlite3.Error`."""
    connection = attach(path, busy_seconds)
    try:
        problems: list[tuple[str]]
        problems = connection.execute("PRAGMA integrity_check(1)").fetchall()
        if problems != [("ok",)]:
            raise sqlite3.DatabaseError(problems[0][0].splitlines()[-1])
        if _version(connection) != SCHEMA_VERSION:
            _migrate(connection)
        connection.execute(f"SELECT {COLUMNS} FROM keys LIMIT 0")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        version = _version(connection)  # another process may have been faster
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError("it was written by a newer version of Fathom")
        if version < 1:
            raise sqlite3.DatabaseError("it was not written by Fathom")
        for newer in range(version + 1, SCHEMA_VERSION + 1):
            for column in ADDED_COLUMNS[newer]:
                connection.execute(f"ALTER TABLE keys ADD COLUMN {column} INTEGER")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def check_file(path: Path) -> tuple[int, int]:
    """Device and inode of a store's file. Raises `ConfigError`, or `OSError` if it is gone."""
    status = path.lstat()
    check_private(path, status, "600")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: the key store cannot be opened: it is not a file")
    if status.st_size == 0:
        raise ConfigError(
            f"{path}: the key store is empty, which no key store is; restore it from a copy, or "
            "remove it and make new keys"
        )
    return status.st_dev, status.st_ino


def check_private(path: Path, status: os.stat_result, mode: str) -> None:
    """Raises `ConfigError` for a path that is not ours alone, with the ``mode`` it should have."""
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user; keys are not kept there")
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"{path} is a link; keys are not kept behind one")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"{path} can be read by other users; run `chmod {mode} {path}`")
