# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Matrix products of few rows on the GPU; ``kernels.linear`` holds the contracts.

    y = x @ weight.T + bias        gated: y = silu(x @ gate.T) * (x @ up.T), weight = (gate | up)

gemv: up to four rows, in ``kernels.linear_gemv_triton``.
tile: tensor cores. in_features is cut into SLICES and total = slice 0 + slice 1 + ..., in order.
Where programs would be few, each takes one slice and writes its sum to a workspace, and a second
kernel adds them up; else one program takes all slices. A slice is always summed from zero and then
added, so both ways give the same bits.
Gated: columns of a block are gate 0, up 0, gate 1, up 1, ..., so that one program holds both.
Graph-safe: grids follow from shapes, nothing is read back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import linear_slices_triton
from kernels.activation import gated_product
from kernels.configs import Fact, launch_config
from kernels.dispatch import capability_of
from kernels.linear_gemv_triton import launch_gemv
from kernels.linear_slices_triton import features_of, size_of_slice

# with fewer programs each slice becomes a program
MIN_PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit
def slice_product(
    rows_ptr,  # [BLOCK_M, 1] pointers: where each row starts
    weights_ptr,  # [1, BLOCK_N] pointers: where the weights of each column start
    is_row,
    is_column,
    start,
    end,
    in_features,
    weight_in_stride,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # [BLOCK_M, BLOCK_N] fp32 over channels [start, end)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(start, end, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        rows_mask = is_row[:, None]
        weights_mask = is_column[None, :]
        if not WHOLE_K:
            rows_mask = rows_mask & (inner < in_features)[None, :]
            weights_mask = weights_mask & (inner < in_features)[:, None]
        rows = tl.load(rows_ptr + inner[None, :], mask=rows_mask, other=0.0)
        weights = tl.load(
            weights_ptr + inner[:, None] * weight_in_stride, mask=weights_mask, other=0.0
        )
        total = tl.dot(rows.to(weights.dtype), weights, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows"])
def tile_kernel(
    x_ptr,  # [num_rows, num_heads, in_features]
    weight_ptr,  # [num_heads, out_features, in_features], any strides
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, num_heads, out_features], gated half of it; SLICED: fp32 [SLICES, ...]
    num_rows,
    out_features,
    in_features,
    row_stride,
    row_head_stride,
    weight_head_stride,
    weight_out_stride,
    weight_in_stride,
    out_row_stride,
    out_head_stride,
    SLICES: tl.constexpr,
    SLICED: tl.constexpr,  # the program sums one slice into the workspace
    GATED: tl.constexpr,
    WHOLE_K: tl.constexpr,  # BLOCK_K divides in_features
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # row blocks whose programs with the same columns are neighbours
):
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_column_blocks = tl.cdiv(out_features, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * num_column_blocks)
    within = tl.program_id(0) % (GROUP_M * num_column_blocks)
    group_rows = tl.minimum(num_row_blocks - group * GROUP_M, GROUP_M)
    row_block = group * GROUP_M + within % group_rows
    column_block = within // group_rows
    head = tl.program_id(2).to(tl.int64)

    row_ids = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_row = row_ids < num_rows
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    features = features_of(columns, out_features, GATED)
    rows_ptr = x_ptr + head * row_head_stride + row_ids[:, None] * row_stride
    weights_ptr = weight_ptr + head * weight_head_stride
    weights_ptr += features.to(tl.int64)[None, :] * weight_out_stride
    size = size_of_slice(in_features, BLOCK_K, SLICES)
    first_slice = tl.program_id(1) if SLICED else 0
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for index in range(1 if SLICED else SLICES):
        start = (first_slice + index) * size
        total += slice_product(
            rows_ptr,
            weights_ptr,
            is_row,
            is_column,
            start,
            tl.minimum(start + size, in_features),
            in_features,
            weight_in_stride,
            WHOLE_K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    if SLICED:
        places = (tl.program_id(1).to(tl.int64) * num_rows + row_ids[:, None]) * out_features
        tl.store(out_ptr + places + features[None, :], total, is_row[:, None] & is_column[None, :])
    else:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + features, mask=is_column, other=0.0)
            total += bias.to(tl.float32)[None, :]
        outs_ptr = out_ptr + head * out_head_stride + row_ids[:, None] * out_row_stride
        if GATED:
            gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N // 2, 2)))
            places = column_block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(
                outs_ptr + places[None, :],
                gated_product(gate, up, out_ptr.dtype.element_ty),
                mask=is_row[:, None] & (places < out_features // 2)[None, :],
            )
        else:
            rounded = total.to(out_ptr.dtype.element_ty)
            tl.store(
                outs_ptr + columns[None, :], rounded, mask=is_row[:, None] & is_column[None, :]
            )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many the chip has; the interpreter has those of an H200."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def linear_config(
    dtype: torch.dtype,
    num_rows: int,
    out_features: int,
    in_features: int,
    capability: int,
    batch_invariant: bool,
) -> tuple[str, dict[str, Any]]:
    """Body ("gemv", "tile" or "cublas") and launch of a product; ``dtype`` is the weight's.

    Batch-invariant and gemv launches do not know how many rows there are.
    """
    facts: dict[str, Fact | torch.dtype] = {
        "arch": capability,
        "dtype": dtype,
        "in_features": in_features,
        "out_features": out_features,
    }
    if batch_invariant:
        body, config = "tile", launch_config("linear_invariant", **facts)
    else:
        body = launch_config("linear", rows=num_rows, **facts)["body"]
        if body == "cublas":
            return body, {}
        if body == "gemv":
            config = launch_config("linear_gemv", **facts)
        else:
            config = launch_config("linear_tile", rows=num_rows, **facts)
    num_blocks = triton.cdiv(in_features, config["BLOCK_K"])
    # no slice is empty
    config["SLICES"] = triton.cdiv(num_blocks, triton.cdiv(num_blocks, config["SLICES"]))
    config["WHOLE_K"] = in_features % config["BLOCK_K"] == 0
    return body, config


def heads_linear_config(
    dtype: torch.dtype, num_heads: int, out_features: int, in_features: int, capability: int
) -> dict[str, Any]:
    """Launch of one product per head, and the ``max_rows`` it is for."""
    config = launch_config(
        "heads_linear",
        arch=capability,
        dtype=dtype,
        num_heads=num_heads,
        in_features=in_features,
        out_features=out_features,
    )
    return config | {"WHOLE_K": in_features % config["BLOCK_K"] == 0}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    gated: bool,
    batch_invariant: bool,
) -> Tensor | None:
    """Launch what the table says, for at least one row; None where it says cuBLAS."""
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    capability = capability_of(x.device)
    body, config = linear_config(
        weight.dtype, num_rows, out_features, in_features, capability, batch_invariant
    )
    if body == "cublas":
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    width = out_features // 2 if gated else out_features
    out = torch.empty((num_rows, width), dtype=out_dtype, device=x.device)
    if body == "gemv":
        launch_gemv(x, weight, bias, out, gated, config)
    else:
        launch_tile(x, weight, bias, out, gated, config)
    return out


