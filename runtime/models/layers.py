"""Layers the families share: plain objects that hold preallocated tensors and call one op each.

``targets(prefix)`` of a layer maps names in a checkpoint to the tensors to fill. Tensors that are
stored apart but used together (q, k and v; gate and up; the experts) are views of one parameter,
so loading is copying and nothing is ever joined afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.linear import linear
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope import (
    default_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    rotary_table,
    yarn_inv_freq,
)
from runtime.config import RopeConfig

Targets = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where parameters live and in which dtype."""

    device: torch.device
    dtype: torch.dtype

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


class Linear:
    """y = x Wᵀ + b. ``parts`` names the checkpoint's tensors stacked in W, and their rows."""

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        placement: Placement,
        *,
        bias: bool = False,
    ) -> None:
        self.parts = dict(parts)
        out_features = sum(self.parts.values())
        self.weight = placement.empty(out_features, in_features)
        self.bias = placement.empty(out_features) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)  # [num_tokens, out_features]

    def targets(self, prefix: str) -> Targets:
        sizes = list(self.parts.values())
        weights = zip(self.parts, self.weight.split_with_sizes(sizes), strict=True)
        targets = {f"{prefix}{name}.weight": rows for name, rows in weights}
        if self.bias is not None:
            biases = zip(self.parts, self.bias.split_with_sizes(sizes), strict=True)
            targets |= {f"{prefix}{name}.bias": rows for name, rows in biases}
        return targets


class RMSNorm:
    """Root-mean-square norm (arXiv:1910.07467), alone or after adding to the residual stream."""

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        self.weight = placement.empty(size)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)``."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class GatedMLP:
    """down(silu(gate x) · up x)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, placement: Placement, *, bias: bool = False
    ) -> None:
        gate_up = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(hidden_size, gate_up, placement, bias=bias)
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size}, placement, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))

    def targets(self, prefix: str) -> Targets:
        return self.gate_up_proj.targets(prefix) | self.down_proj.targets(prefix)


def rope_table(rope: RopeConfig, dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Cos and sin of every position: [num_positions, dim] fp32, cos first."""
    if rope.kind == "linear":
        inv_freq = linear_inv_freq(dim, rope.theta, rope.factor)
    elif rope.kind == "llama3":
        inv_freq = llama3_inv_freq(
            dim,
            rope.theta,
            rope.factor,
            rope.low_freq_factor,
            rope.high_freq_factor,
            rope.original_max_position,
        )
    elif rope.kind == "yarn":
        inv_freq = yarn_inv_freq(
            dim,
            rope.theta,
            rope.factor,
            rope.original_max_position,
            rope.beta_fast,
            rope.beta_slow,
        )
    else:
        inv_freq = default_inv_freq(dim, rope.theta)
    return rotary_table(inv_freq, num_positions, rope.attention_factor, device)
