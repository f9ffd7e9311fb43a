"""Products on a CPU with int8 weights, each output's scaled by its largest, exact in integers.

    weight[n, k] = values[n, k] * scale[n]                values int8, |values| <= 127
    x[t, k]      = (high[t, k] + low[t, k] / 254) * s[t]  s[t] = max |x[t]| / 127
    y[t, n]      = (high[t] . values[n] + low[t] . values[n] / 254) * s[t] * scale[n] + bias[n]

CPUs multiply int8 fastest when both sides are, but one int8 per activation would lose what is small
beside an outlier. Two carry 15 bits, more than bf16 has at a row's largest, so that only the
weights are quantized in effect (weight-only). The second half is a second row of the same product:
for few rows, where reading weights is what takes time, it costs nothing. Integer sums are exact, so
a row has the same bits in any batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.dispatch import compiles_loops, interpreting, native

MAX_INT8 = 127
_ZERO = 128  # of rows in uint8: without AMX oneDNN takes its reference kernel for int8 by int8
_LOW_STEPS = 2 * MAX_INT8  # low counts steps of 1 / 254: what rounding to high leaves is up to 1/2
_MAX_QUANTIZED_VALUES = 1 << 20  # at a time: a head in fp32 would be larger than all that is kept
_SMALLEST = 1e-30  # of a row's largest: a row of zeros divides by it


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """One matrix in int8.

    Attributes:
        matrix: opaque, of shape [in_features, out_features], packed by oneDNN.
        scale: [out_features] fp32.
        address: of the weights, for products of few rows by a compiled loop; None if there is none.
    """

    matrix: Tensor
    scale: Tensor
    address: int | None = None


@functools.cache
def multiplies_int8() -> bool:
    """Whether this CPU's int8 products are exact: without VNNI they saturate."""
    if interpreting() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    extreme = torch.full((64, 256), MAX_INT8, dtype=torch.int8)  # rows that take the tiled kernels
    rows = torch.full((64, 256), _ZERO + MAX_INT8, dtype=torch.uint8)
    try:
        weight = Int8Weight(torch.ops.onednn.qlinear_prepack(extreme, None), torch.ones(64))
        return bool((_product(rows, weight) == 256 * MAX_INT8**2).all())
    except RuntimeError:
        return False


def int8_nbytes(out_features: int, in_features: int) -> int:
    return out_features * (in_features + torch.float32.itemsize)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` of a finite matrix [out_features, in_features] of any float dtype.

    Returns:
        values [out_features, in_features] int8 and scale [out_features] fp32, as in the module.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0])
    at_once = max(_MAX_QUANTIZED_VALUES // weight.shape[1], 1)
    for first in range(0, weight.shape[0], at_once):
        rows = slice(first, first + at_once)
        exact = weight[rows].float()
        scale[rows] = exact.abs().amax(dim=1).clamp_min(_SMALLEST) / MAX_INT8
        values[rows] = (exact / scale[rows, None]).round_()
    return values, scale


def pack_int8(weight: Tensor) -> Int8Weight:
    """Quantize and pack ``weight`` [out_features, in_features], finite, of any float dtype."""
    values, scale = quantize_int8(weight)
    packed = Int8Weight(torch.ops.onednn.qlinear_prepack(values, None), scale)
    is_tried = compiles_loops() and weight.dtype != torch.float16
    address = native("int8").packed_address(packed.matrix, weight.dtype) if is_tried else None
    if address is not None:
        x = torch.randn((2, weight.shape[1]), generator=torch.Generator().manual_seed(0))
        x = x.to(weight.dtype)
        found = native("int8").multiply(x, address, x.shape[1], scale, None, torch.float32)
        if torch.equal(found, _plain_linear(x, packed, None, torch.float32)):
            return replace(packed, address=address)
    return packed


def int8_linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias``; needs `multiplies_int8`.

    Args:
        x: [num_tokens, in_features], any float dtype; rows may be strided.
        weight: what `pack_int8` made.
        bias: [out_features], any float dtype, or None.
        out_dtype: of the result; None for that of ``x``.

    Returns:
        [num_tokens, out_features] in ``out_dtype``, rounded once. A row has the same bits in any
        batch. A row with a NaN or an infinity gives no finite number.
    """
    num_tokens, out_features = x.shape[0], weight.scale.shape[0]
    if num_tokens == 0:
        return x.new_empty((0, out_features), dtype=out_dtype or x.dtype)
    out_dtype = out_dtype or x.dtype
    if weight.address is not None and native("int8").takes(x, bias, out_dtype):
        out: Tensor = native("int8").multiply(
            x, weight.address, weight.matrix.shape[0], weight.scale, bias, out_dtype
        )
        return out
    return _plain_linear(x, weight, bias, out_dtype)


def _plain_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    num_tokens = x.shape[0]
    rows = x.float()
    step = rows.abs().amax(dim=1, keepdim=True).clamp_min(_SMALLEST).div_(MAX_INT8)
    scaled = rows / step
    halves = torch.empty((2, *x.shape), dtype=torch.uint8)
    high = scaled.round()
    halves[0] = high + _ZERO
    halves[1] = scaled.sub_(high).mul_(_LOW_STEPS).round_().add_(_ZERO)
    sums = _product(halves.flatten(0, 1), weight)
    out = torch.add(sums[:num_tokens], sums[num_tokens:], alpha=1 / _LOW_STEPS).mul_(step)
    if bias is not None:
        out += bias
    return out.to(out_dtype)


def _product(values: Tensor, weight: Int8Weight) -> Tensor:
    """Values [num_rows, in_features] uint8 less 128, times the scaled weight: fp32."""
    zeros = _zero_points(weight.scale.shape[0])
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(values, 1.0, _ZERO),
        *(weight.matrix, weight.scale, zeros, None),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return out


@functools.lru_cache(maxsize=64)
def _zero_points(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long)
