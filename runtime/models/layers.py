"""Layers the families share: plain objects that hold preallocated tensors and call one op each.

``targets(prefix)`` of a layer maps names in a checkpoint to the tensors to fill. Tensors that are
stored apart but used together (q, k and v; gate and up; the experts) are views of one parameter,
so loading is copying and nothing is ever joined afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.linear import linear, linear_silu_and_mul
from kernels.norm import add_rms_norm, rms_norm
from kernels.packed_linear import (
    QUANTIZED,
    PackedMatrix,
    PackFormat,
    pack_format,
    pack_matrix,
    packed_linear,
    packed_nbytes,
)
from kernels.quant import BLOCK, ActivationScale, Fp8Weight, fp8_linear, num_blocks
from kernels.rope import (
    default_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    rotary_table,
    yarn_inv_freq,
)
from runtime.config import RopeConfig

Targets = dict[str, Tensor]
SCALE_SUFFIX = "_scale_inv"
"""What an FP8 weight's name gets for the name of its scales."""


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """Linear layers and experts keep their weights in FP8 blocks (`kernels.quant`)."""

    activations: ActivationScale | None = None  # None: W8A16


@dataclass(frozen=True, slots=True)
class Placement:
    """Where parameters live, in which dtype, and how products with them are to be computed.

    With ``fp8`` matrices are kept in FP8 instead. With ``batch_invariant`` a token's bits do not
    follow the number of tokens in a step; in fp32 on a CPU they never do. With ``packing`` a CPU's
    linear layers and experts are packed as they are loaded (`kernels.packed_linear`), to their own
    dtype where that pays, or to int8 or int4.
    """

    device: torch.device
    dtype: torch.dtype
    fp8: Fp8Format | None = None
    batch_invariant: bool = False
    packing: PackFormat | None = None

    @property
    def unquantized(self) -> Placement:
        """For the matrices that quantized models keep in ``dtype``."""
        return replace(self, fp8=None, packing=self.packing and "dtype")

    @property
    def quantizes_packed(self) -> bool:
        """Whether packed matrices become int8 or int4."""
        return self.packing in QUANTIZED

    @property
    def for_head(self) -> Placement:
        """For the product that gives logits: what it loses is not made up for by later layers."""
        packing: PackFormat | None = "int8" if self.packing == "int4" else self.packing
        return replace(self, fp8=None, packing=packing)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def matrix(self, parts: list[int], in_features: int, *leading: int) -> Tensor | Fp8Weight:
        """Matrices of ``parts`` rows stacked into one: [*leading, sum(parts), in_features]."""
        out_features = sum(parts)
        if self.fp8 is None:
            return self.empty(*leading, out_features, in_features)
        blocks = [num_blocks(rows) for rows in parts]
        scale_rows = self.empty(out_features, dtype=torch.int32)
        if not scale_rows.is_meta:
            numbers = [torch.arange(rows, dtype=torch.int32) // BLOCK for rows in parts]
            firsts = itertools.accumulate(blocks, initial=0)
            shifted = [part + first for part, first in zip(numbers, firsts, strict=False)]
            scale_rows.copy_(torch.cat(shifted))
        return Fp8Weight(
            values=self.empty(*leading, out_features, in_features, dtype=torch.float8_e4m3fn),
            scale_inv=self.empty(
                *leading, sum(blocks), num_blocks(in_features), dtype=torch.float32
            ),
            scale_rows=scale_rows,
            activations=self.fp8.activations,
        )


def matrix_targets(names: list[str], parts: list[int], weight: Tensor | Fp8Weight) -> Targets:
    """The parts of one `Placement.matrix` under the names of their weights."""
    if isinstance(weight, Tensor):
        return dict(zip(names, weight.split_with_sizes(parts), strict=True))
    blocks = [num_blocks(rows) for rows in parts]
    scale_names = [name + SCALE_SUFFIX for name in names]
    return {
        **dict(zip(names, weight.values.split_with_sizes(parts), strict=True)),
        **dict(zip(scale_names, weight.scale_inv.split_with_sizes(blocks), strict=True)),
    }


class Linear:
    """y = x Wᵀ + b. ``parts`` names the checkpoint's tensors stacked in W, and their rows."""

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        placement: Placement,
        *,
        bias: bool = False,
        shared: Tensor | None = None,
    ) -> None:
        """``shared`` is the weight of another layer, for W to be that too."""
        self.parts = dict(parts)
        sizes = list(self.parts.values())
        self.weight: Tensor | Fp8Weight | PackedMatrix
        self.weight = placement.matrix(sizes, in_features) if shared is None else shared
        self.bias = placement.empty(sum(sizes)) if bias else None
        self.batch_invariant = placement.batch_invariant
        self.is_shared = shared is not None
        self.shape = sum(sizes), in_features
        self.packing: PackFormat | None = None
        """What `pack` makes of the weight; None if that stays as it is."""
        if isinstance(self.weight, Tensor):
            self.packing = pack_format(
                self.shape,
                placement.dtype,
                placement.device,
                placement.packing,
                placement.batch_invariant,
            )

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """[num_tokens, in_features] to [num_tokens, out_features].

        ``out_dtype`` is as in `kernels.linear.linear`; weights in FP8 take none.
        """
        if isinstance(self.weight, Fp8Weight):
            assert out_dtype is None
            return fp8_linear(x, self.weight, self.bias, batch_invariant=self.batch_invariant)
        invariant = self.batch_invariant
        if isinstance(self.weight, Tensor):
            return linear(x, self.weight, self.bias, out_dtype=out_dtype, batch_invariant=invariant)
        return packed_linear(
            x, self.weight, self.bias, out_dtype=out_dtype, batch_invariant=invariant
        )

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """silu(gate) · up, where the outputs are gate | up."""
        if not isinstance(self.weight, Tensor):
            return silu_and_mul(self(x))
        return linear_silu_and_mul(x, self.weight, self.bias, batch_invariant=self.batch_invariant)

    def targets(self, prefix: str) -> Targets:
        sizes = list(self.parts.values())
        names = [f"{prefix}{name}.weight" for name in self.parts]
        assert isinstance(self.weight, Tensor | Fp8Weight), "targets are asked for before loading"
        targets = matrix_targets(names, sizes, self.weight)
        if self.bias is not None:
            biases = zip(self.parts, self.bias.split_with_sizes(sizes), strict=True)
            targets |= {f"{prefix}{name}.bias": rows for name, rows in biases}
        return targets

    def pack(self) -> None:
        """Put the packed weight in the place of the loaded one."""
        assert isinstance(self.weight, Tensor) and self.packing is not None
        self.weight = pack_matrix(self.weight, self.packing)

    @property
    def packed(self) -> PackedMatrix:
        """The weight once it is packed."""
        assert not isinstance(self.weight, Tensor | Fp8Weight)
        return self.weight

    @property
    def packed_nbytes(self) -> int:
        """Bytes that `pack` makes."""
        assert isinstance(self.weight, Tensor) and self.packing is not None
        return packed_nbytes(self.shape, self.weight.dtype, self.packing)


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
        return self.down_proj(self.gate_up_proj.silu_and_mul(x))

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
