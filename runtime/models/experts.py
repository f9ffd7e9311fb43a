"""Mixture of experts (DeepSeekMoE, arXiv:2401.06066): a router, routed experts, shared experts.

    y = Σ weight_e · expert_e(x)  over the routed experts that the router chose,  + shared(x)

The router works in fp32 whatever the model's dtype: a rounded score chooses another expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.linear import linear
from kernels.moe import ExpertWeights, moe_experts, route_noaux_tc, route_softmax
from kernels.quant import Fp8Weight
from runtime.config import MAX_WIDTH, Fields
from runtime.models.layers import GatedMLP, Placement, Targets, matrix_targets


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    num_experts: int
    num_shared_experts: int
    num_experts_per_token: int
    num_groups: int
    num_top_groups: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    moe_intermediate_size: int
    intermediate_size: int  # of the dense layers
    num_dense_layers: int  # the first layers, which have one wide MLP


def parse_experts(fields: Fields, *, smallest_group: int | None) -> ExpertsConfig:
    """The experts of a config.json; ``smallest_group`` None for a family without groups.

    Raises `CheckpointError`.
    """
    fields.integer("moe_layer_freq", 1, low=1, high=1)
    num_layers = fields.integer("num_hidden_layers", high=1024)
    num_experts = fields.integer("n_routed_experts", high=8192)
    num_groups = fields.integer("n_group", high=num_experts) if smallest_group else 1
    num_top_groups = fields.integer("topk_group", high=num_groups) if smallest_group else 1
    if num_experts % num_groups or num_experts < num_groups * (smallest_group or 1):
        raise fields.error(
            "n_group",
            f"{num_experts} experts do not make {num_groups} groups of {smallest_group} or more",
        )
    num_eligible = num_experts // num_groups * num_top_groups
    return ExpertsConfig(
        num_experts=num_experts,
        num_shared_experts=fields.integer("n_shared_experts", high=64),
        num_experts_per_token=fields.integer("num_experts_per_tok", high=num_eligible),
        num_groups=num_groups,
        num_top_groups=num_top_groups,
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0, low=0.0, high=1e3),
        moe_intermediate_size=fields.integer("moe_intermediate_size", high=MAX_WIDTH),
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
        num_dense_layers=fields.integer("first_k_dense_replace", low=0, high=num_layers),
    )


class Router(Protocol):
    """Chooses experts: ids [num_tokens, k] int64 and weights [num_tokens, k] fp32."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def targets(self, prefix: str) -> Targets: ...


class SoftmaxRouter:
    """Softmax over all experts; the best of the best groups, not renormalised: V1 and V2."""

    def __init__(self, config: ExpertsConfig, hidden_size: int, placement: Placement) -> None:
        self.config = config
        self.gate = placement.empty(config.num_experts, hidden_size, dtype=torch.float32)
        self.batch_invariant = placement.batch_invariant

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return route_softmax(
            linear(x, self.gate, batch_invariant=self.batch_invariant),  # [num_tokens, num_experts]
            config.num_experts_per_token,
            config.num_groups,
            config.num_top_groups,
            config.routed_scaling_factor,
        )

    def targets(self, prefix: str) -> Targets:
        return {f"{prefix}gate.weight": self.gate}


class SigmoidRouter:
    """Sigmoid scores, balanced by a bias that takes part in the choice only (noaux_tc): V3."""

    def __init__(self, config: ExpertsConfig, hidden_size: int, placement: Placement) -> None:
        self.config = config
        self.gate = placement.empty(config.num_experts, hidden_size, dtype=torch.float32)
        self.correction_bias = placement.empty(config.num_experts, dtype=torch.float32)
        self.batch_invariant = placement.batch_invariant

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return route_noaux_tc(
            linear(x, self.gate, batch_invariant=self.batch_invariant),  # [num_tokens, num_experts]
            self.correction_bias,
            config.num_experts_per_token,
            config.num_groups,
            config.num_top_groups,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )

    def targets(self, prefix: str) -> Targets:
        return {
            f"{prefix}gate.weight": self.gate,
            f"{prefix}gate.e_score_correction_bias": self.correction_bias,
        }


class MoE:
    """The chosen experts, weighted, plus the shared ones, which see every token."""

    def __init__(
        self, config: ExpertsConfig, hidden_size: int, router: Router, placement: Placement
    ) -> None:
        size = config.moe_intermediate_size
        self.num_experts = config.num_experts
        self.hidden_size, self.intermediate_size = hidden_size, size
        self.router = router
        self.experts: list[GatedMLP] = []  # each on its own if they are packed one by one
        if placement.quantizes_packed:
            self.experts = [GatedMLP(hidden_size, size, placement) for _ in range(self.num_experts)]
        else:
            self.gate_up = placement.matrix([size, size], hidden_size, config.num_experts)
            self.down = placement.matrix([hidden_size], size, config.num_experts)
        self.shared_experts = GatedMLP(hidden_size, config.num_shared_experts * size, placement)
        self.batch_invariant = placement.batch_invariant

    def __call__(self, x: Tensor) -> Tensor:
        expert_ids, expert_weights = self.router(x)
        return moe_experts(
            x,
            expert_ids,
            expert_weights,
            *self._weights(),
            self.shared_experts(x),
            batch_invariant=self.batch_invariant,
        )

    def targets(self, prefix: str) -> Targets:
        targets = {
            **self.router.targets(prefix),
            **self.shared_experts.targets(f"{prefix}shared_experts."),
        }
        for expert_id in range(self.num_experts):
            expert = f"{prefix}experts.{expert_id}."
            if self.experts:
                targets |= self.experts[expert_id].targets(expert)
                continue
            gate_up = [f"{expert}gate_proj.weight", f"{expert}up_proj.weight"]
            sizes = [self.intermediate_size, self.intermediate_size]
            targets |= matrix_targets(gate_up, sizes, _expert(self.gate_up, expert_id))
            down = [f"{expert}down_proj.weight"]
            targets |= matrix_targets(down, [self.hidden_size], _expert(self.down, expert_id))
        return targets

    def _weights(self) -> tuple[ExpertWeights, ExpertWeights]:
        """``(gate_up, down)`` of all experts."""
        if not self.experts:
            return self.gate_up, self.down
        gate_up = [expert.gate_up_proj.packed for expert in self.experts]
        return gate_up, [expert.down_proj.packed for expert in self.experts]


def dense_or_experts(
    config: ExpertsConfig,
    hidden_size: int,
    layer_id: int,
    make_router: Callable[[ExpertsConfig, int, Placement], Router],
    placement: Placement,
) -> GatedMLP | MoE:
    """The first layers have one wide MLP, the others a mixture of experts."""
    if layer_id < config.num_dense_layers:
        return GatedMLP(hidden_size, config.intermediate_size, placement)
    return MoE(config, hidden_size, make_router(config, hidden_size, placement), placement)


def _expert(weight: Tensor | Fp8Weight, expert_id: int) -> Tensor | Fp8Weight:
    if isinstance(weight, Tensor):
        return weight[expert_id]
    return replace(weight, values=weight.values[expert_id], scale_inv=weight.scale_inv[expert_id])
