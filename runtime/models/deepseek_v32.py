"""DeepSeek-V3.2 (arXiv:2512.02556): V3 with sparse attention, chosen by a lightning indexer.

    q_I = wq_b(query latent)  [H_I, d]      k_I = LayerNorm(wk x)  [d]      both rotated in front
    score[t, s] = Σ_h w[t, h] · relu(q_I[t, h] · k_I[s]),  w = weights_proj(x) · H_I^-0.5 · d^-0.5

Each token attends to the ``index_topk`` best of its context; while the context is no longer than
that, to all of it. The release also turns q_I and k_I by a Hadamard matrix, which changes no score,
and quantizes them to FP8, which only approximates the scores: as in transformers both are left out,
and keys are cached in the cache's dtype.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.indexer import norm_rope_and_write_index, select_keys
from runtime.config import MAX_POSITION, Fields
from runtime.models.decoder import CacheSpec, Decoder
from runtime.models.deepseek_v3 import DeepseekV3Config, parse_v3_fields, v3_decoder
from runtime.models.latent import LatentHeads, QueryLatent
from runtime.models.layers import Linear, Placement, Targets

INDEX_NORM_EPS = 1e-6  # of the indexer's LayerNorm, which config.json does not name


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV32Config(DeepseekV3Config):
    indexer: IndexerConfig


def parse_deepseek_v32(fields: Fields, tensor_names: Container[str]) -> DeepseekV32Config:
    """A `DeepseekV32ForCausalLM` config.json. Raises `CheckpointError`."""
    if fields.boolean("indexer_rope_interleave", False):
        raise fields.error("indexer_rope_interleave", "true is not supported")
    common = parse_v3_fields(fields, tensor_names)
    rope_dim = common["latent"].qk_rope_head_dim
    indexer = IndexerConfig(
        num_heads=fields.integer("index_n_heads", high=4096),
        head_dim=fields.integer("index_head_dim", low=rope_dim, high=1024),
        top_k=fields.integer("index_topk", high=MAX_POSITION),
    )
    return DeepseekV32Config(**common, indexer=indexer)


class Indexer:
    """Chooses the positions that each token attends to, from keys of its own."""

    def __init__(self, config: DeepseekV32Config, placement: Placement) -> None:
        self.config = indexer = config.indexer
        self.weight_scale = (indexer.num_heads * indexer.head_dim) ** -0.5
        self.wq_b = Linear(
            config.q_lora_rank, {"wq_b": indexer.num_heads * indexer.head_dim}, placement
        )
        self.wk = Linear(config.hidden_size, {"wk": indexer.head_dim}, placement)
        self.norm_weight = placement.empty(indexer.head_dim, dtype=torch.float32)
        self.norm_bias = placement.empty(indexer.head_dim, dtype=torch.float32)
        self.weights_proj = Linear(
            config.hidden_size, {"weights_proj": indexer.num_heads}, placement.unquantized
        )

    def __call__(
        self,
        x: Tensor,
        q_latent: Tensor,
        cos_sin: Tensor,
        batch: PagedBatch,
        cache: dict[str, Tensor],
    ) -> Tensor | None:
        """Write the tokens' keys; chosen positions [num_tokens, top_k], None for all of them."""
        q = norm_rope_and_write_index(
            self.wq_b(q_latent).view(-1, self.config.num_heads, self.config.head_dim),
            self.wk(x),
            self.norm_weight,
            self.norm_bias,
            INDEX_NORM_EPS,
            cos_sin,
            batch,
            cache["index_k"],
        )  # [num_tokens, H_I, d]
        if batch.max_context_len <= self.config.top_k:
            return None
        weights = self.weights_proj(x).float() * self.weight_scale  # [num_tokens, H_I]
        return select_keys(q, weights, cache["index_k"], batch, self.config.top_k)

    def targets(self, prefix: str) -> Targets:
        return {
            **self.wq_b.targets(prefix),
            **self.wk.targets(prefix),
            f"{prefix}k_norm.weight": self.norm_weight,
            f"{prefix}k_norm.bias": self.norm_bias,
            **self.weights_proj.targets(prefix),
        }


class SparseLatentAttention:
    """MLA to the positions that the indexer chose."""

    def __init__(self, config: DeepseekV32Config, placement: Placement) -> None:
        hidden_size = config.hidden_size
        self.indexer = Indexer(config, placement)
        self.query = QueryLatent(config.latent, config.q_lora_rank, hidden_size, placement)
        self.heads = LatentHeads(config.latent, hidden_size, config.rope, placement)

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        q_latent, kv_latent, k_pe = self.query(x)
        selected = self.indexer(x, q_latent, cos_sin, batch, cache)
        q = self.query.q_b_proj(q_latent)
        q_nope, q_pe = self.heads.write(q, kv_latent, k_pe, cos_sin, batch, cache)
        return self.heads.attend(q_nope, q_pe, batch, cache, selected)

    def targets(self, prefix: str) -> Targets:
        return {
            **self.query.targets(prefix),
            **self.indexer.targets(f"{prefix}indexer."),
            **self.heads.targets(prefix),
        }

    def cache_spec(self) -> CacheSpec:
        return self.heads.cache_spec() | {"index_k": (self.indexer.config.head_dim,)}


def build_deepseek_v32(
    config: DeepseekV32Config, placement: Placement, max_model_len: int
) -> Decoder:
    """V3.2 with its MTP layers, parameters uninitialised."""
    return v3_decoder(
        config, lambda: SparseLatentAttention(config, placement), placement, max_model_len
    )
