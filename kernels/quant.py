"""FP8 weights in blocks of 128 x 128, as DeepSeek-V3 releases them, and the product with them.

    values    [out_features, in_features] e4m3      scale_inv [row blocks, ceil(in_features / 128)]
    weight[n, k] = values[n, k] * scale_inv[scale_rows[n], k // 128]

(arXiv:2412.19437, section 3.3; ``weight_scale_inv`` is the inverse of the scale that was multiplied
in, so one multiplies by it.) The last block of rows or columns may be partial. Matrices stacked in
one weight keep their own blocks: ``scale_rows`` says which row of scales covers a row of values.

W8A16: the weights are decoded inside the product, a slice at a time; the activations stay as they
are. W8A8: each token's activations are quantized too, in groups of 128 channels, so that a chip
with fp8 matrix units (sm_89 and later) multiplies in fp8; others multiply the same numbers in fp16.
Scales multiply the partial sum of each slice of channels, and sums of slices are fp32; within one
the fp8 units of sm_90 keep about 14 bits, as in the release.
The torch bodies compute the same sums from decoded slices, W8A8 in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import quant_triton
from kernels.dispatch import use_triton
from kernels.linear import linear

BLOCK = 128
E4M3_MAX = 448.0
MIN_ACTIVATION = 1e-4  # a group's largest magnitude counts as at least this
MIN_SCALE = 2.0**-126  # of weights: the smallest normal fp32, so that none is divided by zero
MAX_DECODED_BYTES = 64 << 20  # of one slice in the torch body, in fp32

ActivationScale = Literal["float32", "ue8m0"]
"""How scales of quantized activations are rounded; ue8m0 takes powers of two only."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """One matrix, or with a leading dimension the matrices of all experts.

    Attributes:
        values: [..., out_features, in_features] float8_e4m3fn, finite.
        scale_inv: [..., num_row_blocks, ceil(in_features / 128)] fp32.
        scale_rows: [out_features] int32, ascending: the row of ``scale_inv`` for each output.
        activations: None for W8A16; for W8A8 how the scales of activations are rounded.
    """

    values: Tensor
    scale_inv: Tensor
    scale_rows: Tensor
    activations: ActivationScale | None = None


def num_blocks(size: int) -> int:
    """Blocks along a dimension, the last one perhaps partial."""
    return -(-size // BLOCK)


def quantize_weight(weight: Tensor, scale: ActivationScale = "float32") -> tuple[Tensor, Tensor]:
    """Quantize one matrix in blocks: largest magnitude of each block to 448.

    s = max(max(|block|) / 448, 2^-126), and 1 for a block of zeros.

    Args:
        weight: [out_features, in_features], any float dtype, finite.
        scale: "ue8m0" rounds scales up to powers of two.

    Returns:
        ``(values, scale_inv)``: [out_features, in_features] float8_e4m3fn and
        [ceil(out_features / 128), ceil(in_features / 128)] fp32. Both bodies give the same bits.
    """
    if use_triton(weight) and weight.numel() > 0:
        return quant_triton.quantize_weight(weight, scale)
    out_features, in_features = weight.shape
    rows, columns = num_blocks(out_features), num_blocks(in_features)
    padding = (0, columns * BLOCK - in_features, 0, rows * BLOCK - out_features)
    padded = torch.nn.functional.pad(weight.float(), padding)
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    highest = blocks.abs().amax(dim=(1, 3))
    scale_inv = torch.where(highest > 0, (highest / E4M3_MAX).clamp(min=MIN_SCALE), 1.0)
    if scale == "ue8m0":
        scale_inv = _round_up_to_power_of_two(scale_inv)
    values = (blocks / scale_inv[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.view(rows * BLOCK, -1)[:out_features, :in_features].contiguous(), scale_inv


def dequantize_weight(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """The matrix that ``weight`` stands for, [..., out_features, in_features], rounded once."""
    scales = weight.scale_inv.index_select(-2, weight.scale_rows)  # [..., out, column blocks]
    decoded = weight.values.to(torch.float32)
    in_features = decoded.shape[-1]
    whole = in_features // BLOCK * BLOCK
    blocks = decoded[..., :whole].view(*decoded.shape[:-1], whole // BLOCK, BLOCK)
    blocks.mul_(scales[..., : whole // BLOCK].unsqueeze(-1))
    if whole < in_features:
        decoded[..., whole:].mul_(scales[..., -1:])
    return decoded.to(dtype)


def quantize_activations(x: Tensor, scale: ActivationScale) -> tuple[Tensor, Tensor]:
    """Quantize each token in groups of 128 channels, as DeepSeek-V3 does before an fp8 product.

    s = max(|group|, 1e-4) / 448, with "ue8m0" rounded up to a power of two.

    Args:
        x: [num_tokens, in_features], any float dtype.

    Returns:
        ``(values, scales)``: [num_tokens, in_features] float8_e4m3fn, rounded to nearest, and
        [num_tokens, ceil(in_features / 128)] fp32; x is about values * scales. Both bodies give
        the same bits for finite ``x``; what is not finite makes the products with it so too.
    """
    num_tokens, in_features = x.shape
    if use_triton(x) and num_tokens > 0:
        return quant_triton.quantize_activations(x, scale)
    columns = num_blocks(in_features)
    padded = torch.nn.functional.pad(x.float(), (0, columns * BLOCK - in_features))
    groups = padded.view(num_tokens, columns, BLOCK)
    scales = groups.abs().amax(dim=-1).clamp(min=MIN_ACTIVATION) / E4M3_MAX
    if scale == "ue8m0":
        scales = _round_up_to_power_of_two(scales)
    values = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(1)[:, :in_features].contiguous(), scales


def dequantize_activations(values: Tensor, scales: Tensor) -> Tensor:
    """``values * scales`` in fp32, [num_tokens, in_features]."""
    in_features = values.shape[1]
    return values.float() * scales.repeat_interleave(BLOCK, dim=1)[:, :in_features]


def fp8_linear(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """Return ``x @ weight.T + bias``; W8A8 if ``weight.activations`` says so, else W8A16.

    Args:
        x: [num_tokens, in_features], any float dtype.
        weight: one matrix.
        bias: [out_features], dtype of ``x``, or None.
        batch_invariant: on a GPU, launch as for one row whatever the number of rows; several times
            slower for prompts. On a CPU as in `linear`.

    Returns:
        [num_tokens, out_features] in the dtype of ``x``, rounded after the bias is added. On a CPU
        promises about batches are those of `linear`; W8A8 is multiplied in fp32. On a GPU a row has
        the same bits in any batch if ``batch_invariant``; else in all whose number of rows chooses
        the same row of ``[[fp8_linear]]`` in ``configs.toml``: by default in any of up to 64 rows.
    """
    num_tokens, in_features = x.shape
    out_features = weight.values.shape[0]
    if num_tokens == 0:
        return x.new_empty((0, out_features))
    if use_triton(x):
        return quant_triton.fp8_linear(x, weight, bias, batch_invariant=batch_invariant)
    rows = x
    if weight.activations is not None:
        rows = dequantize_activations(*quantize_activations(x, weight.activations))
    out = x.new_empty((num_tokens, out_features))
    at_once = max(MAX_DECODED_BYTES // (4 * in_features), 1)
    for first in range(0, out_features, at_once):
        few = slice(first, first + at_once)
        part = Fp8Weight(weight.values[few], weight.scale_inv, weight.scale_rows[few])
        part_bias = None if bias is None else bias[few].to(rows.dtype)
        decoded = dequantize_weight(part, rows.dtype)
        out[:, few] = linear(rows, decoded, part_bias, batch_invariant=batch_invariant)
    return out


def _round_up_to_power_of_two(values: Tensor) -> Tensor:
    """2^ceil(log2 v) of positive values, exactly."""
    mantissa, exponent = torch.frexp(values)  # v = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(values), exponent - (mantissa == 0.5).int())
