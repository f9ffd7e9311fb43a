"""`fathom keys`: create, list and revoke API keys. A key is printed once and never listed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console

from api.keys import SECONDS_PER_DAY, KeyEntry, KeyStore
from runtime import ConfigError

MAX_DAYS = 36_500
"""The longest life of a key that expires."""
NO_KEYS = "No keys yet; make one with `fathom keys create NAME`."

keys_app = typer.Typer(
    help="Create, list and revoke the API keys that clients send.", no_args_is_help=True
)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Who or what uses the key, for example open-webui.")],
    expires: Annotated[
        str | None,
        typer.Option(
            help="How long the key works: 30d, 12h, or its last day, 2026-12-31.",
            show_default="never expires",
        ),
    ] = None,
) -> None:
    """Make a key and show it once; only its digest is kept."""
    expires_at = None if expires is None else parse_expiry(expires, time.time())
    with closing(KeyStore.open()) as store:
        secret = store.create(name, expires_at)
        try:
            Console(stderr=True).print("Keep this key; it is not shown again:", style="dim")
            # The key alone on stdout, so that it can be piped into a client's configuration.
            if sys.stdout is None:
                raise OSError("it is closed")
            print(secret, flush=True)
        except OSError as error:
            store.revoke(name)
            raise ConfigError(f"standard output took no key ({error}); {name} is revoked") from None


@keys_app.command("list")
def list_keys() -> None:
    """Show the keys' names, times and states, never the keys."""
    with closing(KeyStore.open()) as store:
        entries = store.list()
    lines = table(entries, time.time()) if entries else [NO_KEYS]
    console = Console(highlight=False, soft_wrap=True)
    try:
        for line in lines:
            console.print(line, markup=False)
    except OSError as error:
        raise ConfigError(f"standard output took no list: {error}") from None


@keys_app.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Name or id, as `fathom keys list` shows it.")],
) -> None:
    """Make a key invalid at once, also for running servers."""
    with closing(KeyStore.open()) as store:
        store.revoke(name)
    try:
        Console(soft_wrap=True).print(f"Revoked {name}.", markup=False, highlight=False)
    except OSError as error:
        raise ConfigError(f"{name} is revoked, but standard output took no text: {error}") from None


def table(entries: list[KeyEntry], now: float) -> Iterator[str]:
    """The lines of `fathom keys list`; times are local, the day of the last use is UTC's."""
    width = max(len("name"), *(len(entry.name) for entry in entries))
    row = f"{{:<8}}  {{:<{width}}}  {{:<16}}  {{:<16}}  {{:<10}}  {{}}"
    yield row.format("id", "name", "created", "expires", "last used", "state")
    for entry in entries:
        yield row.format(
            entry.public_id,
            entry.name,
            _moment(entry.created_at),
            "never" if entry.expires_at is None else _moment(entry.expires_at),
            "never" if entry.last_used_day is None else _day(entry.last_used_day),
            entry.state(now),
        )


def parse_expiry(text: str, now: float) -> int:
    """``30d``, ``12h`` or a last day as Unix seconds. Raises `ConfigError` that says what is wrong.

    A day ends at midnight local time.
    """
    problem = f"--expires {text[:40]!r}"
    if match := re.fullmatch(r"([0-9]{1,7})([dh])", text):
        seconds = int(match[1]) * (SECONDS_PER_DAY if match[2] == "d" else 3600)
        if not 0 < seconds <= MAX_DAYS * SECONDS_PER_DAY:
            raise ConfigError(f"{problem} is not between 1h and {MAX_DAYS}d")
        return int(now) + seconds
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ConfigError(f"{problem} is not a time; write for example 30d, 12h or 2026-12-31")
    try:
        day = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{problem} is not a day: {error}") from None
    today = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    if day < today:
        raise ConfigError(f"{problem} is in the past")
    if day > today + timedelta(days=MAX_DAYS):
        raise ConfigError(f"{problem} is more than {MAX_DAYS} days away; leave --expires out")
    return int((day + timedelta(days=1)).timestamp()) - 1


def _moment(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _day(day: int) -> str:
    try:
        return datetime.fromtimestamp(day * SECONDS_PER_DAY, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return str(day)
