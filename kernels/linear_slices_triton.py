# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the bodies of ``kernels.linear_triton`` share: slices of in_features, and gated columns.

total = slice 0 + slice 1 + ..., in order; y = total + bias, or silu(gate) * up of two such sums
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import gated_product
from kernels.configs import launch_config


@triton.jit
def features_of(columns, out_features, GATED: tl.constexpr):
    # the rows of the weight that make these columns
    return columns // 2 + columns % 2 * (out_features // 2) if GATED else columns


@triton.jit
def size_of_slice(in_features, BLOCK_K: tl.constexpr, SLICES: tl.constexpr):
    return tl.cdiv(tl.cdiv(in_features, BLOCK_K), SLICES) * BLOCK_K


@triton.jit
def sum_of_slices(
    partial_ptr, bias_ptr, slice_stride, places, features, is_inside, SLICES: tl.constexpr
):
    total = tl.zeros(features.shape, dtype=tl.float32)
    for index in range(SLICES):
        at = index * slice_stride + places
        total += tl.load(partial_ptr + at, mask=is_inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + features, mask=is_inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    partial_ptr,  # [SLICES, num_rows, out_features] fp32
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features], gated half of it
    num_rows,
    out_features,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,  # of all outputs of all rows
):
    width = out_features // 2 if GATED else out_features
    outputs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ids = outputs // width
    columns = outputs % width
    is_inside = row_ids < num_rows
    places = row_ids * out_features + columns
    stride = num_rows.to(tl.int64) * out_features
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = sum_of_slices(partial_ptr, bias_ptr, stride, places, columns, is_inside, SLICES)
    if GATED:
        places += width
        columns += width
        up = sum_of_slices(partial_ptr, bias_ptr, stride, places, columns, is_inside, SLICES)
        result = gated_product(total, up, dtype)
    else:
        result = total.to(dtype)
    tl.store(out_ptr + outputs, result, mask=is_inside)


def workspace(slices: int, num_rows: int, out_features: int, device: torch.device) -> Tensor:
    """Room for the sums of slices, which every program fills whole."""
    return torch.empty((slices, num_rows, out_features), dtype=torch.float32, device=device)


def finish(partial: Tensor, bias: Tensor | None, out: Tensor, gated: bool) -> None:
    """Add up slices in order, then the bias; multiply gated halves; round."""
    slices, num_rows, out_features = partial.shape
    config = launch_config("linear_finish")
    finish_kernel[(triton.cdiv(out.numel(), config["BLOCK"]),)](
        partial, bias, out, num_rows, out_features, SLICES=slices, GATED=gated, **config
    )
