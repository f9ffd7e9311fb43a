"""The conductor of `make gpu`: no part, however it ends, costs another one its results."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import PartPlan, run_parts
from benchmarks.report import summary

# Each gets `--seconds S --rows PATH --ceilings PATH`; these are the parts' own arguments.
START = """
import json, os, pathlib, signal, sys, time
rows = pathlib.Path(sys.argv[sys.argv.index("--rows") + 1])
def record(**row):
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\\n")
record(first=1)
"""
SCRIPTS = {
    "passes": "record(second=2); print('printed')",
    "raises": "raise RuntimeError('no kernel today')",
    "hangs": "time.sleep(600)",
    "dies": "os.kill(os.getpid(), signal.SIGSEGV)",
    "half": "rows.open('a').write('{\"half\": '); sys.exit(3)",
    "ceilings": "record(memory_bytes_per_s=4e12, matmul_flops_per_s=8e14, launch_s=1e-6)",
    "reads": (
        "path = pathlib.Path(sys.argv[sys.argv.index('--ceilings') + 1])\n"
        "record(copy=json.loads(path.read_text())['memory_bytes_per_s'])"
    ),
    "forks": ("child = os.fork()\nif child == 0:\n    time.sleep(600)\nrecord(child=child)"),
}


def plans(*names: str, hang_weight: float = 1.0) -> list[PartPlan]:
    return [
        PartPlan(
            name,
            [sys.executable, "-c", START + SCRIPTS[name]],
            hang_weight if name == "hangs" else 1000.0,
        )
        for name in names
    ]


def read(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_each_end_is_recorded_and_the_others_survive(tmp_path: Path) -> None:
    parts = plans("raises", "hangs", "dies", "half", "passes", hang_weight=300.0)
    results = run_parts(parts, tmp_path, minutes=0.5, facts={"commit": "abc"})
    assert results == read(tmp_path)
    assert list(results) == ["commit", "ceilings", "parts"]
    by_name = results["parts"]
    assert {name: part["status"] for name, part in by_name.items()} == {
        "raises": "failed",
        "hangs": "timed out",
        "dies": "failed",
        "half": "failed",
        "passes": "passed",
    }
    assert "no kernel today" in by_name["raises"]["reason"]
    assert by_name["dies"]["reason"] == "ended by SIGSEGV"
    assert by_name["half"]["reason"].startswith("exit code 3")
    assert by_name["passes"]["reason"] is None
    assert all(part["rows"][0] == {"first": 1} for part in by_name.values())
    assert by_name["passes"]["rows"] == [{"first": 1}, {"second": 2}]
    assert by_name["half"]["rows"] == [{"first": 1}]
    assert (tmp_path / "passes.log").read_text() == "printed\n"


def test_a_part_takes_what_the_ones_before_it_left(tmp_path: Path) -> None:
    start = time.monotonic()
    results = run_parts(plans("hangs", "passes", hang_weight=1e6), tmp_path, minutes=0.04)
    assert time.monotonic() - start < 5
    assert results["parts"]["hangs"]["status"] == "timed out"
    assert results["parts"]["passes"]["status"] == "skipped"
    assert results["parts"]["passes"]["reason"] == "no time left"


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    results = run_parts(plans("forks"), tmp_path, minutes=1)
    child = results["parts"]["forks"]["rows"][-1]["child"]
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    os.kill(child, 9)
    pytest.fail("a process of a part outlived it")


def test_parts_see_the_ceilings_of_the_same_run(tmp_path: Path) -> None:
    results = run_parts(plans("ceilings", "reads"), tmp_path, minutes=1)
    assert results["ceilings"]["matmul_flops_per_s"] == 8e14
    assert results["parts"]["reads"]["rows"][-1] == {"copy": 4e12}


def test_the_summary_shows_figures_failures_and_what_was_left_out() -> None:
    kernel = {"op": "linear", "model": "v2_lite", "shape": "o 8x8", "gb_s": 1.0, "tflop_s": 0.0}
    parts = {
        "decode": [
            {"model": "m", "batch": 1, "context": 64, "step_ms": 2.0, "tok_s": 500.0,
             "floor_ms": 1.8, "floor_tok_s": 555.0, "percent": 90.0},
            {"model": "m", "batch": 8, "context": 64, "skipped": "no time left"},
        ],
        "tests": [{"failed": "test_x", "why": "E  assert"}, {"num_passed": 3, "num_failed": 1}],
        "kernels": [
            {**kernel, "at": "1", "us": 5.0, "percent": 91.0, "torch": 1.25, "invariant": 2.0},
            {**kernel, "at": "2", "error": "OutOfResources: shared memory"},
        ],
        "peers": [{"model": "m", "peer": "transformers plain", "batch": 1, "ours_tok_s": 3.0,
                   "theirs_tok_s": 2.0, "ratio": 1.5}],
    }  # fmt: skip
    results = {
        "parts": {
            name: {"status": "passed", "seconds": 1.0, "reason": None, "rows": rows}
            for name, rows in parts.items()
        }
    }
    text = summary(results)
    for expected in (
        "500",
        "90.0",
        "skipped, no time left: m 8 64",
        "3 passed, 1 failed",
        "FAILED test_x: E  assert",
        "linear v2_lite o 8x8 | 1: 5 91% [1.25] (2.00)",
        "OutOfResources: shared memory",
        "ratio 1.50",
    ):
        assert expected in text
