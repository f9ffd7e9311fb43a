"""What this machine can do at most: every other part reports percents of these three numbers.

memory    bytes per second: of a copy, read and written, or of a sum, read; the faster of the two.
          Both are kernels: a copy recorded in a CUDA graph goes to the copy engines, which reach
          2.6 TB/s on an H200 where kernels reach 4.3
matmul    operations per second of an 8192 x 8192 x 8192 product in bf16, on random data
launch    seconds from one kernel to the next inside a CUDA graph

python -m benchmarks.ceilings
"""

from __future__ import annotations

import sys

import torch

from benchmarks.part import Part, parse_part, release
from benchmarks.timing import time_calls


def measure_ceilings(part: Part) -> dict[str, float]:
    """``memory_bytes_per_s``, ``matmul_flops_per_s`` and ``launch_s`` of the part's device."""
    device, dtype = part.device, part.dtype
    size = 8192 if part.on_gpu else 512
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    _wake(left, 300 if part.on_gpu else 1)
    matmul = time_calls({"matmul": [lambda: left @ right]}, device, rounds=11)["matmul"]
    num_values = 1 << (30 if part.on_gpu else 23)  # 2 GiB of bf16: source and target each
    source = torch.randn(num_values, device=device, dtype=dtype)
    target = torch.empty_like(source)
    passes = {"copy": [lambda: torch.neg(source, out=target)], "sum": [lambda: source.sum()]}
    seconds = time_calls(passes, device, rounds=11)
    memory = max(2 * source.nbytes / seconds["copy"], source.nbytes / seconds["sum"])
    small = torch.zeros(1, device=device)
    launch = time_calls({"add": [lambda: small.add_(1.0)]}, device, estimate=2e-6)["add"]
    return {
        "memory_bytes_per_s": memory,
        "matmul_flops_per_s": 2.0 * size**3 / matmul,
        "launch_s": launch,
    }


def _wake(matrix: torch.Tensor, num_products: int) -> None:
    """Half a second of work: an idle GPU runs at a fifth of its clock."""
    for _ in range(num_products):
        matrix @ matrix


def ceilings_of(part: Part) -> dict[str, float]:
    """The ceilings measured before in the same run, else measured now."""
    if part.ceilings is None:
        part.ceilings = measure_ceilings(part)
        release(part)
    return part.ceilings


def main() -> int:
    part = parse_part(__doc__)
    name = torch.cuda.get_device_name(part.device) if part.on_gpu else "cpu"
    part.record(device=name, **measure_ceilings(part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