def launch_tile(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gated: bool, config: dict[str, Any]
) -> None:
    """Write the product of any number of rows to ``out``."""
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    slices = config["SLICES"]
    num_tiles = tiles_of(num_rows, out_features, config)
    few = MIN_PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(x.device)
    sliced = slices > 1 and num_tiles < few
    target = (
        linear_slices_triton.workspace(slices, num_rows, out_features, x.device) if sliced else out
    )
    tile_kernel[num_tiles, slices if sliced else 1, 1](
        x,
        weight,
        None if sliced else bias,
        target,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        0,
        0,
        weight.stride(0),
        weight.stride(1),
        out.shape[1],
        0,
        SLICED=sliced,
        GATED=gated,
        **config,
    )
    if sliced:
        linear_slices_triton.finish(target, bias, out, gated)


def heads_linear(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor | None:
    """One product per head, for at least one row; None for more rows than the table takes."""
    num_rows, num_heads, in_features = x.shape
    out_features = weight.shape[1]
    config = heads_linear_config(
        weight.dtype, num_heads, out_features, in_features, capability_of(x.device)
    )
    if num_rows > config.pop("max_rows") and not batch_invariant:
        return None
    out = torch.empty((num_rows, num_heads, out_features), dtype=x.dtype, device=x.device)
    launch_heads(x, weight, out, config)
    return out


def launch_heads(x: Tensor, weight: Tensor, out: Tensor, config: dict[str, Any]) -> None:
    """Write the products of all heads to ``out`` [num_rows, num_heads, out_features]."""
    num_rows, num_heads, in_features = x.shape
    out_features = weight.shape[1]
    tile_kernel[tiles_of(num_rows, out_features, config), 1, num_heads](
        x,
        weight,
        None,
        out,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        x.stride(1),
        *weight.stride(),
        out.stride(0),
        out.stride(1),
        SLICES=1,
        SLICED=False,
        GATED=False,
        **config,
    )


def tiles_of(num_rows: int, out_features: int, config: dict[str, Any]) -> int:
    """Row blocks times column blocks."""
    return int(
        triton.cdiv(num_rows, config["BLOCK_M"]) * triton.cdiv(out_features, config["BLOCK_N"])
    )
