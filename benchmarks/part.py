"""What the parts of `benchmarks.gpu` share: their options, their rows, and going on after a crash.

A part is a program of its own. It appends each row to a file of JSON lines as soon as it has it, so
that whatever ends the part later, a hang or a dead GPU context, the rows before it stay.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
DEAD_CONTEXT = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "hardware stack error",
    "cudaErrorLaunchTimeout",
)
"""Errors after which nothing more runs on the GPU in the same process."""


class DeadGpu(Exception):
    """The process cannot use the GPU any more."""


@dataclass(slots=True)
class Part:
    """The options of one part, and its rows so far."""

    device: torch.device
    tiny: bool  # small shapes: a test of the benchmark, no measurement
    deadline: float  # of time.monotonic()
    first_case: int  # cases before it were done by a process that died
    rows_path: Path | None
    ceilings: dict[str, float] | None  # what `benchmarks.ceilings` measured, if it did
    failures: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and caches; CPUs test the plumbing in float32."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, **row: Any) -> None:
        """Keep one row and print it."""
        if self.rows_path is not None:
            with self.rows_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print("  ".join(f"{key}={_shown(value)}" for key, value in row.items()), flush=True)

    def run_cases(self, cases: Iterable[tuple[Row, Callable[[], None]]]) -> int:
        """Run each case in turn; the exit code, 1 if one failed.

        A case is what it is called, as the first fields of a row, and a function that records its
        rows. One that raises gets a row with ``error``, one past the deadline a row with
        ``skipped``. A GPU context that died is replaced with a new process for the cases that
        follow.
        """
        for index, (label, run) in enumerate(cases):
            if index < self.first_case:
                continue
            if self.seconds_left <= 0:
                self.record(**label, skipped="no time left")
                continue
            try:
                run()
            except DeadGpu:
                self._go_on_from(index + 1)
            except Exception as error:  # whatever a kernel, a compiler or a library raises
                try:
                    self.fail(label, error)
                except DeadGpu:
                    self._go_on_from(index + 1)
        return 1 if self.failures else 0

    def fail(self, label: Row, error: Exception) -> None:
        """Keep an error as a row, and go on. Raises `DeadGpu` if nothing more can run."""
        reason = describe(error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            self.record(**label, skipped=f"does not fit on the device ({reason[:120]})")
            return
        self.record(**label, error=reason)
        self.failures.append(reason)
        if self.on_gpu and any(words in reason for words in DEAD_CONTEXT):
            raise DeadGpu(reason) from error

    def _go_on_from(self, case: int) -> None:
        """Replace this process by one that does the cases from ``case`` on and then fails."""
        arguments = [*sys.orig_argv[1:], "--first-case", str(case), "--failed"]
        arguments += ["--seconds", str(self.seconds_left)]  # the last one given counts
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *arguments])


def parse_part(description: str | None, arguments: list[str] | None = None) -> Part:
    """A part with the options of the command line, or with ``arguments``."""
    return make_part(part_parser(description).parse_args(arguments))


def part_parser(description: str | None) -> argparse.ArgumentParser:
    """The options every part takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test the benchmark")
    parser.add_argument("--seconds", type=float, default=600.0, help="start nothing new after this")
    parser.add_argument("--rows", type=Path, help="append the rows to this file of JSON lines")
    parser.add_argument("--ceilings", type=Path, help="JSON of the ceilings measured before")
    parser.add_argument("--first-case", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--failed", action="store_true", help=argparse.SUPPRESS)
    return parser


def make_part(options: argparse.Namespace) -> Part:
    """A part with these options, at its start."""
    if options.device == "cpu":
        torch.set_num_threads(1)  # what is timed there is only tested, and must not wait for others
    ceilings = None
    if options.ceilings is not None and options.ceilings.exists():
        ceilings = json.loads(options.ceilings.read_text(encoding="utf-8"))
    return Part(
        device=torch.device(options.device),
        tiny=options.tiny,
        deadline=time.monotonic() + options.seconds,
        first_case=options.first_case,
        rows_path=options.rows,
        ceilings=ceilings,
        failures=["a case before"] if options.failed else [],
    )


def release(part: Part) -> None:
    """Give memory back that nothing uses any more; engines are cycles of objects."""
    gc.collect()
    if part.on_gpu:
        torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
