# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""FP8 blocks on the GPU; ``kernels.quant`` holds the contracts and the equations.

e4m3 travels as uint8, since sm_80 and sm_86 know no such type: there it is read, and everywhere
written, by integer operations. fp16 holds every e4m3 number exactly, and so does bf16.
A program of the product takes BLOCK_M rows and BLOCK_N outputs; it adds up, in fp32, one product
per BLOCK_K channels times their scales. Programs next to each other share weights. Where a matrix
has too few outputs to keep a chip busy, its channels are cut into SLICES. For a few rows each has a
program, and a second kernel adds their fp32 sums in order; for many one program does so itself,
with the same bits. Graph-safe: the grids follow from shapes, nothing is read back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import linear_slices_triton
from kernels.configs import launch_config
from kernels.dispatch import FP8_CAPABILITY, capability_of, multiplies_fp8

if TYPE_CHECKING:
    from kernels.quant import ActivationScale, Fp8Weight

# as in kernels.quant, which imports this file
_BLOCK = tl.constexpr(128)
_E4M3_MAX = tl.constexpr(448.0)
_MIN_ACTIVATION = tl.constexpr(1e-4)
_INFINITY = tl.constexpr(0x7F800000)  # bits of fp32
_MIN_SCALE = tl.constexpr(2.0**-126)
_MAX_SPLIT_ROWS = 64  # more rows are enough programs


@triton.jit
def e4m3_to_float(bits):
    # finite e4m3 -> fp16, exactly: the same bits one exponent bias of 15 - 7 further up
    sign = (bits & 0x80).to(tl.uint16) << 8
    magnitude = (bits & 0x7F).to(tl.uint16) << 7
    return (sign | magnitude).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def float_to_e4m3(x):
    # fp32 -> the nearest e4m3, the even one of two; what is 464 or more in magnitude becomes NaN
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # rebias the exponent by 7 - 127 and round off 20 bits of the mantissa
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # below 2^-6 numbers are 2^-9 apart, as fp32 numbers next to 2^14 are: the addition rounds
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.where(magnitude < (121 << 23), small, tl.minimum(normal, 0x7F))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _round_up_to_power_of_two(scales):
    # normal numbers and infinity
    bits = scales.to(tl.int32, bitcast=True)
    above = (bits + 0x7FFFFF) & _INFINITY
    return tl.where(bits < _INFINITY, above, bits).to(tl.float32, bitcast=True)


