# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Grouped experts on the GPU; ``kernels.moe`` holds the contract and the equations.

    slot = token * k + j        order [num_slots]: slots sorted by expert, stable
    expert_starts [num_experts + 1]: first sorted position of each expert, then num_slots

A program of the grouped product multiplies one block of BLOCK_M sorted positions of one expert with
one block of that expert's rows. Blocks never span experts, so a row meets the same numbers in the
same order whoever its neighbours are. Positions past an expert's end are masked, not stored.
Graph-safe: the grid holds the most blocks num_slots can need; a program finds its expert from the
counts on the device, and programs past the last block return.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.dispatch import multiplies_fp8
from kernels.quant import Fp8Weight
from kernels.quant_triton import fp8_product, quantize_activations

COMBINE_CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _block_of(
    block_id, expert_starts_ptr, num_experts, EXPERTS_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr
):
    # the expert of a block, num_experts past the last block; its sorted positions [start, end)
    experts = tl.arange(0, EXPERTS_BLOCK)
    is_expert = experts < num_experts
    starts = tl.load(expert_starts_ptr + experts, mask=is_expert, other=0)
    ends = tl.load(expert_starts_ptr + experts + 1, mask=is_expert, other=0)
    num_blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    block_ends = tl.cumsum(num_blocks, axis=0)
    expert_id = tl.sum(((block_ends <= block_id) & is_expert).to(tl.int32), axis=0)
    is_mine = experts == expert_id
    first_block = tl.sum(tl.where(is_mine, block_ends - num_blocks, 0), axis=0)
    start = tl.sum(tl.where(is_mine, starts, 0), axis=0) + (block_id - first_block) * BLOCK_M
    end = tl.sum(tl.where(is_mine, ends, 0), axis=0)
    return expert_id, start, end


