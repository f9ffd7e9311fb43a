"""Rows of the fault matrix about clients, signals, sockets and the machine around the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.faults.bench import ENDLESS, Bench, Row, brief, code_of, expect
from tests.load.client import Address, Answer, ask
from tests.load.served import ROOT, Served, address_in, chat_body, served, wait_until
from tests.processes import is_alive

SERVE = [sys.executable, "-m", "api", "serve", "--device", "cpu", "--threads", "1", "--port", "0"]
LONG = {"max_tokens": 4000, **ENDLESS}


def start(*flags: str, home: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A start that should fail."""
    return subprocess.run(
        [sys.executable, "-m", "api", "serve", "--device", "cpu", *flags],
        cwd=ROOT,
        env={**os.environ, "FATHOM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def server_killed(bench: Bench) -> str:
    """F09"""
    with served() as server:
        engine, port = server.engine_pid, server.address.port
        assert engine is not None
        server.process.kill()
        server.process.wait()
        gone = wait_until(lambda: not is_alive(engine), 10)
        free = is_free(port)
        again = Served(server.home, port=port)
        try:
            again.wait_for_banner()
            answer = again.chat(max_tokens=5)
        finally:
            again.close()
    seen = f"engine gone after {gone:.2f} s, port free: {free}, same port serves: {brief(answer)}"
    expect(gone <= 2 and free and answer.whole, seen)
    return seen


def send(address: Address, data: bytes) -> socket.socket:
    connection = socket.create_connection((address.host, address.port), timeout=30)
    connection.sendall(data)
    return connection


def rude_clients(bench: Bench) -> str:
    """F18"""
    seen = []
    flags = ("--limit", "stall=2", "--limit", "header-seconds=2", "--limit", "body-seconds=2")
    with served(*flags) as server:
        request = server.address.request("POST", "/v1/chat/completions", chat_body(**LONG))
        with bench.canary(server):
            for name in ("FIN", "RST", "half-close"):
                connection = send(server.address, request)
                connection.recv(200)
                if name == "RST":
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if name == "half-close":
                    connection.shutdown(socket.SHUT_WR)
                else:
                    connection.close()
                wait_until(lambda: server.stats()["num_running"] <= 1, 3)
                connection.close()
                seen.append(f"{name}: freed")
            with send(server.address, b"GET /v1/models HTTP/1.1\r\nHost: localh") as slow:
                started = time.monotonic()
                reply = slow.recv(100)
                seen.append(f"half a header: {reply[9:12]!r} {time.monotonic() - started:.1f} s")
                expect(reply.startswith(b"HTTP/1.1 408"), "; ".join(seen))
            with send(server.address, request[:-20]) as slow:
                started = time.monotonic()
                reply = slow.recv(100)
                seen.append(f"half a body: {reply[9:12]!r} {time.monotonic() - started:.1f} s")
                expect(reply.startswith(b"HTTP/1.1 408"), "; ".join(seen))
            short = server.address.request("GET", "/v1/models").replace(
                b"Connection: close\r\n", b""
            )
            with send(server.address, short * 3) as pipelined:
                data = b""
                while data.count(b"HTTP/1.1 200") < 3 and (part := pipelined.recv(1 << 16)):
                    data += part
                seen.append(f"3 pipelined: {data.count(b'HTTP/1.1 200')} answers")
    return "; ".join(seen)


def storm(bench: Bench) -> str:
    """F19"""
    server = bench.server

    async def leave(delay: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await ask(server.address, chat_body(**LONG))

    async def work() -> None:
        await asyncio.gather(*(leave(0.2 + i / 250) for i in range(500)))

    asyncio.run(work())
    seconds = wait_until(server.is_idle, 10)
    expect(seconds <= 1, f"idle after {seconds:.2f} s")
    return f"500 clients left within 2 s; idle after {seconds:.2f} s (2,000: tests.load.floods)"


@contextlib.contextmanager
def streaming(server: Served, **fields: object) -> Iterator[list[Answer]]:
    """A stream in a thread of its own; the answer is in the list once it has ended."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(server.chat(**fields)))
    thread.start()
    wait_until(lambda: server.stats()["num_running"] > 0, 20)
    yield answers
    thread.join(60)


def terminated(bench: Bench) -> str:
    """F20"""
    seen = []
    for name, drain, fields in (
        ("short answer", "20", {"max_tokens": 300, **ENDLESS}),
        ("endless answer", "1", LONG),
    ):
        with served("--drain", drain) as server:
            engine = server.engine_pid
            assert engine is not None
            with streaming(server, **fields) as answers:
                started = time.monotonic()
                code = server.stop()
                seconds = time.monotonic() - started
            [answer] = answers
            wait_until(lambda engine=engine: not is_alive(engine), 5)  # type: ignore[misc]
            seen.append(f"{name}: {brief(answer)}, exit {code} after {seconds:.1f} s")
            good = answer.whole if drain == "20" else answer.error is not None and seconds < 5
            expect(good and code == 0 and is_free(server.address.port), "; ".join(seen))
    return "; ".join(seen)


def terminated_twice(bench: Bench) -> str:
    """F21"""
    seen = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with served("--drain", "60") as server:
            with streaming(server, **LONG) as answers:
                server.process.send_signal(number)
                time.sleep(0.5)
                started = time.monotonic()
                code = server.stop(number)
                seconds = time.monotonic() - started
            seen.append(
                f"{number.name} twice: exit {code} after {seconds:.1f} s, {brief(answers[0])}"
            )
            expect(seconds <= 2 and code == 0, "; ".join(seen))
    return "; ".join(seen)


def other_signals(bench: Bench) -> str:
    """F22"""
    server = bench.server
    with bench.canary(server):
        for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2):
            server.process.send_signal(number)
            time.sleep(0.1)
    expect(server.process.poll() is None, "the server is gone")
    return "the server lives; canary same"


def port_in_use(bench: Bench) -> str:
    """F23"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start("--port", str(port), home=bench.folder())
    line = result.stderr.strip()
    expect(result.returncode == 2 and "\n" not in line and str(port) in line, line)
    return f"exit 2: {line}"


def odd_addresses(bench: Bench) -> str:
    """F24"""
    seen = []
    for host in ("203.0.113.7", "no-such-host.invalid", "0.0.0.0"):
        result = start("--host", host, "--port", "0", home=bench.folder())
        line = result.stderr.strip()
        seen.append(line)
        expect(result.returncode == 2 and "\n" not in line and host in line, line)
    few = (64, 64)
    home = bench.folder()
    server = Served(home)
    try:
        address = server.wait_for_banner()
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, few)
        connections = [socket.create_connection((address.host, address.port)) for _ in range(100)]
        time.sleep(0.5)
        before = cpu_seconds(server.process.pid)
        time.sleep(2)
        spun = cpu_seconds(server.process.pid) - before
        for connection in connections:
            connection.close()
        wait_until(lambda: server.chat(max_tokens=5).whole, 10)
    finally:
        server.close()
    seen.append(f"64 files, 100 connections: {spun:.1f} CPU seconds in 2, serves again after")
    expect(spun < 1, "; ".join(seen))
    return "; ".join(seen)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def suspended(bench: Bench) -> str:
    """F32"""
    server = bench.server
    engine = server.engine_pid
    assert engine is not None
    with streaming(server, max_tokens=1500, **ENDLESS) as answers:
        for pid in (server.process.pid, engine):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(12)
        for pid in (engine, server.process.pid):
            os.kill(pid, signal.SIGCONT)
    seen = f"stopped 12 s (watchdog 5): {brief(answers[0])}, same engine"
    expect(answers[0].whole and server.engine_pid == engine, seen)
    return seen


def starved(bench: Bench) -> str:
    """F33"""
    server = bench.server
    engine = server.engine_pid
    assert engine is not None
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for pid in (server.process.pid, engine):
            os.setpriority(os.PRIO_PROCESS, pid, 19)
        answer = server.chat(max_tokens=300, **ENDLESS)
        time.sleep(6)
        after = server.chat(max_tokens=20)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    seen = f"{brief(answer)}, {brief(after)}, same engine: {server.engine_pid == engine}"
    expect(answer.whole and after.whole and server.engine_pid == engine, seen)
    bench.fresh()  # without the nice value
    return seen


def little_memory(bench: Bench) -> str:
    """F34"""
    with served() as server:
        pid = server.process.pid
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (48 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        body = chat_body("x " * 3_000_000)

        async def flood() -> Counter[str]:
            answers = await asyncio.gather(*(ask(server.address, body) for _ in range(12)))
            return Counter(f"{answer.status} {code_of(answer)}" for answer in answers)

        statuses = asyncio.run(flood())
        lives = server.process.poll() is None
        after = server.chat(max_tokens=5) if lives else Answer()
    seen = f"12 × 6 MB with 48 MiB left: {dict(statuses)}; then {brief(after)}"
    expect(lives and after.whole, seen)
    return seen


async def fill_log(address: Address) -> list[Answer]:
    """More lines than the 64 KiB of a pipe take, then a few answers."""
    for i in range(1500):
        await ask(address, path=f"/v1/models/{'x' * 150}{i}")
    return [await ask(address, chat_body(max_tokens=5)) for _ in range(3)]


def closed_logs(bench: Bench) -> str:
    """F35"""
    home = bench.folder()
    seen = []
    for name in ("closed after a line", "never read"):
        process = subprocess.Popen(
            SERVE,
            cwd=ROOT,
            env={**os.environ, "FATHOM_HOME": str(home), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            text = ""
            while "Ctrl-C" not in text and (line := process.stdout.readline()):
                text += line
            address = address_in(text)
            if name == "closed after a line":
                process.stdout.close()
                body = chat_body(max_tokens=5)
                answers = [asyncio.run(ask(address, body)) for _ in range(20)]
            else:
                answers = asyncio.run(fill_log(address))
            whole = sum(answer.whole and answer.status == 200 for answer in answers)
            process.send_signal(signal.SIGTERM)
            code = process.wait(20)
        finally:
            process.kill()
            process.wait()
        seen.append(f"output {name}: {whole} of {len(answers)} answered, exit {code}")
        expect(whole == len(answers) and code == 0, "; ".join(seen))
    return "; ".join(seen)


def odd_surroundings(bench: Bench) -> str:
    """F36"""
    home, cwd = bench.folder(), bench.folder()
    cwd.chmod(0o500)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "FATHOM_HOME": str(home),
        "LC_ALL": "C",
        "TZ": "Nowhere/Odd",
        "PYTHONUNBUFFERED": "1",
    }
    log = home / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            SERVE,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "Ctrl-C" in log.read_text(errors="replace") or process.poll(), 60)
        text = log.read_text(errors="replace")
        expect("Ctrl-C" in text, text)
        address = address_in(text)
        answer = asyncio.run(ask(address, chat_body("你好", max_tokens=40)))
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    finally:
        process.kill()
        process.wait()
    seen = f"no HOME, LC_ALL=C, odd TZ, read-only folder: {answer.text[-20:]!r}, exit {code}"
    expect(answer.whole and any(letter > "\u4e00" for letter in answer.text) and code == 0, seen)
    return seen


def hash_seeds(bench: Bench) -> str:
    """F37"""
    texts = []
    for seed in ("0", "1", "random"):
        os.environ["PYTHONHASHSEED"] = seed
        try:
            with served() as server:
                answers = [
                    server.chat(text=text, max_tokens=60, seed=7, temperature=0.8)
                    for text in ("hello", "who are you?", "hello")
                ]
                details = [
                    answer.usage and answer.usage["prompt_tokens_details"] for answer in answers
                ]
                texts.append(([answer.text for answer in answers], details))
        finally:
            del os.environ["PYTHONHASHSEED"]
    expect(texts[0] == texts[1] == texts[2], str(texts))
    return f"same texts and cached tokens with seeds 0, 1, random; {texts[0][1]}"


def idle_crowd(bench: Bench) -> str:
    """F38"""
    server = bench.server
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    count = min(10_000, min(hard, 20_000) - 500)
    connections: list[socket.socket] = []
    kept = server.get("/health").status
    with bench.canary(server):
        pass
    try:
        refused = 0
        for _ in range(count):
            connection = socket.socket()
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect((server.address.host, server.address.port))
            connections.append(connection)
            if len(connections) % 500 == 0:
                time.sleep(0.05)
        time.sleep(2)
        for connection in connections:
            with contextlib.suppress(BlockingIOError, OSError):
                refused += connection.recv(12) == b"HTTP/1.1 503"
        num_files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: server.chat(max_tokens=5).whole, 10)
    seen = (
        f"{count:,} idle connections: {refused:,} refused with 503, {num_files:,} files open in "
        f"the server, before {kept}, after them it serves"
    )
    expect(num_files <= 1200 and refused > 0, seen)
    return seen


ROWS = [
    Row("F09", "server killed", "engine gone ≤ 2 s, port free", server_killed),
    Row("F18", "clients leave, stall, pipeline", "freed at once, 408, answered", rude_clients),
    Row("F19", "500 clients leave", "idle ≤ 1 s", storm),
    Row("F20", "SIGTERM with streams", "answers end within --drain, exit 0", terminated),
    Row("F21", "SIGTERM, SIGINT twice", "exit ≤ 2 s", terminated_twice),
    Row("F22", "SIGHUP, SIGPIPE, SIGUSR1, 2", "nothing", other_signals),
    Row("F23", "port in use", "one line, exit 2, before loading", port_in_use),
    Row("F24", "address not ours, few files", "one line; accepts again", odd_addresses),
    Row("F32", "machine suspended", "no false alarm, stream goes on", suspended),
    Row("F33", "CPU starved", "no false alarm", starved),
    Row("F34", "no memory left", "requests fail, server lives", little_memory),
    Row("F35", "log closed or blocked", "no hang, no death", closed_logs),
    Row("F36", "odd environment", "serves Unicode", odd_surroundings),
    Row("F37", "hash seeds", "same answers and hits", hash_seeds),
    Row("F38", "10,000 idle connections", "capped, served after", idle_crowd),
]
