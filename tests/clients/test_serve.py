"""`fathom serve` as its user meets it: the printed request works, signals end it, nothing stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port and what it printed until it was ready."""
    command = [sys.executable, "-m", "api", "serve", "--device", "cpu"]
    server = subprocess.Popen(
        [*command, "--threads", "1", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "FATHOM_HOME": str(home), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


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


def test_a_stream_in_progress_does_not_hold_up_the_end_and_the_port_is_free_again(
    tmp_path: Path,
) -> None:
    with serving(tmp_path) as (server, banner):
        base = banner.split("serving")[1].split()[0]
        key = banner.split("Bearer ")[1].split('"')[0]
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "ignore_eos": True,
            "logit_bias": {"20": 100},
        }
        headers = {"Authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=base, headers=headers, timeout=30) as client,
            client.stream("POST", "/chat/completions", json=body) as response,
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
        port = int(base.rsplit(":", 1)[1].split("/")[0])
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))


def test_a_killed_server_leaves_no_engine(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, _):
        engine = engine_pid(server)
        server.kill()
        server.wait(10)
        wait_until_gone(engine)


def test_a_dead_engine_turns_health_red_and_answers_503(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, banner):
        base = banner.split("serving")[1].split()[0]
        key = banner.split("Bearer ")[1].split('"')[0]
        assert httpx.get(f"{base}/health").status_code == 200
        os.kill(engine_pid(server), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while httpx.get(f"{base}/health").status_code != 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        response = httpx.post(
            f"{base}/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"messages": [{"role": "user", "content": "hello"}]},
        )
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert "Retry-After" in response.headers


def test_what_cannot_be_answered_is_refused_in_the_envelope(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, banner):
        base = banner.split("serving")[1].split()[0]
        key = banner.split("Bearer ")[1].split('"')[0]
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
