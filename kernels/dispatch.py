"""Which body of an op runs: Triton on a GPU or under its interpreter, torch otherwise."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor


@functools.cache
def interpreting() -> bool:
    """Whether this process runs Triton kernels on the CPU (``TRITON_INTERPRET=1`` at start)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """True if the op that got ``tensor`` should launch its Triton body."""
    return tensor.is_cuda or interpreting()


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the chip has fp8 matrix units (Ada, sm_89, and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
