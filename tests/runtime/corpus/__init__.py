"""The corpus of bad checkpoints, and of odd ones that are good.

``python -m tests.runtime.corpus`` writes and loads every one of them and prints what is said.
A weight with a flipped bit is a valid oddity: only a list of digests could tell.
"""

from __future__ import annotations

from tests.runtime.corpus.configs import CONFIGS
from tests.runtime.corpus.files import FILES
from tests.runtime.corpus.fp8 import FP8_CASES
from tests.runtime.corpus.layouts import LAYOUTS
from tests.runtime.corpus.oddities import ODDITIES
from tests.runtime.corpus.parts import PARTS
from tests.runtime.corpus.prompts import PROMPTS
from tests.runtime.corpus.tensors import TENSORS

GROUPS = {
    "file": FILES,
    "folder": LAYOUTS,
    "tensor": TENSORS,
    "part": PARTS,
    "FP8": FP8_CASES,
    "config": CONFIGS,
    "prompt": PROMPTS,
}
BAD = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}

__all__ = ["BAD", "ODDITIES"]
