# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""FP8 blocks on the GPU; ``kernels.quant`` holds the contracts and the equations.

e4m3 travels as uint8, since sm_80 and sm_86 know no such type: there it is read, and everywhere
written, by integer operations. fp16 holds every e4m3 number exactly, and so does bf16.
A program of the product takes BLOCK_M rows and BLOCK_N outputs; it adds up, in fp32, one product
per slice of BLOCK_K channels times the slice's scales. Programs next to each other share weights.
Graph-safe: the grids follow from shapes, nothing is read back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import multiplies_fp8

if TYPE_CHECKING:
    from kernels.quant import ActivationScale, Fp8Weight

QUANTIZE_CONFIG = {"GROUPS": 8, "num_warps": 4}
MAX_DECODE_ROWS = 64  # up to here a product is bound by reading the weights
# as in kernels.quant, which imports this file
_BLOCK = tl.constexpr(128)
_E4M3_MAX = tl.constexpr(448.0)
_MIN_ACTIVATION = tl.constexpr(1e-4)
_INFINITY = tl.constexpr(0x7F800000)  # bits of fp32


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
    num_scales,
    QUANTIZED_ROWS: tl.constexpr,  # W8A8
    FP8_DOT: tl.constexpr,  # W8A8 in fp8 matrix units; else both sides decoded to fp16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides 128, so that a slice has one scale
):
    # rows [row_ids] times the transposed rows [columns] of the matrix: [BLOCK_M, BLOCK_N] fp32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
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
    out_ptr,  # [num_rows, out_features]
    num_rows,
    row_stride,
    out_features,
    in_features,
    num_scales,  # of a row: ceil(in_features / 128)
    QUANTIZED_ROWS: tl.constexpr,
    FP8_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_ids = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row_ids < num_rows
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < out_features
    scale_rows = tl.load(scale_rows_ptr + columns, mask=is_column, other=0)
    total = fp8_product(
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
        num_scales,
        QUANTIZED_ROWS,
        FP8_DOT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + row_ids[:, None] * out_features + columns[None, :],
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
        bits = scales.to(tl.int32, bitcast=True)
        above = (bits + 0x7FFFFF) & _INFINITY
        scales = tl.where(bits < _INFINITY, above, bits).to(tl.float32, bitcast=True)
    codes = float_to_e4m3(tl.div_rn(x, scales[:, None]))
    tl.store(values_ptr + token * in_features + columns, codes, mask=inside)
    tl.store(scales_ptr + token * num_scales + groups, scales, mask=groups < num_scales)


def fp8_linear_config(
    dtype: torch.dtype, num_rows: int, in_features: int, fp8_dot: bool
) -> dict[str, int]:
    """Block shape and launch: one for decodes and one for prompts, with the same slices of K.

    ``dtype`` is that of the rows, uint8 for W8A8. fp32, which no model is served in, has only one
    launch, and so have rows off 16 bytes, whose loads take the registers that a large block needs.
    """
    quantized = dtype == torch.uint8
    if dtype == torch.float32:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    elif num_rows <= MAX_DECODE_ROWS or in_features % 16:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    elif quantized and not fp8_dot:  # decoding both sides takes registers
        blocks = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    else:
        blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    return {"QUANTIZED_ROWS": quantized, "FP8_DOT": quantized and fp8_dot, **blocks}


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Launch the kernels, for at least one row."""
    num_rows, in_features = x.shape
    out_features, num_scales = weight.values.shape[0], weight.scale_inv.shape[1]
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    rows, row_scales = (x if x.stride(1) == 1 else x.contiguous()), None
    if weight.activations is not None:
        rows, row_scales = quantize_activations(rows, weight.activations)
        rows = rows.view(torch.uint8)
    config = fp8_linear_config(rows.dtype, num_rows, in_features, multiplies_fp8(x.device))
    grid = triton.cdiv(num_rows, config["BLOCK_M"]), triton.cdiv(out_features, config["BLOCK_N"])
    fp8_linear_kernel[grid](
        rows,
        row_scales,
        weight.values.view(torch.uint8),
        weight.scale_inv,
        weight.scale_rows,
        bias,
        out,
        num_rows,
        rows.stride(0),
        out_features,
        in_features,
        num_scales,
        **config,
    )
    return out


def quantize_activations(x: Tensor, scale: ActivationScale) -> tuple[Tensor, Tensor]:
    """Launch the kernel, for at least one row."""
    num_tokens, in_features = x.shape
    num_scales = triton.cdiv(in_features, _BLOCK.value)
    x = x if x.stride(1) == 1 else x.contiguous()
    values = torch.empty((num_tokens, in_features), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_tokens, num_scales), dtype=torch.float32, device=x.device)
    grid = num_tokens, triton.cdiv(num_scales, QUANTIZE_CONFIG["GROUPS"])
    quantize_activations_kernel[grid](
        x,
        values.view(torch.uint8),
        scales,
        x.stride(0),
        in_features,
        num_scales,
        POWER_OF_TWO=scale == "ue8m0",
        **QUANTIZE_CONFIG,
    )
    return values, scales
