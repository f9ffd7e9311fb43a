# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products of up to four rows on CUDA cores, bound by reading the weights.

A program owns BLOCK_N outputs and multiplies BLOCK_K places of in_features at a time into as many
fp32 sums, which it adds up at the end. Each row has sums of its own in the same layout, so its bits
do not depend on the others. ``kernels.linear_triton`` chooses the launch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels import linear_slices_triton
from kernels.activation import gated_product
from kernels.linear_slices_triton import features_of, size_of_slice


@triton.jit
def multiply_add_row(
    total, weights, x_ptr, row: tl.constexpr, row_stride, inner, in_features, WHOLE_K: tl.constexpr
):
    if WHOLE_K:
        x = tl.load(x_ptr + row * row_stride + inner)
    else:
        x = tl.load(x_ptr + row * row_stride + inner, mask=inner < in_features, other=0.0)
    x = tl.broadcast_to(x.to(tl.float32)[None, :], weights.shape[0], weights.shape[1])
    return tl.fma(weights, x, total)


@triton.jit
def store_gemv_row(
    total,  # [BLOCK_N, BLOCK_K]
    bias_ptr,
    out_ptr,
    row: tl.constexpr,
    out_features,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    features = features_of(columns, out_features, GATED)
    sums = tl.sum(total, axis=1)
    if SLICES > 1:
        at = (tl.program_id(1) * ROWS + row).to(tl.int64) * out_features
        tl.store(out_ptr + at + features, sums, mask=is_column)
    else:
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + features, mask=is_column, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(sums, (BLOCK_N // 2, 2)))
            places = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(
                out_ptr + row * (out_features // 2) + places,
                gated_product(gate, up, out_ptr.dtype.element_ty),
                mask=places < out_features // 2,
            )
        else:
            rounded = sums.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * out_features + columns, rounded, mask=is_column)


@triton.jit
def gemv_kernel(
    x_ptr,  # [ROWS, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features] or None
    out_ptr,  # [ROWS, out_features], gated half of it; SLICES > 1: fp32 [SLICES, ...], no bias
    row_stride,
    weight_stride,
    out_features,
    in_features,
    ROWS: tl.constexpr,  # 1 to 4
    GATED: tl.constexpr,
    WHOLE_K: tl.constexpr,  # BLOCK_K divides in_features
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,  # over 1: loads run that many steps ahead, through shared memory
    UNROLL: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    features = features_of(columns, out_features, GATED).to(tl.int64)
    weights_ptr = weight_ptr + features[:, None] * weight_stride
    total0 = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    total1 = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    total3 = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    size = size_of_slice(in_features, BLOCK_K, SLICES)
    start = tl.program_id(1) * size
    end = tl.minimum(start + size, in_features)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
        inner = k + tl.arange(0, BLOCK_K)
        is_read = is_column[:, None]
        if not WHOLE_K:
            is_read = is_read & (inner < in_features)[None, :]
        weights = tl.load(weights_ptr + inner[None, :], mask=is_read, other=0.0).to(tl.float32)
        total0 = multiply_add_row(
            total0, weights, x_ptr, 0, row_stride, inner, in_features, WHOLE_K
        )
        if ROWS > 1:
            total1 = multiply_add_row(
                total1, weights, x_ptr, 1, row_stride, inner, in_features, WHOLE_K
            )
        if ROWS > 2:
            total2 = multiply_add_row(
                total2, weights, x_ptr, 2, row_stride, inner, in_features, WHOLE_K
            )
        if ROWS > 3:
            total3 = multiply_add_row(
                total3, weights, x_ptr, 3, row_stride, inner, in_features, WHOLE_K
            )
    store_gemv_row(total0, bias_ptr, out_ptr, 0, out_features, ROWS, BLOCK_N, SLICES, GATED)
    if ROWS > 1:
        store_gemv_row(total1, bias_ptr, out_ptr, 1, out_features, ROWS, BLOCK_N, SLICES, GATED)
    if ROWS > 2:
        store_gemv_row(total2, bias_ptr, out_ptr, 2, out_features, ROWS, BLOCK_N, SLICES, GATED)
    if ROWS > 3:
        store_gemv_row(total3, bias_ptr, out_ptr, 3, out_features, ROWS, BLOCK_N, SLICES, GATED)


def launch_gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gated: bool, config: dict[str, Any]
) -> None:
    """Write the product of at most four rows to ``out``."""
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    slices = config["SLICES"]
    target = (
        out
        if slices == 1
        else linear_slices_triton.workspace(slices, num_rows, out_features, x.device)
    )
    grid = triton.cdiv(out_features, config["BLOCK_N"]), slices
    gemv_kernel[grid](
        x,
        weight,
        bias if slices == 1 else None,
        target,
        x.stride(0),
        weight.stride(0),
        out_features,
        in_features,
        ROWS=num_rows,
        GATED=gated,
        **config,
    )
    if slices > 1:
        linear_slices_triton.finish(target, bias, out, gated)
