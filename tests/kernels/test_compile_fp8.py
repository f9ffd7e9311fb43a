"""FP8 products and quantization compile for every chip without spilling, with no GPU."""

from __future__ import annotations

import torch

from kernels.compile import KernelVariant
from kernels.configs import launch_config
from kernels.quant import num_blocks
from kernels.quant_triton import (
    fp8_linear_config,
    fp8_linear_kernel,
    quantize_activations_kernel,
    quantize_weight_kernel,
)
from tests.kernels.test_compile_linear import finish_variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I32, U8 = torch.int32, torch.uint8


def linear_variants(
    name: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    capability: int,
    *,
    w8a8: bool,
    bias: bool = False,
) -> list[KernelVariant]:
    rows = U8 if w8a8 else dtype
    arguments = {
        **{"rows_ptr": rows, "row_scales_ptr": FP32 if w8a8 else None, "values_ptr": U8},
        **{"scale_inv_ptr": FP32, "scale_rows_ptr": I32, "bias_ptr": dtype if bias else None},
        **{"out_ptr": dtype, "row_stride": in_features, "out_features": out_features},
        **{"in_features": in_features, "num_scales": num_blocks(in_features)},
    }
    variants = []
    # a batch-invariant prompt has the launch of one row, but does not split its channels
    for kind, num_rows, rows_fact in (("decode", 64, 64), ("prompt", 65, 65), ("same", 65, 1)):
        config = fp8_linear_config(
            capability, rows, rows_fact, out_features, in_features, multiplies_fp8(capability)
        )
        split = num_rows <= 64 and config["SLICES"] > 1
        if kind == "same" and config["SLICES"] == 1:
            continue
        kernel_arguments = arguments | {"num_rows": num_rows}
        if split:
            kernel_arguments |= {"bias_ptr": None, "out_ptr": FP32}
            variants.append(
                finish_variant(f"fp8_{name}", config["SLICES"], out_features, arguments, False)
            )
        variants.append(
            KernelVariant(
                f"linear_{name}_{kind}",
                fp8_linear_kernel,
                kernel_arguments,
                {"SPLIT": split, **config},
            )
        )
    return variants


def quantize_variants(name: str, in_features: int, dtype: torch.dtype) -> list[KernelVariant]:
    arguments = {
        **{"x_ptr": dtype, "values_ptr": U8, "scales_ptr": FP32, "x_stride": in_features},
        **{"in_features": in_features, "num_scales": num_blocks(in_features)},
    }
    return [
        KernelVariant(
            f"quantize_{name}",
            quantize_activations_kernel,
            arguments,
            {"POWER_OF_TWO": power_of_two, **launch_config("quantize_activations")},
        )
        for power_of_two in (False, True)
    ]


def quantize_weight_variants(
    name: str, in_features: int, dtype: torch.dtype
) -> list[KernelVariant]:
    arguments = {
        **{"weight_ptr": dtype, "values_ptr": U8, "scale_inv_ptr": FP32},
        **{"row_stride": in_features, "out_features": 2048, "in_features": in_features},
        "num_scales": num_blocks(in_features),
    }
    return [
        KernelVariant(
            f"quantize_weight_{name}",
            quantize_weight_kernel,
            arguments,
            {"POWER_OF_TWO": power_of_two, **launch_config("quantize_weight")},
        )
        for power_of_two in (False, True)
    ]


def multiplies_fp8(capability: int) -> bool:
    return capability >= 89


def tight(capability: int) -> list[KernelVariant]:
    """All that V3 launches in bf16, W8A16 and W8A8, besides its experts."""
    variants = [
        *quantize_variants("v3", 7168, BF16),
        *quantize_weight_variants("v3", 7168, BF16),
    ]
    for w8a8 in (False, True):
        name = "v3_w8a8" if w8a8 else "v3_w8a16"
        variants += linear_variants(name, 2112, 7168, BF16, capability, w8a8=w8a8)
        variants += linear_variants(f"kv_a_{name}", 576, 7168, BF16, capability, w8a8=w8a8)
    return variants


def every(capability: int) -> list[KernelVariant]:
    variants = [
        *tight(capability),
        *quantize_variants("tiny", 96, FP32),
        *quantize_variants("odd", 200, FP16),
        *linear_variants("tiny", 192, 96, FP32, capability, w8a8=False),
        *quantize_weight_variants("odd", 299, FP32),
        *linear_variants("odd", 203, 299, BF16, capability, w8a8=False, bias=True),
    ]
    for w8a8 in (False, True):
        for dtype in (BF16, FP16, FP32):
            name = f"{dtype}_{'w8a8' if w8a8 else 'w8a16'}"
            variants += [
                *linear_variants(f"o_{name}", 7168, 16384, dtype, capability, w8a8=w8a8),
                *linear_variants(
                    f"bias_{name}", 4608, 3584, dtype, capability, w8a8=w8a8, bias=True
                ),
                *linear_variants(f"v2_lite_{name}", 21888, 2048, dtype, capability, w8a8=w8a8),
                *linear_variants(
                    f"few_{name}", 1024, 4096, dtype, capability, w8a8=w8a8, bias=True
                ),
            ]
    return variants
