"""The engine process: `Engine` behind a socket. `EngineClient` starts it and watches over it.

Messages come between two steps. While the engine works it says something about once a second, so
the server knows a slow engine from a hung one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from runtime import wire
from runtime.engine import Engine
from runtime.engine_config import EngineConfig
from runtime.errors import FathomError
from runtime.memory import give_back_memory
from runtime.request import FinishReason, Sequence, TokenEvent

PROGRESS_SECONDS = 0.1
BEAT_SECONDS = 1.0
MESSAGES_SECONDS = 0.25
"""How long messages may keep a step waiting: to compile a grammar takes up to a second."""
IDLE_SECONDS = 5.0
"""After these without work what requests have left is given back, once."""
MAX_SPOILT_STEPS = 3
"""So many steps in succession without a finite row, and it is not the requests that are bad."""
GONE = (BrokenPipeError, ConnectionResetError)
"""What a send raises once the server is gone."""

Loader = Callable[[EngineConfig, Callable[[int, int], None]], Engine]


class Channel:
    """The blocking end of the socket; knows when it last sent something."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent_at = time.monotonic()

    def send(self, message: wire.Message) -> None:
        self.sock.sendall(wire.encode(message))
        self.sent_at = time.monotonic()

    def send_events(self, events: list[TokenEvent]) -> None:
        at = time.monotonic()
        # what tells of a prompt is long; many of them could be too much for one message
        alone = [bool(event.prompt_logprobs) for event in events]
        starts = [i for i in range(len(events)) if i == 0 or alone[i] or alone[i - 1]]
        for start, end in itertools.pairwise([*starts, len(events)]):
            rows = wire.pack_events(events[start:end])
            self.send({"type": "events", "events": rows, "at": at})

    def beat(self) -> None:
        """Say that steps go on, unless something was said within a second."""
        if time.monotonic() - self.sent_at >= BEAT_SECONDS:
            self.send({"type": "beat"})


def serve_engine(sock: socket.socket, load: Loader = Engine.from_checkpoint) -> bool:
    """Run the engine behind ``sock`` until the other end says stop or goes away.

    False if a step failed in a way that leaves this process unusable; the other end then knows.
    Raises `WireError` for messages that make no sense, and one of `GONE` once the other end is
    gone.
    """
    channel = Channel(sock)
    first = wire.receive(sock)
    if first is None:
        return True
    engine = _load(channel, first, load)
    if engine is None:
        return True
    # what is there now stays: walking through it would stop the steps for a sixth of a second
    gc.collect()
    gc.freeze()

    def tell_started(sequences: list[Sequence]) -> None:
        rows = [[seq.seq_id, seq.num_cached] for seq in sequences]
        channel.send({"type": "started", "sequences": rows, "at": time.monotonic()})

    engine.on_start = tell_started
    channel.send({"type": "ready", "info": engine.info.to_dict()})
    num_spoilt = 0
    while True:
        if not engine.has_work and not select.select([sock], [], [], IDLE_SECONDS)[0]:
            give_back_memory()
        # With work at hand the socket is only glanced at; without, it is waited for.
        waiting_since: float | None = None
        while select.select([sock], [], [], 0 if engine.has_work else None)[0]:
            waiting_since = waiting_since or time.monotonic()
            message = wire.receive(sock)
            if message is None or message.get("type") == "stop":
                return True
            _apply(engine, channel, message)
            if engine.has_work and time.monotonic() - waiting_since > MESSAGES_SECONDS:
                break
        try:
            events = engine.step()
            num_spoilt = count_spoilt(events, num_spoilt)
            if num_spoilt >= MAX_SPOILT_STEPS:
                raise ArithmeticError(f"no row of {num_spoilt} steps was finite")
        except GONE:
            raise
        except (torch.OutOfMemoryError, MemoryError):
            traceback.print_exc()
            events = engine.fail_running()
        except Exception as error:
            # On a GPU a failed kernel leaves the device unusable for this process. On a CPU too
            # nobody knows what state a step has left behind.
            traceback.print_exc()
            text = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            channel.send({"type": "fault", "text": text})
            return False
        channel.send_events(events)
        channel.beat()


def count_spoilt(events: list[TokenEvent], num_before: int) -> int:
    """Steps in succession that drew nothing finite; one that drew nothing at all does not count."""
    if any(event.token_id is not None or event.prompt_logprobs for event in events):
        return 0
    return num_before + any(event.finish_reason is FinishReason.NOT_FINITE for event in events)


def _load(channel: Channel, first: wire.Message, load: Loader) -> Engine | None:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PROGRESS_SECONDS:
            last = now
            channel.send({"type": "progress", "done": done, "total": total})

    try:
        return load(EngineConfig(**wire.field(first, "config", dict)), progress)
    except (*GONE, wire.WireError):
        raise
    except FathomError as error:
        kind, text = type(error).__name__, str(error)
    except Exception as error:
        traceback.print_exc()
        kind, text = "EngineDead", f"the engine cannot start: {type(error).__name__}: {error}"
    channel.send({"type": "failed", "kind": kind, "text": text})
    return None


def _apply(engine: Engine, channel: Channel, message: wire.Message) -> None:
    """Carry out one message of the server, and answer it."""
    match message.get("type"):
        case "add":
            seq_id = wire.field(message, "seq_id", int)
            try:
                engine.add(
                    wire.field(message, "prompt_ids", list),
                    wire.unpack_params(wire.field(message, "params", dict)),
                    seq_id=seq_id,
                    namespace=wire.field(message, "namespace", str),
                    priority=wire.field(message, "priority", int),
                )
            except wire.WireError:
                raise
            except Exception as error:  # whatever one request brings about ends that request only
                if not isinstance(error, FathomError):
                    traceback.print_exc()
                channel.send_events([TokenEvent(seq_id, None, FinishReason.ERROR)])
        case "abort":
            seq_id = wire.field(message, "seq_id", int)
            engine.abort(seq_id)
            channel.send({"type": "aborted", "seq_id": seq_id})
        case "stats":
            channel.send({"type": "stats", "stats": engine.stats()})
        case other:
            raise wire.WireError(f"unknown message type {other!r}")


def main(argv: list[str] | None = None, load: Loader = Engine.from_checkpoint) -> None:
    """Serve on the socket that the server passed on, and end this process: with 1 after a fault.

    Not by way of Python's own end, which a broken device may hold up and a native thread may crash.
    """
    parser = argparse.ArgumentParser(prog="python -m runtime")
    parser.add_argument("--fd", type=int, required=True, help="socket inherited from the server")
    parser.add_argument("--parent", type=int, required=True, help="process id of the server")
    arguments: Any = parser.parse_args(argv)
    code = 0
    with (
        contextlib.suppress(*GONE),
        socket.socket(fileno=arguments.fd) as sock,
    ):
        try:
            code = 0 if serve_engine(sock, load) else 1
        except wire.WireError as error:
            print(f"fathom: the engine process ends: {error}", file=sys.stderr)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