@triton.jit
def fp8_product(
    rows_ptr,  # W8A8: e4m3 as uint8
    row_scales_ptr,  # [num_rows, num_scales] fp32; W8A16: None
    values_ptr,  # [out_features, in_features], e4m3 as uint8
    column_scales_ptr,  # [BLOCK_N] pointers: where the scales of each output start
    row_ids,  # [BLOCK_M] int64
    is_row,
    columns,  # [BLOCK_N]
    is_column,
    row_stride,
    in_features,
    first,  # channels [first, end), a multiple of 128 and another or in_features
    end,
    num_scales,
    QUANTIZED_ROWS: tl.constexpr,  # W8A8
    FP8_DOT: tl.constexpr,  # W8A8 in fp8 matrix units; else both sides decoded to fp16
    HAS_E4M3: tl.constexpr,  # the chip converts e4m3 itself, in half the instructions
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides 128, so that a step has one scale
):
    # rows [row_ids] times the transposed rows [columns] of the matrix: [BLOCK_M, BLOCK_N] fp32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(first, end, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        is_inner = inner < in_features
        rows = tl.load(
            rows_ptr + row_ids[:, None] * row_stride + inner[None, :],
            mask=is_row[:, None] & is_inner[None, :],
            other=0,
        )
        weights = tl.load(
            values_ptr + columns[None, :] * in_features + inner[:, None],
            mask=is_column[None, :] & is_inner[:, None],
            other=0,
        )
        scales = tl.load(column_scales_ptr + k // _BLOCK, mask=is_column, other=0.0)[None, :]
        if QUANTIZED_ROWS:
            row_scales_at = row_scales_ptr + row_ids * num_scales + k // _BLOCK
            scales = tl.load(row_scales_at, mask=is_row, other=0.0)[:, None] * scales
        if FP8_DOT:
            rows = rows.to(tl.float8e4nv, bitcast=True)
            weights = weights.to(tl.float8e4nv, bitcast=True)
        elif QUANTIZED_ROWS:
            rows = e4m3_to_float(rows)
            weights = e4m3_to_float(weights)
        elif HAS_E4M3:
            weights = weights.to(tl.float8e4nv, bitcast=True).to(rows.dtype)
        else:
            weights = e4m3_to_float(weights).to(rows.dtype)
        total += tl.dot(rows, weights, input_precision="ieee") * scales
    return total


@triton.jit(do_not_specialize=["num_rows"])
def fp8_linear_kernel(
    rows_ptr,  # [num_rows, in_features]; W8A8: e4m3 as uint8
    row_scales_ptr,  # [num_rows, num_scales] fp32; W8A16: None
    values_ptr,  # [out_features, in_features], e4m3 as uint8
    scale_inv_ptr,  # [num_row_blocks, num_scales] fp32
    scale_rows_ptr,  # [out_features] int32
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features]; SPLIT: [SLICES, num_rows, out_features] fp32
    num_rows,
    row_stride,
    out_features,
    in_features,
    num_scales,  # of a row: ceil(in_features / 128)
    QUANTIZED_ROWS: tl.constexpr,
    FP8_DOT: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,  # a program has one slice; else it has all of them
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_ids = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row_ids < num_rows
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    scale_rows = tl.load(scale_rows_ptr + columns, mask=is_column, other=0)
    slice_size = tl.cdiv(num_scales, SLICES) * _BLOCK
    first_slice, end_slice = 0, SLICES
    if SPLIT:
        first_slice = tl.program_id(2)
        end_slice = first_slice + 1
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for slice_id in range(first_slice, end_slice):
        total += fp8_product(
            rows_ptr,
            row_scales_ptr,
            values_ptr,
            scale_inv_ptr + scale_rows * num_scales,
            row_ids,
            is_row,
            columns,
            is_column,
            row_stride,
            in_features,
            slice_id * slice_size,
            tl.minimum((slice_id + 1) * slice_size, in_features),
            num_scales,
            QUANTIZED_ROWS,
            FP8_DOT,
            HAS_E4M3,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out_rows = tl.program_id(2) * num_rows + row_ids
    tl.store(
        out_ptr + out_rows[:, None] * out_features + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@triton.jit
def quantize_activations_kernel(
    x_ptr,  # [num_tokens, in_features]
    values_ptr,  # [num_tokens, in_features] uint8, out
    scales_ptr,  # [num_tokens, num_scales] fp32, out
    x_stride,
    in_features,
    num_scales,
    POWER_OF_TWO: tl.constexpr,  # scales are rounded up to one
    GROUPS: tl.constexpr,  # of one token, per program
):
    token = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = columns < in_features
    x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # magnitudes compare as integers do, and NaN is above all of them
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    lowest = tl.full((GROUPS,), _MIN_ACTIVATION, tl.float32).to(tl.int32, bitcast=True)
    highest = tl.maximum(tl.max(magnitudes, axis=1), lowest)
    scales = tl.div_rn(highest.to(tl.float32, bitcast=True), _E4M3_MAX)  # [GROUPS]
    if POWER_OF_TWO:
        scales = _round_up_to_power_of_two(scales)
    codes = float_to_e4m3(tl.div_rn(x, scales[:, None]))
    tl.store(values_ptr + token * in_features + columns, codes, mask=inside)
    tl.store(scales_ptr + token * num_scales + groups, scales, mask=groups < num_scales)


@triton.jit
def quantize_weight_kernel(
    weight_ptr,  # [out_features, in_features]
    values_ptr,  # [out_features, in_features] uint8, out
    scale_inv_ptr,  # [num_row_blocks, num_scales] fp32, out
    row_stride,
    out_features,
    in_features,
    num_scales,  # of a row: ceil(in_features / 128)
    POWER_OF_TWO: tl.constexpr,  # scales are rounded up to one
):
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows = row_block.to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)[:, None]
    columns = column_block * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = (rows < out_features) & (columns < in_features)
    weight = tl.load(weight_ptr + rows * row_stride + columns, mask=inside, other=0.0)
    weight = weight.to(tl.float32)
    highest = tl.max(tl.max(tl.abs(weight), axis=1), axis=0)
    scale = tl.maximum(tl.div_rn(highest, tl.full((), _E4M3_MAX, tl.float32)), _MIN_SCALE)
    scale = tl.where(highest > 0, scale, 1.0)
    if POWER_OF_TWO:
        scale = _round_up_to_power_of_two(scale)
    codes = float_to_e4m3(tl.div_rn(weight, scale))
    tl.store(values_ptr + rows * in_features + columns, codes, mask=inside)
    tl.store(scale_inv_ptr + row_block * num_scales + column_block, scale)


def fp8_linear_config(
    arch: int, dtype: torch.dtype, num_rows: int, out_features: int, in_features: int, fp8_dot: bool
) -> dict[str, Any]:
    """Block shape, slices and launch; ``dtype`` is that of the rows, uint8 for W8A8."""
    quantized = dtype == torch.uint8
    blocks = launch_config(
        "fp8_linear",
        arch=arch,
        dtype=dtype,
        rows=num_rows,
        out_features=out_features,
        in_features=in_features,
        aligned=in_features % 16 == 0,
        fp8_dot=quantized and fp8_dot,
    )
    formats = {"QUANTIZED_ROWS": quantized, "FP8_DOT": quantized and fp8_dot}
    return {**formats, "HAS_E4M3": arch >= FP8_CAPABILITY, **blocks}


def fp8_linear(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None, *, batch_invariant: bool
) -> Tensor:
    """Launch the kernels, for at least one row."""
    num_rows, in_features = x.shape
    out_features, num_scales = weight.values.shape[0], weight.scale_inv.shape[1]
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    rows, row_scales = (x if x.stride(1) == 1 else x.contiguous()), None
    if weight.activations is not None:
        rows, row_scales = quantize_activations(rows, weight.activations)
        rows = rows.view(torch.uint8)
    config = fp8_linear_config(
        capability_of(x.device),
        rows.dtype,
        1 if batch_invariant else num_rows,
        out_features,
        in_features,
        multiplies_fp8(x.device),
    )
    slices = config["SLICES"] if num_rows <= _MAX_SPLIT_ROWS else 1
    partial = out
    if slices > 1:
        partial = linear_slices_triton.workspace(slices, num_rows, out_features, x.device)
    grid = (
        triton.cdiv(num_rows, config["BLOCK_M"]),
        triton.cdiv(out_features, config["BLOCK_N"]),
        slices,
    )
    fp8_linear_kernel[grid](
        rows,
        row_scales,
        weight.values.view(torch.uint8),
        weight.scale_inv,
        weight.scale_rows,
        bias if slices == 1 else None,
        partial,
        num_rows,
        rows.stride(0),
        out_features,
        in_features,
        num_scales,
        SPLIT=slices > 1,
        **config,
    )
    if slices > 1:
        linear_slices_triton.finish(partial, bias, out, gated=False)
    return out


def quantize_activations(x: Tensor, scale: ActivationScale) -> tuple[Tensor, Tensor]:
    """Launch the kernel, for at least one row."""
    num_tokens, in_features = x.shape
    num_scales = triton.cdiv(in_features, _BLOCK.value)
    x = x if x.stride(1) == 1 else x.contiguous()
    values = torch.empty((num_tokens, in_features), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_tokens, num_scales), dtype=torch.float32, device=x.device)
    config = launch_config("quantize_activations")
    grid = num_tokens, triton.cdiv(num_scales, config["GROUPS"])
    quantize_activations_kernel[grid](
        x,
        values.view(torch.uint8),
        scales,
        x.stride(0),
        in_features,
        num_scales,
        POWER_OF_TWO=scale == "ue8m0",
        **config,
    )
    return values, scales


def quantize_weight(weight: Tensor, scale: ActivationScale) -> tuple[Tensor, Tensor]:
    """Launch the kernel, for at least one element."""
    out_features, in_features = weight.shape
    grid = triton.cdiv(out_features, _BLOCK.value), triton.cdiv(in_features, _BLOCK.value)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale_inv = torch.empty(grid, dtype=torch.float32, device=weight.device)
    quantize_weight_kernel[grid](
        weight,
        values.view(torch.uint8),
        scale_inv,
        weight.stride(0),
        out_features,
        in_features,
        grid[1],
        POWER_OF_TWO=scale == "ue8m0",
        **launch_config("quantize_weight"),
    )
    return values, scale_inv
