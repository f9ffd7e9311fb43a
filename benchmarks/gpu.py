"""Everything worth knowing about the machine's GPU in one command: `make gpu`.

    python -m benchmarks.gpu [--out DIR] [--minutes 10] [--only part ...]

    ceilings   memory bandwidth, matmul rate, launch overhead; all else is a percent of these
    decode     whole engine steps and prompts of released models with random weights
    tests      pytest -m gpu
    kernels    every op of a step at released shapes
    peers      transformers on the same weights

Each part is a process with a time limit of its own, the most valuable first; one that fails, hangs
or crashes loses no other part, nor its own rows so far. DIR/results.json holds them all and is
replaced every few seconds; DIR/<part>.log holds what a part printed. The exit code is 1 if a part
failed. `--device cpu --tiny` tests the benchmark itself on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, commit, date, first_line, versions
from benchmarks.report import summary

SAVE_SECONDS = 5.0
END_SECONDS = 5.0  # kept for what comes after the last part
STOP_SECONDS = 15.0  # from the time after which a part starts nothing new to its end by force
LEAST_SECONDS = 20.0  # a part that would get less is skipped
SHARE = 1.25  # what a part may take beyond its share of the time, since most take less
REASON_LINES = 4


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part, how it is started, and its share of the time."""

    name: str
    command: Sequence[str]
    weight: float


def _plan(name: str, module: str, weight: float) -> PartPlan:
    return PartPlan(name, [sys.executable, "-m", module], weight)


PARTS = [
    _plan("ceilings", "benchmarks.ceilings", 60),
    _plan("decode", "benchmarks.decode", 200),
    _plan("tests", "benchmarks.gpu_tests", 150),
    _plan("kernels", "benchmarks.kernels", 150),
    _plan("peers", "benchmarks.peers", 150),
]


def run_parts(
    parts: Sequence[PartPlan],
    out: Path,
    *,
    minutes: float,
    options: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the parts in order and keep ``out/results.json`` up to date.

    Args:
        parts: what to run.
        out: a folder, made if it is missing.
        minutes: for all parts together. A part may take its share of what is left and a quarter
            more; what it leaves is for those that follow.
        options: passed to every part, such as ``--tiny``.
        facts: about the machine and the run, first in the results.

    Returns:
        The results: ``facts``, then ``ceilings`` and ``parts``. A part has ``status`` (passed,
        failed, timed out, skipped), ``seconds``, ``reason`` (None if it passed) and ``rows``.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes - min(END_SECONDS, 6 * minutes)
    least = min(LEAST_SECONDS, 3 * minutes)
    results: dict[str, Any] = {**(facts or {}), "ceilings": None, "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        ceilings_path = Path(scratch) / "ceilings.json"
        for index, plan in enumerate(parts):
            left = end - time.monotonic()
            share = plan.weight / sum(later.weight for later in parts[index:])
            limit = min(SHARE * share, 1.0) * left
            if limit < least:
                outcome = _outcome("skipped", 0.0, "no time left")
                results["parts"][plan.name] = {**outcome, "rows": []}
                _save(results, out)
                continue
            print(f"\n== {plan.name}, at most {limit:.0f} s", flush=True)
            rows_path = Path(scratch) / f"{plan.name}.jsonl"
            command = [
                *plan.command,
                *options,
                *("--seconds", f"{max(limit - STOP_SECONDS, limit / 2):.1f}"),
                *("--rows", str(rows_path), "--ceilings", str(ceilings_path)),
            ]
            _run_part(plan.name, command, limit, rows_path, results, out)
            if plan.name == "ceilings" and results["parts"]["ceilings"]["rows"]:
                measured = results["parts"]["ceilings"]["rows"][-1]
                results["ceilings"] = measured
                ceilings_path.write_text(json.dumps(measured), encoding="utf-8")
            _save(results, out)
    return results


def _run_part(
    name: str,
    command: Sequence[str],
    limit: float,
    rows_path: Path,
    results: dict[str, Any],
    out: Path,
) -> None:
    """Run one part to its end or to its limit, saving its rows on the way."""
    log_path = out / f"{name}.log"
    start = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            process_group=0,  # so that all of it can be ended together
        )
        try:
            code = None
            while code is None and time.monotonic() - start < limit:
                results["parts"][name] = {
                    **_outcome("running", time.monotonic() - start, None),
                    "rows": _read_rows(rows_path),
                }
                _save(results, out)
                wait = min(SAVE_SECONDS, limit - (time.monotonic() - start))
                try:
                    code = process.wait(max(wait, 0.01))
                except subprocess.TimeoutExpired:
                    code = None
        finally:
            end_group(process)
    seconds = time.monotonic() - start
    if code is None:
        outcome = _outcome("timed out", seconds, f"ended by force after {limit:.0f} s")
    elif code == 0:
        outcome = _outcome("passed", seconds, None)
    else:
        outcome = _outcome("failed", seconds, _reason(code, log_path))
    results["parts"][name] = {**outcome, "rows": _read_rows(rows_path)}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the part and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(status: str, seconds: float, reason: str | None) -> dict[str, Any]:
    return {"status": status, "seconds": round(seconds, 1), "reason": reason}


def _reason(code: int, log_path: Path) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"exit code {code}: " + " | ".join(lines[-REASON_LINES:])[-600:]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a part's rows; the last one may be half written."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _save(results: dict[str, Any], out: Path) -> None:
    """Replace the results in one step: whoever reads them, or stops us, finds a whole document."""
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    partial.replace(out / "results.json")


def run_facts(device: str, tiny: bool, minutes: float) -> dict[str, Any]:
    """Versions, machine, commit and date; what cannot be found out is None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = first_line(query) if device.startswith("cuda") else None
    name, driver, memory = (gpu.split(", ") if gpu else [None, None, None])[:3]
    return {
        "benchmark": "gpu",
        "date": date(),
        "commit": commit(),
        "device": device,
        "tiny": tiny,
        "minutes": minutes,
        "gpu": {"name": name, "driver": driver, "memory": memory},
        "versions": versions(),
    }


def _has_gpu() -> bool:
    import torch  # two seconds that a wrong option need not pay

    return torch.cuda.is_available()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=[plan.name for plan in PARTS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test the benchmark")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not _has_gpu():
        print("no CUDA device is visible to PyTorch; `--device cpu --tiny` tests the benchmark")
        return 2
    parts = [plan for plan in PARTS if options.only is None or plan.name in options.only]
    passed_on = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    facts = run_facts(options.device, options.tiny, options.minutes)
    results = run_parts(parts, options.out, minutes=options.minutes, options=passed_on, facts=facts)
    table = summary(results)
    (options.out / "summary.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{options.out / 'results.json'}")
    failed = [
        n for n, part in results["parts"].items() if part["status"] in ("failed", "timed out")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
