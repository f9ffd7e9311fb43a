# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The compiled body for a CPU with AMX or VNNI of products of few rows with int8 weights.

The equations are those of ``kernels.int8_linear``, and so are the bits: sums are integers, and what
is rounded is rounded in the same order. Weights lie as oneDNN packed them,
[out_features / 64, in_features / 4, 64, 4], and behind them each output's sum of weights,
negative, [out_features] int32. VNNI multiplies bytes without a sign by bytes with one: what is of a
row has 128 added, and what that adds to a sum is taken off. Each thread quantizes all the rows for
itself.
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
    has_features,
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
    sums_of_int8_by_vectors,
)

MAX_ROWS = MAX_TILE_ROWS // 2
"""Each takes two rows of integers."""
_MAX_INT8, _LOW_STEPS, _SMALLEST = np.float32(127), np.float32(254), np.float32(1e-30)
_LOW_STEP = np.float32(1 / 254)

_ROWS_AT_ONCE = 3
_sums_of_one_row = sums_of_int8_by_vectors(2)
_sums_of_two_rows = sums_of_int8_by_vectors(4)
_sums_of_three_rows = sums_of_int8_by_vectors(2 * _ROWS_AT_ONCE)

exact_loop = numba.njit(error_model="numpy", fastmath=False)  # else it would be as of its callers
"""Rounds after each operation, as torch's bodies do."""


@exact_loop
def _quantize(row, step, added, halves):
    for i in range(row.size):
        scaled = widen(row[i]) / step
        rounded = np.rint(scaled)
        halves[0, i] = np.int32(rounded) + added
        halves[1, i] = np.int32(np.rint((scaled - rounded) * _LOW_STEPS)) + added


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
def _quantize_rows(given, dtype, added):
    # high and low of each row, and what one of high stands for
    x_at, num_rows, x_stride, num_terms = given[0], given[5], given[6], given[8]
    quantized = np.empty((num_rows, 2, num_terms), np.uint8)
    steps = np.empty(num_rows, np.float32)
    for row in range(num_rows):
        x = array(x_at, row * x_stride, num_terms, dtype)
        steps[row] = max_or_nan(x, _SMALLEST) / _MAX_INT8
        _quantize(x, steps[row], np.int32(added), quantized[row])
    return quantized, steps


@loop
def _finish_block(given, start, sums, steps, dtype, out_dtype):
    scale_at, bias_at, out_at, out_features = given[2], given[3], given[4], given[7]
    scale = array(scale_at, start, INT8_BLOCK, FP32)
    bias = array(bias_at, start, INT8_BLOCK if bias_at != 0 else 0, dtype)
    for row in range(steps.size):
        out = array(out_at, row * out_features + start, INT8_BLOCK, out_dtype)
        _finish(sums[row, 0], sums[row, 1], scale, steps[row], bias, out)


@loop
def _multiply_by_tiles(data, dtype, out_dtype):
    given, _ = arguments(data)
    weights_at, num_rows, out_features, num_terms = given[1], given[5], given[7], given[8]
    quantized, steps = _quantize_rows(given, dtype, 0)
    sums = np.empty((num_rows, 2, INT8_BLOCK), np.int32)
    configure_tiles(2 * num_rows)
    first, last = share(out_features // INT8_BLOCK)
    for block in range(first, last):
        start = block * INT8_BLOCK
        weights = weights_at + start * num_terms
        sums_of_int8(weights, quantized.ctypes.data, num_terms, sums.ctypes.data)
        _finish_block(given, start, sums, steps, dtype, out_dtype)
    release_tiles()


@loop
def _multiply_by_vectors(data, dtype, out_dtype):
    given, _ = arguments(data)
    weights_at, num_rows, out_features, num_terms = given[1], given[5], given[7], given[8]
    quantized, steps = _quantize_rows(given, dtype, 128)
    sums = np.empty((num_rows, 2, INT8_BLOCK), np.int32)
    first, last = share(out_features // INT8_BLOCK)
    for block in range(first, last):
        start = block * INT8_BLOCK
        weights = weights_at + start * num_terms
        negative = weights_at + out_features * num_terms + start * 4
        for row in range(0, num_rows, _ROWS_AT_ONCE):
            rows_at, sums_at = quantized[row].ctypes.data, sums[row].ctypes.data
            if num_rows - row == 1:
                _sums_of_one_row(weights, negative, rows_at, num_terms, sums_at)
            elif num_rows - row == 2:
                _sums_of_two_rows(weights, negative, rows_at, num_terms, sums_at)
            else:
                _sums_of_three_rows(weights, negative, rows_at, num_terms, sums_at)
        _finish_block(given, start, sums, steps, dtype, out_dtype)


def _multiply_bf16_by_tiles(data):
    _multiply_by_tiles(data, BF16, BF16)


def _multiply_bf16_to_fp32_by_tiles(data):
    _multiply_by_tiles(data, BF16, FP32)


def _multiply_fp32_by_tiles(data):
    _multiply_by_tiles(data, FP32, FP32)


def _multiply_bf16_by_vectors(data):
    _multiply_by_vectors(data, BF16, BF16)


def _multiply_bf16_to_fp32_by_vectors(data):
    _multiply_by_vectors(data, BF16, FP32)


def _multiply_fp32_by_vectors(data):
    _multiply_by_vectors(data, FP32, FP32)


# dtypes of rows and results: by tiles, by vectors
_MULTIPLY = {
    (torch.bfloat16, torch.bfloat16): (_multiply_bf16_by_tiles, _multiply_bf16_by_vectors),
    (torch.bfloat16, torch.float32): (
        _multiply_bf16_to_fp32_by_tiles,
        _multiply_bf16_to_fp32_by_vectors,
    ),
    (torch.float32, torch.float32): (_multiply_fp32_by_tiles, _multiply_fp32_by_vectors),
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
    by_tiles, by_vectors = _MULTIPLY[x.dtype, out_dtype]
    launch(
        entry(by_tiles if has_tiles() else by_vectors),
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

    None where this CPU has neither tiles nor VNNI, or they cannot lie as `multiply` reads them.
    Otherwise what multiplies rows in ``dtype`` is compiled.
    """
    in_features, out_features = matrix.shape
    fits = out_features % INT8_BLOCK == 0 and in_features % INT8_TILE_TERMS == 0
    num_bytes = out_features * in_features + 4 * out_features
    multiplies = has_tiles() or has_features("avx512vnni")
    if not (multiplies and fits) or torch.ops.mkldnn._nbytes(matrix) != num_bytes:
        return None
    for (rows_dtype, _), (by_tiles, by_vectors) in _MULTIPLY.items():
        if rows_dtype == dtype:
            entry(by_tiles if has_tiles() else by_vectors)
    address: int = torch.ops.mkldnn.data_ptr(matrix)
    return address
