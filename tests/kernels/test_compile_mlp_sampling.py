"""Norms, activation and sampler compile for every chip without spilling, with no GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import silu_and_mul_kernel
from kernels.compile import SHARED_MEMORY, KernelVariant
from kernels.configs import launch_config
from kernels.norm import rms_norm_config, rms_norm_kernel
from kernels.sampling_logprobs_triton import (
    COUNT_BLOCK,
    block_top_kernel,
    count_kernel,
    logprobs_kernel,
)
from kernels.sampling_search_triton import search_kernel
from kernels.sampling_triton import block_best_kernel, block_mass_kernel, draw_kernel
from tests.kernels.compiled import check
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


def sample_variants(
    name: str, vocab_size: int, dtype: torch.dtype, filters: str = "", greedy: bool = False
) -> list[KernelVariant]:
    """The launches of a step after the first; ``filters`` names those that are host-known."""
    config = launch_config("sample", arch=90)
    num_blocks = -(-vocab_size // config["BLOCK"])
    row_config = {**config, "BLOCKS": 1 << (num_blocks - 1).bit_length()}
    top_k, top_p = "top_k" in filters, "top_p" in filters
    search = I64 if top_k or top_p else None
    common = {
        **{"logits_ptr": dtype, "best_ptr": I64, "search_ptr": search, "temperature_ptr": FP32},
        **{"top_k_ptr": I32, "top_p_ptr": FP32, "logits_stride": vocab_size},
        **{"vocab_size": vocab_size, "num_blocks": num_blocks},
    }
    masses = {"masses_ptr": None if greedy else I64, "min_p_ptr": FP32}
    draw = {"token_ids_ptr": I64, "seeds_ptr": I64, "positions_ptr": I64}
    flags = {"ANY_FILTER": bool(filters), "ANY_TOP_K": top_k, "ANY_TOP_P": top_p, **row_config}
    variants = [
        KernelVariant(
            f"sample_draw_{name}",
            draw_kernel,
            common | masses | draw,
            {"ALL_GREEDY": greedy, **flags},
        )
    ]
    if not greedy:
        variants.append(
            KernelVariant(f"sample_mass_{name}", block_mass_kernel, common | masses, flags)
        )
    launch = {
        **{"ANY_TOP_K": top_k, "BLOCK": config["BLOCK"], "BLOCKS": row_config["BLOCKS"]},
    }
    for by_mass, rows in [(False, 1), (False, 64)] * top_k + [(True, 1), (True, 64)] * top_p:
        part = f"{'mass' if by_mass else 'count'}_{rows}"
        arguments = common | {"level": 1}
        config = {
            **{"BY_MASS": by_mass, **launch},
            **launch_config("sample_search", arch=90, rows=rows),
        }
        variants += [
            KernelVariant(f"sample_search_{part}_{name}", search_kernel, arguments, config)
        ]
    return variants


def best_variant(
    name: str,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    counts: bool = False,
    masks: bool = False,
    logprobs: bool = False,
    search: bool = False,
) -> KernelVariant:
    config = launch_config("sample", arch=90)
    per_row = FP32 if counts else None
    arguments = {
        **{"logits_ptr": dtype, "adjusted_ptr": FP32 if bias or counts or masks else None},
        **{"best_ptr": I64, "raw_sums_ptr": FP32 if logprobs else None},
        **{"search_ptr": I64 if search else None, "counts_ptr": I32 if counts else None},
        **{"rows_ptr": I64 if counts else None, "presence_ptr": per_row},
        **{"frequency_ptr": per_row, "repetition_ptr": per_row},
        **{"bias_ids_ptr": I64 if bias else None, "bias_values_ptr": FP32 if bias else None},
        **{"masks_ptr": I32 if masks else None, "mask_rows_ptr": I32 if masks else None},
        **{"logits_stride": 129280, "count_stride": 129280 if counts else 0},
        **{"vocab_size": 129280, "num_blocks": -(-129280 // config["BLOCK"])},
        **{"max_bias": 300 if bias else 0, "masks_stride": 4040 if masks else 0},
    }
    return KernelVariant(f"sample_best_{name}", block_best_kernel, arguments, config)


def logprobs_variants(dtype: torch.dtype) -> list[KernelVariant]:
    config = launch_config("sample", arch=90)
    num_blocks = -(-151936 // config["BLOCK"])
    common = {
        **{"logits_ptr": dtype, "tops_ptr": I64, "logits_stride": 151936},
        **{"num_blocks": num_blocks, "num_top": 20},
    }
    outputs = {
        **{"raw_sums_ptr": FP32, "token_ids_ptr": I64, "logprobs_ptr": FP32},
        **{"top_ids_ptr": I64, "top_logprobs_ptr": FP32},
    }
    warps = {"num_warps": config["num_warps"]}
    merge = {"BLOCKS": 1 << (num_blocks - 1).bit_length(), **warps}
    return [
        KernelVariant("block_top", block_top_kernel, common | {"vocab_size": 151936}, config),
        KernelVariant("logprobs", logprobs_kernel, common | outputs, merge),
    ]


COUNT = KernelVariant(
    "count_tokens",
    count_kernel,
    {
        **{"counts_ptr": I32, "rows_ptr": I64, "token_ids_ptr": I64},
        **{"count_stride": 129280, "num_tokens": 64},
    },
    {"BLOCK": COUNT_BLOCK, "num_warps": 4},
)
VARIANTS = [
    norm_variant("v3", 7168, BF16, add=True),
    norm_variant("v3_latent", 512, BF16, add=False),
    norm_variant("tiny", 192, FP32, add=True),
    silu_variant("v3", 2048, BF16),
    silu_variant("tiny", 96, FP32),
    best_variant("plain", BF16),
    best_variant("search", FP32, search=True, logprobs=True),
    best_variant("bias", BF16, bias=True),
    best_variant("mask", BF16, masks=True),
    best_variant("all", FP32, bias=True, counts=True, masks=True, logprobs=True, search=True),
    *sample_variants("greedy", 129280, FP32, greedy=True),
    *sample_variants("plain", 129280, BF16),
    *sample_variants("min_p", 102400, FP32, "min_p"),
    *sample_variants("top_p", 151936, FP32, "top_p"),
    *sample_variants("top_k", 32256, BF16, "top_k"),
    *sample_variants("both", 129280, FP32, "top_k top_p"),
    *sample_variants("tiny", 300, FP32, "top_k top_p"),
    *logprobs_variants(FP32),
    COUNT,
]


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel has no machine code")
@pytest.mark.parametrize(
    "capability",
    # these kernels are small: one chip of each kind tells, all of them run with -m slow
    [
        pytest.param(capability, marks=[] if capability in (80, 90, 120) else pytest.mark.slow)
        for capability in SHARED_MEMORY
    ],
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiles_without_spilling(variant: KernelVariant, capability: int) -> None:
    check([variant], capability)
