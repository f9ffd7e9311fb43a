"""What every benchmark says about where it ran: machine, versions and commit.

A benchmark ends with `print_record`: one JSON document on the last line of stdout.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_MODEL = ROOT / "weights" / "fathom-tiny"
PACKAGES = ("torch", "triton", "transformers", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Flags of /proc/cpuinfo that decide which matmul kernels there are."""


def commit() -> str | None:
    """The short hash of what is checked out, None without git."""
    return first_line(["git", "rev-parse", "--short", "HEAD"])


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of Python and the packages whose speed is measured; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    return found | {name: version_of(name) for name in PACKAGES}


def first_line(command: list[str]) -> str | None:
    """The first line that a program prints, None if it cannot be run."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.splitlines()), None)


def date() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """The CPU's name and features, cores, memory, and how busy others keep the machine."""
    cpuinfo = meminfo = ""
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    name = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return {
        "cpu": name[1] if name else platform.machine(),
        "features": [feature for feature in FEATURES if feature in known],
        "cores": usable_cores(),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "load_1_min": round(os.getloadavg()[0], 2),
    }


def record(benchmark: str, **results: Any) -> dict[str, Any]:
    """A benchmark's results with all that must be known to compare them."""
    return {
        "benchmark": benchmark,
        "date": date(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **results,
    }


def print_record(benchmark: str, **results: Any) -> None:
    """The last line of a benchmark's stdout."""
    print(json.dumps(record(benchmark, **results)), flush=True)


def rounds_within(count: int, seconds: float) -> Iterator[int]:
    """0 for a warm-up, then 1 to ``count``; after ``seconds`` none but the first begins."""
    end = time.monotonic() + seconds
    for number in range(count + 1):
        if number > 1 and time.monotonic() > end:
            return
        yield number


def percent_of(part: float, whole: float | None) -> float | None:
    return 100 * part / whole if whole else None


def shown(value: float | None, pattern: str = ",.0f") -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else format(value, pattern)
