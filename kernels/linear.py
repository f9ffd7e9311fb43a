"""Matrix product with the weights of a linear layer.

    x [num_tokens, in_features]   weight [out_features, in_features]   bias [out_features]
    y = x @ weight.T + bias

The product is torch's on every device (cuBLAS on a GPU, MKL and oneDNN on a CPU). What is unusual:
on a CPU the number of rows decides which matrix kernel runs, and a row's last bits with it. MKL,
which does fp32, is therefore put into the mode where it does not, and rows are padded where that
helps, so that a token's result does not depend on its neighbours.
Graph-safe: shapes are host-known, nothing is read back.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional

# MKL reads it at its first product. A row of an fp32 product then has the same bits for any number
# of rows and threads (measured with AVX2 and AVX-512; without it, up to 16 rows differ from more).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# rows in multiples of this give a row the same bits in any batch (measured)
_ROW_GROUPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


def row_group(dtype: torch.dtype) -> int:
    """How many rows a CPU matrix product should have a multiple of, for bits that never vary."""
    return _ROW_GROUPS.get(dtype, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features], any float dtype.
        weight: [out_features, in_features], dtype of ``x``.
        bias: [out_features], dtype of ``x``, or None.

    Returns:
        [num_tokens, out_features] in the dtype of ``x``. On a CPU a row has the same bits in any
        batch, for a fixed number of threads; in bf16 in any of up to 32 rows, since chips with AMX
        are given faster kernels for more.
    """
    num_tokens = x.shape[0]
    if num_tokens == 0:
        return x.new_empty((0, weight.shape[0]))
    num_padding = 0 if x.is_cuda else -num_tokens % row_group(x.dtype)
    if num_padding == 0:
        return functional.linear(x, weight, bias)
    padded = functional.pad(x, (0, 0, 0, num_padding))
    return functional.linear(padded, weight, bias)[:num_tokens]
