"""`fathom serve` as its user meets it: the printed request works, signals end it, nothing stays."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import trustme

from tests.processes import is_alive

ROOT = Path(__file__).resolve().parents[2]


LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "stream": True,
    "ignore_eos": True,
    "logit_bias": {"20": 100},
}


def start(home: Path, *flags: str, **options: Any) -> subprocess.Popen[str]:
    """`fathom serve` on a free port."""
    command = [sys.executable, "-m", "api", "serve", "--device", "cpu", "--threads", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*command, "--port", "0", *flags],
        cwd=ROOT,
        env={**os.environ, "FATHOM_HOME": str(home), "PYTHONUNBUFFERED": "1"},
        text=True,
        **{**streams, **options},
    )


@contextmanager
def serving(home: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port and what it printed until it was ready."""
    server = start(home, *flags)
    try:
        assert server.stdout is not None
        banner = ""
        while "Ctrl-C" not in banner:
            line = server.stdout.readline()
            assert line, f"the server ended: {banner}{server.communicate()[1]}"
            banner += line
        yield server, banner
    finally:
        server.kill()
        server.communicate()


def base_of(banner: str) -> str:
    return banner.split("serving")[1].split()[0]


def key_of(banner: str) -> str:
    return banner.split("Bearer ")[1].split('"')[0]


def printed_curl(banner: str) -> str:
    start = banner.index("curl ")
    return banner[start : banner.index("\n\n", start)]


def ask(banner: str) -> dict[str, object]:
    result = subprocess.run(
        ["bash", "-c", f"{printed_curl(banner)} -sS --max-time 60"],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def engine_pid(server: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} stays"
        time.sleep(0.02)


def test_the_printed_request_is_answered_at_the_first_start_and_at_the_next(
    tmp_path: Path,
) -> None:
    with serving(tmp_path) as (server, banner):
        assert "shown only now" in banner
        for fact in ("DeepseekV3ForCausalLM", "cpu", "pages of 16 tokens", "/v1"):
            assert fact in banner
        answer = ask(banner)
        assert answer["object"] == "chat.completion", answer
        message = answer["choices"][0]["message"]  # type: ignore[index]
        assert "hello" in message["content"].lower()
        assert message["reasoning_content"]
        engine = engine_pid(server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        wait_until_gone(engine)
    with serving(tmp_path) as (_, banner):
        assert "shown only now" not in banner  # the lasting key is kept; this run lends another
        assert ask(banner)["object"] == "chat.completion"


def test_answers_finish_before_the_end_and_the_log_has_a_line_for_each(tmp_path: Path) -> None:
    with serving(tmp_path, "--log-json") as (server, banner):
        headers = {"Authorization": f"Bearer {key_of(banner)}"}
        with (
            httpx.Client(base_url=base_of(banner), headers=headers, timeout=30) as client,
            client.stream("POST", "/chat/completions", json={**LONG, "max_tokens": 90}) as response,
        ):
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGHUP)  # its terminal is gone; it goes on
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(20) == 0
        assert server.stderr is not None
        logged = [json.loads(line) for line in server.stderr.read().splitlines()]
    [entry] = [line for line in logged if line["message"] == "request"]
    assert entry["key"] == key_of(banner).split("-")[2]
    assert (entry["status"], entry["completion_tokens"], entry["outcome"]) == (200, 90, "ok")


def test_a_second_signal_ends_a_stream_at_once_and_the_port_is_free_again(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, banner):
        headers = {"Authorization": f"Bearer {key_of(banner)}"}
        with (
            httpx.Client(base_url=base_of(banner), headers=headers, timeout=30) as client,
            client.stream("POST", "/chat/completions", json=LONG) as response,
        ):
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            engine = engine_pid(server)
            server.send_signal(signal.SIGINT)
            time.sleep(0.3)
            server.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
            assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
            assert server.wait(20) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()
        wait_until_gone(engine)
        port = int(base_of(banner).rsplit(":", 1)[1].split("/")[0])
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))


def test_it_answers_while_it_loads_and_a_signal_ends_the_load(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = start(tmp_path, "--uds", str(path), "--no-key")
    try:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            wait_for(path.exists, server)
            assert client.get("/health").status_code == 200
            ready = client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "loading")
            chat = client.post("/v1/chat/completions", json=LONG)
            assert (chat.status_code, chat.json()["error"]["code"]) == (503, "model_loading")
            assert path.stat().st_mode & 0o777 == 0o600
            engine = engine_pid(server)
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        wait_until_gone(engine)
        assert not path.exists()
    finally:
        server.kill()
        assert "Traceback" not in server.communicate()[1]


def test_an_output_that_nobody_reads_or_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    unread, full = os.pipe()
    os.set_blocking(full, False)
    with suppress(BlockingIOError):
        while os.write(full, b"x" * 4096):
            pass
    os.set_blocking(full, True)
    gone, broken = os.pipe()
    os.close(gone)
    server = start(
        tmp_path,
        "--uds",
        str(path),
        "--no-key",
        stdin=subprocess.DEVNULL,
        stdout=full,
        stderr=broken,
    )
    try:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=30) as client:
            wait_for(path.exists, server)
            wait_for(lambda: client.get("/ready").status_code == 200, server)
            for _ in range(3):
                chat = client.post("/v1/chat/completions", json={**LONG, "max_tokens": 5})
                assert chat.text.endswith("data: [DONE]\n\n")
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()
        for file in (unread, full, broken):
            os.close(file)


def wait_for(condition: Callable[[], bool], server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_server_leaves_no_engine(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, _):
        engine = engine_pid(server)
        for pid in (server.pid, engine):  # a core file would hold keys and prompts
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max core file size +0 +0 ", limits), limits
        server.kill()
        server.wait(10)
        wait_until_gone(engine)


def test_a_dead_engine_is_replaced_behind_tls(tmp_path: Path) -> None:
    pem, authority = str(tmp_path / "server.pem"), trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    with serving(tmp_path, "--tls-cert", pem, "--tls-key", pem) as (server, banner):
        base, key = base_of(banner), key_of(banner)
        assert base.startswith("https://127.0.0.1:")
        assert f"curl {base}/chat/completions" in banner
        trusted = ssl.create_default_context()
        authority.configure_trust(trusted)
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=base, headers=headers, verify=trusted, timeout=60) as client:
            assert client.get("/ready").status_code == 200
            os.kill(engine_pid(server), signal.SIGKILL)
            wait_for(lambda: client.get("/ready").status_code == 503, server)
            assert client.get("/health").status_code == 200
            # It waits for the new engine.
            answer = client.post(
                "/chat/completions", json={**LONG, "stream": False, "max_tokens": 3}
            )
            assert answer.json()["usage"]["completion_tokens"] == 3
            assert client.get("/ready").status_code == 200


def test_what_cannot_be_answered_is_refused_in_the_envelope(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, banner):
        base, key = base_of(banner), key_of(banner)
        port = int(base.rsplit(":", 1)[1].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nContent-Length: -3\r\n\r\n")
            head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        response = httpx.post(
            f"{base}/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"messages": [{"role": "user", "content": "hello there " * 500_000}]},
            timeout=30,
        )
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "8192" in error["message"]
