"""The real engine process with faults that requests ask for by their seed. Run as a program.

``EngineClient(config, program=PROGRAM)`` starts it; a request with ``seed=Fault.RAISE`` makes the
step that first runs it raise, and so on. Every other request is served as ever.
"""

from __future__ import annotations

import enum
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-P", str(Path(__file__).resolve()))
SLOW_SECONDS = 2.0


class Fault(enum.IntEnum):
    """What a step does that runs a sequence with this seed."""

    RAISE = 9001  # an exception that nobody expects
    OUT_OF_MEMORY = 9002
    HANG = 9003  # for ever, in Python
    SLOW = 9004  # each step sleeps
    EXIT = 9005
    SEGFAULT = 9006
    KILL = 9007
    STOP = 9008  # SIGSTOP
    ADD = 9009  # `Engine.add` raises


def cause(fault: Fault) -> None:
    import torch

    match fault:
        case Fault.RAISE:
            raise RuntimeError("CUDA error: device-side assert triggered (a test's)")
        case Fault.OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("out of memory (a test's)")
        case Fault.HANG:
            while True:
                time.sleep(1)
        case Fault.SLOW:
            time.sleep(SLOW_SECONDS)
        case Fault.EXIT:
            os._exit(3)
        case Fault.SEGFAULT:
            os.kill(os.getpid(), signal.SIGSEGV)
        case Fault.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            pass


class FaultyRunner:
    """Stands before a runner and has the faults of the sequences in a plan."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plan: Any) -> Any:
        for chunk in plan.chunks:
            if chunk.seq.params.seed in set(Fault):
                cause(Fault(chunk.seq.params.seed))
        return self._runner.launch(plan)


def with_faults(engine: Any) -> Any:
    """The same engine; from now on its requests can ask for faults."""
    engine.runner = FaultyRunner(engine.runner)
    add = engine.add

    def faulty_add(prompt_ids: Any, params: Any, **options: Any) -> Any:
        if params.seed == Fault.ADD:
            raise ValueError("a test's")
        return add(prompt_ids, params, **options)

    engine.add = faulty_add
    return engine


def load(config: Any, progress: Callable[[int, int], None]) -> Any:
    from runtime import Engine

    return with_faults(Engine.from_checkpoint(config, progress))


def start() -> None:
    from runtime.engine_process import main

    main(load=load)


if __name__ == "__main__":
    import runpy

    # As the real program does, before anything heavy is imported; but then our engine.
    program = Path(__file__).resolve().parents[2] / "runtime" / "__main__.py"
    runpy.run_path(str(program))["prepare"]()
    start()
