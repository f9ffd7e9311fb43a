"""How the C library is told to give memory back, so that weeks do not add up their peaks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # mallopt(3)
LARGE_BYTES = 256 << 10
MAX_ARENAS = 2


def return_large_blocks() -> None:
    """Have glibc return a large block as soon as it is freed, and keep few arenas for threads.

    Left alone it raises the size from which it does so with each such block, up to 32 MiB, and
    keeps what lies between smaller ones: bodies and prompts of megabytes stay for good. Not for
    processes that compute: each tensor would be new memory.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, LARGE_BYTES)
    _glibc("mallopt", M_ARENA_MAX, MAX_ARENAS)


def give_back_memory() -> None:
    """Return what lies free between small blocks, too.

    Garbage in cycles is collected first; Python would wait for a quarter more of all there is.
    Takes 5 ms for 100 MB, and nothing if nothing was left.
    """
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            getattr(ctypes.CDLL(None), function)(*arguments)
