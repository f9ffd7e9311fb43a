"""`python -m tests.clients.open_webui [FOLDER]`: Open WebUI and a browser on our own server.

Makes the environments if they are not there, starts the server with the embedded model and Open
WebUI with nothing but environment variables, and lets headless Chromium ask a question. Prints
what was seen; screenshots go to FOLDER (build/clients/screenshots).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.clients.conftest import Served, first_start
from tests.clients.environments import ALL, ENVIRONMENTS, InstallError, find_chromium

SCRIPT = Path(__file__).parent / "scripts" / "open_webui.mjs"
SCREENSHOTS = ENVIRONMENTS / "screenshots"
START_SECONDS = 180.0
# No accounts, no calls to the internet, no other model provider.
SETTINGS = {
    "WEBUI_AUTH": "False",
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    "ENABLE_OLLAMA_API": "False",
    "WEBUI_SECRET_KEY": "only for this run",
    "ANONYMIZED_TELEMETRY": "False",
}


@contextlib.contextmanager
def open_webui(served: Served, home: Path) -> Iterator[str]:
    """Open WebUI on a free port of this machine, connected to our server; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    connection = {"OPENAI_API_BASE_URL": served.base, "OPENAI_API_KEY": served.key}
    log = home / "open-webui.log"
    command = [ALL["open-webui"].folder / "bin" / "open-webui", "serve"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=home,
            env={**os.environ, **SETTINGS, **connection, "DATA_DIR": str(home / "data")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{base}/health"):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            assert process.poll() is None and time.monotonic() < deadline, "\n".join(lines)
            time.sleep(0.5)
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def browse(served: Served, home: Path, screenshots: Path) -> dict[str, Any]:
    """What a person with a browser sees. Raises `AssertionError` with the browser's words."""
    screenshots.mkdir(parents=True, exist_ok=True)
    browser = ALL["browser"]
    with open_webui(served, home) as base:
        result = subprocess.run(
            # From standard input, so that imports are looked up in the working directory.
            [browser.interpreter, "--input-type=module", "-", find_chromium(), base, screenshots],
            input=SCRIPT.read_text(encoding="utf-8"),
            cwd=browser.folder,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert result.returncode == 0, result.stderr
    seen: dict[str, Any] = json.loads(result.stdout)
    return seen


def main(arguments: list[str]) -> int:
    screenshots = Path(arguments[0]).resolve() if arguments else SCREENSHOTS
    try:
        find_chromium()
        for name in ("open-webui", "browser"):
            ALL[name].make()
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as home, first_start(Path(home)) as served:
        seen = browse(served, Path(home), screenshots)
    print(json.dumps(seen, indent=2, ensure_ascii=False))
    print(f"screenshots are in {screenshots}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
