"""How the C library is told to give memory back, so that weeks do not add up their peaks."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # mallopt(3)
LARGE_BYTES = 256 << 10
MAX_ARENAS = 2


def return_large_blocks() -> None:
    """Have glibc return a large block as soon as it is freed, and keep few arenas for threads.

    Left alone it raises the size from which it does so with each such block, up to 32 MiB, and
    keeps what lies between smaller ones: bodies and prompts of megabytes stay for good.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
            libc.mallopt(M_ARENA_MAX, MAX_ARENAS)
