"""API keys in one SQLite file of the user's: digests only, the secret is shown once.

A key reads ``sk-<name>-<8 hex digits>-<43 base64url characters>``. The secret has 256 random bits,
so a plain SHA-256 is enough to store, and a lookup costs microseconds.
"""

from __future__ import annotations

import builtins
import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from api.errors import HttpError
from runtime import ConfigError

FILE_NAME = "keys.db"
SCHEMA_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
SECRET = re.compile(rb"[\x21-\x7e]{20,200}")

# STRICT came with SQLite 3.37; Red Hat 9 has an older one.
STRICT = "STRICT" if sqlite3.sqlite_version_info >= (3, 37) else ""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS keys (
    public_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest BLOB NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
) {STRICT};
CREATE UNIQUE INDEX IF NOT EXISTS active_name ON keys (name) WHERE revoked_at IS NULL;
"""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What is known about a key; times are Unix seconds."""

    public_id: str
    name: str
    created_at: int
    revoked_at: int | None


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
    """Creates, lists, revokes and checks keys. Every call reads the file, so a revoked key is
    refused at once, whichever process revoked it.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, identity: tuple[int, int]):
        self._connection = connection
        self._path = path
        self._identity = identity  # device and inode of the file behind the connection
        self._lent: dict[bytes, KeyEntry] = {}  # digest -> key of this process only

    @classmethod
    def open(cls, path: Path | None = None) -> KeyStore:
        """Open the store, making it if it is not there.

        Raises `ConfigError` if others can read it, if it is not ours, or if it is damaged.
        """
        path = path or default_path()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(path.parent, path.parent.lstat(), "700")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                status = os.fstat(file)
            finally:
                os.close(file)
        except OSError as error:
            raise ConfigError(f"{path}: the key store cannot be opened: {error.strerror}") from None
        _check_private(path, status, "600")
        try:
            connection = _connect(path)
        except sqlite3.Error as error:
            raise ConfigError(f"{path}: not a usable key store: {error}") from None
        return cls(connection, path, (status.st_dev, status.st_ino))

    def create(self, name: str) -> str:
        """Make a key and return its secret, which is kept nowhere.

        Raises `ConfigError` for a name that is malformed or in use.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"key name {name[:40]!r} is not allowed: 1 to 32 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit"
            )
        public_id = secrets.token_hex(4)
        secret = f"sk-{name}-{public_id}-{secrets.token_urlsafe(32)}"
        row = (public_id, name, _digest(secret.encode()), int(time.time()))
        try:
            with self._connection:
                self._connection.execute(
                    "INSERT INTO keys (public_id, name, digest, created_at) VALUES (?, ?, ?, ?)",
                    row,
                )
        except sqlite3.IntegrityError:
            raise ConfigError(
                f"there already is a key named {name!r}; choose another name, or first run "
                f"`fathom keys revoke {name}`"
            ) from None
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return secret

    def lend(self) -> str:
        """Make a key that this object alone knows, gone with it; returns its secret."""
        secret = f"sk-run-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}"
        public_id = secret.split("-")[2]
        entry = KeyEntry(public_id, "run", int(time.time()), revoked_at=None)
        self._lent[_digest(secret.encode())] = entry
        return secret

    def list(self) -> list[KeyEntry]:
        """All keys, revoked ones too, oldest first."""
        try:
            rows = self._connection.execute(
                "SELECT public_id, name, created_at, revoked_at FROM keys ORDER BY rowid"
            ).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return [KeyEntry(*row) for row in rows]

    def revoke(self, name_or_id: str) -> None:
        """Make a key invalid from now on. Raises `ConfigError` if no active key is called so."""
        try:
            with self._connection:
                cursor = self._connection.execute(
                    "UPDATE keys SET revoked_at = ? "
                    "WHERE revoked_at IS NULL AND public_id = coalesce("
                    "(SELECT public_id FROM keys WHERE name = ? AND revoked_at IS NULL), ?)",
                    (int(time.time()), name_or_id, name_or_id),
                )
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if cursor.rowcount == 0:
            raise ConfigError(f"no active key {name_or_id[:40]!r}; see `fathom keys list`")

    def authenticate(self, secret: bytes) -> KeyEntry | None:
        """The active key with this secret, or None.

        Raises `HttpError` 503 if the store cannot be read: without it nobody is let in.
        """
        if not SECRET.fullmatch(secret):
            return None
        digest = _digest(secret)
        for lent, entry in self._lent.items():
            if hmac.compare_digest(lent, digest):
                return entry
        try:
            status = self._path.lstat()
            if (status.st_dev, status.st_ino) != self._identity:
                raise OSError("the file was replaced")
            row = self._connection.execute(
                "SELECT digest, public_id, name, created_at, revoked_at FROM keys "
                "WHERE digest = ? AND revoked_at IS NULL",
                (digest,),
            ).fetchone()
        except (OSError, sqlite3.Error):
            raise HttpError(
                503,
                "API keys cannot be checked right now.",
                code="auth_unavailable",
                error_type="server_error",
            ) from None
        if row is None or not hmac.compare_digest(row[0], digest):
            return None
        return KeyEntry(*row[1:])

    def close(self) -> None:
        self._connection.close()

    def _unusable(self, error: sqlite3.Error) -> ConfigError:
        return ConfigError(f"{self._path}: the key store cannot be used: {error}")


def _connect(path: Path) -> sqlite3.Connection:
    # SQLite serialises calls itself; the server may be run by another thread than the opener's.
    connection = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        problems: builtins.list[tuple[str]] = connection.execute("PRAGMA quick_check").fetchall()
        if problems != [("ok",)]:
            raise sqlite3.DatabaseError(problems[0][0])
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError("it was written by a newer version of Fathom")
        connection.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection


def _check_private(path: Path, status: os.stat_result, mode: str) -> None:
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user; keys are not kept there")
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"{path} is a link; keys are not kept behind one")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"{path} can be read by other users; run `chmod {mode} {path}`")


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
