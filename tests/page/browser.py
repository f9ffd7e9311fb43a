"""Chromium driven by playwright-core in node; each scenario is a function of JavaScript."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv" / "clients"  # kept between runs, ignored by git
DRIVER = Path(__file__).with_name("drive.mjs")
PLAYWRIGHT = "playwright-core@1.65.1"
SECONDS = 120
NAMES = ("chromium", "chromium-browser", "google-chrome")


class NoBrowser(AssertionError):
    """What the browser's tests need is not installed."""


def run_scenario(
    name: str, base: str, answers: Mapping[str, Callable[[], object]], **options: str
) -> None:
    """Run a scenario of the `.mjs` files here in a browser of its own on the page at ``base``.

    The scenario may ask for something to be done to the server by a name in ``answers``; it goes
    on with what that returns. Fails with what the scenario found, or `NoBrowser`.
    """
    node, chromium = find("node"), find(*NAMES)
    given = {"name": name, "base": base, "chromium": chromium, **options}
    command = [node, str(DRIVER), json.dumps({**given, "modules": str(modules())})]
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


def find(*names: str) -> str:
    """The program of one of these names. Raises `NoBrowser`."""
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NoBrowser(
        f"{' or '.join(names)} is not installed, and the page's tests need it: "
        "apt-get install chromium nodejs npm"
    )


def modules() -> Path:
    """The folder with playwright-core, made if it is not there. Raises `NoBrowser`."""
    folder = ENVIRONMENTS / PLAYWRIGHT.replace("@", "-")
    stamp = folder / ".installed"
    folder.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENTS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not stamp.exists():
            (folder / "package.json").write_text("{}")
            command = [find("npm"), "install", "--no-audit", "--no-fund", PLAYWRIGHT]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if result.returncode != 0:
                raise NoBrowser(f"npm could not install {PLAYWRIGHT}: {result.stderr.strip()}")
            stamp.touch()
    return folder
