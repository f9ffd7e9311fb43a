# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The compiled body for a CPU with AMX of products of few rows with int8 weights.

The equations are those of ``kernels.int8_linear``, and so are the bits: sums are integers, and what
is rounded is rounded in the same order. Weights lie as oneDNN packed them,
[out_features / 64, in_features / 4, 64, 4]; each thread quantizes all the rows for itself.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.native import (
    BF16,
    FP32,
    arguments,
    array,
    check_rows,
    entry,
    fma,
    launch,
    loop,
    max_or_nan,
    share,
    store,
    widen,
)
from kernels.native_sums import (
    INT8_BLOCK,
    INT8_TILE_TERMS,
    MAX_TILE_ROWS,
    configure_tiles,
    has_tiles,
    release_tiles,
    sums_of_int8,
)

MAX_ROWS = MAX_TILE_ROWS // 2
"""Each takes two rows of integers."""
_MAX_INT8, _LOW_STEPS, _SMALLEST = np.float32(127), np.float32(254), np.float32(1e-30)
_LOW_STEP = np.float32(1 / 254)

exact_loop = numba.njit(error_model="numpy", fastmath=False)  # else it would be as of its callers
"""Rounds after each operation, as torch's bodies do."""


@exact_loop
def _quantize(row, step, high, low):
    for i in range(row.size):
        scaled = widen(row[i]) / step
        rounded = np.rint(scaled)
        high[i] = np.int8(np.int32(rounded))
        low[i] = np.int8(np.int32(np.rint((scaled - rounded) * _LOW_STEPS)))


@exact_loop
def _finish(sums_high, sums_low, scale, step, bias, out):
    for i in range(out.size):
        high = np.float32(sums_high[i]) * scale[i]
        low = np.float32(sums_low[i]) * scale[i]
        total = fma(low, _LOW_STEP, high) * step
        if bias.size > 0:
            total += widen(bias[i])
        store(out, i, total)


@loop
def _multiply(data, dtype, out_dtype):
    given, _ = arguments(data)
    x_at, weights_at, scale_at, bias_at, out_at = given[:5]
    num_rows, x_stride, out_features, num_terms = given[5:9]
    quantized = np.empty((2, num_rows, num_terms), np.int8)  # high, low
    steps = np.empty(num_rows, np.float32)
    for row in range(num_rows):
        x = array(x_at, row * x_stride, num_terms, dtype)
        steps[row] = max_or_nan(x, _SMALLEST) / _MAX_INT8
        _quantize(x, steps[row], quantized[0, row], quantized[1, row])
    configure_tiles(2 * num_rows)
    sums = np.empty((2, num_rows, INT8_BLOCK), np.int32)
    first, last = share(out_features // INT8_BLOCK)
    for block in range(first, last):
        start = block * INT8_BLOCK
        weights = weights_at + start * num_terms
        sums_of_int8(weights, quantized.ctypes.data, num_terms, sums.ctypes.data)
        scale = array(scale_at, start, INT8_BLOCK, FP32)
        bias = array(bias_at, start, INT8_BLOCK if bias_at != 0 else 0, dtype)
        for row in range(num_rows):
            out = array(out_at, row * out_features + start, INT8_BLOCK, out_dtype)
            _finish(sums[0, row], sums[1, row], scale, steps[row], bias, out)
    release_tiles()


def _multiply_bf16(data):
    _multiply(data, BF16, BF16)


def _multiply_bf16_to_fp32(data):
    _multiply(data, BF16, FP32)


def _multiply_fp32(data):
    _multiply(data, FP32, FP32)


_MULTIPLY = {
    (torch.bfloat16, torch.bfloat16): _multiply_bf16,
    (torch.bfloat16, torch.float32): _multiply_bf16_to_fp32,
    (torch.float32, torch.float32): _multiply_fp32,
}


def takes(x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> bool:
    """Whether `multiply` takes such rows."""
    is_few = 0 < x.shape[0] <= MAX_ROWS
    return is_few and (x.dtype, out_dtype) in _MULTIPLY and (bias is None or bias.dtype == x.dtype)


def multiply(
    x: Tensor,
    address: int,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``kernels.int8_linear.int8_linear``; ``address`` is from `packed_address`."""
    num_rows = x.shape[0]
    check_rows(x, bias, x.dtype, (scale.shape[0], in_features))
    out = torch.empty((num_rows, scale.shape[0]), dtype=out_dtype)
    launch(
        entry(_MULTIPLY[x.dtype, out_dtype]),
        scale.shape[0] * in_features,
        0.0,
        x.data_ptr(),
        address,
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        num_rows,
        x.stride(0),
        scale.shape[0],
        in_features,
    )
    return out


def packed_address(matrix: Tensor, dtype: torch.dtype) -> int | None:
    """Where the weights lie in what ``qlinear_prepack`` made, [in_features, out_features].

    None where this CPU has no tiles, or they cannot lie as `multiply` reads them. Otherwise what
    multiplies rows in ``dtype`` is compiled.
    """
    in_features, out_features = matrix.shape
    fits = out_features % INT8_BLOCK == 0 and in_features % INT8_TILE_TERMS == 0
    num_bytes = out_features * in_features + 4 * out_features  # behind them lie sums of each output
    if not (has_tiles() and fits) or torch.ops.mkldnn._nbytes(matrix) != num_bytes:
        return None
    for (rows_dtype, _), function in _MULTIPLY.items():
        if rows_dtype == dtype:
            entry(function)
    address: int = torch.ops.mkldnn.data_ptr(matrix)
    return address
