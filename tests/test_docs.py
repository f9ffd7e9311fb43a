"""The documents stay true: files they name exist, options and commands they show are real."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from api.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "weights/README.md"]
TREES = ("kernels/", "runtime/", "api/", "benchmarks/", "tests/", "weights/", ".ci/")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_a_document_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+)`", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    paths = [name for name in named if name.startswith(TREES) or name.endswith(".md")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_options_in_a_document_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    known = {"serve", "chat", "inspect", "keys", "pull", "top"}
    assert known == set(commands)
    assert set(re.findall(r"(?:bin/|`)fathom (\w+)", text)) <= known
    options = {option for name in known for param in commands[name].params for option in param.opts}
    assert set(re.findall(r"`(--[\w-]+)`", text)) <= options


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) <= targets


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=;\s]", line)[0].lower().replace("_", "-") for line in required}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names - pinned == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_placeholder_is_left(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    names = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", text))
    assert names <= {
        "FATHOM_API_KEY",
        "FATHOM_HOME",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HUB_ID",
        "OPENAI_API_BASE_URL",
        "LITELLM_LOCAL_MODEL_COST_MAP",
        "NUMBA_DISABLE_JIT",
        "OPENAI_API_KEY",
        "TRITON_INTERPRET",
    }
