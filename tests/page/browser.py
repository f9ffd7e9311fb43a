"""Chromium driven by playwright-core in node; each scenario is a function of JavaScript."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.clients.environments import ALL, find_chromium

DRIVER = Path(__file__).with_name("drive.mjs")
PLAYWRIGHT = ALL["browser"]
SECONDS = 120


def run_scenario(
    name: str, base: str, answers: Mapping[str, Callable[[], object]], **options: str
) -> None:
    """Run a scenario of the `.mjs` files here in a browser of its own on the page at ``base``.

    The scenario may ask for something to be done to the server by a name in ``answers``; it goes
    on with what that returns. Fails with what the scenario found. Raises `InstallError` if there
    is nothing to drive.
    """
    given = {"name": name, "base": base, "chromium": find_chromium(), **options}
    PLAYWRIGHT.make()
    given["modules"] = str(PLAYWRIGHT.folder)
    command = [PLAYWRIGHT.interpreter, str(DRIVER), json.dumps(given)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                if not line.startswith("@"):
                    said.append(line)
                    continue
                answer = answers[line[1:].strip()]()
                process.stdin.write(f"{json.dumps(answer)}\n")
                process.stdin.flush()
            status = process.wait(SECONDS)
        finally:
            process.kill()
    assert status == 0, "".join(said)
