"""Products on a CPU with int4 weights in groups of 32 inputs, packed as PyTorch packs them.

    weight[n, k] = (values[n, k] - 8) * scale[n, k // 32] + middle[n, k // 32]     values 0 .. 15

Weight-only: activations stay as they are, or for the compiled loop become 16-bit integers of each
group's own scale, which hold more than bf16 does. Both multiply row by row, about as fast as they
can decode weights, so that many rows are multiplied by weights that were decoded before, some
outputs at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import compiles_loops, native

GROUP = 32
"""Inputs that share a scale; ``in_features`` must be a multiple."""
OUT_MULTIPLE = 64
"""``out_features`` must be a multiple: the packed kernel's blocks."""
_MIDDLE_VALUE = 8
_MAX_VALUE = 15
_DECODED_FROM_ROWS = 128  # measured: decoding takes as long as some 100 rows
_MAX_DECODED_VALUES = 1 << 21  # at a time


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """One matrix in int4.

    Attributes:
        values: [out_features, in_features / 2] uint8, packed.
        scale_and_middle: [in_features / 32, out_features, 2], dtype of the activations; for the
            compiled loop [out_features / 64, in_features / 32, 64, 2], in the order it reads them.
    """

    values: Tensor
    scale_and_middle: Tensor

    @property
    def has_loop(self) -> bool:
        return self.scale_and_middle.dim() == 4


def fits_int4(out_features: int, in_features: int) -> bool:
    return out_features % OUT_MULTIPLE == 0 and in_features % GROUP == 0


def int4_nbytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    return out_features * (in_features // 2 + in_features // GROUP * 2 * dtype.itemsize)


def quantize_int4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(values, scale_and_middle)`` of a finite matrix [out_features, in_features] that fits.

    Returns:
        values [out_features, in_features] int32, 0 to 15, nearest for the rounded scales, and
        scale_and_middle [in_features / 32, out_features, 2] in ``dtype``.
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / _MAX_VALUE).clamp_min(torch.finfo(dtype).tiny).to(dtype).float()
    middle = (low + scale * _MIDDLE_VALUE).to(dtype).float()
    values = ((groups - middle[..., None]) / scale[..., None]).round_().add_(_MIDDLE_VALUE)
    packed = torch.stack((scale, middle), dim=2).transpose(0, 1).to(dtype).contiguous()
    return values.clamp_(0, _MAX_VALUE).flatten(1).int(), packed


def pack_int4(weight: Tensor, dtype: torch.dtype) -> Int4Weight:
    """Quantize and pack ``weight`` [out_features, in_features], finite, for inputs of ``dtype``."""
    at_once = max(_MAX_DECODED_VALUES // weight.shape[1] // OUT_MULTIPLE, 1) * OUT_MULTIPLE
    packed, scales = [], []
    for first in range(0, weight.shape[0], at_once):  # blocks of outputs lie one behind another
        values, scale_and_middle = quantize_int4(weight[first : first + at_once], dtype)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1))
        scales.append(scale_and_middle)
    scale_and_middle = torch.cat(scales, dim=1)
    if dtype == torch.bfloat16 and _block_size() == OUT_MULTIPLE and _has_loop():
        blocks = scale_and_middle.view(len(scale_and_middle), -1, OUT_MULTIPLE, 2)
        scale_and_middle = blocks.transpose(0, 1).contiguous()
    return Int4Weight(torch.cat(packed), scale_and_middle)


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features], the dtype that ``weight`` was packed for; rows may be strided.
        weight: what `pack_int4` made.
        bias: [out_features], dtype of ``x``, or None.
        out_dtype: of the result; None for that of ``x``. The sum is rounded to that of ``x`` first.
        batch_invariant: never decode for many rows.

    Returns:
        [num_tokens, out_features] in ``out_dtype``. In fp32, and if ``batch_invariant``, a row has
        the same bits in any batch.
    """
    if x.shape[0] == 0:
        return x.new_empty((0, weight.values.shape[0]), dtype=out_dtype or x.dtype)
    takes_packed = batch_invariant or x.dtype == torch.float32 or _block_size() == 0
    if takes_packed or x.shape[0] < _DECODED_FROM_ROWS:
        if weight.has_loop:
            summed: Tensor = native("int4").multiply(
                x, weight.values, weight.scale_and_middle, bias
            )
            return summed.to(out_dtype or x.dtype)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.values, GROUP, weight.scale_and_middle
        )
    else:
        out = _decoded_product(x, weight)
    if bias is not None:
        out += bias
    return out.to(out_dtype or x.dtype)


@functools.cache
def _has_loop() -> bool:
    return compiles_loops() and bool(native("int4").prepare())


def _decoded_product(x: Tensor, weight: Int4Weight) -> Tensor:
    out_features, in_features = weight.values.shape[0], x.shape[1]
    out = x.new_empty((x.shape[0], out_features))
    at_once = max(_MAX_DECODED_VALUES // in_features // OUT_MULTIPLE, 1) * OUT_MULTIPLE
    for first in range(0, out_features, at_once):
        outputs = slice(first, min(first + at_once, out_features))
        out[:, outputs] = torch.nn.functional.linear(x, decode_int4(weight, outputs))
    return out


def decode_int4(weight: Int4Weight, outputs: slice) -> Tensor:
    """Some outputs of the matrix, whole multiples of 64: [num_outputs, in_features]."""
    if weight.has_loop:
        blocks = slice(outputs.start // OUT_MULTIPLE, outputs.stop // OUT_MULTIPLE)
        decoded: Tensor = native("int4").decode(
            weight.values[outputs], weight.scale_and_middle[blocks]
        )
        return decoded
    block, num_groups = _block_size(), 2 * weight.values.shape[1] // GROUP
    values = _unpacked(weight.values[outputs], block).to(weight.scale_and_middle.dtype)
    values = values.sub_(_MIDDLE_VALUE).view(-1, num_groups, GROUP, block)
    scale_and_middle = weight.scale_and_middle[:, outputs].view(num_groups, -1, block, 2)
    scale, middle = scale_and_middle.transpose(0, 1)[:, :, None].unbind(-1)
    decoded = values.mul_(scale).add_(middle)  # [num_blocks, num_groups, 32, block]
    return decoded.flatten(1, 2).mT.reshape(-1, num_groups * GROUP)


def _unpacked(packed: Tensor, block: int) -> Tensor:
    """[num_outputs, in_features / 2] as packed to [num_blocks, in_features, block] uint8.

    For each block of outputs and each input come bytes whose low halves are the block's first half.
    """
    by_input = packed.view(-1, 2 * packed.shape[1], block // 2)
    return torch.cat((by_input & 15, by_input >> 4), dim=2)


@functools.cache
def _block_size() -> int:
    """Outputs that the kernel for this CPU packs together; 0 if it is none of the known ones."""
    values = (torch.arange(OUT_MULTIPLE * GROUP, dtype=torch.int32) * 7 // 5 % 16).view(-1, GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    for block in (64, 32):
        if torch.equal(_unpacked(packed, block).mT.reshape(values.shape).int(), values):
            return block
    return 0
