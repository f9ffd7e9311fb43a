"""Products on a CPU with weights in the layout its matrix kernels read: packed once, at load.

    y = x @ weight.T + bias        weight [out_features, in_features]

Weights stay in their dtype, packed by oneDNN, or become int8 or int4 (``kernels.int8_linear``,
``kernels.int4_linear``).

A plain product arranges its weights anew at every call, which at one row costs as much as the
product. A packed weight takes the place of the original; it is opaque and cannot be read back.
For one number of threads an fp32 row has the same bits in any batch (measured with AVX2 and
AVX-512): from two rows on oneDNN takes one kernel, so a single row is given a second, or comes to
the same bits by a loop (``kernels.native_linear``). With bf16 kernels follow the number of rows, so
that batch-invariant products keep their weights unpacked.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kernels.dispatch import compiles_loops, interpreting, native
from kernels.int4_linear import Int4Weight, fits_int4, int4_linear, int4_nbytes, pack_int4
from kernels.int8_linear import Int8Weight, int8_linear, int8_nbytes, pack_int8
from kernels.linear import in_blocks

if TYPE_CHECKING:
    from kernels.native_linear import PackedRows

# torch reads it at its first tensor on a CPU: what lies in huge pages is read up to a fifth faster
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PackFormat = Literal["dtype", "int8", "int4"]
"""What a packed matrix is kept in: the model's dtype, or less."""
QUANTIZED: dict[str, PackFormat] = {"int8": "int8", "int4": "int4"}
"""The formats that are less, by the name a user gives them."""

# rows that the layout is chosen for: the first where there is a loop for few rows. In bf16 the one
# for a row is the only one that oneDNN reads as fast as a plain sum does, given huge pages; prompts
# take up to a quarter longer with it
_ROWS_HINT = 32
_LONE_ROWS_HINT = {torch.float32: 32, torch.bfloat16: 1}
_LEAST_ROWS = {torch.float32: 2, torch.bfloat16: 1}
# a packed product takes some 15 us beside its multiplications, in fp32 more than MKL's does
LEAST_VALUES = {torch.float32: 1 << 18, torch.bfloat16: 0}
"""Matrices with fewer values are faster unpacked."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One matrix in its own dtype, packed.

    Attributes:
        matrix: opaque, of shape [out_features, in_features].
        rows: for products of few rows by a compiled loop; None where there is none.
    """

    matrix: Tensor
    rows: PackedRows | None


PackedMatrix = PackedWeight | Int8Weight | Int4Weight


def pack_format(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    wanted: PackFormat | None,
    batch_invariant: bool = False,
) -> PackFormat | None:
    """What to keep a matrix of ``shape`` (out_features, in_features) in where ``wanted`` is asked.

    None: as it is, since packing does not gain here, or would not keep the promises of
    `kernels.linear`. What does not divide into int4 groups becomes int8.
    """
    if wanted == "int4" and not fits_int4(*shape):
        return "int8"
    if wanted == "dtype":
        is_packed = device.type == "cpu" and dtype in _packed_dtypes()
        is_large = is_packed and shape[0] * shape[1] >= LEAST_VALUES[dtype]
        return "dtype" if is_large and not in_blocks(dtype, batch_invariant) else None
    return wanted


def packed_nbytes(shape: tuple[int, int], dtype: torch.dtype, packing: PackFormat) -> int:
    """Bytes of a packed matrix of ``shape`` (out_features, in_features)."""
    if packing == "int8":
        return int8_nbytes(*shape)
    if packing == "int4":
        return int4_nbytes(*shape, dtype)
    return shape[0] * shape[1] * dtype.itemsize


@functools.cache
def _packed_dtypes() -> frozenset[torch.dtype]:
    is_measured = platform.machine().lower() in ("x86_64", "amd64")
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if interpreting() or not is_measured or not has_onednn:
        return frozenset()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return frozenset((torch.float32, torch.bfloat16))
    return frozenset((torch.float32,))


def pack_matrix(weight: Tensor, packing: PackFormat) -> PackedMatrix:
    """Pack a copy of ``weight`` [out_features, in_features], contiguous and finite.

    ``packing`` is what `pack_format` allows for it.
    """
    if packing == "int8":
        return pack_int8(weight)
    if packing == "int4":
        return pack_int4(weight, weight.dtype)
    if compiles_loops():
        matrix = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        rows = native("linear").packed_rows(matrix)
        if rows is not None or weight.dtype == torch.float32:
            return PackedWeight(matrix, rows)
        del matrix
    hint = _LONE_ROWS_HINT[weight.dtype]
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, hint), None)


def packed_linear(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features], the dtype the weight had; rows may be strided.
        weight: what `pack_matrix` made.
        bias: [out_features], dtype of ``x``, or None.
        out_dtype: of the result; None for that of ``x``. The sum is rounded to that of ``x`` first,
            but not with int8.
        batch_invariant: with int4, take the kernel that does not follow the number of rows.

    Returns:
        [num_tokens, out_features] in ``out_dtype``. In fp32, with int8, and with int4 if
        ``batch_invariant`` a row has the same bits in any batch, for a fixed number of threads.
    """
    if isinstance(weight, Int8Weight):
        return int8_linear(x, weight, bias, out_dtype=out_dtype)
    if isinstance(weight, Int4Weight):
        return int4_linear(x, weight, bias, out_dtype=out_dtype, batch_invariant=batch_invariant)
    num_tokens, dtype = x.shape[0], weight.matrix.dtype
    if num_tokens == 0:
        return x.new_empty((0, weight.matrix.shape[0]), dtype=out_dtype or dtype)
    if weight.rows is not None and num_tokens <= weight.rows.max_rows:
        out: Tensor = native("linear").multiply(x, weight.rows, bias)
        return out if out_dtype in (None, dtype) else out.to(out_dtype)
    is_padded = num_tokens < _LEAST_ROWS[dtype]
    if is_padded:
        x = torch.nn.functional.pad(x, (0, 0, 0, _LEAST_ROWS[dtype] - num_tokens))
    out = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.matrix, bias, "none", [], "")
    if is_padded:
        out = out[:num_tokens]
    return out if out_dtype in (None, dtype) else out.to(out_dtype)
