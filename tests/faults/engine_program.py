"""The program of the engine process with faults in it. It starts as the real one does: it ties
itself to its server before it imports anything that takes time.
"""

import runpy
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "runtime" / "__main__.py"

if __name__ == "__main__":
    runpy.run_path(str(PROGRAM))["prepare"]()
    from tests.faults.engine import run

    run(sys.argv[1:])
