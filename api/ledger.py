"""How much each key has used, by day and model, in an SQLite file beside the key store.

Requests only add to numbers in memory; a thread writes them down about once a second. Whatever is
wrong with the file, no request waits or fails: what could not be written is kept and tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from api import key_file
from api.keys import SECONDS_PER_DAY
from runtime import ConfigError

FILE_NAME = "usage.db"
SCHEMA_VERSION = 1
WRITE_SECONDS = 1.0
BUSY_SECONDS = 1.0
"""How long one try to write waits for another process that writes."""

TABLE = f"""
CREATE TABLE IF NOT EXISTS usage (
    day INTEGER NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (day, key_id, model)
) {key_file.STRICT}
"""
ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (day, key_id, model) DO UPDATE SET
    requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""
TOTALS = (
    "SELECT key_id, sum(prompt_tokens + completion_tokens) FROM usage WHERE day = ? GROUP BY key_id"
)
ROWS = "SELECT * FROM usage WHERE day >= ? ORDER BY day, key_id, model"

logger = logging.getLogger("fathom.api")


def ledger_path(store_path: Path) -> Path:
    """Where the ledger of a key store is."""
    return store_path.with_name(FILE_NAME)


@dataclass(slots=True)
class Usage:
    """What one key used of one model on one day; cached tokens are among the prompt's."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """What counts against a key's tokens of a day."""
        return self.num_prompt_tokens + self.num_completion_tokens

    def add(self, other: Usage) -> None:
        self.num_requests += other.num_requests
        self.num_prompt_tokens += other.num_prompt_tokens
        self.num_cached_tokens += other.num_cached_tokens
        self.num_completion_tokens += other.num_completion_tokens


Entries = dict[tuple[int, str], Usage]
"""(day counted from 1970 in UTC, key id) -> usage of this server's model."""


class Ledger:
    """Counts what keys use of one model. Any thread may call it; only `write` touches the file."""

    def __init__(self, path: Path, model: str, *, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives Unix seconds. What the file holds for today is read at once."""
        self._path = path
        self._model = model
        self._clock = clock
        self._lock = threading.Lock()  # of the numbers, never held while the file is used
        self._file_lock = threading.Lock()
        self._pending: Entries = {}
        self._being_written: Entries = {}
        self._stored_day = self.today
        self._stored: Mapping[str, int] = {}  # key id -> tokens of that day, all servers' together
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the connected file
        self._is_failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="ledger", daemon=True)
        self.write()

    @property
    def today(self) -> int:
        return int(self._clock() // SECONDS_PER_DAY)

    @property
    def seconds_left_today(self) -> float:
        """Until midnight UTC."""
        return SECONDS_PER_DAY - self._clock() % SECONDS_PER_DAY

    def start(self) -> None:
        """Write about once a second from now on, until `close`."""
        self._thread.start()

    def close(self) -> None:
        """Write down what is left. Idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.write()
        self._disconnect()

    def add(self, key_id: str, usage: Usage) -> None:
        with self._lock:
            self._pending.setdefault((self.today, key_id), Usage()).add(usage)

    def tokens_today(self, key_id: str) -> int:
        """Tokens of this UTC day: of this server as of now, of others as of a second ago."""
        with self._lock:
            entry = (self.today, key_id)
            unsaved = [self._pending.get(entry), self._being_written.get(entry)]
            stored = self._stored.get(key_id, 0) if self._stored_day == entry[0] else 0
            return stored + sum(usage.num_tokens for usage in unsaved if usage is not None)

    def write(self) -> None:
        """Write down what came since the last time, and read what other servers wrote."""
        with self._file_lock:
            self._write()

    def _write(self) -> None:
        with self._lock:
            entries = self._being_written = self._pending
            self._pending = {}
        today = self.today
        try:
            connection = self._connect()
            with connection:
                connection.executemany(ADD, self._rows(entries))
                totals = dict(connection.execute(TOTALS, (today,)).fetchall())
        except (OSError, sqlite3.Error, ConfigError) as error:
            self._disconnect()
            with self._lock:
                for entry, usage in entries.items():
                    self._pending.setdefault(entry, Usage()).add(usage)
                self._being_written = {}
            if not self._is_failing:
                logger.error("usage is kept in memory, for it cannot be written down: %s", error)
            self._is_failing = True
            return
        with self._lock:
            self._being_written = {}
            self._stored, self._stored_day = totals, today
        if self._is_failing:
            logger.warning("usage is written down again")
        self._is_failing = False

    def _rows(self, entries: Entries) -> list[tuple[int | str, ...]]:
        return [
            (
                *(day, key_id, self._model, usage.num_requests, usage.num_prompt_tokens),
                *(usage.num_cached_tokens, usage.num_completion_tokens),
            )
            for (day, key_id), usage in entries.items()
        ]

    def _write_often(self) -> None:
        while not self._closing.wait(WRITE_SECONDS):
            try:
                self.write()
            except Exception:  # the next second may be better
                logger.exception("usage could not be written down for a moment")

    def _connect(self) -> sqlite3.Connection:
        """The connection to the file that is at the path now, which is made if there is none."""
        with contextlib.suppress(FileNotFoundError):
            status = self._path.lstat()
            if self._connection is not None and self._identity == (status.st_dev, status.st_ino):
                return self._connection
        self._disconnect()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(self._path, flags, 0o600))
        status = self._path.lstat()
        key_file.check_private(self._path, status, "600")
        connection = key_file.attach(self._path, BUSY_SECONDS)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise sqlite3.DatabaseError("it was written by a newer version of Fathom")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
            connection.execute(TABLE)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, (status.st_dev, status.st_ino)
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One line of the ledger as it is in the file; the day is counted from 1970 in UTC."""

    day: int
    key_id: str
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def read_ledger(path: Path, first_day: int) -> list[LedgerRow]:
    """What was written down since ``first_day``, oldest first; nothing if there is no file.

    Raises `ConfigError` for a file that cannot be read.
    """
    if not os.path.lexists(path):
        return []
    try:
        key_file.check_private(path, path.lstat(), "600")
        with contextlib.closing(key_file.attach(path, key_file.BUSY_SECONDS)) as connection:
            rows = connection.execute(ROWS, (first_day,)).fetchall()
            return [LedgerRow(*row) for row in rows]
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path}: the usage ledger cannot be read: {error}") from None
