# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The compiled body for a CPU of products with int4 weights, as PyTorch packs them for AVX-512.

    values             [out_features / 64, in_features, 32] bytes: output i below, i + 32 above
    scale_and_middle   [out_features / 64, in_features / 32, 64, 2] bf16
    x = counts * unit            counts int16, in each group the largest is 32767
    y = sum over groups of  scale * unit * (counts . values) + (middle - 8 * scale) * sum(x)

CPUs multiply pairs of 16-bit integers in the time of one fp32, and as exactly as bf16 deserves.
Groups are added up in fp32, in one order for any number of rows: bits follow from the row alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.native import (
    BF16,
    UINT8,
    arguments,
    array,
    check_rows,
    entry,
    has_features,
    launch,
    loop,
    max_or_nan,
    share,
    store,
    store_block,
    widen,
)
from kernels.native_sums import INT4_BLOCK, sums_of_int4

GROUP = 32
_ROWS_AT_ONCE = 4
_MAX_INT16, _SMALLEST = np.float32(32767), np.float32(1e-30)

_add_one_row = sums_of_int4(1, GROUP)
_add_two_rows = sums_of_int4(2, GROUP)
_add_four_rows = sums_of_int4(_ROWS_AT_ONCE, GROUP)


@loop
def _quantize(x, quantized, units, totals):
    for group in range(units.size):
        terms = x[group * GROUP : (group + 1) * GROUP]
        unit = max_or_nan(terms, _SMALLEST) / _MAX_INT16
        total = np.int32(0)
        for i in range(GROUP):
            count = np.int32(np.rint(widen(terms[i]) / unit))
            quantized[group * GROUP + i] = np.int16(count)
            total += count
        units[group] = unit
        totals[group] = np.float32(total) * unit


def _multiply(data):
    given, _ = arguments(data)
    x_at, values_at, scales_at, bias_at, out_at = given[:5]
    num_rows, x_stride, out_features, num_terms = given[5:9]
    num_padded = num_rows if num_rows <= 2 else -(-num_rows // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
    num_groups = num_terms // GROUP
    bias = array(bias_at, 0, out_features if bias_at != 0 else 0, BF16)
    quantized = np.zeros((num_padded, num_terms), np.int16)
    units = np.zeros((num_padded, num_groups), np.float32)
    totals = np.zeros((num_padded, num_groups), np.float32)
    for row in range(num_rows):
        x = array(x_at, row * x_stride, num_terms, BF16)
        _quantize(x, quantized[row], units[row], totals[row])
    sums = np.empty((num_padded, INT4_BLOCK), np.float32)
    row_bytes, unit_bytes = num_terms * 2, num_groups * 4
    first, last = share(out_features // INT4_BLOCK)
    for block in range(first, last):
        start = block * INT4_BLOCK
        sums[:] = 0
        for row in range(0, num_padded, _ROWS_AT_ONCE):
            for group in range(num_groups):
                weights = values_at + (start * num_terms + group * GROUP * INT4_BLOCK) // 2
                scales = scales_at + (start * num_groups + group * INT4_BLOCK) * 4
                rows_at = quantized.ctypes.data + (row * num_terms + group * GROUP) * 2
                units_at = units.ctypes.data + (row * num_groups + group) * 4
                totals_at = totals.ctypes.data + (row * num_groups + group) * 4
                sums_at = sums.ctypes.data + row * INT4_BLOCK * 4
                given_rows = rows_at, row_bytes, units_at, totals_at, unit_bytes
                if num_padded == 1:
                    _add_one_row(weights, scales, *given_rows, sums_at)
                elif num_padded == 2:
                    _add_two_rows(weights, scales, *given_rows, sums_at)
                else:
                    _add_four_rows(weights, scales, *given_rows, sums_at)
        for row in range(num_rows):
            store_block(
                sums[row], block, bias, array(out_at, row * out_features, out_features, BF16)
            )


def multiply(x: Tensor, values: Tensor, scale_and_middle: Tensor, bias: Tensor | None) -> Tensor:
    """``kernels.int4_linear.int4_linear`` in bf16, for one row or more."""
    num_rows, in_features = x.shape
    check_rows(x, bias, torch.bfloat16, (values.shape[0], 2 * values.shape[1]))
    out = torch.empty((num_rows, values.shape[0]), dtype=x.dtype)
    launch(
        entry(_multiply),
        values.shape[0] * in_features,
        0.0,
        x.data_ptr(),
        values.data_ptr(),
        scale_and_middle.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        num_rows,
        x.stride(0),
        values.shape[0],
        in_features,
    )
    return out


def _decode(data):
    given, _ = arguments(data)
    values_at, scales_at, out_at, num_outputs, num_terms = given[:5]
    first, last = share(num_outputs // INT4_BLOCK)
    for block in range(first, last):
        start = block * INT4_BLOCK
        for group in range(num_terms // GROUP):
            at = start * num_terms + group * GROUP * INT4_BLOCK
            values = array(values_at, at // 2, (GROUP, INT4_BLOCK // 2), UINT8)
            at = (start * (num_terms // GROUP) + group * INT4_BLOCK) * 2
            scales = array(scales_at, at, (INT4_BLOCK, 2), BF16)
            for i in range(INT4_BLOCK):
                scale, middle = widen(scales[i, 0]), widen(scales[i, 1])
                out = array(out_at, (start + i) * num_terms + group * GROUP, GROUP, BF16)
                for term in range(GROUP):
                    value = values[term, i % 32]
                    value = value >> 4 if i >= 32 else value & 15
                    store(out, term, (np.float32(value) - np.float32(8)) * scale + middle)


def decode(values: Tensor, scale_and_middle: Tensor) -> Tensor:
    """Matrices in bf16, [out_features, in_features], of such outputs."""
    num_outputs, in_features = values.shape[0], 2 * values.shape[1]
    out = torch.empty((num_outputs, in_features), dtype=torch.bfloat16)
    launch(
        entry(_decode),
        out.numel(),
        0.0,
        values.data_ptr(),
        scale_and_middle.data_ptr(),
        out.data_ptr(),
        num_outputs,
        in_features,
    )
    return out


def prepare() -> bool:
    """Compile the loops, if this CPU has what they are written for."""
    if not has_features("avx512f", "avx512bw"):
        return False
    entry(_multiply)
    entry(_decode)
    return True
