"""The list of mutants fits the source as it is, and the hunt finds them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.runtime import mutants
from tests.runtime.mutants import MUTANTS, Mutant


def test_every_mutant_still_fits_the_source() -> None:
    assert len(MUTANTS) >= 25
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.old != mutant.new, mutant.name
        ast.parse(mutant.apply())


def test_a_stale_mutant_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants, "MUTANTS", [Mutant("gone", "blocks", "no such text", "")])
    assert mutants.main([]) == 1
    assert "mutant 'gone' is stale: its text is 0 times in runtime/blocks.py" in (
        capsys.readouterr().out
    )


def test_mutants_are_killed() -> None:
    """Three of them, one per way in which a page goes wrong; the command hunts all."""
    killed, printed = hunt("leak of the last page", "hit adds no reference", "know its namespace")
    assert killed, printed
    assert printed.count("simulator, seed") == 3, printed


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_all_mutants_are_killed() -> None:
    killed, printed = hunt()
    assert killed, printed


def hunt(*names: str) -> tuple[bool, str]:
    """Whether the command kills the mutants with these words in their names, and its output."""
    command = [sys.executable, "-m", "tests.runtime.mutants"]
    command += [f"--only={name}" for name in names]
    done = subprocess.run(command, cwd=mutants.ROOT, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr
