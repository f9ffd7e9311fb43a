"""Which body of an op runs: Triton on a GPU or under its interpreter, or else a CPU's.

A CPU has torch's bodies, and for most of a decode step loops compiled by numba where there is one.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor

_NATIVE_DTYPES = frozenset((torch.bfloat16, torch.float32))
FP8_CAPABILITY = 89  # Ada; sm_80 and sm_86 know no e4m3


@functools.cache
def interpreting() -> bool:
    """Whether this process runs Triton kernels on the CPU (``TRITON_INTERPRET=1`` at start)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """True if the op that got ``tensor`` should launch its Triton body."""
    return tensor.is_cuda or interpreting()


@functools.cache
def compiles_loops() -> bool:
    """Whether ``kernels.native`` can be imported; ``NUMBA_DISABLE_JIT=1`` at start says no."""
    if interpreting():
        return False
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return False
    try:
        importlib.import_module("kernels.native")
    except Exception:  # no numba, or one that does not go with numpy or torch: do without
        return False
    return True


def use_native(tensor: Tensor) -> bool:
    """True if the op that got ``tensor`` should run its compiled loop, for bf16 and fp32."""
    return tensor.is_cpu and tensor.dtype in _NATIVE_DTYPES and compiles_loops()


@functools.cache
def native(name: str) -> Any:
    """The module ``kernels.native_{name}``, where `compiles_loops`."""
    return importlib.import_module(f"kernels.native_{name}")


def prepare_loops(dtype: torch.dtype) -> None:
    """Compile the loops of a step in ``dtype``, so that no request waits for it: 5 s, once."""
    if dtype in _NATIVE_DTYPES and compiles_loops():
        for name in ("rows", "attention", "tape"):
            native(name).prepare(dtype)


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
