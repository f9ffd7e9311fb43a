# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Routers on the GPU; ``kernels.moe`` holds the contracts.

One program routes one token: its experts lie in a tile [groups, members of a group], so a row's
bits depend on nothing but the row. Graph-safe: the grid is the number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import launch_config

_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _best_groups(group_scores, num_groups, top_groups, GROUPS_BLOCK: tl.constexpr):
    # which groups are among the top_groups best, the lowest ids among equals: [GROUPS_BLOCK] bool
    group_ids = tl.arange(0, GROUPS_BLOCK)
    kept = group_ids < 0
    for _ in range(top_groups):
        open_scores = tl.where(kept | (group_ids >= num_groups), float("-inf"), group_scores)
        chosen = tl.min(
            tl.where(open_scores == tl.max(open_scores, axis=0), group_ids, _NO_ID), axis=0
        )
        kept = kept | (group_ids == chosen)
    return kept


@triton.jit
def _best_experts(choice, scores, ids, num_experts, TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr):
    # ids and scores of the TOP_K largest choices, best first, and the sum of the scores
    slots = tl.arange(0, TOP_K_BLOCK)
    chosen_ids = tl.zeros((TOP_K_BLOCK,), dtype=tl.int32)
    chosen_scores = tl.zeros((TOP_K_BLOCK,), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for slot in range(TOP_K):
        best = tl.max(tl.max(choice, axis=1), axis=0)
        best_id = tl.min(tl.min(tl.where(choice == best, ids, _NO_ID), axis=1), axis=0)
        chosen = ids == best_id
        score = tl.sum(tl.sum(tl.where(chosen, scores, 0.0), axis=1), axis=0)
        choice = tl.where(chosen, float("-inf"), choice)
        best_id = tl.minimum(best_id, num_experts - 1)  # a row of NaN chooses no id of its own
        chosen_ids = tl.where(slots == slot, best_id, chosen_ids)
        chosen_scores = tl.where(slots == slot, score, chosen_scores)
        total += score
    return chosen_ids, chosen_scores, total


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
        kept = _best_groups(group_scores, num_groups, top_groups, GROUPS_BLOCK)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    chosen_ids, chosen_scores, total = _best_experts(
        choice, scores, ids, num_experts, TOP_K, TOP_K_BLOCK
    )
    if RENORMALIZE:
        chosen_scores = chosen_scores / (total + 1e-20)
    slots = tl.arange(0, TOP_K_BLOCK)
    stored = slots < TOP_K
    tl.store(expert_ids_ptr + token * TOP_K + slots, chosen_ids.to(tl.int64), mask=stored)
    tl.store(weights_ptr + token * TOP_K + slots, chosen_scores * scaling_factor, mask=stored)


@triton.jit
def route_softmax_kernel(
    logits_ptr,  # [num_tokens, num_groups * group_size] fp32
    expert_ids_ptr,  # [num_tokens, top_k] int64, out
    weights_ptr,  # [num_tokens, top_k] fp32, out
    group_size,
    num_groups,
    top_groups,
    scaling_factor,
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
    logits = tl.load(logits_ptr + token * num_experts + ids, mask=inside, other=float("-inf"))
    powers = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))  # 0 outside
    scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    if top_groups < num_groups:
        kept = _best_groups(tl.max(scores, axis=1), num_groups, top_groups, GROUPS_BLOCK)
        scores = tl.where(kept[:, None], scores, 0.0)
    choice = tl.where(inside, scores, float("-inf"))
    ids = tl.where(inside, ids, _NO_ID)
    chosen_ids, chosen_scores, _ = _best_experts(
        choice, scores, ids, num_experts, TOP_K, TOP_K_BLOCK
    )
    slots = tl.arange(0, TOP_K_BLOCK)
    stored = slots < TOP_K
    tl.store(expert_ids_ptr + token * TOP_K + slots, chosen_ids.to(tl.int64), mask=stored)
    tl.store(weights_ptr + token * TOP_K + slots, chosen_scores * scaling_factor, mask=stored)


def route_config(top_k: int, num_groups: int, group_size: int) -> dict[str, int]:
    """Powers of two that hold the choice, the groups and a group."""
    return {
        "TOP_K": top_k,
        "TOP_K_BLOCK": triton.next_power_of_2(top_k),
        "GROUPS_BLOCK": triton.next_power_of_2(num_groups),
        "SIZE_BLOCK": triton.next_power_of_2(group_size),
        **launch_config("moe_route", num_experts=num_groups * group_size),
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
    expert_ids, expert_weights = _outputs(router_logits, top_k)
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


def route_softmax(
    router_logits: Tensor, top_k: int, num_groups: int, top_groups: int, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    group_size = num_experts // num_groups
    expert_ids, expert_weights = _outputs(router_logits, top_k)
    route_softmax_kernel[(num_tokens,)](
        router_logits.contiguous(),
        expert_ids,
        expert_weights,
        group_size,
        num_groups,
        top_groups,
        scaling_factor,
        **route_config(top_k, num_groups, group_size),
    )
    return expert_ids, expert_weights


def _outputs(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape, device = (router_logits.shape[0], top_k), router_logits.device
    expert_ids = torch.empty(shape, dtype=torch.int64, device=device)
    return expert_ids, torch.empty(shape, dtype=torch.float32, device=device)