@triton.jit
def _rows_of(start, end, order_ptr, top_k, SORTED_ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    # which rows the block reads and which it writes, and which of them there are
    positions = start + tl.arange(0, BLOCK_M)
    is_row = positions < end
    slots = tl.load(order_ptr + positions, mask=is_row, other=0)
    row_ids = positions if SORTED_ROWS else slots // top_k
    out_ids = slots if SORTED_ROWS else positions
    return row_ids, out_ids, is_row


@triton.jit
def grouped_linear_kernel(
    rows_ptr,  # [num_tokens or num_slots, in_features]
    weights_ptr,  # [num_experts, out_features, in_features]
    out_ptr,  # [num_slots, out_features]
    order_ptr,  # [num_slots] int64
    expert_starts_ptr,  # [num_experts + 1] int64
    num_experts,
    out_features,
    in_features,
    top_k,
    SORTED_ROWS: tl.constexpr,  # rows lie in sorted order and out in slot order; else the reverse
    EXPERTS_BLOCK: tl.constexpr,  # the power of two that holds num_experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert_id, start, end = _block_of(
        tl.program_id(0), expert_starts_ptr, num_experts, EXPERTS_BLOCK, BLOCK_M
    )
    if expert_id >= num_experts:
        return
    row_ids, out_ids, is_row = _rows_of(start, end, order_ptr, top_k, SORTED_ROWS, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    expert_ptr = weights_ptr + expert_id.to(tl.int64) * out_features * in_features
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        is_inner = inner < in_features
        rows = tl.load(
            rows_ptr + row_ids[:, None] * in_features + inner[None, :],
            mask=is_row[:, None] & is_inner[None, :],
            other=0.0,
        )
        weights = tl.load(
            expert_ptr + columns[None, :] * in_features + inner[:, None],
            mask=is_column[None, :] & is_inner[:, None],
            other=0.0,
        )
        total = tl.dot(rows, weights, total, input_precision="ieee")
    tl.store(
        out_ptr + out_ids[:, None] * out_features + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@triton.jit
def grouped_fp8_linear_kernel(
    rows_ptr,  # [num_tokens or num_slots, in_features]; W8A8: e4m3 as uint8
    row_scales_ptr,  # [num_tokens or num_slots, num_scales] fp32; W8A16: None
    values_ptr,  # [num_experts, out_features, in_features], e4m3 as uint8
    scale_inv_ptr,  # [num_experts, num_row_blocks, num_scales] fp32
    scale_rows_ptr,  # [out_features] int32
    out_ptr,  # [num_slots, out_features]
    order_ptr,  # [num_slots] int64
    expert_starts_ptr,  # [num_experts + 1] int64
    num_experts,
    out_features,
    in_features,
    num_row_blocks,
    num_scales,  # of a row: ceil(in_features / 128)
    top_k,
    SORTED_ROWS: tl.constexpr,  # rows lie in sorted order and out in slot order; else the reverse
    QUANTIZED_ROWS: tl.constexpr,  # W8A8
    FP8_DOT: tl.constexpr,  # W8A8 in fp8 matrix units; else both sides decoded to fp16
    EXPERTS_BLOCK: tl.constexpr,  # the power of two that holds num_experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides 128, so that a slice has one scale
):
    expert_id, start, end = _block_of(
        tl.program_id(0), expert_starts_ptr, num_experts, EXPERTS_BLOCK, BLOCK_M
    )
    if expert_id >= num_experts:
        return
    row_ids, out_ids, is_row = _rows_of(start, end, order_ptr, top_k, SORTED_ROWS, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    expert_ptr = values_ptr + expert_id.to(tl.int64) * out_features * in_features
    scale_rows = tl.load(scale_rows_ptr + columns, mask=is_column, other=0)
    total = fp8_product(
        rows_ptr,
        row_scales_ptr,
        expert_ptr,
        scale_inv_ptr + (expert_id * num_row_blocks + scale_rows) * num_scales,
        row_ids,
        is_row,
        columns,
        is_column,
        in_features,
        in_features,
        num_scales,
        QUANTIZED_ROWS,
        FP8_DOT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    tl.store(
        out_ptr + out_ids[:, None] * out_features + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@triton.jit
def combine_kernel(
    outputs_ptr,  # [num_tokens * top_k, hidden_size]
    expert_weights_ptr,  # [num_tokens, top_k] fp32
    out_ptr,  # [num_tokens, hidden_size]
    hidden_size,
    top_k,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(top_k):
        slot = token * top_k + index
        output = tl.load(outputs_ptr + slot * hidden_size + columns, mask=inside, other=0.0)
        total += tl.load(expert_weights_ptr + slot) * output.to(tl.float32)
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden_size + columns, total, mask=inside)


def grouped_linear_config(dtype: torch.dtype) -> dict[str, int]:
    """Block shape and launch; one per dtype, since a row's bits follow the block shape."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


def grouped_fp8_linear_config(dtype: torch.dtype, fp8_dot: bool) -> dict[str, int]:
    """The same for FP8 weights; ``dtype`` is that of the rows, uint8 for W8A8."""
    if dtype == torch.float32:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    else:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    quantized = dtype == torch.uint8
    return {"QUANTIZED_ROWS": quantized, "FP8_DOT": quantized and fp8_dot, **blocks}


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor | Fp8Weight,
    down: Tensor | Fp8Weight,
) -> Tensor:
    num_tokens, top_k = expert_ids.shape
    num_experts = (gate_up if isinstance(gate_up, Tensor) else gate_up.values).shape[0]
    sorted_experts, order = expert_ids.flatten().sort(stable=True)
    expert_starts = torch.searchsorted(
        sorted_experts, torch.arange(num_experts + 1, device=x.device)
    )  # [num_experts + 1]
    gated = _grouped_linear(x.contiguous(), gate_up, order, expert_starts, top_k, False)
    outputs = _grouped_linear(silu_and_mul(gated), down, order, expert_starts, top_k, True)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    combine_kernel[(num_tokens, triton.cdiv(x.shape[1], COMBINE_CONFIG["BLOCK"]))](
        outputs, expert_weights.contiguous(), out, x.shape[1], top_k, **COMBINE_CONFIG
    )
    return out


def _grouped_linear(
    rows: Tensor,
    weight: Tensor | Fp8Weight,
    order: Tensor,
    expert_starts: Tensor,
    top_k: int,
    sorted_rows: bool,
) -> Tensor:
    values = weight if isinstance(weight, Tensor) else weight.values.view(torch.uint8)
    num_slots = order.shape[0]
    num_experts, out_features, in_features = values.shape
    out = torch.empty((num_slots, out_features), dtype=rows.dtype, device=rows.device)
    shared = {"SORTED_ROWS": sorted_rows, "EXPERTS_BLOCK": triton.next_power_of_2(num_experts)}

    def grid(config: dict[str, int]) -> tuple[int, int]:
        # each expert that is hit wastes less than one block
        max_blocks = num_slots // config["BLOCK_M"] + min(num_experts, num_slots)
        return max_blocks, triton.cdiv(out_features, config["BLOCK_N"])

    if isinstance(weight, Tensor):
        config = grouped_linear_config(rows.dtype)
        grouped_linear_kernel[grid(config)](
            rows,
            values,
            out,
            order,
            expert_starts,
            num_experts,
            out_features,
            in_features,
            top_k,
            **shared,
            **config,
        )
        return out
    row_scales = None
    if weight.activations is not None:
        rows, row_scales = quantize_activations(rows, weight.activations)
        rows = rows.view(torch.uint8)
    config = grouped_fp8_linear_config(rows.dtype, multiplies_fp8(rows.device))
    grouped_fp8_linear_kernel[grid(config)](
        rows,
        row_scales,
        values,
        weight.scale_inv,
        weight.scale_rows,
        out,
        order,
        expert_starts,
        num_experts,
        out_features,
        in_features,
        *weight.scale_inv.shape[1:],
        top_k,
        **shared,
        **config,
    )
    return out
