"""A part's cases: one that raises costs no other, and nothing starts after the deadline."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.part import Part, Row, parse_part
from benchmarks.timing import num_sets, time_calls


def make_part(tmp_path: Path, *arguments: str) -> Part:
    return parse_part(None, ["--device", "cpu", "--rows", str(tmp_path / "rows"), *arguments])


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]


def fails(message: str) -> Callable[[], None]:
    def run() -> None:
        raise RuntimeError(message)

    return run


def test_a_case_that_raises_costs_no_other(tmp_path: Path) -> None:
    part = make_part(tmp_path)

    def does_not_fit() -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    cases: list[tuple[Row, Callable[[], None]]] = [
        ({"case": 1}, fails("bad\nkernel")),
        ({"case": 2}, does_not_fit),
        ({"case": 3}, lambda: part.record(case=3, us=1.5)),
    ]
    assert part.run_cases(cases) == 1
    first, second, third = rows_of(tmp_path)
    assert first == {"case": 1, "error": "RuntimeError: bad kernel"}
    assert second["case"] == 2 and "does not fit" in second["skipped"]
    assert third == {"case": 3, "us": 1.5}
    assert make_part(tmp_path).run_cases(cases[1:]) == 0


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    part = make_part(tmp_path, "--seconds", "0")
    assert part.run_cases([({"case": 1}, fails("started"))]) == 0
    assert rows_of(tmp_path) == [{"case": 1, "skipped": "no time left"}]


def test_a_dead_gpu_context_is_left_for_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(Exception):
        pass

    calls: list[list[str]] = []

    def replace(program: str, arguments: list[str]) -> None:
        calls.append(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execv", replace)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.kernels", "--tiny"])
    part = make_part(tmp_path, "--device", "cuda", "--seconds", "50")
    dies = fails("CUDA error: an illegal memory access was encountered")
    cases: list[tuple[Row, Callable[[], None]]] = [({"case": 0}, lambda: None), ({"case": 1}, dies)]
    with pytest.raises(Replaced):
        part.run_cases(cases)
    [arguments] = calls
    assert arguments[1:6] == ["-m", "benchmarks.kernels", "--tiny", "--first-case", "2"]
    resumed = make_part(tmp_path, *arguments[4:])
    done: list[int] = []
    # it does what follows, and still fails at its end
    more = [*cases, ({"case": 2}, lambda: done.append(2))]
    assert resumed.run_cases(more) == 1
    assert done == [2]
    assert 0 < resumed.seconds_left <= 50


def test_inputs_rotate_past_the_cache() -> None:
    assert num_sets(1 << 30) == 1
    assert num_sets(1 << 26) == 4
    assert num_sets(1) == 64


def test_candidates_are_timed_by_name() -> None:
    counts = {"a": 0, "b": 0}

    def call(name: str) -> Callable[[], object]:
        def run() -> None:
            counts[name] += 1

        return run

    calls = {"a": [call("a")], "b": [call("b"), call("b")]}
    seconds = time_calls(calls, torch.device("cpu"), rounds=3)
    assert seconds.keys() == {"a", "b"} and all(value >= 0 for value in seconds.values())
    assert counts == {"a": 4, "b": 7}  # one call warms up
