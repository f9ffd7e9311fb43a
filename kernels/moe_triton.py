# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Grouped experts on the GPU; ``kernels.moe`` holds the contract and the equations.

    slot = token * k + j        order [num_slots]: slots sorted by expert, stable
    expert_starts [num_experts + 1]: first sorted position of each expert, then num_slots

A program of the grouped product multiplies one block of BLOCK_M sorted positions of one expert with
BLOCK_N of that expert's rows. Blocks never span experts, so a row meets the same numbers in the
same order whoever its neighbours are. Positions past an expert's end are masked, not stored.

The first product (GATED) reads token rows and writes silu(gate) * up in sorted order: a block holds
rows of gate and of up in turn, so that the two halves of a pair meet in one thread. The second
reads sorted rows and writes in slot order. The combining kernel adds the k outputs of a token.
Graph-safe: the grid holds the most blocks num_slots can need; a program finds its expert from the
counts on the device, and programs past the last block return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import gated_product
from kernels.configs import Fact, launch_config
from kernels.dispatch import FP8_CAPABILITY, capability_of, multiplies_fp8
from kernels.moe_align_triton import align
from kernels.quant import Fp8Weight
from kernels.quant_triton import fp8_product, quantize_activations


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
def _rows_of(start, end, order_ptr, top_k, GATED: tl.constexpr, BLOCK_M: tl.constexpr):
    # which rows the block reads and which it writes, and which of them there are
    positions = start + tl.arange(0, BLOCK_M)
    is_row = positions < end
    slots = tl.load(order_ptr + positions, mask=is_row, other=0)
    row_ids = slots // top_k if GATED else positions
    out_ids = positions if GATED else slots
    return row_ids, out_ids, is_row


