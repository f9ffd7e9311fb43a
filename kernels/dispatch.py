"""Which body of an op runs: Triton on a GPU or under its interpreter, torch otherwise."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

FP8_CAPABILITY = 89  # Ada; sm_80 and sm_86 know no e4m3


@functools.cache
def interpreting() -> bool:
    """Whether this process runs Triton kernels on the CPU (``TRITON_INTERPRET=1`` at start)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """True if the op that got ``tensor`` should launch its Triton body."""
    return tensor.is_cuda or interpreting()


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability, 90 for sm_90; the interpreter takes the tiles of an H200."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the chip has fp8 matrix units (Ada, sm_89, and later)."""
    return device.type == "cuda" and capability_of(device) >= FP8_CAPABILITY
