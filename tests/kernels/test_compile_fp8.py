"""FP8 products and quantization compile for every chip without spilling, with no GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.compile import SHARED_MEMORY, KernelVariant
from kernels.moe_triton import grouped_fp8_linear_config, grouped_fp8_linear_kernel
from kernels.quant import num_blocks
from kernels.quant_triton import (
    MAX_DECODE_ROWS,
    QUANTIZE_CONFIG,
    fp8_linear_config,
    fp8_linear_kernel,
    quantize_activations_kernel,
)
from tests.kernels.compiled import check, check_tensor_cores
from tests.kernels.passes import INTERPRETED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I32, I64, U8 = torch.int32, torch.int64, torch.uint8
NUM_ROWS = {"decode": MAX_DECODE_ROWS, "prompt": MAX_DECODE_ROWS + 1}


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
    return [
        KernelVariant(
            f"linear_{name}_{kind}",
            fp8_linear_kernel,
            arguments | {"num_rows": num_rows},
            fp8_linear_config(rows, num_rows, in_features, multiplies_fp8(capability)),
        )
        for kind, num_rows in NUM_ROWS.items()
    ]


def experts_variants(
    name: str,
    num_experts: int,
    hidden: int,
    inter: int,
    top_k: int,
    dtype: torch.dtype,
    capability: int,
    *,
    w8a8: bool,
) -> list[KernelVariant]:
    rows = U8 if w8a8 else dtype
    variants = []
    for part, out_features, in_features in (("up", 2 * inter, hidden), ("down", hidden, inter)):
        arguments = {
            **{"rows_ptr": rows, "row_scales_ptr": FP32 if w8a8 else None, "values_ptr": U8},
            **{"scale_inv_ptr": FP32, "scale_rows_ptr": I32, "out_ptr": dtype, "order_ptr": I64},
            **{"expert_starts_ptr": I64, "num_experts": num_experts, "top_k": top_k},
            **{"out_features": out_features, "in_features": in_features},
            "num_row_blocks": 2 * num_blocks(inter) if part == "up" else num_blocks(hidden),
            "num_scales": num_blocks(in_features),
        }
        config = {
            **{"SORTED_ROWS": part == "down", "EXPERTS_BLOCK": 1 << (num_experts - 1).bit_length()},
            **grouped_fp8_linear_config(rows, multiplies_fp8(capability)),
        }
        variants.append(
            KernelVariant(f"experts_{part}_{name}", grouped_fp8_linear_kernel, arguments, config)
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
            {"POWER_OF_TWO": power_of_two, **QUANTIZE_CONFIG},
        )
        for power_of_two in (False, True)
    ]


def multiplies_fp8(capability: int) -> bool:
    return capability >= 89


def tight(capability: int) -> list[KernelVariant]:
    """All that V3 launches in bf16, W8A16 and W8A8."""
    variants = quantize_variants("v3", 7168, BF16)
    for w8a8 in (False, True):
        name = "v3_w8a8" if w8a8 else "v3_w8a16"
        variants += linear_variants(name, 2112, 7168, BF16, capability, w8a8=w8a8)
        variants += experts_variants(name, 256, 7168, 2048, 8, BF16, capability, w8a8=w8a8)
    return variants


def every(capability: int) -> list[KernelVariant]:
    variants = [
        *tight(capability),
        *quantize_variants("tiny", 96, FP32),
        *quantize_variants("odd", 200, FP16),
        *linear_variants("tiny", 192, 96, FP32, capability, w8a8=False),
        *experts_variants("tiny", 8, 192, 96, 2, FP32, capability, w8a8=False),
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
                *experts_variants(f"v2_{name}", 160, 5120, 1536, 6, dtype, capability, w8a8=w8a8),
            ]
    return variants


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_what_v3_launches_does_not_spill(capability: int) -> None:
    check(tight(capability), capability)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_launch_spills(capability: int) -> None:
    check(every(capability), capability)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
@pytest.mark.parametrize("capability", [80, 90])
def test_products_use_the_tensor_cores(capability: int) -> None:
    check_tensor_cores(tight(capability), capability)
