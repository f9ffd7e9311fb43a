"""Mixture of experts: the routers and the product with the chosen experts.

    x [num_tokens, hidden]                             router_logits [num_tokens, num_experts]
    gate_up [num_experts, 2 * intermediate, hidden]    expert_ids, expert_weights [num_tokens, k]
    down [num_experts, hidden, intermediate]
    y[t] = sum over j of expert_weights[t, j] * (down[e] @ silu_and_mul(gate_up[e] @ x[t])),
           e = expert_ids[t, j]

A *slot* is one (token, j) pair, numbered t * k + j. Slots are sorted by expert and each expert's
group is padded to whole row blocks, so every expert is one dense product and a row's bits do not
depend on how many neighbours chose the same expert. The sum over j runs in slot order, in fp32.
The output of shared experts, which every token has, may be added to it.

FP8 weights (``kernels.quant``) are decoded inside the product. The torch body decodes the experts
that are hit, as many at a time as fit in a fixed number of bytes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import moe_route_triton, moe_triton
from kernels.activation import silu_and_mul
from kernels.dispatch import use_triton
from kernels.linear import in_blocks, row_group, torch_linear
from kernels.packed_linear import PackedMatrix, packed_linear
from kernels.quant import (
    MAX_DECODED_BYTES,
    Fp8Weight,
    dequantize_activations,
    dequantize_weight,
    quantize_activations,
)

ExpertWeights = Tensor | Fp8Weight | list[PackedMatrix]
"""The matrices of all experts, on a CPU perhaps packed one by one."""

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
        return moe_route_triton.route_noaux_tc(
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
        dropped = _dropped_groups(best.sum(dim=-1), top_groups)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    expert_ids = _best(choice, top_k)
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_ids, weights * scaling_factor


def route_softmax(
    router_logits: Tensor, top_k: int, num_groups: int, top_groups: int, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by the rule of DeepSeekMoE and V2.

    scores = softmax(logits) over all experts (arXiv:2401.06066, section 3); the ``top_groups``
    groups with the largest best score stay, the scores of the others become 0 (arXiv:2405.04434,
    section 2.1.2); the ``top_k`` largest are taken and not renormalized. With one group of all
    experts this is the rule of DeepSeekMoE and V2-Lite.

    Args:
        router_logits: [num_tokens, num_experts] fp32.
        top_k: experts per token, at most num_experts / num_groups * top_groups.
        num_groups: divides num_experts.
        top_groups: groups that stay, at most num_groups.
        scaling_factor: multiplies the weights.

    Returns:
        expert_ids [num_tokens, top_k] int64, best first, lowest id first among equals, and
        expert_weights [num_tokens, top_k] fp32.
    """
    num_tokens, num_experts = router_logits.shape
    if use_triton(router_logits) and num_tokens > 0:
        return moe_route_triton.route_softmax(
            router_logits, top_k, num_groups, top_groups, scaling_factor
        )
    scores = router_logits.softmax(dim=-1)  # row by row: the same bits at any place in a tensor
    if top_groups < num_groups:
        grouped = scores.view(num_tokens, num_groups, num_experts // num_groups)
        dropped = _dropped_groups(grouped.amax(dim=-1), top_groups)
        scores = grouped.masked_fill(dropped.unsqueeze(-1), 0.0).flatten(1)
    expert_ids = _best(scores, top_k)
    return expert_ids, scores.gather(1, expert_ids) * scaling_factor


def _best(scores: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` largest, the lowest first among equals, which topk does not keep."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _dropped_groups(group_scores: Tensor, top_groups: int) -> Tensor:
    """True for each of [num_tokens, num_groups] that is not among its token's best."""
    dropped = torch.ones_like(group_scores, dtype=torch.bool)
    return dropped.scatter_(1, _best(group_scores, top_groups), False)


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    shared: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Apply each token's experts and add up their weighted outputs.

    Args:
        x: [num_tokens, hidden_size], any float dtype.
        expert_ids: [num_tokens, k] int64.
        expert_weights: [num_tokens, k] fp32.
        gate_up: [num_experts, 2 * intermediate_size, hidden_size], gate first, dtype of ``x``; or
            as many matrices in FP8; or packed, on a CPU.
        down: [num_experts, hidden_size, intermediate_size], likewise. FP8 weights
            that say W8A8 have their input quantized: ``x``, and what the gate lets through.
        shared: [num_tokens, hidden_size], dtype of ``x``, or None: what the shared experts gave,
            added to the sum once it is rounded.
        batch_invariant: on a GPU, launch as for one token whatever the number of tokens; several
            times slower for prompts. On a CPU as in `linear`.

    Returns:
        [num_tokens, hidden_size] in the dtype of ``x``. On a CPU promises about batches are those
        of `linear`; W8A8 is multiplied in fp32. On a GPU a row has the same bits in any batch if
        ``batch_invariant``; else in all whose number of tokens chooses the same row of
        ``[[grouped_linear]]`` or ``[[grouped_fp8_linear]]`` in ``configs.toml``: by default in any
        of up to 64 tokens.
    """
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    if use_triton(x):
        assert not isinstance(gate_up, list) and not isinstance(down, list)
        return moe_triton.moe_experts(
            x, expert_ids, expert_weights, gate_up, down, shared, batch_invariant=batch_invariant
        )
    routed = _moe_experts_torch(x, expert_ids, expert_weights, gate_up, down, batch_invariant)
    return routed if shared is None else routed + shared


def _moe_experts_torch(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    batch_invariant: bool,
) -> Tensor:
    num_tokens, top_k = expert_ids.shape
    dtypes = (x.dtype, _product_dtype(x.dtype, gate_up, down))
    group = max(row_group(dtype, batch_invariant) for dtype in dtypes)
    if num_tokens == 1 and not isinstance(gate_up, Fp8Weight) and not isinstance(down, Fp8Weight):
        rows = x.expand(group, -1)
        outputs = _one_token_outputs(rows, expert_ids[0].tolist(), gate_up, down, batch_invariant)
        return (outputs * expert_weights.view(top_k, 1)).sum(dim=0, keepdim=True).to(x.dtype)
    slot_experts = expert_ids.flatten().numpy()
    order = np.argsort(slot_experts, kind="stable")
    # the experts that are hit, ascending, and how often: all that follows is about these
    hit, slot_hits, counts = np.unique(slot_experts, return_inverse=True, return_counts=True)
    padded_counts = -(-counts // group) * group
    ends = np.cumsum(padded_counts)
    # rows of an expert start at its padded offset; its slots keep their order
    shifts = (ends - padded_counts) - (np.cumsum(counts) - counts)
    sorted_rows = np.arange(order.size) + shifts[slot_hits[order]]
    row_tokens = np.zeros(int(ends[-1]), dtype=np.int64)
    row_tokens[sorted_rows] = order // top_k
    slot_rows = np.empty_like(order)
    slot_rows[order] = sorted_rows

    rows = _rounded(x, gate_up)[torch.from_numpy(row_tokens)]  # [num_padded_rows, hidden]
    gated = _grouped_linear(rows, gate_up, hit, ends, batch_invariant).to(x.dtype)
    hidden = _rounded(silu_and_mul(gated), down)
    outputs = _grouped_linear(hidden, down, hit, ends, batch_invariant).to(x.dtype)
    outputs = outputs[torch.from_numpy(slot_rows)].view(num_tokens, top_k, -1)
    return (outputs * expert_weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _product_dtype(dtype: torch.dtype, *weights: ExpertWeights) -> torch.dtype:
    """What is multiplied: quantized activations are decoded to fp32, which holds them exactly."""
    quantized = any(isinstance(w, Fp8Weight) and w.activations is not None for w in weights)
    return torch.float32 if quantized else dtype


def _rounded(x: Tensor, weight: ExpertWeights) -> Tensor:
    """The input of a product with ``weight``: for W8A8 quantized, and decoded again."""
    if not isinstance(weight, Fp8Weight) or weight.activations is None:
        return x
    return dequantize_activations(*quantize_activations(x, weight.activations))


def _one_token_outputs(
    rows: Tensor,
    expert_ids: list[int],
    gate_up: Tensor | list[PackedMatrix],
    down: Tensor | list[PackedMatrix],
    batch_invariant: bool,
) -> Tensor:
    """Each chosen expert's output for a single token, which needs no sorting: [k, hidden].

    ``rows`` [group, hidden] repeats the token's input.
    """
    outputs = []
    for expert_id in expert_ids:
        hidden = silu_and_mul(_product(rows, gate_up[expert_id], batch_invariant))
        output = _product(hidden, down[expert_id], batch_invariant)
        outputs.append(output[0])
    return torch.stack(outputs)


def _product(x: Tensor, weight: Tensor | PackedMatrix, batch_invariant: bool) -> Tensor:
    if isinstance(weight, Tensor):
        return torch_linear(x, weight, batch_invariant=batch_invariant)
    return packed_linear(x, weight, batch_invariant=batch_invariant)


def _grouped_linear(
    rows: Tensor,
    weight: ExpertWeights,
    hit: np.ndarray,
    ends: np.ndarray,
    batch_invariant: bool,
) -> Tensor:
    """Multiply rows [ends[i-1], ends[i]) by the transposed matrix of expert ``hit[i]``."""
    if not isinstance(weight, Fp8Weight):
        return _grouped_product(rows, weight, hit, ends, batch_invariant)
    _, out_features, in_features = weight.values.shape
    # decoding goes through fp32; an expert beyond the limit is cut at the same places every time
    features_at_once = max(MAX_DECODED_BYTES // (4 * in_features), 1)
    experts_at_once = max(features_at_once // out_features, 1)
    out = rows.new_empty((rows.shape[0], out_features))
    for first in range(0, hit.size, experts_at_once):
        few = slice(first, first + experts_at_once)
        expert_ids = torch.from_numpy(hit[few])
        start, end = int(ends[first - 1]) if first else 0, int(ends[few][-1])
        for feature in range(0, out_features, features_at_once):
            features = slice(feature, feature + features_at_once)
            part = Fp8Weight(
                values=weight.values[:, features][expert_ids],
                scale_inv=weight.scale_inv[expert_ids],
                scale_rows=weight.scale_rows[features],
            )
            decoded = dequantize_weight(part, rows.dtype)
            out[start:end, features] = _grouped_product(
                rows[start:end],
                decoded,
                np.arange(expert_ids.numel()),
                ends[few] - start,
                batch_invariant,
            )
    return out


def _grouped_product(
    rows: Tensor,
    weights: Tensor | list[PackedMatrix],
    hit: np.ndarray,
    ends: np.ndarray,
    batch_invariant: bool,
) -> Tensor:
    """The same for ``weights`` that need no decoding; both ways give a row the same bits."""
    num_experts, in_features = len(weights), rows.shape[1]
    # grouped_mm refuses rows that do not start on 16 bytes and visits every expert, hit or not
    aligned = in_features * rows.element_size() % 16 == 0
    at_once = aligned and not in_blocks(rows.dtype, batch_invariant)
    if isinstance(weights, Tensor) and at_once and 2 * hit.size >= num_experts:
        all_counts = np.zeros(num_experts, dtype=np.int32)
        all_counts[hit] = np.diff(ends, prepend=0)
        offsets = torch.from_numpy(np.cumsum(all_counts, dtype=np.int32))
        return functional.grouped_mm(rows, weights.transpose(1, 2), offs=offsets)
    starts = [0, *ends.tolist()]
    return torch.cat(
        [
            _product(rows[start:end], weights[expert_id], batch_invariant)
            for expert_id, (start, end) in zip(hit.tolist(), pairwise(starts), strict=True)
        ]
    )
