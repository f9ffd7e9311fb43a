"""Products on a CPU with weights in the layout its matrix kernels read: packed once, at load.

    y = x @ weight.T + bias        weight [out_features, in_features], packed by oneDNN

A plain product arranges its weights anew at every call, which at one row costs as much as the
product. A packed weight takes the place of the original; it is opaque and cannot be read back.
For one number of threads an fp32 row has the same bits in any batch (measured with AVX2 and
AVX-512): from two rows on oneDNN takes one kernel, so a single row is given a second. With bf16 the
kernel follows the number of rows, so that batch-invariant products keep their weights unpacked.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import interpreting
from kernels.linear import in_blocks

# rows that the layout is chosen for: decodes of one row are as fast as with 1, prompts faster
_ROWS_HINT = 32
_LEAST_ROWS = {torch.float32: 2, torch.bfloat16: 1}
# a packed product takes some 15 us beside its multiplications, in fp32 more than MKL's does
LEAST_VALUES = {torch.float32: 1 << 18, torch.bfloat16: 0}
"""Matrices with fewer values are faster unpacked."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One matrix, packed.

    Attributes:
        matrix: opaque, of shape [out_features, in_features].
    """

    matrix: Tensor


def packs(
    dtype: torch.dtype, device: torch.device, num_values: int, batch_invariant: bool = False
) -> bool:
    """Whether products with a matrix of ``num_values`` of this dtype gain from `pack_weight` here.

    False also where they would not keep the promises of `kernels.linear` then.
    """
    is_packed = device.type == "cpu" and dtype in _packed_dtypes()
    return is_packed and num_values >= LEAST_VALUES[dtype] and not in_blocks(dtype, batch_invariant)


@functools.cache
def _packed_dtypes() -> frozenset[torch.dtype]:
    is_measured = platform.machine().lower() in ("x86_64", "amd64")
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if interpreting() or not is_measured or not has_onednn:
        return frozenset()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return frozenset((torch.float32, torch.bfloat16))
    return frozenset((torch.float32,))


def pack_weight(weight: Tensor) -> PackedWeight:
    """Pack a copy of ``weight`` [out_features, in_features], contiguous; `packs` its dtype."""
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT))


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features], dtype of ``weight``; rows may be strided.
        weight: what `pack_weight` made.
        bias: [out_features], dtype of ``weight``, or None.
        out_dtype: of the result; None for that of ``weight``. The sum is rounded to the dtype of
            ``weight`` first.

    Returns:
        [num_tokens, out_features] in ``out_dtype``. In fp32 a row has the same bits in any batch,
        for a fixed number of threads.
    """
    num_tokens, dtype = x.shape[0], weight.matrix.dtype
    if num_tokens == 0:
        return x.new_empty((0, weight.matrix.shape[0]), dtype=out_dtype or dtype)
    if num_tokens < _LEAST_ROWS[dtype]:
        x = torch.nn.functional.pad(x, (0, 0, 0, _LEAST_ROWS[dtype] - num_tokens))
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight.matrix, bias, "none", [], ""
    )
    return out[:num_tokens].to(out_dtype or dtype)
