"""Attention and cache kernels compile for every chip without spilling, with no GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_triton import (
    HeadShape,
    attention_config,
    head_shape,
    kernel_constants,
    paged_attention_kernel,
)
from kernels.cache import (
    kv_config,
    latent_config,
    rope_and_write_kv_kernel,
    rope_and_write_latent_kernel,
)
from kernels.combine_splits_triton import combine_config, combine_splits_kernel
from kernels.compile import SHARED_MEMORY, KernelVariant, compile_variant
from kernels.embedding import embedding_config, embedding_kernel
from kernels.mla import latent_shape
from tests.kernels.passes import INTERPRETED

BF16, FP32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
PAGE_SIZE = 16


def attention_variants(
    name: str, shape: HeadShape, dtype: torch.dtype, capability: int, kinds: tuple[str, ...]
) -> list[KernelVariant]:
    """The launches of one model's attention: decodes in one split or in several, and chunks."""
    width = shape.main_dim + shape.tail_dim
    tail = dtype if shape.tail_dim else None
    value = None if shape.values_are_keys else dtype
    q_width = shape.main_dim if shape.values_are_keys else width
    num_kv_heads = 1 if shape.values_are_keys else 4
    variants = []
    for kind in kinds:
        is_partial = kind == "split"
        config = attention_config(shape, dtype, capability, is_decode=kind != "chunk")
        arguments: dict[str, torch.dtype | int | float | None] = {
            **{"q_ptr": dtype, "q_tail_ptr": tail, "k_ptr": dtype, "k_tail_ptr": tail},
            **{"v_ptr": value, "out_ptr": FP32 if is_partial else dtype},
            **{"lse_ptr": FP32 if is_partial else None, "block_table_ptr": I32},
            **{"cu_seqlens_ptr": I32, "context_lens_ptr": I32, "scale_log2": 0.1},
            **{"first_seq": 0, "num_tiles": 4, "max_splits": 4},
            **{"min_split": 64, "split_limit": 16},
            **{"context_above": 0, "context_up_to": 2**31 - 2, "table_stride": 257},
            **{"q_token_stride": 2 * q_width * num_kv_heads, "q_head_stride": q_width},
            **{"q_tail_token_stride": 2 * width if tail else 0},
            **{"q_tail_head_stride": width if tail else 0},
            **{"k_slot_stride": width * num_kv_heads, "k_head_stride": width},
            **{"v_slot_stride": shape.v_dim * num_kv_heads if value else 0},
            **{"v_head_stride": shape.v_dim if value else 0},
        }
        launch = {"PAGE_SIZE": PAGE_SIZE, "PARTIAL": is_partial, **kernel_constants(config)}
        variants.append(KernelVariant(f"{kind}_{name}", paged_attention_kernel, arguments, launch))
        if is_partial:
            arguments = {
                **{"partial_ptr": FP32, "lse_ptr": FP32, "out_ptr": dtype},
                **{"context_lens_ptr": I32, "num_heads": 28, "max_splits": 4},
                **{"min_split": 64, "split_limit": 16, "block_n": config["BLOCK_N"]},
            }
            launch = combine_config(config, capability, keep_empty=False)
            variants.append(
                KernelVariant(f"combine_{name}", combine_splits_kernel, arguments, launch)
            )
    return variants


def kv_variant(
    name: str, dim: int, dtype: torch.dtype, capability: int, is_normed: bool
) -> KernelVariant:
    norm = dtype if is_normed else None
    arguments = {
        **{"q_ptr": dtype, "k_ptr": dtype, "v_ptr": dtype, "cos_sin_ptr": FP32},
        **{"q_norm_ptr": norm, "k_norm_ptr": norm, "eps": 1e-6},
        **{"positions_ptr": I64, "slots_ptr": I64, "q_out_ptr": dtype},
        **{"k_cache_ptr": dtype, "v_cache_ptr": dtype, "num_heads": 28, "num_kv_heads": 4},
        **{"q_stride": 36 * dim, "k_stride": 36 * dim, "v_stride": 36 * dim},
    }
    config = kv_config(dim, dim, capability)
    return KernelVariant(f"write_{name}", rope_and_write_kv_kernel, arguments, config)


def latent_variant(
    name: str, dim: int, rank: int, dtype: torch.dtype, capability: int
) -> KernelVariant:
    arguments = {
        **{"q_pe_ptr": dtype, "latent_ptr": dtype, "k_pe_ptr": dtype, "cos_sin_ptr": FP32},
        **{"latent_norm_ptr": dtype, "eps": 1e-6},
        **{"positions_ptr": I64, "slots_ptr": I64, "q_out_ptr": dtype, "latent_cache_ptr": dtype},
        **{"q_stride": 48 * dim, "q_head_stride": 3 * dim, "num_heads": 16},
        **{"latent_stride": rank + dim, "k_pe_stride": rank + dim},
    }
    config = latent_config(dim, rank, capability)
    return KernelVariant(f"write_{name}", rope_and_write_latent_kernel, arguments, config)


