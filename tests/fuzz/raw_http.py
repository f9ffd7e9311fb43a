"""Malformed HTTP over raw sockets: ``python -m tests.fuzz.raw_http --requests 20000``.

Every request comes from a grammar that is right in most places and wrong in some, is cut in pieces,
and is followed by what a client may do next: read, stop sending, leave, reset. The server must stay
alive, end every connection in time, answer no 5xx but 503, and put every error in the envelope.
Request N of seed S is always the same: ``--seed S --only N`` sends it again.

With ``--url`` a server is tested that was started with short limits, for example ``fathom serve
--no-key --limit keep-alive=1s --limit header-seconds=1s --limit body-seconds=1s``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from api.app import create_app
from api.connections import protocol_class
from api.limits import Limits
from runtime import Tokenizer
from tests.api.scripted import TINY, engine_of, scripted_state, wait_until
from tests.fuzz.raw_grammar import Case, make_case

NUM_WORKERS = 64
SECONDS_TO_CLOSE = 20.0
"""Far above the limits below, for slow machines; the server must have closed by then."""
LIMITS = Limits(
    body=100_000, body_seconds=0.5, header_seconds=0.5, keep_alive=0.5, stall=2, connections=5000
)
RESET = struct.pack("ii", 1, 0)


class WrongAnswer(Exception):
    """What no request may lead to."""


@dataclass
class Outcome:
    """How often each status came, and what was wrong, by the index of the request."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: dict[int, str] = field(default_factory=dict)


async def run(host: str, port: int, indices: range, seed: int) -> Outcome:
    """Send the requests with these indices, many at once."""
    outcome = Outcome()
    waiting = iter(indices)

    async def work() -> None:
        for index in waiting:
            case = make_case(random.Random(f"{seed}/{index}"))
            try:
                outcome.counts.update(await send(host, port, case))
            except WrongAnswer as error:
                outcome.wrong[index] = f"{error}; sent {b''.join(case.pieces)[:300]!r}"

    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_WORKERS):
            tasks.create_task(work())
    return outcome


async def send(host: str, port: int, case: Case) -> list[str]:
    """The statuses that came back, or how the connection ended without one.

    Raises `WrongAnswer`.
    """
    try:
        async with asyncio.timeout(SECONDS_TO_CLOSE):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        raise WrongAnswer(f"the server does not accept: {error!r}") from None
    received = bytearray()
    end = "closed"
    try:
        try:
            for piece, pause in zip(case.pieces, case.pauses, strict=True):
                writer.write(piece)
                await asyncio.sleep(pause)
            if case.then == "leave":
                return ["left"]
            if case.then == "reset":
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, RESET)
                return ["reset by us"]
            if case.then == "half close":
                writer.write_eof()
            async with asyncio.timeout(SECONDS_TO_CLOSE):
                while part := await reader.read(65536):
                    received += part
        except TimeoutError:  # which is an OSError too
            raise WrongAnswer(f"still open after {bytes(received[:300])!r}") from None
        except OSError:
            end = "reset"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    answers = bytes(received)
    if case.has_bodies is None:
        return [line.decode() for line in re.findall(rb"HTTP/1\.1 ([0-9]{3})", answers)] or [end]
    whole = end == "closed" and case.then == "read"
    return list(statuses(answers, whole=whole, has_body=case.has_bodies)) or [end]


def statuses(received: bytes, *, whole: bool, has_body: bool) -> Iterator[str]:
    """Read the answers one after the other. Raises `WrongAnswer`."""
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        line = re.match(rb"HTTP/1\.1 ([1-5][0-9]{2})[ \r]", head)
        if line is None or not end:
            if whole:
                raise WrongAnswer(f"no HTTP answer: {received[:200]!r}")
            return
        status = int(line[1])
        body, received = take_body(head.lower(), rest, has_body=has_body and status >= 200)
        if received is None:
            if whole:
                raise WrongAnswer(f"the answer breaks off: {head!r}")
            return
        if status >= 500 and status != 503:
            raise WrongAnswer(f"status {status}")
        if status >= 400 and has_body:
            check_envelope(body)
        yield str(status)


def take_body(head: bytes, rest: bytes, *, has_body: bool) -> tuple[bytes, bytes | None]:
    """``(body, what follows)``; None for what follows if the body is not all there."""
    length = re.search(rb"\r\ncontent-length: ?([0-9]+)", head)
    if not has_body:
        return b"", rest
    if length is not None:
        size = int(length[1])
        return rest[:size], rest[size:] if len(rest) >= size else None
    if b"\r\ntransfer-encoding: chunked" not in head:
        return rest, b""  # up to the end of the connection, or none
    body = b""
    while True:
        size_line, end, rest = rest.partition(b"\r\n")
        if not end or not re.fullmatch(rb"[0-9a-f]+", size_line):
            return body, None
        size = int(size_line, 16)
        if len(rest) < size + 2:
            return body, None
        body, rest = body + rest[:size], rest[size + 2 :]
        if not size:
            return body, rest


def check_envelope(body: bytes) -> None:
    try:
        error = json.loads(body)["error"]
        fits = set(error) == {"message", "type", "param", "code"} and isinstance(error["code"], str)
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise WrongAnswer(f"not the error envelope: {body[:200]!r}")


@contextlib.contextmanager
def serve(app: ASGIApp) -> Iterator[tuple[uvicorn.Server, int]]:
    """The application behind the real protocol, in a thread; the server and its port."""
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol_class(LIMITS),
        ws="none",
        lifespan="off",
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def fuzz_scripted(indices: range, seed: int) -> Outcome:
    """Fuzz our application with a scripted engine, then look whether anything was left behind."""
    state = replace(scripted_state(Tokenizer.load(TINY)), limits=LIMITS)
    engine = engine_of(state)
    engine.say("ok")
    with serve(create_app(state)) as (server, port):
        outcome = asyncio.run(run("127.0.0.1", port, indices, seed))
        asyncio.run(check_alive("127.0.0.1", port, outcome))
        try:
            wait_until(lambda: not server.server_state.connections and not engine.num_live)
        except AssertionError:
            left = f"{len(server.server_state.connections)} connections, {engine.num_live} answers"
            outcome.wrong[-1] = f"left behind at the end: {left}"
    return outcome


async def check_alive(host: str, port: int, outcome: Outcome) -> None:
    """A good request must still be answered."""
    request = f"GET /health HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
    try:
        answers = await send(host, port, Case([request.encode()], [0.0], "read"))
    except WrongAnswer as error:
        answers = [str(error)]
    if answers != ["200"]:
        outcome.wrong[-1] = f"/health at the end: {answers}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.raw_http", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--only", type=int, help="the index of one request to send")
    parser.add_argument("--url", help="a running server; without, one is started in here")
    arguments = parser.parse_args()
    only: int | None = arguments.only
    indices = range(arguments.requests) if only is None else range(only, only + 1)
    print(f"{len(indices)} requests, seed {arguments.seed}", flush=True)
    started = time.monotonic()
    if arguments.url is None:
        outcome = fuzz_scripted(indices, arguments.seed)
    else:
        url = urlsplit(arguments.url)
        host, port = url.hostname or "127.0.0.1", url.port or 80
        outcome = asyncio.run(run(host, port, indices, arguments.seed))
        asyncio.run(check_alive(host, port, outcome))
    for name, count in sorted(outcome.counts.items()):
        print(f"  {name:12} {count:7}")
    for index, what in sorted(outcome.wrong.items()):
        print(f"WRONG --only {index}: {what}")
    print(f"{len(outcome.wrong)} wrong, {time.monotonic() - started:.0f} s")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
