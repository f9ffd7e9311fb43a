"""The program of the engine process; `EngineClient` runs this file with ``--fd N --parent PID``.

Before anything that takes time is imported, the process is tied to the server that started it.
"""

import argparse
import ctypes
import faulthandler
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def follow(parent: int) -> None:
    """On Linux, let the kernel kill this process with its parent; leave if that is gone already.

    Elsewhere the end of the socket tells, between two steps.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def prepare() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--parent", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    follow(arguments.parent)
    faulthandler.enable()  # the watchdog's SIGABRT prints where every thread is
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # prompts stay out of core files


if __name__ == "__main__":
    prepare()
    from runtime.engine_process import main  # takes seconds

    main()
