"""`fathom top`: one snapshot for scripts, and the live view in a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from api.cli import main
from api.keys import KeyStore
from api.top_command import NoStats, picture, stats_reader, watch
from runtime import Tokenizer
from tests.api.scripted import engine_of, in_background, post, scripted_state, serve, wait_until

ROOT = Path(__file__).resolve().parents[2]
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
BUSY: dict[str, Any] = {
    "model": "DeepSeek-R1-Distill-Qwen-32B-with-a-rather-long-name",
    "uptime_seconds": 93784.0,
    "num_running": 256,
    "num_waiting": 1024,
    "num_pages": 4_000_000,
    "num_free_pages": 1_000_000,
    "num_cached_pages": 900_000,
    "prompt_tokens_total": 10**12,
    "cached_tokens_total": 25 * 10**10,
    "generation_tokens_total": 10**11,
    "tokens_per_second": 12345.6,
    "requests_total": {"ok": 10**7, "client_gone": 12, "context_length_exceeded": 34},
    "restarts": 1,
    "ttft_seconds_p50": 0.25,
    "requests": [
        {
            "id": f"{'long' * 20}-{number}",
            "key_id": "0badcafe",
            "prompt_tokens": 131_072,
            "completion_tokens": 32_768,
            "seconds": 1024.0,
        }
        for number in range(50)
    ],
}

Top = Callable[..., tuple[int, str, str]]


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Top:
    """Runs `fathom top` in this process: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fathom", "top", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


def drawn(stats: dict[str, Any], rows: int = 10) -> list[str]:
    """The lines of a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(picture(stats, rows=rows))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_busy_server_fits_eighty_columns() -> None:
    lines = drawn(BUSY)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for expected in ("256 running, 1,024 waiting", "12,345.6 a second", "after 0.25 s", "(75 %)"):
        assert expected in text
    assert "3,000,000 of 4,000,000 pages used" in text
    assert "250,000,000,000 of 1,000,000,000,000 prompt tokens (25 %)" in text
    assert text.count("0badcafe") == 10
    assert "131,072  32,768  1,024.0      32.0" in text
    assert lines[-1] == "and 40 more"


def test_what_a_server_says_cannot_change_the_terminal() -> None:
    evil = {**BUSY["requests"][0], "id": "[red]\x1b[2Jhi\n[/nonsense]", "prompt_tokens": None}
    stats = {**BUSY, "model": "\x1b]0;x\x07[bold]", "requests": [evil], "num_pages": "many"}
    lines = drawn({**stats, "requests_total": {"\x1b[5m": "1"}, "ttft_seconds_p50": None})
    assert not any("\x1b" in line or "\x07" in line for line in lines)
    assert any("[red] [2Jhi [/nonsense]" in line for line in lines)


def test_once(top: Top, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = KeyStore.open(tmp_path / "home" / "keys.db")
    secret = store.create("ann")
    state = replace(scripted_state(tokenizer), keys=store)
    engine = engine_of(state)
    engine.say("and so on " * 20)
    engine.seconds_per_token = 0.1
    headers = {"authorization": f"Bearer {secret}", "x-request-id": "order-66"}
    with serve(state) as base:
        with in_background(lambda: assert_ok(base, headers)):
            try:
                wait_until(lambda: engine.num_live == 1)
                code, output, _ = top("--once", "--url", base, "--key", secret)
            finally:
                engine.seconds_per_token = 0.0
        assert code == 0
        assert "1 running, 0 waiting" in output
        assert "order-66" in output and secret.split("-")[2] in output
        wait_until(lambda: "1 ok" in top("--once", "--url", base + "/", "--key", secret)[1])
        for key in ((), ("--key", "sk-no")):
            code, output, problem = top("--once", "--url", base.removesuffix("/v1"), *key)
            assert (code, output) == (2, "")
            assert problem.count("\n") == 1 and "does not accept the key" in problem
    store.close()
    code, output, problem = top("--once", "--url", base, "--key", secret)
    assert (code, output) == (2, "")
    assert problem == f"fathom: {base} does not answer: Connection refused\n"


def assert_ok(base: str, headers: dict[str, str]) -> None:
    assert post(base, HELLO, headers=headers, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--url", "localhost:8000"), "--url"),
        (("--url", "file:///etc/passwd"), "--url"),
        (("--url", "http://"), "--url"),
        (("--url", "http://x:99999"), "--url"),
        (("--key", "a\nb"), "--key"),
        (("--key", "ключ"), "--key"),
        ((), "no terminal"),
    ],
)
def test_mistakes_are_one_line(top: Top, arguments: tuple[str, ...], expected: str) -> None:
    once = ["--once"] if arguments else []
    code, output, problem = top(*once, *arguments)
    assert (code, output, problem.count("\n")) == (2, "", 1)
    assert expected in problem


@contextlib.contextmanager
def stub(status: int, body: bytes, **headers: str) -> Iterator[tuple[str, list[Any]]]:
    """A server that says one thing to everybody: its address, and the headers that it was sent."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def test_other_servers_and_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    message = json.dumps({"error": {"message": "too\nbusy"}}).encode()
    for status, body, expected in (
        (200, b"<html>", "answers, but not as Fathom does"),
        (200, b"[]", "not as Fathom does"),
        (200, b'{"requests": 5}', "not as Fathom does"),
        (200, b'{"requests": [5]}', "not as Fathom does"),
        (404, b"nothing", "answers 404"),
        (503, message, "answers 503: too busy"),
    ):
        with stub(status, body) as (url, _), pytest.raises(NoStats, match=expected):
            stats_reader(url, "sk-secret")()
    with stub(200, b"{}") as (elsewhere, seen):
        monkeypatch.setenv("http_proxy", elsewhere)
        with (
            stub(302, b"", location=elsewhere) as (url, _),
            pytest.raises(NoStats, match="answers 302"),
        ):
            stats_reader(url, "sk-secret")()
        assert seen == []  # neither a proxy nor another host was given the key


