"""The passes a kernel test runs in, and what counts as agreement with its float64 oracle.

A test parametrised over ``DEVICES`` runs the torch bodies by default, the Triton bodies on the CPU
under ``TRITON_INTERPRET=1 pytest -m interpreter``, and the compiled ones under ``pytest -m gpu``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.dispatch import interpreting

INTERPRETED = interpreting()
DEVICES = (
    [pytest.param("cpu", marks=pytest.mark.interpreter)]
    if INTERPRETED
    else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
# the interpreter truncates to bf16 and multiplies bf16 wrongly, so it takes fp16 instead
HALF = torch.float16 if INTERPRETED else torch.bfloat16
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 8e-6, torch.float16: 2.5e-3, torch.bfloat16: 1.2e-2}

torch.set_num_threads(1)


def assert_matches(actual: Tensor, oracle: Tensor) -> None:
    """Every row must agree with the float64 oracle up to rounding in the dtype of ``actual``."""
    assert actual.shape == oracle.shape
    difference = (actual.detach().cpu().double() - oracle.double()).norm(dim=-1)
    error = difference / oracle.double().norm(dim=-1).clamp(min=1e-30)
    worst = int(error.argmax()) if error.numel() else 0
    assert bool((error <= TOLERANCE[actual.dtype]).all()), (
        f"row {worst} is off by {float(error.flatten()[worst]):.2e} of its norm"
    )


def assert_test_has_power(actual: Tensor, oracle: Tensor) -> None:
    """A reference with one row perturbed by 1 % must not pass (3 % in bf16)."""
    perturbed = oracle.clone()
    perturbed[-1] *= 1.03 if actual.dtype == torch.bfloat16 else 1.01
    with pytest.raises(AssertionError, match="is off by"):
        assert_matches(actual, perturbed)
