# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The compiled body for a CPU of products of few rows, with weights as oneDNN packed them.

Such a product takes as long as reading its weights does; `kernels.native_sums` reads them faster
than oneDNN. Sums of bf16 are fp32, as there; those of fp32 have the bits of oneDNN's, so that a
row's do not follow its batch. `packed_rows` tries each matrix, and takes none with other results.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

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
    has_features,
    launch,
    loop,
    share,
    store_block,
)
from kernels.native_sums import (
    BF16_BLOCK,
    FP32_BLOCK,
    MAX_TILE_ROWS,
    TILE_TERMS,
    WIDE_BF16_BLOCK,
    configure_tiles,
    has_tiles,
    release_tiles,
    sums_by_dots,
    sums_by_tiles,
    sums_by_vectors,
)

# outputs whose weights oneDNN is known to pack together
_BLOCKS = {torch.bfloat16: (BF16_BLOCK, WIDE_BF16_BLOCK), torch.float32: (FP32_BLOCK,)}
_MAX_VECTOR_ROWS = 4
# terms that oneDNN was seen to add up by themselves, of short and of long sums, and their likes
_TERMS_AT_ONCE = (512, 1024, 256, 2048)

_sums_of_one_row = sums_by_vectors(BF16_BLOCK, 1, is_bf16=True)
_sums_of_two_rows = sums_by_vectors(BF16_BLOCK, 2, is_bf16=True)
_sums_of_three_rows = sums_by_vectors(BF16_BLOCK, 3, is_bf16=True)
_sums_of_four_rows = sums_by_vectors(BF16_BLOCK, 4, is_bf16=True)
_MAX_DOT_ROWS = 16
_DOT_ROWS_AT_ONCE = 6
_dots_of_one_row = sums_by_dots(1)
_dots_of_two_rows = sums_by_dots(2)
_dots_of_three_rows = sums_by_dots(3)
_dots_of_four_rows = sums_by_dots(4)
_dots_of_five_rows = sums_by_dots(5)
_dots_of_six_rows = sums_by_dots(_DOT_ROWS_AT_ONCE)
_sums_in_fp32 = sums_by_vectors(FP32_BLOCK, 1, is_bf16=False)
_sums_of_a_block_in_fp32 = sums_by_vectors(FP32_BLOCK, 1, is_bf16=False, num_blocks=1)


@loop
def _halves(num_blocks):
    # of this thread's blocks [first, last): the first of the second half, which is the shorter one
    first, last = share(num_blocks)
    return first, last, (first + last + 1) // 2


@loop
def _store_rows(sums, left, right, bias, out_at, out_features):
    # sums: [2, num_rows, block size] fp32, of the blocks left and right
    for row in range(sums.shape[1]):
        out = array(out_at, row * out_features, out_features, BF16)
        store_block(sums[0, row], left, bias, out)
        store_block(sums[1, row], right, bias, out)


