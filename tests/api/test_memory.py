"""What a peak took is given back."""

from __future__ import annotations

import subprocess
import sys

MEASURE = """
import asyncio, re, sys
from api.memory import keep_giving_back
from runtime import return_large_blocks
if sys.argv[1] == "True":
    return_large_blocks()

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = memory()
"""
LARGE_BETWEEN_SMALL = """
small = []
for _ in range(20):  # large blocks between small ones that stay, as in a server
    large = [bytes(size * 300_000) for size in range(2, 30)]
    small.append([bytes(600) for _ in range(300)])
    del large
print(memory() - before)
"""
FREE_BETWEEN_SMALL = """
freed = [bytearray(20_000) for _ in range(2000)]
kept = freed[::50]  # one stays of each megabyte, and the highest
del freed
if sys.argv[1] == "True":
    async def main():
        giving_back = asyncio.create_task(keep_giving_back(0.01))
        await asyncio.sleep(0.5)
        giving_back.cancel()
    asyncio.run(main())
print(memory() - before)
"""


def kept_megabytes(script: str, returns: bool) -> float:
    command = [sys.executable, "-c", MEASURE + script, str(returns)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_large_blocks_are_given_back_though_small_ones_between_them_stay() -> None:
    assert kept_megabytes(LARGE_BETWEEN_SMALL, True) < 12
    assert kept_megabytes(LARGE_BETWEEN_SMALL, False) > 20


def test_what_is_free_between_small_blocks_is_given_back_in_time() -> None:
    assert kept_megabytes(FREE_BETWEEN_SMALL, True) < 12
    assert kept_megabytes(FREE_BETWEEN_SMALL, False) > 20
