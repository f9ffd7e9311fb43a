"""Mixture of experts: the router of DeepSeek-V3 and the product with the chosen experts.

    x [num_tokens, hidden]                             router_logits [num_tokens, num_experts]
    gate_up [num_experts, 2 * intermediate, hidden]    expert_ids, expert_weights [num_tokens, k]
    down [num_experts, hidden, intermediate]
    y[t] = sum over j of expert_weights[t, j] * (down[e] @ silu_and_mul(gate_up[e] @ x[t])),
           e = expert_ids[t, j]

A *slot* is one (token, j) pair, numbered t * k + j. Slots are sorted by expert and each expert's
group is padded to whole row blocks, so every expert is one dense product and a row's bits do not
depend on how many neighbours chose the same expert. The sum over j runs in slot order, in fp32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import moe_triton
from kernels.activation import silu_and_mul
from kernels.dispatch import use_triton
from kernels.linear import row_group

_GROUP_TOP = 2  # a group of experts is scored by the sum of its two best


def route_noaux_tc(
    router_logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by DeepSeek-V3's rule (arXiv:2412.19437, section 2.1.2).

    scores = sigmoid(logits); choice = scores + correction_bias; the ``top_groups`` groups with the
    largest sum of their two best choices stay; of their experts the ``top_k`` with the largest
    choice are taken, weighted by their *scores*.

    Args:
        router_logits: [num_tokens, num_experts] fp32.
        correction_bias: [num_experts] fp32.
        top_k: experts per token, at most num_experts / num_groups * top_groups.
        num_groups: divides num_experts.
        top_groups: groups that stay, at most num_groups.
        renormalize: divide the weights by their sum + 1e-20.
        scaling_factor: multiplies the weights.

    Returns:
        expert_ids [num_tokens, top_k] int64, best first, lowest id first among equals, and
        expert_weights [num_tokens, top_k] fp32.
    """
    num_tokens, num_experts = router_logits.shape
    if use_triton(router_logits) and num_tokens > 0:
        return moe_triton.route_noaux_tc(
            router_logits,
            correction_bias,
            top_k,
            num_groups,
            top_groups,
            renormalize,
            scaling_factor,
        )
    scores = 1.0 / (torch.exp(-router_logits) + 1.0)  # exp: the same bits at any place in a tensor
    choice = scores + correction_bias
    if top_groups < num_groups:
        grouped = choice.view(num_tokens, num_groups, num_experts // num_groups)
        best = grouped.topk(min(_GROUP_TOP, grouped.shape[-1]), dim=-1).values
        group_scores = best.sum(dim=-1)  # [num_tokens, num_groups]
        kept = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    # stable: among equal choices the lowest id comes first, which topk does not promise
    expert_ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_ids, weights * scaling_factor


def moe_experts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Apply each token's experts and add up their weighted outputs.

    Args:
        x: [num_tokens, hidden_size], any float dtype.
        expert_ids: [num_tokens, k] int64.
        expert_weights: [num_tokens, k] fp32.
        gate_up: [num_experts, 2 * intermediate_size, hidden_size], gate first, dtype of ``x``.
        down: [num_experts, hidden_size, intermediate_size], dtype of ``x``.

    Returns:
        [num_tokens, hidden_size] in the dtype of ``x``; a row has the same bits in any batch.
    """
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    if use_triton(x):
        return moe_triton.moe_experts(x, expert_ids, expert_weights, gate_up, down)
    return _moe_experts_torch(x, expert_ids, expert_weights, gate_up, down)


def _moe_experts_torch(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    num_tokens, top_k = expert_ids.shape
    group = row_group(x.dtype)
    if num_tokens == 1:
        outputs = _one_token_outputs(x, expert_ids[0].tolist(), gate_up, down, group)
        return (outputs * expert_weights.view(top_k, 1)).sum(dim=0, keepdim=True).to(x.dtype)
    slot_experts = expert_ids.flatten().numpy()
    order = np.argsort(slot_experts, kind="stable")
    counts = np.bincount(slot_experts, minlength=gate_up.shape[0])
    padded_counts = -(-counts // group) * group
    ends = np.cumsum(padded_counts)
    # rows of an expert start at its padded offset; its slots keep their order
    shifts = (ends - padded_counts) - (np.cumsum(counts) - counts)
    sorted_rows = np.arange(order.size) + shifts[slot_experts[order]]
    row_tokens = np.zeros(int(ends[-1]), dtype=np.int64)
    row_tokens[sorted_rows] = order // top_k
    slot_rows = np.empty_like(order)
    slot_rows[order] = sorted_rows

    rows = x[torch.from_numpy(row_tokens)]  # [num_padded_rows, hidden]
    hidden = silu_and_mul(_grouped_linear(rows, gate_up, ends))
    outputs = _grouped_linear(hidden, down, ends)[torch.from_numpy(slot_rows)]
    outputs = outputs.view(num_tokens, top_k, -1)
    return (outputs * expert_weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _one_token_outputs(
    x: Tensor, expert_ids: list[int], gate_up: Tensor, down: Tensor, group: int
) -> Tensor:
    """Each chosen expert's output for a single token, which needs no sorting: [k, hidden]."""
    rows = x.expand(group, -1)
    outputs = []
    for expert_id in expert_ids:
        hidden = silu_and_mul(functional.linear(rows, gate_up[expert_id]))
        outputs.append(functional.linear(hidden, down[expert_id])[0])
    return torch.stack(outputs)


def _grouped_linear(rows: Tensor, weights: Tensor, ends: np.ndarray) -> Tensor:
    """Multiply rows [ends[e-1], ends[e]) by ``weights[e].T``."""
    num_experts, _, in_features = weights.shape
    # grouped_mm refuses rows that do not start on 16 bytes and visits every expert, hit or not
    aligned = in_features * rows.element_size() % 16 == 0
    if aligned and rows.shape[0] >= num_experts:
        offsets = torch.from_numpy(ends.astype(np.int32))
        return functional.grouped_mm(rows, weights.transpose(1, 2), offs=offsets)
    outputs = []
    start = 0
    for expert_id, end in enumerate(ends.tolist()):
        if end > start:
            outputs.append(functional.linear(rows[start:end], weights[expert_id]))
        start = end
    return torch.cat(outputs)
