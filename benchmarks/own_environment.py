"""Settings that a process must start with: a benchmark that holds an engine has an engine's."""

from __future__ import annotations

import os
import sys

from runtime.link import ENGINE_ENVIRONMENT, engine_environment


def start_as_engine() -> None:
    """Start this program anew, with the same arguments, unless it runs as engine processes do."""
    environment = engine_environment()
    if any(environment.get(name) != os.environ.get(name) for name in ENGINE_ENVIRONMENT):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def without_engine_settings() -> dict[str, str]:
    """The environment without what `start_as_engine` adds, for a server that sets it itself."""
    kept = os.environ.items()
    return {name: value for name, value in kept if ENGINE_ENVIRONMENT.get(name) != value}