def _multiply_bf16(data):
    given, _ = arguments(data)
    x_at, weights_at, bias_at, out_at, num_rows, x_stride, out_features, num_terms = given[:8]
    bias = array(bias_at, 0, out_features if bias_at != 0 else 0, BF16)
    sums = np.empty((2, num_rows, BF16_BLOCK), np.float32)
    sums_at, row_bytes, block_bytes = sums.ctypes.data, x_stride * 2, BF16_BLOCK * num_terms * 2
    first, last, middle = _halves(out_features // BF16_BLOCK)
    for left in range(first, middle):
        right = min(left - first + middle, last - 1)  # of an odd number one is done twice
        left_at, right_at = weights_at + left * block_bytes, weights_at + right * block_bytes
        if num_rows == 1:
            _sums_of_one_row(left_at, right_at, x_at, row_bytes, num_terms, sums_at)
        elif num_rows == 2:
            _sums_of_two_rows(left_at, right_at, x_at, row_bytes, num_terms, sums_at)
        elif num_rows == 3:
            _sums_of_three_rows(left_at, right_at, x_at, row_bytes, num_terms, sums_at)
        else:
            _sums_of_four_rows(left_at, right_at, x_at, row_bytes, num_terms, sums_at)
        _store_rows(sums, left, right, bias, out_at, out_features)


@loop
def _sum_by_dots(weights_at, x_at, row_bytes, num_terms, sums):
    for row in range(0, sums.shape[0], _DOT_ROWS_AT_ONCE):
        rows_at, sums_at, num_left = x_at + row * row_bytes, sums[row].ctypes.data, len(sums) - row
        if num_left == 1:
            _dots_of_one_row(weights_at, rows_at, row_bytes, num_terms, sums_at)
        elif num_left == 2:
            _dots_of_two_rows(weights_at, rows_at, row_bytes, num_terms, sums_at)
        elif num_left == 3:
            _dots_of_three_rows(weights_at, rows_at, row_bytes, num_terms, sums_at)
        elif num_left == 4:
            _dots_of_four_rows(weights_at, rows_at, row_bytes, num_terms, sums_at)
        elif num_left == 5:
            _dots_of_five_rows(weights_at, rows_at, row_bytes, num_terms, sums_at)
        else:
            _dots_of_six_rows(weights_at, rows_at, row_bytes, num_terms, sums_at)


def _multiply_dots(data):
    given, _ = arguments(data)
    x_at, weights_at, bias_at, out_at, num_rows, x_stride, out_features, num_terms = given[:8]
    bias = array(bias_at, 0, out_features if bias_at != 0 else 0, BF16)
    sums = np.empty((num_rows, WIDE_BF16_BLOCK), np.float32)
    block_bytes = WIDE_BF16_BLOCK * num_terms * 2
    first, last = share(out_features // WIDE_BF16_BLOCK)
    for block in range(first, last):
        _sum_by_dots(weights_at + block * block_bytes, x_at, x_stride * 2, num_terms, sums)
        for row in range(num_rows):
            out = array(out_at, row * out_features, out_features, BF16)
            store_block(sums[row], block, bias, out)


def _multiply_tiles(data):
    given, _ = arguments(data)
    x_at, weights_at, bias_at, out_at, num_rows, x_stride, out_features, num_terms, _ = given[:9]
    bias = array(bias_at, 0, out_features if bias_at != 0 else 0, BF16)
    sums = np.empty((2, num_rows, BF16_BLOCK), np.float32)
    row_bytes, block_bytes = x_stride * 2, BF16_BLOCK * num_terms * 2
    configure_tiles(num_rows)
    first, last, middle = _halves(out_features // BF16_BLOCK)
    for left in range(first, middle):
        right = min(left - first + middle, last - 1)
        sums_by_tiles(
            weights_at + left * block_bytes,
            weights_at + right * block_bytes,
            x_at,
            row_bytes,
            num_terms,
            sums.ctypes.data,
            num_rows * BF16_BLOCK * 4,
        )
        _store_rows(sums, left, right, bias, out_at, out_features)
    release_tiles()


def _multiply_fp32(data):
    given, _ = arguments(data)
    x_at, weights_at, bias_at, out_at, _, _, out_features, num_terms, terms_at_once = given[:9]
    bias = array(bias_at, 0, out_features if bias_at != 0 else 0, FP32)
    out = array(out_at, 0, out_features, FP32)
    sums, totals = np.zeros((2, FP32_BLOCK), np.float32), np.empty((2, FP32_BLOCK), np.float32)
    block_bytes = FP32_BLOCK * num_terms * 4
    first, last, middle = _halves(out_features // FP32_BLOCK)
    for left in range(first, middle):
        right = left - first + middle
        totals[:] = 0
        for term in range(0, num_terms, terms_at_once):
            left_at = weights_at + left * block_bytes + term * FP32_BLOCK * 4
            right_at = weights_at + right * block_bytes + term * FP32_BLOCK * 4
            num_summed = min(terms_at_once, num_terms - term)
            if right < last:
                _sums_in_fp32(left_at, right_at, x_at + term * 4, 0, num_summed, sums.ctypes.data)
            else:
                _sums_of_a_block_in_fp32(
                    left_at, left_at, x_at + term * 4, 0, num_summed, sums.ctypes.data
                )
            totals += sums
        store_block(totals[0], left, bias, out)
        if right < last:
            store_block(totals[1], right, bias, out)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where the weights lie that oneDNN packed.

    Attributes:
        address: of the first; they live as long as the packed matrix does.
        shape: (out_features, in_features).
        max_rows: more rows are oneDNN's.
        terms_at_once: in fp32, so many terms of a sum are added up by themselves.
        block: outputs whose weights lie side by side.
    """

    address: int
    shape: tuple[int, int]
    dtype: torch.dtype
    max_rows: int
    terms_at_once: int
    block: int


def multiply(x: Tensor, weight: PackedRows, bias: Tensor | None) -> Tensor:
    """``kernels.packed_linear.packed_linear`` for 1 to ``weight.max_rows`` rows, in their dtype."""
    check_rows(x, bias, weight.dtype, weight.shape)
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    if weight.dtype == torch.float32:
        function = _multiply_fp32
    elif weight.block == WIDE_BF16_BLOCK:
        function = _multiply_dots
    else:
        function = _multiply_bf16 if num_rows <= _MAX_VECTOR_ROWS else _multiply_tiles
    out = torch.empty((num_rows, out_features), dtype=x.dtype)
    launch(
        entry(function),
        out_features * in_features,
        0.0,
        x.data_ptr(),
        weight.address,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        num_rows,
        x.stride(0),
        out_features,
        in_features,
        weight.terms_at_once,
    )
    return out


def _max_rows(dtype: torch.dtype, block: int, num_terms: int) -> int:
    if dtype == torch.float32:
        return 1
    if block == WIDE_BF16_BLOCK:
        return _MAX_DOT_ROWS if has_features("avx512bf16") else 0
    is_tiled = num_terms % TILE_TERMS == 0 and has_tiles()
    return MAX_TILE_ROWS if is_tiled else _MAX_VECTOR_ROWS


def packed_rows(matrix: Tensor) -> PackedRows | None:
    """What `multiply` needs of a matrix that oneDNN packed; None if its layout is another.

    In fp32 a product has oneDNN's bits: how many terms that adds up at once is found by trying.
    """
    dtype, shape = matrix.dtype, (matrix.shape[0], matrix.shape[1])
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if shape[1] % 2 != 0 or torch.ops.mkldnn._nbytes(matrix) != num_bytes:
        return None
    num_rows = MAX_TILE_ROWS if dtype == torch.bfloat16 else 2
    x = torch.randn((num_rows, shape[1]), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    tolerance = expected.abs().max() / 128 if dtype == torch.bfloat16 else 0
    address = torch.ops.mkldnn.data_ptr(matrix)
    terms = (shape[1], *(_TERMS_AT_ONCE if dtype == torch.float32 else ()))
    for block, terms_at_once in itertools.product(_BLOCKS[dtype], terms):
        max_rows = _max_rows(dtype, block, shape[1])
        if max_rows == 0 or shape[0] % block != 0:
            continue
        rows = PackedRows(address, shape, dtype, max_rows, terms_at_once, block)
        found = torch.cat([multiply(part, rows, None) for part in (x[:1], *x[1:].split(max_rows))])
        if bool(((found - expected).abs() <= tolerance).all()):
            return rows
    return None