@triton.jit
def _columns_of(block_id, out_features, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    # the rows of the matrix that the block multiplies with, and which of them there are
    columns = block_id * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    if GATED:
        columns = columns // 2 + columns % 2 * (out_features // 2)
    return columns, is_column


@triton.jit
def _store(
    total,  # [BLOCK_M, BLOCK_N] fp32
    out_ptr,
    out_ids,  # [BLOCK_M]
    is_row,
    block_id,
    out_features,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    out_size = out_features
    out = total
    columns = block_id * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        out_size = out_features // 2
        columns = block_id * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N // 2, 2)))
        out = gated_product(gate, up, out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + out_ids[:, None] * out_size + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (columns < out_size)[None, :],
    )


@triton.jit
def grouped_linear_kernel(
    rows_ptr,  # [num_tokens or num_slots, in_features]
    weights_ptr,  # [num_experts, out_features, in_features]
    out_ptr,  # [num_slots, out_features, or half of it if GATED]
    order_ptr,  # [num_slots] int64
    expert_starts_ptr,  # [num_experts + 1] int64
    num_experts,
    out_features,
    in_features,
    top_k,
    GATED: tl.constexpr,
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
    row_ids, out_ids, is_row = _rows_of(start, end, order_ptr, top_k, GATED, BLOCK_M)
    columns, is_column = _columns_of(tl.program_id(1), out_features, GATED, BLOCK_N)
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
    _store(total, out_ptr, out_ids, is_row, tl.program_id(1), out_features, GATED, BLOCK_M, BLOCK_N)


@triton.jit
def grouped_fp8_linear_kernel(
    rows_ptr,  # [num_tokens or num_slots, in_features]; W8A8: e4m3 as uint8
    row_scales_ptr,  # [num_tokens or num_slots, num_scales] fp32; W8A16: None
    values_ptr,  # [num_experts, out_features, in_features], e4m3 as uint8
    scale_inv_ptr,  # [num_experts, num_row_blocks, num_scales] fp32
    scale_rows_ptr,  # [out_features] int32
    out_ptr,  # [num_slots, out_features, or half of it if GATED]
    order_ptr,  # [num_slots] int64
    expert_starts_ptr,  # [num_experts + 1] int64
    num_experts,
    out_features,
    in_features,
    num_row_blocks,
    num_scales,  # of a row: ceil(in_features / 128)
    top_k,
    GATED: tl.constexpr,
    QUANTIZED_ROWS: tl.constexpr,  # W8A8
    FP8_DOT: tl.constexpr,  # W8A8 in fp8 matrix units; else both sides decoded to fp16
    HAS_E4M3: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,  # the power of two that holds num_experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides 128, so that a step has one scale
):
    expert_id, start, end = _block_of(
        tl.program_id(0), expert_starts_ptr, num_experts, EXPERTS_BLOCK, BLOCK_M
    )
    if expert_id >= num_experts:
        return
    row_ids, out_ids, is_row = _rows_of(start, end, order_ptr, top_k, GATED, BLOCK_M)
    columns, is_column = _columns_of(tl.program_id(1), out_features, GATED, BLOCK_N)
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
        0,
        in_features,
        num_scales,
        QUANTIZED_ROWS,
        FP8_DOT,
        HAS_E4M3,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    _store(total, out_ptr, out_ids, is_row, tl.program_id(1), out_features, GATED, BLOCK_M, BLOCK_N)


@triton.jit
def combine_kernel(
    outputs_ptr,  # [num_tokens * top_k, hidden_size]
    expert_weights_ptr,  # [num_tokens, top_k] fp32
    shared_ptr,  # [num_tokens, hidden_size] or None
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
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + token * hidden_size + columns, mask=inside, other=0.0)
        total = (total.to(tl.float32) + shared.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden_size + columns, total, mask=inside)


def grouped_facts(
    num_tokens: int, top_k: int, weight_shape: Sequence[int], batch_invariant: bool = False
) -> dict[str, Fact]:
    """What the tables of the grouped products may ask for, besides arch, dtype and fp8_dot.

    ``rows_per_expert`` is the average, rounded down. If ``batch_invariant``, these are the facts of
    one token whatever the number of tokens.
    """
    num_experts, out_features, in_features = weight_shape
    num_tokens = 1 if batch_invariant else num_tokens
    return {
        "rows": num_tokens,
        "rows_per_expert": num_tokens * top_k // num_experts,
        "num_experts": num_experts,
        "out_features": out_features,
        "in_features": in_features,
        "aligned": in_features % 16 == 0,
    }


def grouped_linear_config(
    arch: int, dtype: torch.dtype, gated: bool, facts: Mapping[str, Fact]
) -> dict[str, Any]:
    """Block shape and launch; ``dtype`` is that of the rows, ``facts`` are ``grouped_facts``."""
    blocks = launch_config("grouped_linear", arch=arch, dtype=dtype, gated=gated, **facts)
    experts_block = triton.next_power_of_2(int(facts["num_experts"]))
    return {"GATED": gated, "EXPERTS_BLOCK": experts_block, **blocks}


def grouped_fp8_linear_config(
    arch: int, dtype: torch.dtype, gated: bool, fp8_dot: bool, facts: Mapping[str, Fact]
) -> dict[str, Any]:
    """The same for FP8 weights; ``dtype`` is that of the rows, uint8 for W8A8."""
    quantized = dtype == torch.uint8
    fp8_dot = fp8_dot and quantized
    blocks = launch_config(
        "grouped_fp8_linear",
        arch=arch,
        dtype=dtype,
        gated=gated,
        fp8_dot=fp8_dot,
        **facts,
    )
    experts_block = triton.next_power_of_2(int(facts["num_experts"]))
    formats = {
        "QUANTIZED_ROWS": quantized,
        "FP8_DOT": fp8_dot,
        "HAS_E4M3": arch >= FP8_CAPABILITY,
    }
    return {"GATED": gated, "EXPERTS_BLOCK": experts_block, **formats, **blocks}


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor | Fp8Weight,
    down: Tensor | Fp8Weight,
    shared: Tensor | None,
    *,
    batch_invariant: bool,
) -> Tensor:
    """Launch the kernels, for at least one token."""
    num_tokens, top_k = expert_ids.shape
    hidden_size = x.shape[1]
    num_experts = (gate_up if isinstance(gate_up, Tensor) else gate_up.values).shape[0]
    order, expert_starts = align(expert_ids, num_experts)

    def product(rows: Tensor, weight: Tensor | Fp8Weight, gated: bool) -> Tensor:
        values = weight if isinstance(weight, Tensor) else weight.values
        facts = grouped_facts(num_tokens, top_k, values.shape, batch_invariant)
        return _grouped_linear(rows, weight, order, expert_starts, top_k, gated, facts)

    hidden = product(x.contiguous(), gate_up, gated=True)  # [num_slots, intermediate_size]
    outputs = product(hidden, down, gated=False)  # [num_slots, hidden_size]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = launch_config("moe_combine", rows=num_tokens, hidden_size=hidden_size)
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, config["BLOCK"]))](
        outputs,
        expert_weights.contiguous(),
        None if shared is None else shared.contiguous(),
        out,
        hidden_size,
        top_k,
        **config,
    )
    return out


def _grouped_linear(
    rows: Tensor,
    weight: Tensor | Fp8Weight,
    order: Tensor,
    expert_starts: Tensor,
    top_k: int,
    gated: bool,
    facts: Mapping[str, Fact],
) -> Tensor:
    values = weight if isinstance(weight, Tensor) else weight.values.view(torch.uint8)
    num_slots, arch = order.shape[0], capability_of(rows.device)
    num_experts, out_features, in_features = values.shape
    out_shape = num_slots, out_features // 2 if gated else out_features
    out = torch.empty(out_shape, dtype=rows.dtype, device=rows.device)

    def grid(config: dict[str, Any]) -> tuple[int, int]:
        # each expert that is hit wastes less than one block
        max_blocks = num_slots // config["BLOCK_M"] + min(num_experts, num_slots)
        return max_blocks, triton.cdiv(out_features, config["BLOCK_N"])

    if isinstance(weight, Tensor):
        config = grouped_linear_config(arch, rows.dtype, gated, facts)
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
            **config,
        )
        return out
    row_scales = None
    if weight.activations is not None:
        rows, row_scales = quantize_activations(rows, weight.activations)
        rows = rows.view(torch.uint8)
    config = grouped_fp8_linear_config(arch, rows.dtype, gated, multiplies_fp8(rows.device), facts)
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
        **config,
    )
    return out
