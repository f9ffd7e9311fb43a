"""What the rows of the fault matrix share: a server to spoil, a canary beside it, and checks."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.engine import Fault, Spoil
from tests.load.client import Answer, ask
from tests.load.served import Served, chat_body, served, wait_until

ENDLESS = {"ignore_eos": True}
REPLACED_SECONDS = 15.0
"""In which an engine process is replaced: importing torch and loading take 3 to 5 of them here."""


class Unexpected(Exception):
    """What was seen is not what was expected."""


def expect(good: object, seen: str) -> None:
    if not good:
        raise Unexpected(seen)


@dataclass(frozen=True)
class Row:
    """One line of the matrix; ``run`` returns what was seen or raises `Unexpected` with it."""

    id: str
    fault: str
    expected: str
    run: Callable[[Bench], str]


class Bench:
    """A server for the rows that leave it alive, and folders for those that want their own."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._shared: Served | None = None
        self._flags = ("--watchdog", "5", "--max-model-len", "2048")
        self._canary_text: str | None = None

    def close(self) -> None:
        self._stack.close()

    @property
    def server(self) -> Served:
        """Ready, calm and idle."""
        if self._shared is None or self._shared.process.poll() is not None:
            self._shared = self._stack.enter_context(served(*self._flags))
        server = self._shared
        wait_until(server.is_ready, 90)
        wait_until(server.is_idle, 10)
        return server

    def fresh(self) -> Served:
        """A server that has seen no fault: its next engine comes at once."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        return self.server

    def folder(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fathom-")))

    @contextlib.contextmanager
    def canary(self, server: Served) -> Iterator[list[str]]:
        """Streams of one fixed request all the while; each must be the same as alone."""
        body = chat_body("what is 12 + 7?", max_tokens=60)
        if self._canary_text is None:
            self._canary_text = asyncio.run(ask(server.address, body)).text
        texts: list[str] = []
        done = threading.Event()

        def sing() -> None:
            while not done.is_set():
                texts.append(asyncio.run(ask(server.address, body)).text)

        thread = threading.Thread(target=sing)
        thread.start()
        try:
            wait_until(lambda: texts, 20)
            yield texts
        finally:
            done.set()
            thread.join()
        expect(set(texts) == {self._canary_text}, f"the canary changed: {set(texts)}")
        wait_until(server.is_idle, 5)


def chat_with(fault: Fault | Spoil, **fields: Any) -> dict[str, Any]:
    """A request that brings a fault of the engine along, with a prompt of its own."""
    text = f"{fault.name.lower()} {time.monotonic_ns()}"
    return chat_body(text, **{"max_tokens": 200, **ENDLESS, "seed": int(fault), **fields})


def code_of(answer: Answer) -> str:
    return "none" if answer.error is None else str(answer.error["code"])


def brief(answer: Answer) -> str:
    """Status, code, and whether it came to its end."""
    end = "whole" if answer.whole else f"{answer.num_chunks} chunks"
    return f"{answer.status} {code_of(answer)} {end}" if answer.error else f"{answer.status} {end}"


async def together(server: Served, *bodies: dict[str, Any]) -> list[Answer]:
    return await asyncio.gather(*(ask(server.address, body) for body in bodies))


def replaced(server: Served, old_pid: int | None) -> float:
    """Seconds until another engine is ready."""
    started = time.monotonic()
    wait_until(lambda: server.engine_pid not in (None, old_pid), 60)
    wait_until(server.is_ready, 60)
    return time.monotonic() - started
