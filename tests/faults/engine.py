"""The engine with faults in it; `tests.faults.engine_program` is its process.

A request brings its own fault along, by its seed; so a fault strikes when that request runs, and
what it does to the others can be seen. The counts of the engine can be asked for over a Unix socket
beside it, from outside and at any time.
"""

from __future__ import annotations

import enum
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import Engine, EngineConfig
from runtime.engine_process import main
from runtime.scheduler import Plan
from tests.runtime.faulty_engine import Fault, cause

FAULT_AT = 3
"""Tokens of its answer that a request gets before its fault strikes."""


class Spoil(enum.IntEnum):
    """Seeds beside those of `Fault`: what goes wrong with numbers, pages and the wire."""

    ROW = 9101  # its own parameters cannot be taken over
    NAN = 9102  # its logits are NaN
    INF = 9103
    MINUS_INF = 9104
    ALL_NAN = 9105  # from now on every row of every step is
    KILL_AT_START = 9106  # dies before its first token, each time
    DIRTY_PAGES = 9107  # every page that nobody uses is filled with NaN
    GARBAGE = 9108  # writes nonsense to the server
    HUGE_FRAME = 9109
    TRUNCATED_FRAME = 9110


FAULTS = {*Fault, *Spoil}


class FaultyModel:
    """Spoils the logits of chosen rows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.spoilt: dict[int, float] = {}  # row of the next step's logits -> value
        self.is_broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.logits(hidden)
        for row, value in self.spoilt.items():
            logits[row] = value
        self.spoilt = {}
        return logits.fill_(torch.nan) if self.is_broken else logits


class FaultyRunner:
    """Lets the faults of a plan's requests strike before the plan is launched."""

    def __init__(self, engine: Engine, sock: int) -> None:
        self._engine = engine
        self._sock = sock
        self._runner: Any = engine.runner
        self._model = self._runner.model = FaultyModel(self._runner.model)
        self._struck: set[int] = set()
        start = self._runner.sampler.start

        def start_row(seq: Any) -> None:
            if seq.params.seed == Spoil.ROW:
                raise RecursionError("a fault of this row")
            start(seq)

        self._runner.sampler.start = start_row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plan: Plan) -> Any:
        sampling = [chunk.seq for chunk in plan.chunks if chunk.samples]
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.params.seed == Spoil.KILL_AT_START:
                os._exit(1)
            seed, is_due = seq.params.seed, len(seq.output_ids) >= FAULT_AT
            if seed not in FAULTS or not is_due or seq.seq_id in self._struck:
                continue
            self._struck.add(seq.seq_id)
            if seed in set(Fault):
                cause(Fault(seed))
            else:
                self._strike(Spoil(seed), sampling.index(seq))
        return self._runner.launch(plan)

    def _strike(self, fault: Spoil, row: int) -> None:
        match fault:
            case Spoil.NAN | Spoil.INF | Spoil.MINUS_INF:
                values = {Spoil.NAN: "nan", Spoil.INF: "inf", Spoil.MINUS_INF: "-inf"}
                self._model.spoilt = {row: float(values[fault])}
            case Spoil.ALL_NAN:
                self._model.is_broken = True
            case Spoil.GARBAGE:
                os.write(self._sock, b"\x00\x00\x00\x04{..}")
            case Spoil.HUGE_FRAME:
                os.write(self._sock, b"\x40\x00\x00\x00")
            case Spoil.TRUNCATED_FRAME:
                os.write(self._sock, b"\x00\x00\x00\x40{")
                os._exit(0)
            case Spoil.DIRTY_PAGES:
                pool = self._engine.scheduler.pool
                for layer in self._runner.caches:
                    for cache in layer.values():
                        cache[pool._free] = torch.nan


def answer(engine: Engine, path: Path) -> None:
    """Tell whoever connects to the socket at ``path`` the engine's counts, one JSON each."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(json.dumps(engine.stats()).encode())

    threading.Thread(target=serve, daemon=True).start()


def loader(path: Path, sock: int) -> Callable[[EngineConfig, Any], Engine]:
    def load(config: EngineConfig, progress: Any) -> Engine:
        engine = Engine.from_checkpoint(config, progress)
        engine.runner = FaultyRunner(engine, sock)
        answer(engine, path)
        return engine

    return load


def run(arguments: list[str]) -> None:
    """What `tests.faults.engine_program` does: ``--control SOCKET --fd N --parent PID``."""
    flag, control, *rest = arguments
    assert flag == "--control"
    main(rest, loader(Path(control), int(rest[rest.index("--fd") + 1])))
