"""`fathom top`: what a server does, live in the terminal. It only reads `GET /stats`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import ssl
import sys
import termios
import time
import tty
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runtime import ConfigError

POLL_SECONDS = 1.0
REFUSED_SECONDS = 5.0
"""After a key was refused: a server counts wrong keys, and answers none that come too often."""
ANSWER_SECONDS = 5.0
MAX_ANSWER_BYTES = 4 << 20
QUIT_KEYS = ("q", "Q")

Stats = dict[str, Any]


class NoStats(Exception):
    """Why the server gave no figures, in one line; ``refused`` if it does not know the key."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


def top_command(
    url: Annotated[
        str, typer.Option(help="The server's address, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None,
        typer.Option(
            envvar="FATHOM_API_KEY",
            help="An API key of the server.",
            show_default="none",
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print the figures once, for scripts, and end.")
    ] = False,
) -> None:
    """Watch a running server: requests, tokens per second, cache pages and hits. `q` ends it."""
    console = Console(highlight=False)
    fetch = stats_reader(url, key)
    if once:
        try:
            stats = fetch()
        except NoStats as error:
            raise ConfigError(str(error)) from None
        _print(console, picture(stats, rows=len(stats["requests"])))
        return
    if not console.is_terminal:
        raise ConfigError("standard output is no terminal; use `fathom top --once`")
    with contextlib.suppress(KeyboardInterrupt), key_presses() as wait_for_quit:
        watch(console, fetch, wait_for_quit)


def watch(
    console: Console, fetch: Callable[[], Stats], wait_for_quit: Callable[[float], bool]
) -> None:
    """Show the figures once a second until ``wait_for_quit`` returns True within its seconds.

    A server that is away or refuses the key is one line, until it answers again.
    """
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            seconds = POLL_SECONDS
            try:
                stats = fetch()
            except NoStats as error:
                seconds = REFUSED_SECONDS if error.refused else POLL_SECONDS
                shown: RenderableType = Text(f"{error}; trying again. q quits.", style="red")
            else:
                shown = Group(
                    picture(stats, rows=max(console.height - 9, 1)),
                    Text("q quits", style="dim"),
                )
            live.update(shown, refresh=True)
            if wait_for_quit(seconds):
                return


def stats_reader(url: str, key: str | None) -> Callable[[], Stats]:
    """Asks the server for its figures; what it returns raises `NoStats`.

    Raises `ConfigError` for what is no address or no key.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"--url {url[:200]!r} is no address; write http://HOST:PORT")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError("--key is no API key; it has characters that no key has")
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    headers = {} if key is None else {"Authorization": f"Bearer {key.strip()}"}
    request = urllib.request.Request(f"{base}/stats", headers=headers)
    # A proxy or another host that the server names must not get the key.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def fetch() -> Stats:
        try:
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return checked(answer.read(MAX_ANSWER_BYTES), base)
        except urllib.error.HTTPError as error:
            with error:
                raise refused(error, base) from None
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            reason = getattr(error, "reason", error)
            words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise NoStats(f"{base} does not answer: {_line(words)}") from None

    return fetch


def checked(data: bytes, base: str) -> Stats:
    """The figures in an answer. Raises `NoStats` if it has none."""
    with contextlib.suppress(ValueError):
        stats = json.loads(data)
        requests = stats.get("requests") if isinstance(stats, dict) else None
        if isinstance(requests, list) and all(isinstance(each, dict) for each in requests):
            return dict(stats)
    raise NoStats(f"{base} answers, but not as Fathom does")


def refused(error: urllib.error.HTTPError, base: str) -> NoStats:
    """What a status other than 200 means to who watches."""
    if error.code == 401:
        return NoStats(
            f"{base} does not accept the key; give one with --key or FATHOM_API_KEY "
            "(`fathom keys create NAME` makes one)",
            refused=True,
        )
    message = ""
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        message = f": {_line(str(json.loads(error.read(65536))['error']['message']))}"
    return NoStats(f"{base} answers {error.code}{message}", refused=error.code == 429)


def picture(stats: Stats, *, rows: int) -> RenderableType:
    """The figures as they are shown; at most ``rows`` requests, the oldest first.

    Figures that the answer lacks are left blank.
    """
    number = _Numbers(stats)
    num_pages, num_free = number["num_pages"], number["num_free_pages"]
    used = num_pages - num_free
    prompt, cached = number["prompt_tokens_total"], number["cached_tokens_total"]
    outcomes = stats.get("requests_total")
    count = _Numbers(outcomes)
    names = outcomes if isinstance(outcomes, dict) else {}
    ended = ", ".join(f"{count[name]:,.0f} {_line(name)}" for name in names) or "none"
    has_first = stats.get("ttft_seconds_p50") is not None
    first = f"{number['ttft_seconds_p50']:.2f} s" if has_first else "-"
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="dim", no_wrap=True, min_width=len("requests"))
    figures.add_column(overflow="ellipsis", no_wrap=True)
    for title, text in (
        (
            "model",
            f"{_line(str(stats.get('model', '')))}, up {_duration(number['uptime_seconds'])}, "
            f"{number['restarts']:,.0f} restarts",
        ),
        (
            "requests",
            f"{number['num_running']:,.0f} running, {number['num_waiting']:,.0f} waiting; "
            f"ended: {ended}",
        ),
        (
            "tokens",
            f"{number['tokens_per_second']:,.1f} a second; "
            f"{number['generation_tokens_total']:,.0f} so far; first token after {first}",
        ),
        (
            "cache",
            f"{used:,.0f} of {num_pages:,.0f} pages used ({_percent(used, num_pages)}), "
            f"{number['num_cached_pages']:,.0f} cached",
        ),
        (
            "hits",
            f"{cached:,.0f} of {prompt:,.0f} prompt tokens ({_percent(cached, prompt)})",
        ),
    ):
        figures.add_row(title, Text(text))
    return Group(figures, Text(), _requests(stats["requests"], rows))


def _requests(requests: list[Stats], rows: int) -> RenderableType:
    if not requests:
        return Text("no request is running", style="dim")
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("request", overflow="ellipsis", no_wrap=True, max_width=32)
    shown.add_column("key", no_wrap=True)
    for title in ("prompt", "answer", "seconds", "tokens/s"):
        shown.add_column(title, justify="right", no_wrap=True)
    for request in requests[:rows]:
        number = _Numbers(request)
        seconds, tokens = number["seconds"], number["completion_tokens"]
        shown.add_row(
            Text(_line(str(request.get("id", "")))),
            Text(_line(str(request.get("key_id") or "-"))),
            f"{number['prompt_tokens']:,.0f}",
            f"{tokens:,.0f}",
            f"{seconds:,.1f}",
            f"{tokens / seconds:,.1f}" if seconds else "-",
        )
    if len(requests) > rows:
        return Group(shown, Text(f"and {len(requests) - rows} more", style="dim"))
    return shown


@contextlib.contextmanager
def key_presses() -> Iterator[Callable[[float], bool]]:
    """A function that waits for so many seconds, and returns True as soon as a key to quit comes.

    Without a keyboard it only waits.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield _wait
        return
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)

    def wait_for_quit(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([file], [], [], left)[0]:
                break
            pressed = os.read(file, 64).decode(errors="replace")
            if not pressed or any(key in pressed for key in QUIT_KEYS):
                return True  # nothing to read: the terminal is gone
        return False

    try:
        tty.setcbreak(file)
        yield wait_for_quit
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow nothing; the answer is then an `HTTPError` with its own status."""


class _Numbers:
    """The numbers of an answer; 0 for one that is not there or is none."""

    def __init__(self, values: Any) -> None:
        self._values = values if isinstance(values, dict) else {}

    def __getitem__(self, name: str) -> float:
        value = self._values.get(name)
        return value if isinstance(value, int | float) else 0.0


def _print(console: Console, shown: RenderableType) -> None:
    try:
        console.print(shown)
    except OSError as error:
        raise ConfigError(f"standard output took no figures: {error}") from None


def _line(text: str) -> str:
    """What a server says made safe for a terminal: one line without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:300]).strip()


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f} d {hours % 24:.0f} h"
    if hours:
        return f"{hours:.0f} h {minutes % 60:.0f} min"
    return f"{minutes:.0f} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
