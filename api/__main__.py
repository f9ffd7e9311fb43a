"""Entry point of the `fathom` command; ``python -m api`` is the same."""

from __future__ import annotations

import gc
import signal
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, unless Hugging Face's package of the name `kernels` hides ours."""
    # Importing torch takes seconds, in which Ctrl-C must not be swallowed nor print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    found = find_spec("kernels")
    if found is None or find_spec("kernels.mla") is None:
        where = found.origin if found else "nowhere"
        print(
            f"fathom: the package 'kernels' found at {where} is not Fathom's; run Fathom in an "
            "environment of its own (`make serve` makes one) or uninstall the other",
            file=sys.stderr,
        )
        sys.exit(2)
    gc.disable()  # importing makes many objects and no garbage; collecting takes 0.3 s of the start
    from api.cli import main as run

    gc.enable()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
