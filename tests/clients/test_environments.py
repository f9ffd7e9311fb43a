"""The command that makes the clients' environments, without making one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.clients import environments
from tests.clients.conftest import environment
from tests.clients.environments import ALL, InstallError, main


@pytest.fixture
def nothing_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    return tmp_path


def test_without_its_environment_a_test_fails_with_the_command(nothing_made: Path) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        environment("ai-sdk")
    message = str(failure.value)
    assert "python -m tests.clients.environments ai-sdk" in message and "\n" not in message


def test_what_is_there_is_left_as_it_is(nothing_made: Path) -> None:
    client = ALL["litellm"]
    client.folder.mkdir()
    (client.folder / ".installed").write_text("\n".join(client.pip))
    client.make()
    assert [path.name for path in client.folder.iterdir()] == [".installed"]
    (client.folder / ".installed").write_text("litellm==0.1")
    assert not client.ready, "another version counts as not there"


def test_every_package_is_pinned() -> None:
    for client in ALL.values():
        assert bool(client.pip) != bool(client.npm)
        assert all("==" in package for package in client.pip)
        assert all("@" in package[1:] for package in client.npm)


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opnai"]) == 2
    said = capsys.readouterr().err
    assert "'opnai'" in said and "openai-node" in said and said.count("\n") == 1


def test_without_npm_it_says_what_to_install(
    nothing_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InstallError, match="install nodejs and npm"):
        ALL["browser"].make()
