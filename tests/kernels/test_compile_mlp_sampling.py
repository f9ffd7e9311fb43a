"""Norms, activation, experts and sampler compile for every chip without spilling, with no GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import silu_and_mul_kernel
from kernels.compile import SHARED_MEMORY, KernelVariant
from kernels.configs import launch_config
from kernels.moe_route_triton import route_config, route_noaux_tc_kernel, route_softmax_kernel
from kernels.moe_triton import (
    COMBINE_CONFIG,
    combine_kernel,
    grouped_linear_config,
    grouped_linear_kernel,
)
from kernels.norm import rms_norm_config, rms_norm_kernel
from kernels.sampling_triton import CONFIG, adjust_kernel, logprobs_kernel, sample_kernel
from tests.kernels.compiled import check, check_tensor_cores
from tests.kernels.passes import INTERPRETED

BF16, FP32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64


def norm_variant(name: str, hidden_size: int, dtype: torch.dtype, add: bool) -> KernelVariant:
    other = dtype if add else None
    arguments = {
        **{"x_ptr": dtype, "residual_ptr": other, "weight_ptr": dtype, "out_ptr": dtype},
        **{"total_ptr": other, "x_stride": hidden_size, "hidden_size": hidden_size, "eps": 1e-6},
    }
    config = {"ADD": add, **rms_norm_config(hidden_size)}
    return KernelVariant(f"norm_{name}", rms_norm_kernel, arguments, config)


def silu_variant(name: str, size: int, dtype: torch.dtype) -> KernelVariant:
    arguments = {"gate_up_ptr": dtype, "out_ptr": dtype, "row_stride": 2 * size, "size": size}
    return KernelVariant(
        f"silu_{name}", silu_and_mul_kernel, arguments, launch_config("silu_and_mul")
    )


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


def experts_variants(
    name: str, num_experts: int, hidden: int, inter: int, top_k: int, dtype: torch.dtype
) -> list[KernelVariant]:
    def grouped(part: str, sorted_rows: bool, features: tuple[int, int]) -> KernelVariant:
        arguments = {
            **{"rows_ptr": dtype, "weights_ptr": dtype, "out_ptr": dtype, "order_ptr": I64},
            **{"expert_starts_ptr": I64, "num_experts": num_experts, "top_k": top_k},
            **{"out_features": features[0], "in_features": features[1]},
        }
        block = 1 << (num_experts - 1).bit_length()
        config = {
            **{"SORTED_ROWS": sorted_rows, "EXPERTS_BLOCK": block},
            **grouped_linear_config(dtype),
        }
        return KernelVariant(f"experts_{part}_{name}", grouped_linear_kernel, arguments, config)

    combine = {
        **{"outputs_ptr": dtype, "expert_weights_ptr": FP32, "out_ptr": dtype},
        **{"hidden_size": hidden, "top_k": top_k},
    }
    return [
        grouped("up", False, (2 * inter, hidden)),
        grouped("down", True, (hidden, inter)),
        KernelVariant(f"experts_combine_{name}", combine_kernel, combine, COMBINE_CONFIG),
    ]


def sample_variant(name: str, vocab_size: int, greedy: bool, filters: bool) -> KernelVariant:
    arguments = {
        **{"logits_ptr": FP32, "token_ids_ptr": I64, "temperature_ptr": FP32, "top_k_ptr": I32},
        **{"top_p_ptr": FP32, "min_p_ptr": FP32, "seeds_ptr": I64, "positions_ptr": I64},
        **{"logits_stride": vocab_size, "vocab_size": vocab_size},
    }
    config = {"ALL_GREEDY": greedy, "ANY_FILTER": filters, **CONFIG}
    return KernelVariant(f"sample_{name}", sample_kernel, arguments, config)


def adjust_variant(name: str, bias: bool, counts: bool) -> KernelVariant:
    arguments = {
        **{"logits_ptr": FP32, "out_ptr": FP32, "counts_ptr": I32 if counts else None},
        **{"rows_ptr": I64 if counts else None, "logits_stride": 129280, "vocab_size": 129280},
        **{f"{part}_ptr": FP32 if counts else None for part in ("presence", "frequency")},
        **{"repetition_ptr": FP32 if counts else None, "count_stride": 129280 if counts else 0},
        **{"bias_ids_ptr": I64 if bias else None, "bias_values_ptr": FP32 if bias else None},
        "max_bias": 300 if bias else 0,
    }
    config = {"HAS_BIAS": bias, "HAS_COUNTS": counts, **CONFIG}
    return KernelVariant(f"adjust_{name}", adjust_kernel, arguments, config)


LOGPROBS = KernelVariant(
    "logprobs",
    logprobs_kernel,
    {
        **{"logits_ptr": FP32, "token_ids_ptr": I64, "logprobs_ptr": FP32, "top_ids_ptr": I64},
        **{"top_logprobs_ptr": FP32, "logits_stride": 129280, "vocab_size": 129280, "num_top": 20},
    },
    CONFIG,
)
VARIANTS = [
    norm_variant("v3", 7168, BF16, add=True),
    norm_variant("v3_latent", 512, BF16, add=False),
    norm_variant("tiny", 192, FP32, add=True),
    silu_variant("v3", 2048, BF16),
    silu_variant("tiny", 96, FP32),
    route_variant("v3", 256, 8, 4, 8, is_softmax=False),
    route_variant("tiny", 8, 1, 1, 2, is_softmax=False),
    route_variant("v2", 160, 8, 3, 6, is_softmax=True),
    route_variant("v2_lite", 64, 1, 1, 6, is_softmax=True),
    *experts_variants("v3", 256, 7168, 2048, 8, BF16),
    *experts_variants("v2", 160, 5120, 1536, 6, BF16),
    *experts_variants("tiny", 8, 192, 96, 2, FP32),
    sample_variant("greedy", 129280, greedy=True, filters=False),
    sample_variant("plain", 129280, greedy=False, filters=False),
    sample_variant("filters", 151936, greedy=False, filters=True),
    adjust_variant("bias", bias=True, counts=False),
    adjust_variant("all", bias=True, counts=True),
    LOGPROBS,
]


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel has no machine code")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiles_without_spilling(variant: KernelVariant, capability: int) -> None:
    check([variant], capability)


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel has no machine code")
@pytest.mark.parametrize("capability", [80, 90])
def test_products_use_the_tensor_cores(capability: int) -> None:
    check_tensor_cores(VARIANTS, capability)
