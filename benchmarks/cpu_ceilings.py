"""What this CPU can do at most, with the threads torch has: every CPU benchmark reports percents.

memory    bytes per second that a pass over 512 MiB reads
matmul    operations per second of a 1024 x 1024 x 1024 product on random data
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def read_bandwidth(num_bytes: int = 1 << 29, seconds: float = 0.4) -> float:
    """Bytes per second; the best pass counts. A sum of float32 reads as fast as memory gives."""
    data = torch.ones(num_bytes // 4)
    return data.nbytes / _best(data.sum, seconds)


def matmul_rate(dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Operations per second in ``dtype``; the best product counts."""
    size = 1024
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: left @ right, seconds)


def _best(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
