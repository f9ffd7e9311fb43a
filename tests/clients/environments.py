"""`python -m tests.clients.environments [NAME ...]`: make the clients' environments, or all.

Each is a folder under build/clients that holds pinned packages: a Python environment made with
pip or a node folder made with npm. What is there already is left as it is. Open WebUI takes three
gigabytes, so it is made only when named.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / "build" / "clients"  # ignored by git
COMMAND = "python -m tests.clients.environments"


@dataclass(frozen=True, slots=True)
class Environment:
    """One client's packages; ``requirements`` are pip's or npm's by the file they are for."""

    name: str
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    large: bool = False  # made only when named

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def interpreter(self) -> Path:
        """What runs the client's scripts: Python, or the node that the folder brings."""
        return self.folder / ("bin/python" if self.pip else "node_modules/node/bin/node")

    @property
    def ready(self) -> bool:
        stamp = self.folder / ".installed"
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == self._stamp

    @property
    def _stamp(self) -> str:
        return "\n".join((*self.pip, *self.npm))

    def make(self) -> None:
        """Install the packages unless they are there. Raises `InstallError` with pip's or npm's
        words.
        """
        ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
        with (ENVIRONMENTS / f".{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.ready:
                return
            if self.pip:
                _run([sys.executable, "-m", "venv", "--clear", self.folder])
                _run([self.interpreter, "-m", "pip", "install", "--quiet", *self.pip])
            else:
                self._install_npm()
            (self.folder / ".installed").write_text(self._stamp, encoding="utf-8")

    def _install_npm(self) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise InstallError(f"{self.name} needs npm; install nodejs and npm and try again")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        dependencies = dict(package.rsplit("@", 1) for package in self.npm)
        package = {"private": True, "type": "module", "dependencies": dependencies}
        (self.folder / "package.json").write_text(json.dumps(package), encoding="utf-8")
        _run([npm, "install", "--no-audit", "--no-fund", "--loglevel=error"], self.folder)


class InstallError(Exception):
    """An environment could not be made; the message is for the person who asked for it."""


# The npm package of node brings its own binary: the clients need a newer one than Debian has.
NODE = "node@22.23.3"
ALL = {
    environment.name: environment
    for environment in (
        Environment("openai", pip=("openai==3.57.0",)),
        Environment("openai-0.28", pip=("openai==0.28.1",)),
        Environment("langchain", pip=("langchain-openai==1.7.4",)),
        Environment("litellm", pip=("litellm==1.110.2",)),
        Environment("openai-node", npm=(NODE, "openai@7.57.0", "zod@4.6.7")),
        Environment(
            "ai-sdk",
            npm=(NODE, "ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"),
        ),
        Environment("browser", npm=(NODE, "playwright-core@1.65.1")),
        Environment("schemathesis", pip=("schemathesis==4.32.5",)),
        Environment("open-webui", pip=("torch==2.13.0", "open-webui==0.12.4"), large=True),
    )
}


def find_chromium() -> str:
    """The browser. Raises `InstallError` if there is none."""
    return find_program("chromium", "chromium-browser", "google-chrome")


def find_program(*names: str) -> str:
    """The program of one of these names. Raises `InstallError`."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise InstallError(
        f"{' or '.join(names)} is not installed; on Debian: apt-get install chromium nodejs npm"
    )


def _run(command: list[str | Path], folder: Path = ROOT) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr or result.stdout).strip().splitlines()[-5:]
        raise InstallError(f"{' '.join(map(str, command))} failed:\n" + "\n".join(last))


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"no client is called {unknown[0]!r}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    for environment in ALL.values():
        if environment.name not in names and (names or environment.large):
            continue
        print(f"{environment.name}: ", end="", flush=True)
        try:
            environment.make()
        except InstallError as error:
            print(error)
            return 1
        print(", ".join((*environment.pip, *environment.npm)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
