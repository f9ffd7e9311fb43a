"""Which body of an op runs: Triton on a GPU or under its interpreter, torch otherwise."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

SMALL_SHARED_MEMORY = frozenset({(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)})
"""Compute capabilities with 99 KiB of shared memory per program; others have 163 or more."""


@functools.cache
def interpreting() -> bool:
    """Whether this process runs Triton kernels on the CPU (``TRITON_INTERPRET=1`` at start)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """True if the op that got ``tensor`` should launch its Triton body."""
    return tensor.is_cuda or interpreting()


@functools.cache
def has_small_shared_memory(device: torch.device) -> bool:
    """Whether a program gets under 100 KiB of shared memory (sm_86, 89 and 120) on this device."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) in SMALL_SHARED_MEMORY
