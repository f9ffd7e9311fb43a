"""Routers and experts, bf16 and FP8, compile for every chip without spilling, with no GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kernels.compile import SHARED_MEMORY, KernelVariant
from kernels.configs import launch_config
from kernels.moe_align_triton import align_kernel
from kernels.moe_route_triton import route_config, route_noaux_tc_kernel, route_softmax_kernel
from kernels.moe_triton import (
    combine_kernel,
    grouped_facts,
    grouped_fp8_linear_config,
    grouped_fp8_linear_kernel,
    grouped_linear_config,
    grouped_linear_kernel,
)
from kernels.quant import num_blocks

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I32, I64, U8 = torch.int32, torch.int64, torch.uint8
# tokens for which the table has a row of its own, by their number per expert
KINDS = {"decode": 0, "prompt": 24, "long": 96}


def route_variant(
    name: str, num_experts: int, groups: int, kept: int, top_k: int, is_softmax: bool
) -> KernelVariant:
    size = num_experts // groups
    arguments = {
        **{"logits_ptr": FP32, "expert_ids_ptr": I64, "weights_ptr": FP32},
        **{"group_size": size, "num_groups": groups, "top_groups": kept, "scaling_factor": 2.5},
    }
    config = route_config(top_k, groups, size)
    if is_softmax:
        return KernelVariant(f"route_{name}", route_softmax_kernel, arguments, config)
    arguments, config = arguments | {"bias_ptr": FP32}, config | {"RENORMALIZE": True}
    return KernelVariant(f"route_{name}", route_noaux_tc_kernel, arguments, config)


def align_variant(name: str, num_experts: int) -> KernelVariant:
    arguments = {
        **{"slot_experts_ptr": I64, "order_ptr": I64, "expert_starts_ptr": I64},
        **{"num_slots": 512, "num_experts": num_experts},
    }
    config = launch_config("moe_align", num_experts=num_experts)
    del config["max_slots"]
    return KernelVariant(f"experts_align_{name}", align_kernel, arguments, config)


def combine_variant(
    name: str, hidden: int, top_k: int, dtype: torch.dtype, shared: bool
) -> KernelVariant:
    arguments = {
        **{"outputs_ptr": dtype, "expert_weights_ptr": FP32, "out_ptr": dtype},
        **{"shared_ptr": dtype if shared else None, "hidden_size": hidden, "top_k": top_k},
    }
    config = launch_config("moe_combine", rows=1, hidden_size=hidden)
    return KernelVariant(f"experts_combine_{name}", combine_kernel, arguments, config)


def experts_variants(
    name: str,
    num_experts: int,
    hidden: int,
    inter: int,
    top_k: int,
    dtype: torch.dtype,
    capability: int,
    fp8: str = "",
    kinds: Iterable[str] = KINDS,
) -> list[KernelVariant]:
    """Both products; ``fp8`` is "w8a16" or "w8a8"."""
    variants = []
    rows = U8 if fp8 == "w8a8" else dtype
    for kind in kinds:
        rows_per_expert = KINDS[kind]
        num_tokens = max(-(-rows_per_expert * num_experts // top_k), 65 if rows_per_expert else 64)
        for part in ("up", "down"):
            gated = part == "up"
            shape = (num_experts, 2 * inter, hidden) if gated else (num_experts, hidden, inter)
            facts = grouped_facts(num_tokens, top_k, shape)
            arguments = {
                **{"rows_ptr": rows, "out_ptr": dtype, "order_ptr": I64, "expert_starts_ptr": I64},
                **{"num_experts": num_experts, "out_features": shape[1], "in_features": shape[2]},
                "top_k": top_k,
            }
            label = f"experts_{part}_{name}_{fp8 or dtype}_{kind}".replace("torch.", "")
            if not fp8:
                arguments |= {"weights_ptr": dtype}
                config = grouped_linear_config(capability, rows, gated, facts)
                variants.append(KernelVariant(label, grouped_linear_kernel, arguments, config))
                continue
            arguments |= {
                **{"row_scales_ptr": FP32 if rows == U8 else None, "values_ptr": U8},
                **{"scale_inv_ptr": FP32, "scale_rows_ptr": I32},
                "num_row_blocks": 2 * num_blocks(inter) if gated else num_blocks(hidden),
                "num_scales": num_blocks(shape[2]),
            }
            config = grouped_fp8_linear_config(capability, rows, gated, capability >= 89, facts)
            variants.append(KernelVariant(label, grouped_fp8_linear_kernel, arguments, config))
    return variants


def tight(capability: int, kinds: Iterable[str] = ("decode", "long")) -> list[KernelVariant]:
    """What V3 launches with experts in bf16, W8A16 and W8A8."""
    return [
        route_variant("v3", 256, 8, 4, 8, is_softmax=False),
        align_variant("v3", 256),
        combine_variant("v3", 7168, 8, BF16, shared=True),
        *[
            variant
            for fp8 in ("", "w8a16", "w8a8")
            for variant in experts_variants("v3", 256, 7168, 2048, 8, BF16, capability, fp8, kinds)
        ],
    ]


def every(capability: int) -> list[KernelVariant]:
    variants = [
        *tight(capability, KINDS),
        route_variant("tiny", 8, 1, 1, 2, is_softmax=False),
        route_variant("v2", 160, 8, 3, 6, is_softmax=True),
        route_variant("v2_lite", 64, 1, 1, 6, is_softmax=True),
        align_variant("tiny", 8),
        combine_variant("alone", 7168, 8, BF16, shared=False),
        combine_variant("tiny", 192, 2, FP32, shared=True),
        *experts_variants("odd", 5, 299, 139, 2, BF16, capability, kinds=["decode"]),
        *experts_variants("odd", 5, 299, 139, 2, BF16, capability, "w8a16", ["decode"]),
        *experts_variants("odd", 5, 299, 139, 2, BF16, capability, "w8a8", ["decode"]),
    ]
    for fp8 in ("", "w8a16", "w8a8"):
        variants += experts_variants("tiny", 8, 192, 96, 2, FP32, capability, fp8)
        for dtype in (BF16, FP16, FP32):
            variants += experts_variants("v2", 160, 5120, 1536, 6, dtype, capability, fp8)
        variants += experts_variants("v2_lite", 64, 2048, 1408, 6, BF16, capability, fp8)
    return variants


def test_prompts_have_blocks_for_the_matrix_units_and_decodes_do_not() -> None:
    """64 rows or more, once there are enough rows per expert; never for up to 64 tokens."""
    for capability in SHARED_MEMORY:
        for fp8 in ("", "w8a16", "w8a8"):
            variants = experts_variants("v3", 256, 7168, 2048, 8, BF16, capability, fp8)
            rows = {variant.name.split("_")[-1]: variant.config["BLOCK_M"] for variant in variants}
            assert rows["decode"] == 16 and rows["prompt"] >= 64 and rows["long"] >= 64
            dense = experts_variants("dense", 6, 4096, 1408, 6, BF16, capability, fp8)
            assert dense[0].config["BLOCK_M"] == 16  # 64 tokens that choose every expert