def test_it_goes_on_when_the_server_is_back() -> None:
    answers: list[Any] = [
        NoStats("http://x does not answer: Connection refused"),
        NoStats("http://x does not accept the key", refused=True),
        BUSY,
    ]
    waited: list[float] = []
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    assert isinstance(console.file, io.StringIO)
    screens: list[str] = []

    def fetch() -> dict[str, Any]:
        answer = answers[len(waited)]
        if isinstance(answer, NoStats):
            raise answer
        assert isinstance(answer, dict)
        return answer

    def wait_for_quit(seconds: float) -> bool:
        assert isinstance(console.file, io.StringIO)
        screens.append(console.file.getvalue())
        console.file.truncate(0)
        waited.append(seconds)
        return len(waited) == 3

    watch(console, fetch, wait_for_quit)
    assert "does not answer: Connection refused; trying again" in screens[0]
    assert "does not accept the key" in screens[1]
    assert "256 running" in screens[2] and "does not" not in screens[2]
    assert waited[1] > waited[0] == waited[2]  # wrong keys are counted against an address


@pytest.mark.parametrize("how", ["q", pytest.param("ctrl-c", marks=pytest.mark.slow)])
def test_in_a_terminal(how: str) -> None:
    """In a terminal of 80 columns; it quits and leaves the terminal as it was."""
    code = "import signal, sys; signal.signal(2, signal.default_int_handler); "
    code += "import typer; from api.top_command import top_command; typer.run(top_command)"
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(follower)
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    environment = {key: value for key, value in environment.items() if key != "COLUMNS"}
    with stub(200, json.dumps(BUSY).encode()) as (url, _):
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--url", url],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
            cwd=ROOT,
        )
        text = b""
        deadline = time.monotonic() + 60
        while b"q quits" not in text:
            assert time.monotonic() < deadline, text
            if select.select([leader], [], [], 0.1)[0]:
                text += os.read(leader, 65536)
        if how == "q":
            os.write(leader, b"xq")
        else:
            process.send_signal(signal.SIGINT)
        while process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([leader], [], [], 0.1)[0]:
                text += os.read(leader, 65536)
        assert process.wait(30) == 0, text
    assert termios.tcgetattr(follower) == before
    assert b"256 running" in text and b"Traceback" not in text
    os.close(leader)
    os.close(follower)
