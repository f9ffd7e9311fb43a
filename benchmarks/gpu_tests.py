"""Runs the tests marked gpu and keeps each outcome as it comes: part `tests` of `benchmarks.gpu`.

This module is also the pytest plugin that does so. A row per outcome that is no pass, and the
counts every few seconds, survive a run that is ended by force, as a report file would not.

    python -m benchmarks.gpu_tests
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.part import Part, parse_part

ROWS_VARIABLE = "FATHOM_BENCHMARK_ROWS"
FOLDERS = ["tests/kernels", "tests/runtime"]
SERVER_TESTS = "tests/load/test_gpu.py"  # where what a server needs is installed
NEEDS_SERVER = ["tests/runtime/test_corpus.py"]  # imports api, and holds no test marked gpu
COUNT_SECONDS = 5.0
MAX_FAILURES = 20  # rows; more are counted
TEST_SECONDS = 60
MAX_WORKERS = 12  # most of a test is compiling kernels, on one core each


class Outcomes:
    """Counts what tests report and keeps the first failures as rows."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.counts = {"num_passed": 0, "num_failed": 0, "num_skipped": 0}
        self.saved_at = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return  # set up or torn down
        self.counts[f"num_{report.outcome}"] += 1
        if report.failed:
            self._keep(report.nodeid, report.longreprtext)
        if time.monotonic() - self.saved_at > COUNT_SECONDS:
            self.save()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["num_failed"] += 1
            self._keep(report.nodeid, report.longreprtext)

    def pytest_sessionfinish(self) -> None:
        self.save()

    def _keep(self, name: str, text: str) -> None:
        if self.counts["num_failed"] <= MAX_FAILURES:
            lines = [line for line in text.splitlines() if line.startswith("E ")] or [text[-300:]]
            self.part.record(failed=name, why=" | ".join(lines)[:400])

    def save(self) -> None:
        self.saved_at = time.monotonic()
        self.part.record(**self.counts)


def pytest_configure(config: pytest.Config) -> None:
    """Keep outcomes in the main process; workers report to it."""
    if not hasattr(config, "workerinput"):
        part = parse_part(None, ["--rows", os.environ[ROWS_VARIABLE], "--device", "cpu"])
        config.pluginmanager.register(Outcomes(part))


def test_command(part: Part) -> list[str]:
    """What runs the tests; without a GPU one small file, to test the benchmark."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_tests"]
    # a plugin of the lent machine, which warns that it cannot time in parallel; warnings are errors
    command += ["-p", "no:benchmark"]
    command += ["-p", "no:cacheprovider", "--timeout", str(TEST_SECONDS)]
    if not part.on_gpu:
        return [*command, "-n", "0", "tests/kernels/test_configs.py"]
    ignored = [f"--ignore={path}" for path in NEEDS_SERVER]
    num_workers = min(MAX_WORKERS, os.cpu_count() or 1)
    parallel = ["-n", f"{num_workers}", "--dist", "worksteal", "--timeout-method", "thread"]
    paths = [*FOLDERS, *([SERVER_TESTS] if importlib.util.find_spec("starlette") else [])]
    return [*command, "-m", "gpu", *parallel, "--continue-on-collection-errors", *ignored, *paths]


def main() -> int:
    part = parse_part(__doc__)
    assert part.rows_path is not None or not part.first_case
    environment: dict[str, Any] = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    environment[ROWS_VARIABLE] = str(part.rows_path or Path(os.devnull))
    try:
        command = test_command(part)
        return subprocess.run(command, env=environment, timeout=part.seconds_left).returncode
    except subprocess.TimeoutExpired:
        part.record(skipped="no time left for the tests that follow")
        return 1


if __name__ == "__main__":
    sys.exit(main())