def embedding_variant(
    name: str, hidden_size: int, dtype: torch.dtype, capability: int
) -> KernelVariant:
    arguments = {
        **{"token_ids_ptr": I64, "weight_ptr": dtype, "out_ptr": dtype, "hidden_size": hidden_size}
    }
    config = embedding_config(hidden_size, capability)
    return KernelVariant(f"embedding_{name}", embedding_kernel, arguments, config)


DECODE, SPLIT, CHUNK = ("decode",), ("split",), ("chunk",)
Launch = tuple[str, HeadShape, torch.dtype, tuple[str, ...]]
# the launches of each kind that take the most registers or shared memory
TIGHT: list[Launch] = [
    ("qwen_7b", head_shape(7, 128, 128), BF16, SPLIT + CHUNK),
    ("v3_expanded", head_shape(1, 192, 128), BF16, CHUNK),
    ("v2_lite", latent_shape(16, 512, 64), BF16, SPLIT + CHUNK),
    ("v3", latent_shape(128, 512, 64), BF16, SPLIT),
    ("tiny_fp32", latent_shape(4, 64, 16), FP32, SPLIT + CHUNK),
    ("tiny_expanded_fp32", head_shape(1, 48, 32), FP32, CHUNK),
]
ALL: list[Launch] = [
    *TIGHT,
    ("qwen_7b", head_shape(7, 128, 128), BF16, DECODE),
    ("llama_8b", head_shape(4, 128, 128), BF16, SPLIT + CHUNK),
    ("llama_8b_fp16", head_shape(4, 128, 128), torch.float16, SPLIT + CHUNK),
    ("llama_8b_fp32", head_shape(4, 128, 128), FP32, SPLIT + CHUNK),
    ("llama_7b", head_shape(1, 128, 128), BF16, SPLIT + CHUNK),
    ("qwen_14b", head_shape(5, 128, 128), BF16, SPLIT + CHUNK),
    ("qwen_1_5b", head_shape(6, 128, 128), BF16, SPLIT + CHUNK),
    ("llama_70b", head_shape(8, 128, 128), BF16, SPLIT + CHUNK),
    ("mqa_32", head_shape(32, 128, 128), BF16, SPLIT + CHUNK),
    ("dim_64", head_shape(8, 64, 64), BF16, SPLIT + CHUNK),
    ("dim_80", head_shape(5, 80, 80), BF16, SPLIT + CHUNK),
    ("v3_expanded_fp32", head_shape(1, 192, 128), FP32, CHUNK),
    ("v2_lite", latent_shape(16, 512, 64), BF16, DECODE),
    ("v2_lite_fp32", latent_shape(16, 512, 64), FP32, SPLIT + CHUNK),
    ("v3", latent_shape(128, 512, 64), BF16, CHUNK),
    ("tiny", latent_shape(4, 64, 16), BF16, DECODE + SPLIT + CHUNK),
    ("tiny_fp32", latent_shape(4, 64, 16), FP32, DECODE),
    ("tiny_expanded", head_shape(1, 48, 32), BF16, CHUNK),
]


def small_variants(capability: int) -> list[KernelVariant]:
    """What surrounds an attention."""
    return [
        kv_variant("kv_128", 128, BF16, capability, is_normed=False),
        kv_variant("normed_kv_128", 128, BF16, capability, is_normed=True),
        kv_variant("normed_kv_80", 80, torch.float16, capability, is_normed=True),
        kv_variant("kv_64_fp32", 64, FP32, capability, is_normed=False),
        kv_variant("normed_kv_128_fp32", 128, FP32, capability, is_normed=True),
        latent_variant("latent_512", 64, 512, BF16, capability),
        latent_variant("latent_512_fp32", 64, 512, FP32, capability),
        latent_variant("latent_tiny_fp32", 16, 64, FP32, capability),
        embedding_variant("4096", 4096, BF16, capability),
        embedding_variant("7168", 7168, BF16, capability),
        embedding_variant("tiny_fp32", 192, FP32, capability),
    ]


def variants_of(launches: list[Launch], capability: int) -> list[KernelVariant]:
    attention = [
        variant
        for name, shape, dtype, kinds in launches
        for variant in attention_variants(name, shape, dtype, capability, kinds)
    ]
    return attention + small_variants(capability)


def tight(capability: int) -> list[KernelVariant]:
    return variants_of(TIGHT, capability)


def every(capability: int) -> list[KernelVariant]:
    return variants_of(ALL, capability)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
def test_a_kernel_that_needs_too_much_is_found() -> None:
    """Sums of 64 x 512 floats in 128 threads leave no register for anything else."""
    (fine,) = attention_variants("v3", latent_shape(128, 512, 64), BF16, 90, ("chunk",))
    config = {**fine.config, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 5}
    greedy = KernelVariant("greedy", fine.kernel, fine.arguments, config)
    resources = compile_variant(greedy, 90)
    assert resources.stack_bytes > 0
    assert resources.shared_bytes > SHARED_MEMORY[90]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
def test_a_variant_names_every_parameter() -> None:
    fine = kv_variant("kv", 128, BF16, 90, is_normed=True)
    arguments = {key: value for key, value in fine.arguments.items() if key != "k_stride"}
    with pytest.raises(ValueError, match="k_stride"):
        compile_variant(KernelVariant("short", fine.kernel, arguments, fine.config), 90)
