"""Benchmarks that hold an engine: what they and the servers they start run with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import ROOT
from runtime.link import ENGINE_ENVIRONMENT

PROGRAM = """
import json, os, sys
from benchmarks.own_environment import start_as_engine, without_engine_settings

start_as_engine()
print(json.dumps([sys.argv[1:], dict(os.environ), without_engine_settings()]))
"""


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_a_benchmark_runs_as_an_engine_and_its_server_as_a_users(
    chosen: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ours = (*ENGINE_ENVIRONMENT, "OMP_WAIT_POLICY")
    users = {name: value for name, value in os.environ.items() if name not in ours}
    users |= {"PYTHONPATH": str(ROOT), **chosen}
    done = subprocess.run(
        [sys.executable, str(program), "a b", "--c"],
        env=users,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    arguments, engines, servers = json.loads(done.stdout)
    assert arguments == ["a b", "--c"]
    assert engines["GLIBC_TUNABLES"] == ENGINE_ENVIRONMENT["GLIBC_TUNABLES"]
    spins = chosen.get("GOMP_SPINCOUNT", None if chosen else ENGINE_ENVIRONMENT["GOMP_SPINCOUNT"])
    assert engines.get("GOMP_SPINCOUNT") == spins
    assert {name: servers.get(name) for name in ours} == {name: users.get(name) for name in ours}
