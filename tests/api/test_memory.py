"""What a peak took is given back."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import re, sys
from api.memory import return_large_blocks
if sys.argv[1] == "True":
    return_large_blocks()

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = memory()
small = []
for _ in range(20):  # large blocks between small ones that stay, as in a server
    large = [bytes(size * 300_000) for size in range(2, 30)]
    small.append([bytes(600) for _ in range(300)])
    del large
print(memory() - before)
"""


def kept_megabytes(returns: bool) -> float:
    command = [sys.executable, "-c", SCRIPT, str(returns)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_large_blocks_are_given_back_though_small_ones_between_them_stay() -> None:
    assert kept_megabytes(True) < 12
    assert kept_megabytes(False) > 20
