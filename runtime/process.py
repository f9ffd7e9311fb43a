"""The engine in its own process: Python's lock never stands between two device steps.

`EngineClient` lives in the server's event loop; `main` is the engine process. They talk over a
socket pair with the frames of `runtime.wire`. Either end notices the other's death at once,
because the socket then ends.

server → engine   start · add · abort · stats · stop
engine → server   progress · ready · failed · events · stats
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import select
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime import wire
from runtime.admission import admit
from runtime.engine import Engine
from runtime.engine_config import EngineConfig, EngineInfo
from runtime.errors import CheckpointError, ConfigError, EngineDead, FathomError, QueueFull
from runtime.request import FinishReason, SamplingParams, TokenEvent

STOP_SECONDS = 5.0
"""How long a stopped engine process may take to leave before it is killed."""
PROGRESS_SECONDS = 0.1
MAX_WAITING = 256
"""Sequences that may wait beyond those that run."""


class Generation:
    """The tokens of one sequence as they come: ``async for events in generation``.

    Each item is a list with every event that arrived since the last one; the last item ends with
    the event that carries a ``finish_reason``. Raises `EngineDead` if the engine process dies.
    """

    def __init__(self, seq_id: int, abort: Callable[[int], None]) -> None:
        self.seq_id = seq_id
        self._abort = abort
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()
        self._error: EngineDead | None = None
        self._finished = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if self._finished:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        if self._error is not None:
            self._finished = True
            raise self._error
        self._finished = events[-1].finish_reason is not None
        return events

    def abort(self) -> None:
        """End this sequence and free its pages before the engine's next step. Idempotent."""
        self._abort(self.seq_id)

    def deliver(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    def fail(self, error: EngineDead) -> None:
        self._error = error
        self._arrived.set()


class EngineClient:
    """The server's handle on the engine process. All methods belong to one event loop."""

    def __init__(
        self, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.config = config
        self._progress = progress or (lambda done, total: None)
        self._info: EngineInfo | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._generations: dict[int, Generation] = {}
        self._seq_ids = itertools.count()
        self._stats: deque[asyncio.Future[dict[str, int]]] = deque()
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._stopping = False

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "EngineClient.start has not finished"
        return self._info

    @property
    def healthy(self) -> bool:
        return self._info is not None and self._writer is not None

    async def start(self) -> EngineInfo:
        """Start the engine process and wait until its weights are loaded.

        Raises `ConfigError` or `CheckpointError` as the engine did, `EngineDead` if it died.
        """
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches the server only, which then ends the engine
                env={**os.environ, "PYTHONPATH": path},
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._ready = asyncio.get_running_loop().create_future()
        self._reader_task = asyncio.create_task(self._read(reader))
        self._send({"type": "start", "config": self.config.to_dict()})
        try:
            self._info = await self._ready
        except BaseException:
            await self.stop()
            raise
        return self._info

    async def stop(self) -> None:
        """End the engine process and whatever it was running. Idempotent."""
        self._stopping = True
        if self._writer is not None:
            self._send({"type": "stop"})
        if self._process is not None:
            if self._info is None:
                self._process.kill()  # it is busy loading and reads no messages
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._reader_task is not None:
            await self._reader_task

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> Generation:
        """Queue a sequence.

        Raises `BadRequest`, `ContextLengthExceeded`, `QueueFull` or `EngineDead`.
        """
        if not self.healthy:
            raise EngineDead("the engine is not running")
        if len(self._generations) >= self.info.max_num_seqs + MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} requests are waiting already; try again later")
        seq_id = next(self._seq_ids)
        admit(seq_id, prompt_ids, params, self.info)  # refuse here what the engine would refuse
        generation = Generation(seq_id, self._abort)
        self._generations[seq_id] = generation
        message = {
            "type": "add",
            "seq_id": seq_id,
            "prompt_ids": prompt_ids,
            "params": wire.pack_params(params),
        }
        self._send(message)
        return generation

    def end_all(self, reason: str) -> None:
        """End every generation; their readers get an `EngineDead` with this reason."""
        for seq_id in self._generations:
            self._send({"type": "abort", "seq_id": seq_id})
        self._fail_all(EngineDead(reason))

    async def stats(self) -> dict[str, int]:
        """The engine's own counts (`Engine.stats`). Raises `EngineDead`."""
        if not self.healthy:
            raise EngineDead("the engine is not running")
        answer: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        self._stats.append(answer)
        self._send({"type": "stats"})
        return await answer

    # -- inside ----------------------------------------------------------------------------

    def _abort(self, seq_id: int) -> None:
        generation = self._generations.pop(seq_id, None)
        if generation is None:
            return
        generation.deliver(TokenEvent(seq_id, None, FinishReason.ABORT))
        self._send({"type": "abort", "seq_id": seq_id})

    def _send(self, message: wire.Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header = await reader.readexactly(wire.HEADER.size)
                body = await reader.readexactly(wire.body_length(header))
                self._handle(wire.decode(body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the engine process is gone
        finally:
            self._close()

    def _handle(self, message: wire.Message) -> None:
        match message["type"]:
            case "events":
                for event in wire.unpack_events(message["events"]):
                    generation = self._generations.get(event.seq_id)
                    if generation is None:
                        continue  # aborted while the event was on its way
                    if event.finish_reason is not None:
                        del self._generations[event.seq_id]
                    generation.deliver(event)
            case "progress":
                self._progress(message["done"], message["total"])
            case "stats":
                answer = self._stats.popleft()
                if not answer.done():
                    answer.set_result(message["stats"])
            case "ready":
                assert self._ready is not None
                self._ready.set_result(EngineInfo.from_dict(message["info"]))
            case "failed":
                kinds = {"ConfigError": ConfigError, "CheckpointError": CheckpointError}
                assert self._ready is not None
                self._ready.set_exception(kinds.get(message["kind"], EngineDead)(message["text"]))

    def _fail_all(self, error: EngineDead) -> None:
        for generation in self._generations.values():
            generation.fail(error)
        self._generations.clear()

    def _close(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        error = EngineDead("the engine process stopped")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        while self._stats:
            answer = self._stats.popleft()
            if not answer.done():
                answer.set_exception(error)
        self._fail_all(error)
        if not self._stopping and self._info is not None:
            print("fathom: the engine process stopped; restart the server", file=sys.stderr)


# -- the engine process --------------------------------------------------------------------


def serve_engine(sock: socket.socket) -> None:
    """Run the engine behind ``sock`` until the other end says stop or goes away."""
    first = wire.receive(sock)
    if first is None:
        return
    engine = _load(sock, EngineConfig(**first["config"]))
    if engine is None:
        return
    # what is there now stays: walking through it would stop the steps for a sixth of a second
    gc.collect()
    gc.freeze()
    sock.sendall(wire.encode({"type": "ready", "info": engine.info.to_dict()}))
    while True:
        # With work at hand the socket is only glanced at; without, it is waited for.
        while select.select([sock], [], [], 0 if engine.has_work else None)[0]:
            message = wire.receive(sock)
            if message is None or message["type"] == "stop":
                return
            answer = _apply(engine, message)
            if answer is not None:
                sock.sendall(wire.encode(answer))
        try:
            events = engine.step()
        except Exception:
            traceback.print_exc()
            if engine.info.device != "cpu":
                raise  # a failed kernel leaves the device unusable for this process
            events = engine.fail_running()
        if events:
            sock.sendall(wire.encode({"type": "events", "events": wire.pack_events(events)}))


def _load(sock: socket.socket, config: EngineConfig) -> Engine | None:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PROGRESS_SECONDS:
            last = now
            sock.sendall(wire.encode({"type": "progress", "done": done, "total": total}))

    try:
        return Engine.from_checkpoint(config, progress)
    except FathomError as error:
        failure = {"type": "failed", "kind": type(error).__name__, "text": str(error)}
        sock.sendall(wire.encode(failure))
        return None


def _apply(engine: Engine, message: wire.Message) -> wire.Message | None:
    """Carry out one message of the server; the answer it gets, if any."""
    match message["type"]:
        case "add":
            params = wire.unpack_params(message["params"])
            seq_id: int = message["seq_id"]
            try:
                engine.add(message["prompt_ids"], params, seq_id=seq_id)
            except FathomError:
                events = [TokenEvent(seq_id, None, FinishReason.ERROR)]
                return {"type": "events", "events": wire.pack_events(events)}
        case "abort":
            engine.abort(message["seq_id"])
        case "stats":
            return {"type": "stats", "stats": engine.stats()}
        case other:
            raise wire.WireError(f"unknown message type {other!r}")
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m runtime")
    parser.add_argument("--fd", type=int, required=True, help="socket inherited from the server")
    arguments: Any = parser.parse_args(argv)
    with (
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
        socket.socket(fileno=arguments.fd) as sock,
    ):
        serve_engine(sock)
