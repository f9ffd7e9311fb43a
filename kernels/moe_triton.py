# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Routing and grouped experts on the GPU; ``kernels.moe`` holds the contracts and the equations.

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

ROUTE_WARPS = 4
COMBINE_CONFIG = {"BLOCK": 1024, "num_warps": 4}
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def route_noaux_tc_kernel(
    logits_ptr,  # [num_tokens, num_groups * group_size] fp32
    bias_ptr,  # [num_groups * group_size] fp32
    expert_ids_ptr,  # [num_tokens, top_k] int64, out
    weights_ptr,  # [num_tokens, top_k] fp32, out
    group_size,
    num_groups,
    top_groups,
    scaling_factor,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_BLOCK: tl.constexpr,  # powers of two that hold top_k, the groups and a group
    GROUPS_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS_BLOCK)[:, None]
    members = tl.arange(0, SIZE_BLOCK)[None, :]
    inside = (groups < num_groups) & (members < group_size)
    ids = groups * group_size + members  # [GROUPS_BLOCK, SIZE_BLOCK]
    num_experts = num_groups * group_size
    logits = tl.load(logits_ptr + token * num_experts + ids, mask=inside, other=0.0)
    decay = tl.exp(-tl.abs(logits))  # never overflows
    scores = tl.where(logits >= 0, 1.0, decay) / (1.0 + decay)
    bias = tl.load(bias_ptr + ids, mask=inside, other=0.0)
    choice = tl.where(inside, scores + bias, float("-inf"))
    ids = tl.where(inside, ids, _NO_ID)
    if top_groups < num_groups:
        # a group's score is the sum of its two best choices
        best = tl.max(choice, axis=1)  # [GROUPS_BLOCK]
        best_ids = tl.min(tl.where(choice == best[:, None], ids, _NO_ID), axis=1)
        second = tl.max(tl.where(ids == best_ids[:, None], float("-inf"), choice), axis=1)
        group_scores = best + tl.where(group_size > 1, second, 0.0)
        group_ids = tl.arange(0, GROUPS_BLOCK)
        kept = group_ids < 0
        for _ in range(top_groups):
            open_scores = tl.where(kept | (group_ids >= num_groups), float("-inf"), group_scores)
            chosen = tl.min(
                tl.where(open_scores == tl.max(open_scores, axis=0), group_ids, _NO_ID), axis=0
            )
            kept = kept | (group_ids == chosen)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    slots = tl.arange(0, TOP_K_BLOCK)
    chosen_ids = tl.zeros((TOP_K_BLOCK,), dtype=tl.int32)
    chosen_weights = tl.zeros((TOP_K_BLOCK,), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for slot in range(TOP_K):
        best = tl.max(tl.max(choice, axis=1), axis=0)
        best_id = tl.min(tl.min(tl.where(choice == best, ids, _NO_ID), axis=1), axis=0)
        chosen = ids == best_id
        weight = tl.sum(tl.sum(tl.where(chosen, scores, 0.0), axis=1), axis=0)
        choice = tl.where(chosen, float("-inf"), choice)
        best_id = tl.minimum(best_id, num_experts - 1)  # a row of NaN chooses no id of its own
        chosen_ids = tl.where(slots == slot, best_id, chosen_ids)
        chosen_weights = tl.where(slots == slot, weight, chosen_weights)
        total += weight
    if RENORMALIZE:
        chosen_weights = chosen_weights / (total + 1e-20)
    stored = slots < TOP_K
    tl.store(expert_ids_ptr + token * TOP_K + slots, chosen_ids.to(tl.int64), mask=stored)
    tl.store(weights_ptr + token * TOP_K + slots, chosen_weights * scaling_factor, mask=stored)


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
    block_id = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_BLOCK)
    is_expert = experts < num_experts
    starts = tl.load(expert_starts_ptr + experts, mask=is_expert, other=0)
    ends = tl.load(expert_starts_ptr + experts + 1, mask=is_expert, other=0)
    num_blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    block_ends = tl.cumsum(num_blocks, axis=0)
    if block_id >= tl.max(block_ends, axis=0):
        return
    expert_id = tl.sum(((block_ends <= block_id) & is_expert).to(tl.int32), axis=0)
    is_mine = experts == expert_id
    first_block = tl.sum(tl.where(is_mine, block_ends - num_blocks, 0), axis=0)
    start = tl.sum(tl.where(is_mine, starts, 0), axis=0) + (block_id - first_block) * BLOCK_M
    end = tl.sum(tl.where(is_mine, ends, 0), axis=0)

    positions = start + tl.arange(0, BLOCK_M)  # sorted positions
    is_row = positions < end
    slots = tl.load(order_ptr + positions, mask=is_row, other=0)
    if SORTED_ROWS:
        row_ids = positions
        out_ids = slots
    else:
        row_ids = slots // top_k
        out_ids = positions
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


def route_config(top_k: int, num_groups: int, group_size: int) -> dict[str, int]:
    """Powers of two that hold the choice, the groups and a group."""
    return {
        "TOP_K": top_k,
        "TOP_K_BLOCK": triton.next_power_of_2(top_k),
        "GROUPS_BLOCK": triton.next_power_of_2(num_groups),
        "SIZE_BLOCK": triton.next_power_of_2(group_size),
        "num_warps": ROUTE_WARPS,
    }


def route_noaux_tc(
    router_logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    group_size = num_experts // num_groups
    device = router_logits.device
    expert_ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=device)
    expert_weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=device)
    route_noaux_tc_kernel[(num_tokens,)](
        router_logits.contiguous(),
        correction_bias,
        expert_ids,
        expert_weights,
        group_size,
        num_groups,
        top_groups,
        scaling_factor,
        RENORMALIZE=renormalize,
        **route_config(top_k, num_groups, group_size),
    )
    return expert_ids, expert_weights


def moe_experts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    num_tokens, top_k = expert_ids.shape
    num_experts = gate_up.shape[0]
    sorted_experts, order = expert_ids.flatten().sort(stable=True)
    expert_starts = torch.searchsorted(
        sorted_experts, torch.arange(num_experts + 1, device=x.device)
    )  # [num_experts + 1]
    gated = _grouped_linear(x.contiguous(), gate_up, order, expert_starts, top_k, False)
    outputs = _grouped_linear(silu_and_mul(gated), down, order, expert_starts, top_k, True)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    combine_kernel[(num_tokens, triton.cdiv(x.shape[1], COMBINE_CONFIG["BLOCK"]))](
        outputs, expert_weights, out, x.shape[1], top_k, **COMBINE_CONFIG
    )
    return out


def _grouped_linear(
    rows: Tensor,
    weights: Tensor,
    order: Tensor,
    expert_starts: Tensor,
    top_k: int,
    sorted_rows: bool,
) -> Tensor:
    num_slots = order.shape[0]
    num_experts, out_features, in_features = weights.shape
    out = torch.empty((num_slots, out_features), dtype=rows.dtype, device=rows.device)
    config = grouped_linear_config(rows.dtype)
    # each expert that is hit wastes less than one block
    max_blocks = num_slots // config["BLOCK_M"] + min(num_experts, num_slots)
    grouped_linear_kernel[(max_blocks, triton.cdiv(out_features, config["BLOCK_N"]))](
        rows,
        weights,
        out,
        order,
        expert_starts,
        num_experts,
        out_features,
        in_features,
        top_k,
        SORTED_ROWS=sorted_rows,
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts),
        **config,
    )
    return out
