"""The indexer's and the sparse attention's kernels compile for every chip without spilling."""

from __future__ import annotations

import torch

from kernels.attention_triton import HeadShape, kernel_constants
from kernels.combine_splits_triton import combine_config, combine_splits_kernel
from kernels.compile import KernelVariant
from kernels.indexer_triton import (
    index_config,
    index_scores_kernel,
    norm_rope_and_write_index_kernel,
    scores_config,
    select_config,
    select_top_k_kernel,
)
from kernels.mla import latent_shape
from kernels.sparse_mla_triton import sparse_attention_kernel, sparse_config

BF16, FP32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
PAGE_SIZE = 16


def write_variant(
    name: str, num_heads: int, dim: int, rope_dim: int, dtype: torch.dtype, capability: int
) -> KernelVariant:
    arguments = {
        **{"q_ptr": dtype, "k_ptr": dtype, "norm_weight_ptr": FP32, "norm_bias_ptr": FP32},
        **{"cos_sin_ptr": FP32, "positions_ptr": I64, "slots_ptr": I64, "q_out_ptr": dtype},
        **{"index_cache_ptr": dtype, "k_stride": dim, "num_heads": num_heads, "eps": 1e-6},
    }
    config = index_config(dim, rope_dim, capability)
    return KernelVariant(f"write_{name}", norm_rope_and_write_index_kernel, arguments, config)


def scores_variant(
    name: str, num_heads: int, dim: int, top_k: int, dtype: torch.dtype, capability: int
) -> KernelVariant:
    arguments = {
        **{"q_ptr": dtype, "weights_ptr": FP32, "index_cache_ptr": dtype, "scores_ptr": FP32},
        **{"positions_ptr": I64, "cu_seqlens_ptr": I32, "block_table_ptr": I32},
        **{"first_row": 0, "num_seqs": 1, "scores_stride": 4096, "table_stride": 257},
        "top_k": top_k,
    }
    config = {"PAGE_SIZE": PAGE_SIZE, **scores_config(num_heads, dim, dtype, capability)}
    return KernelVariant(f"scores_{name}", index_scores_kernel, arguments, config)


def select_variant(name: str, top_k: int, capability: int) -> KernelVariant:
    arguments = {
        **{"scores_ptr": FP32, "positions_ptr": I64, "selected_ptr": I32},
        **{"first_row": 0, "scores_stride": 4096, "top_k": top_k},
    }
    config = select_config(top_k, capability)
    return KernelVariant(f"select_{name}", select_top_k_kernel, arguments, config)


def sparse_variants(
    name: str, shape: HeadShape, top_k: int, dtype: torch.dtype, capability: int
) -> list[KernelVariant]:
    """Chunks, decodes in several splits, those in one, and what combines the splits."""
    variants = []
    for kind in ("chunk", "split", "decode"):
        is_partial = kind == "split"
        width = shape.main_dim + shape.tail_dim
        config = sparse_config(shape, dtype, capability, is_decode=kind != "chunk")
        arguments: dict[str, torch.dtype | int | float | None] = {
            **{"q_ptr": dtype, "q_tail_ptr": dtype, "k_ptr": dtype, "selected_ptr": I32},
            **{"out_ptr": FP32 if is_partial else dtype, "lse_ptr": FP32 if is_partial else None},
            **{"positions_ptr": I64, "cu_seqlens_ptr": I32, "context_lens_ptr": I32},
            **{"block_table_ptr": I32, "scale_log2": 0.1, "first_row": 0, "num_seqs": 1},
            **{"max_splits": 8, "top_k": top_k, "table_stride": 257},
            **{"min_split": 64, "split_limit": 16},
            **{"q_token_stride": shape.main_dim, "q_head_stride": 64 * shape.main_dim},
            **{"q_tail_token_stride": 128 * width, "q_tail_head_stride": width},
        }
        launch = {"PAGE_SIZE": PAGE_SIZE, "PARTIAL": is_partial, **kernel_constants(config)}
        variants.append(KernelVariant(f"{kind}_{name}", sparse_attention_kernel, arguments, launch))
        if is_partial:
            arguments = {
                **{"partial_ptr": FP32, "lse_ptr": FP32, "out_ptr": dtype},
                **{"context_lens_ptr": I32, "num_heads": shape.group_size, "max_splits": 8},
                **{"min_split": 64, "split_limit": 16, "block_n": config["BLOCK_N"]},
            }
            launch = combine_config(config, capability, keep_empty=True)
            variants.append(
                KernelVariant(f"combine_{name}", combine_splits_kernel, arguments, launch)
            )
    return variants


V32 = latent_shape(128, 512, 64)
TINY = latent_shape(4, 64, 16)


def tight(capability: int) -> list[KernelVariant]:
    """All that V3.2 launches in bf16."""
    return [
        write_variant("v32", 64, 128, 64, BF16, capability),
        scores_variant("v32", 64, 128, 2048, BF16, capability),
        select_variant("v32", 2048, capability),
        *sparse_variants("v32", V32, 2048, BF16, capability),
    ]


def every(capability: int) -> list[KernelVariant]:
    return [
        *tight(capability),
        write_variant("tiny_fp32", 16, 12, 8, FP32, capability),
        write_variant("whole_rope", 3, 40, 40, BF16, capability),
        scores_variant("tiny_fp32", 16, 12, 24, FP32, capability),
        scores_variant("tiny", 16, 12, 24, BF16, capability),
        scores_variant("v32_fp16", 64, 128, 2048, torch.float16, capability),
        scores_variant("v32_fp32", 64, 128, 2048, FP32, capability),
        scores_variant("many_heads", 80, 128, 2048, BF16, capability),
        scores_variant("widest", 16, 512, 2048, BF16, capability),
        scores_variant("widest_fp32", 16, 512, 2048, FP32, capability),
        select_variant("tiny", 24, capability),
        *sparse_variants("tiny_fp32", TINY, 24, FP32, capability),
        *sparse_variants("tiny", TINY, 24, BF16, capability),
        *sparse_variants("v32_fp32", V32, 2048, FP32, capability),
        *sparse_variants("v32_fp16", V32, 2048, torch.float16, capability),
    ]
