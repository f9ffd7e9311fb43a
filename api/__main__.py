"""Entry point of the `fathom` command; ``python -m api`` is the same."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, unless Hugging Face's package of the name `kernels` hides ours."""
    found = find_spec("kernels")
    if found is None or find_spec("kernels.mla") is None:
        where = found.origin if found else "nowhere"
        print(
            f"fathom: the package 'kernels' found at {where} is not Fathom's; run Fathom in an "
            "environment of its own (`make serve` makes one) or uninstall the other",
            file=sys.stderr,
        )
        sys.exit(2)
    from api.cli import main as run

    run()


if __name__ == "__main__":
    main()
