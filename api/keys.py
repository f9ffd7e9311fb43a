"""API keys in one SQLite file of the user's: digests only, the secret is shown once.

A key reads ``sk-<name>-<8 hex digits>-<43 base64url characters>``. The secret has 256 random bits,
so a plain SHA-256 is enough to store, and a lookup costs microseconds. Whatever is wrong with the
file, nobody is let in.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from api import key_file
from api.errors import HttpError
from runtime import ConfigError

FILE_NAME = "keys.db"
MAX_NAME = 32
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
SECRET = re.compile(rb"[\x21-\x7e]{20,200}")
SECONDS_PER_DAY = 86400
BUSY_SECONDS_OF_A_REQUEST = 0.1
SETTLED_NANOSECONDS = 50_000_000
"""Two changes of a file that are further apart have different times, however coarse its clock."""
LIMITS = frozenset({"max_concurrency", "tokens_per_day"})
SELECT = f"SELECT {key_file.COLUMNS} FROM keys"


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What is known about a key; times are Unix seconds, the day is counted from 1970 in UTC."""

    public_id: str
    name: str
    created_at: int
    revoked_at: int | None
    expires_at: int | None = None
    last_used_day: int | None = None
    max_concurrency: int | None = None  # requests running at once on one server; None: any number
    tokens_per_day: int | None = None  # of prompts and answers together, per day in UTC

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """``now`` is in Unix seconds. What expired before it was revoked stays expired."""
        expires_at = self.expires_at
        if self.revoked_at is not None:
            expired = expires_at is not None and expires_at <= self.revoked_at
            return "expired" if expired else "revoked"
        return "active" if expires_at is None or now < expires_at else "expired"


def default_path() -> Path:
    """``keys.db`` in $FATHOM_HOME, else in fathom/ of the user's data directory."""
    if home := os.environ.get("FATHOM_HOME"):
        return Path(home) / FILE_NAME
    try:
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder to keep API keys in; set FATHOM_HOME to a folder"
        ) from None
    return Path(data) / "fathom" / FILE_NAME


