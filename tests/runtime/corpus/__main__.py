"""Prints the corpus: each case and the line with which it is refused; fails if one is not."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from runtime.errors import CheckpointError
from tests.runtime.corpus import BAD, ODDITIES
from tests.runtime.corpus.case import Case, limited_memory, load


def outcome(case: Case, parent: Path) -> tuple[str, list[str]]:
    """``(what is said when the case is loaded, what is wrong with that)``."""
    folder = case.write(parent)
    try:
        with limited_memory(), case.reading(folder) as path:
            load(path, case.dtype)
    except CheckpointError as error:
        shown = str(error).replace(f"{folder}/", "").replace(f"{folder.name}/", "")
        return shown.replace(str(folder), "(folder)"), case.faults_of(str(error), folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}", ["is no CheckpointError"]
    return "", ["is accepted"] if case.says else []


def main() -> None:
    num_right = {"refused": 0, "accepted": 0}
    for name, case in (BAD | ODDITIES).items():
        wanted = "refused" if case.says else "accepted"
        with tempfile.TemporaryDirectory() as temporary:
            said, faults = outcome(case, Path(temporary))
        num_right[wanted] += not faults
        line = f"{'WRONG' if faults else wanted:8} {name:52} {said}"
        print("\n         ".join([line.rstrip(), *faults]), flush=True)
    print(f"{num_right['refused']} of {len(BAD)} refused as described")
    print(f"{num_right['accepted']} of {len(ODDITIES)} valid oddities accepted")
    sys.exit(num_right != {"refused": len(BAD), "accepted": len(ODDITIES)})


if __name__ == "__main__":
    main()
