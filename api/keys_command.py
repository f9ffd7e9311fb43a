"""`fathom keys`: create, list, limit and revoke API keys, and what each has used.

A key is printed once and never listed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.keys import SECONDS_PER_DAY, KeyEntry, KeyStore
from api.ledger import LedgerRow, ledger_path, read_ledger
from runtime import ConfigError

MAX_DAYS = 36_500
"""The longest life of a key that expires."""
NO_KEYS = "No keys yet; make one with `fathom keys create NAME`."

LENT = "lent by a server"
"""The name of keys that were never in the store: of one run of a server."""
MAX_LIMIT = 2**53
NO_LIMIT = "none"
COUNTS = {
    "requests": "requests",
    "prompt": "prompt_tokens",
    "cached": "cached_tokens",
    "answer": "completion_tokens",
}
"""Title of a column of the usage table -> field of `LedgerRow`."""

MAX_CONCURRENCY_HELP = "How many requests of this key one server answers at once."
TOKENS_PER_DAY_HELP = "Tokens of prompts and answers together, per day in UTC."

keys_app = typer.Typer(
    help="Create, list, limit and revoke the API keys that clients send, and see their use.",
    no_args_is_help=True,
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
    max_concurrency: Annotated[
        str | None,
        typer.Option(metavar="N", help=MAX_CONCURRENCY_HELP, show_default="no limit"),
    ] = None,
    tokens_per_day: Annotated[
        str | None,
        typer.Option(metavar="N", help=TOKENS_PER_DAY_HELP, show_default="no limit"),
    ] = None,
) -> None:
    """Make a key and show it once; only its digest is kept."""
    expires_at = None if expires is None else parse_expiry(expires, time.time())
    limits = parse_limits(max_concurrency, tokens_per_day)
    with closing(KeyStore.open()) as store:
        secret = store.create(name, expires_at, **limits)
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


@keys_app.command("limit")
def limit_key(
    name: Annotated[str, typer.Argument(help="Name or id, as `fathom keys list` shows it.")],
    max_concurrency: Annotated[
        str | None,
        typer.Option(metavar="N|none", help=MAX_CONCURRENCY_HELP, show_default="as it is"),
    ] = None,
    tokens_per_day: Annotated[
        str | None,
        typer.Option(metavar="N|none", help=TOKENS_PER_DAY_HELP, show_default="as it is"),
    ] = None,
) -> None:
    """Change a key's limits, also in running servers; `none` lifts one."""
    limits = parse_limits(max_concurrency, tokens_per_day)
    if not limits:
        raise ConfigError("nothing to change: give --max-concurrency N, --tokens-per-day N or both")
    with closing(KeyStore.open()) as store:
        store.limit(name, limits)
    words = [_in_words(column, value) for column, value in limits.items()]
    _say(f"{name}: {', '.join(words)}.", f"{name} is limited")


@keys_app.command("usage")
def show_usage(
    days: Annotated[
        int,
        typer.Option(help="Days to show, the current one in UTC included.", min=1, max=MAX_DAYS),
    ] = 30,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one object per day, key and model.")
    ] = False,
) -> None:
    """Show the tokens that each key has used, by day and model."""
    with closing(KeyStore.open()) as store:
        names = {entry.public_id: entry.name for entry in store.list()}
        path = ledger_path(store.path)
    rows = read_ledger(path, int(time.time() // SECONDS_PER_DAY) - days + 1)
    try:
        if as_json:
            sys.stdout.write(json.dumps([_usage_object(row, names) for row in rows]) + "\n")
            sys.stdout.flush()
        elif rows:
            Console().print(usage_table(rows, names))
        else:
            text = f"No key was used in the last {days} days."
            Console(soft_wrap=True).print(text, markup=False, highlight=False)
    except OSError as error:
        raise ConfigError(f"standard output took no usage: {error}") from None


@keys_app.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Name or id, as `fathom keys list` shows it.")],
) -> None:
    """Make a key invalid at once, also for running servers."""
    with closing(KeyStore.open()) as store:
        store.revoke(name)
    _say(f"Revoked {name}.", f"{name} is revoked")


def _say(text: str, done: str) -> None:
    """Print one line. Raises `ConfigError` that says what is ``done`` all the same."""
    try:
        Console(soft_wrap=True).print(text, markup=False, highlight=False)
    except OSError as error:
        raise ConfigError(f"{done}, but standard output took no text: {error}") from None


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
            ", ".join([entry.state(now), *_limits(entry)]),
        )


def usage_table(rows: list[LedgerRow], names: Mapping[str, str]) -> Table:
    """The ledger for people: a line per day, key and model, and the sum of all."""
    shown = Table(box=None, pad_edge=False, show_footer=True, header_style="dim")
    shown.add_column("day (UTC)", footer="all", no_wrap=True)
    shown.add_column("key", overflow="ellipsis", no_wrap=True)
    shown.add_column("model", overflow="ellipsis", no_wrap=True)
    for title, field in COUNTS.items():
        total = sum(getattr(row, field) for row in rows)
        shown.add_column(title, footer=f"{total:,}", justify="right", no_wrap=True)
    for row in rows:
        counts = [f"{getattr(row, field):,}" for field in COUNTS.values()]
        name = names.get(row.key_id, LENT)
        shown.add_row(_day(row.day), Text(name), Text(row.model), *counts)
    return shown


def parse_limits(max_concurrency: str | None, tokens_per_day: str | None) -> dict[str, int | None]:
    """The limits that were given, None for one that is lifted. Raises `ConfigError`."""
    given = {"max_concurrency": max_concurrency, "tokens_per_day": tokens_per_day}
    limits: dict[str, int | None] = {}
    for column, text in given.items():
        if text is None:
            continue
        is_number = re.fullmatch(r"[0-9]{1,16}", text) is not None
        if text != NO_LIMIT and not (is_number and 1 <= int(text) <= MAX_LIMIT):
            raise ConfigError(
                f"--{column.replace('_', '-')} {text[:40]!r} is not a whole number between 1 and "
                f"{MAX_LIMIT}; write `{NO_LIMIT}` for no limit"
            )
        limits[column] = None if text == NO_LIMIT else int(text)
    return limits


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


def _usage_object(row: LedgerRow, names: Mapping[str, str]) -> dict[str, str | int]:
    fields: dict[str, str | int] = asdict(row)
    return {**fields, "day": _day(row.day), "name": names.get(row.key_id, LENT)}


def _limits(entry: KeyEntry) -> list[str]:
    """The limits of a key in words; most keys have none."""
    limits = {"max_concurrency": entry.max_concurrency, "tokens_per_day": entry.tokens_per_day}
    return [_in_words(column, value) for column, value in limits.items() if value is not None]


def _in_words(column: str, value: int | None) -> str:
    what = {"max_concurrency": "at once", "tokens_per_day": "tokens a day"}[column]
    return f"any number {what}" if value is None else f"at most {value:,} {what}"


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