class KeyStore:
    """Creates, lists, revokes and checks keys.

    Every check reads the file, so a key that any process revoked is refused at once. If the file
    is gone, damaged, replaced or readable by others, every check raises `HttpError` 503, also for
    lent keys, until the same file is whole again.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.time, busy_seconds: float
    ) -> None:
        self._path = path
        self._log_path = f"{path}-wal"
        self._clock = clock
        self._identity = key_file.check_file(path)  # device and inode of the file
        self._connection = key_file.connect(path, busy_seconds)
        # What the file looked like when it was last checked; None to check it again.
        self._checked: tuple[object, ...] | None = None
        self._lent: dict[bytes, KeyEntry] = {}  # digest -> key of this process only
        self._noted_days: dict[str, int] = {}  # public_id -> day for which its use was written
        self._writer = ThreadPoolExecutor(1, "key-use")

    @property
    def path(self) -> Path:
        return self._path

    @classmethod
    def open(
        cls,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = key_file.BUSY_SECONDS,
    ) -> KeyStore:
        """Open the store, making it if it is not there. ``clock`` gives Unix seconds.

        Raises `ConfigError` if others can read it, if it is not ours, if another process keeps it
        locked, or if it is damaged.
        """
        path = (path or default_path()).absolute()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            key_file.check_private(path.parent, path.parent.lstat(), "700")
            if not os.path.lexists(path):
                key_file.make(path)
            return cls(path, clock=clock, busy_seconds=busy_seconds)
        except OSError as error:
            raise ConfigError(f"{path}: the key store cannot be opened: {error.strerror}") from None
        except sqlite3.Error as error:
            raise ConfigError(f"{path}: not a usable key store: {error}") from None

    def create(
        self,
        name: str,
        expires_at: int | None = None,
        *,
        max_concurrency: int | None = None,
        tokens_per_day: int | None = None,
    ) -> str:
        """Make a key and return its secret, which is kept nowhere.

        ``expires_at`` is in Unix seconds; limits are as in `KeyEntry`. Raises `ConfigError` for a
        name that is malformed or in use.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"key name {_quote(name)} is not allowed: 1 to 32 letters, digits, '.', '_' or "
                "'-', starting with a letter or digit"
            )
        public_id = secrets.token_hex(4)
        secret = f"sk-{name}-{public_id}-{secrets.token_urlsafe(32)}"
        now = int(self._clock())
        try:
            with self._connection:
                self._connection.execute(  # the name of an expired key is free
                    "UPDATE keys SET revoked_at = ? "
                    "WHERE name = ? AND revoked_at IS NULL AND expires_at <= ?",
                    (now, name, now),
                )
                self._connection.execute(
                    "INSERT INTO keys (public_id, name, digest, created_at, expires_at, "
                    "max_concurrency, tokens_per_day) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(public_id, name, _digest(secret.encode()), now, expires_at),
                        *(max_concurrency, tokens_per_day),
                    ),
                )
            self._checkpoint()
        except sqlite3.IntegrityError:
            raise ConfigError(
                f"there already is a key named {name!r}; choose another name, or first run "
                f"`fathom keys revoke {name}`"
            ) from None
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return secret

    def lend(self) -> str:
        """Make a key that this object alone knows, gone with it; returns its secret.

        It is no way around the store: while that cannot be read, a lent key is refused too.
        """
        public_id = secrets.token_hex(4)
        secret = f"sk-run-{public_id}-{secrets.token_urlsafe(32)}"
        entry = KeyEntry(public_id, "run", int(self._clock()), revoked_at=None)
        self._lent[_digest(secret.encode())] = entry
        return secret

    def list(self) -> list[KeyEntry]:
        """All keys, revoked and expired ones too, oldest first."""
        try:
            rows = self._connection.execute(f"{SELECT} ORDER BY rowid").fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return [KeyEntry(*row[:-1]) for row in rows]

    def revoke(self, name_or_id: str) -> None:
        """Make a key invalid from now on. Raises `ConfigError` if no active key is called so."""
        self._change(name_or_id, {"revoked_at": int(self._clock())})

    def limit(self, name_or_id: str, limits: Mapping[str, int | None]) -> None:
        """Set ``max_concurrency``, ``tokens_per_day`` or both, for running servers too.

        Raises `ConfigError` if no active key is called so.
        """
        assert limits.keys() <= LIMITS
        self._change(name_or_id, limits)

    def _change(self, name_or_id: str, values: Mapping[str, int | None]) -> None:
        unknown = ConfigError(
            f"no active key is named {_quote(name_or_id)}; see `fathom keys list`"
        )
        if not NAME.fullmatch(name_or_id):  # no id either
            raise unknown
        assignments = ", ".join(f"{column} = ?" for column in values)
        try:
            with self._connection:
                cursor = self._connection.execute(
                    f"UPDATE keys SET {assignments} "
                    "WHERE revoked_at IS NULL AND public_id = coalesce("
                    "(SELECT public_id FROM keys WHERE name = ? AND revoked_at IS NULL), ?)",
                    (*values.values(), name_or_id, name_or_id),
                )
            self._checkpoint()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if cursor.rowcount == 0:
            raise unknown

    def authenticate(self, secret: bytes) -> KeyEntry | None:
        """The active key with this secret, or None.

        Raises `HttpError` 503 if the store cannot be read: without it nobody is let in.
        """
        if not SECRET.fullmatch(secret):
            return None
        digest = _digest(secret)
        found = self._find("digest = ?", digest)
        if found is None:
            for lent, entry in self._lent.items():
                if hmac.compare_digest(lent, digest):
                    return entry
            return None
        entry, stored = found
        now = self._clock()
        if not hmac.compare_digest(stored, digest) or entry.state(now) != "active":
            return None
        self._note_use(entry, int(now // SECONDS_PER_DAY))
        return entry

    def is_active(self, public_id: str) -> bool:
        """Whether the key would still be let in, lent ones too.

        Raises `HttpError` 503 if the store cannot be read.
        """
        found = self._find("public_id = ?", public_id)
        if found is None:
            return any(entry.public_id == public_id for entry in self._lent.values())
        return found[0].state(self._clock()) == "active"

    def close(self) -> None:
        """Ends the store after the uses that are still being written."""
        self._writer.shutdown()
        self._connection.close()

    def _find(self, condition: str, value: object) -> tuple[KeyEntry, bytes] | None:
        """A key and its digest. Raises `HttpError` 503."""
        try:
            self._check_again()
            query = f"{SELECT} WHERE {condition}"
            row = self._connection.execute(query, (value,)).fetchone()
        except (OSError, sqlite3.Error, ConfigError):
            raise HttpError(
                503,
                "API keys cannot be checked right now.",
                code="auth_unavailable",
                error_type="server_error",
            ) from None
        return None if row is None else (KeyEntry(*row[:-1]), row[-1])

    def _check_again(self) -> None:
        """If anything about the file changed, check all of it, and forget what SQLite remembers.

        SQLite alone would go on answering from memory after its file was damaged.
        """
        file = self._path.lstat()
        try:
            log = os.lstat(self._log_path)
        except FileNotFoundError:
            log = file
        seen = (
            (file.st_dev, file.st_ino, file.st_uid, file.st_mode, file.st_size, file.st_ctime_ns),
            (log.st_ino, log.st_size, log.st_mtime_ns),  # root's SQLite sets its owner anew
        )
        if seen == self._checked:
            return
        if key_file.check_file(self._path) != self._identity:
            raise OSError("the file was replaced")
        connection = key_file.connect(self._path, BUSY_SECONDS_OF_A_REQUEST)
        self._connection.close()
        self._connection = connection
        age = time.time_ns() - max(file.st_ctime_ns, log.st_mtime_ns)
        self._checked = seen if abs(age) > SETTLED_NANOSECONDS else None

    def _note_use(self, entry: KeyEntry, day: int) -> None:
        """Write the day at most once, by another thread: no request waits for it or fails by it."""
        known = max(entry.last_used_day or 0, self._noted_days.get(entry.public_id, 0))
        if known >= day:
            return
        self._noted_days[entry.public_id] = day
        with contextlib.suppress(RuntimeError):  # the process ends or can have no more threads
            self._writer.submit(_write_use, self._path, entry.public_id, day)

    def _checkpoint(self) -> None:
        """Move what was written into the main file, so that no damage to the log can undo it."""
        with contextlib.suppress(sqlite3.Error):  # it is safe in the log already
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _unusable(self, error: sqlite3.Error) -> ConfigError:
        return ConfigError(f"{self._path}: the key store cannot be used: {error}")


def _write_use(path: Path, public_id: str, day: int) -> None:
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(key_file.attach(path, 1.0)) as connection,
        connection,
    ):
        connection.execute(
            "UPDATE keys SET last_used_day = ? WHERE public_id = ?", (day, public_id)
        )


def _quote(name: str) -> str:
    """A name to repeat in an error; what is too long for one may be a key, pasted by mistake."""
    return repr(name) if len(name) <= MAX_NAME else f"of {len(name)} characters"


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
