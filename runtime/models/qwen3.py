"""Qwen3 (arXiv:2505.09388), the family of DeepSeek-R1-0528-Qwen3-8B.

As Llama, but every query and key head goes through an RMSNorm of its own before the rotation.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor

from kernels.attention import paged_attention
from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_kv
from runtime.config import MAX_WIDTH, Fields
from runtime.models.decoder import CacheSpec, Decoder, DecoderConfig, DecoderLayer, parse_decoder
from runtime.models.grouped_query import HeadsConfig, kv_cache_spec, parse_heads, split_heads
from runtime.models.layers import GatedMLP, Linear, Placement, RMSNorm, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    heads: HeadsConfig
    intermediate_size: int


def parse_qwen3(fields: Fields, tensor_names: Container[str]) -> Qwen3Config:
    """A `Qwen3ForCausalLM` config.json. Raises `CheckpointError`."""
    for key in ("use_sliding_window", "attention_bias"):
        if fields.boolean(key, False):
            raise fields.error(key, "true is not supported for Qwen3ForCausalLM")
    common = parse_decoder(fields)
    return Qwen3Config(
        **common,
        heads=parse_heads(fields, common["hidden_size"]),
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
    )


class Qwen3Attention:
    """Grouped-query attention on normed query and key heads."""

    def __init__(self, config: Qwen3Config, placement: Placement) -> None:
        self.heads = heads = config.heads
        self.scale = heads.head_dim**-0.5
        self.batch_invariant = placement.batch_invariant
        qkv = {"q_proj": heads.q_size, "k_proj": heads.kv_size, "v_proj": heads.kv_size}
        self.qkv_proj = Linear(config.hidden_size, qkv, placement)
        self.q_norm = RMSNorm(heads.head_dim, config.rms_norm_eps, placement)
        self.k_norm = RMSNorm(heads.head_dim, config.rms_norm_eps, placement)
        self.o_proj = Linear(heads.q_size, {"o_proj": config.hidden_size}, placement)

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.heads)  # [num_tokens, heads, head_dim] each
        q = rope_and_write_kv(
            q,
            k,
            v,
            cos_sin,
            batch,
            cache["k"],
            cache["v"],
            q_norm=self.q_norm.weight,
            k_norm=self.k_norm.weight,
            eps=self.q_norm.eps,
        )
        out = paged_attention(
            *(q, cache["k"], cache["v"], batch, self.scale), batch_invariant=self.batch_invariant
        )
        return self.o_proj(out.flatten(1))  # [num_tokens, hidden]

    def targets(self, prefix: str) -> Targets:
        return {
            **self.qkv_proj.targets(prefix),
            f"{prefix}q_norm.weight": self.q_norm.weight,
            f"{prefix}k_norm.weight": self.k_norm.weight,
            **self.o_proj.targets(prefix),
        }

    def cache_spec(self) -> CacheSpec:
        return kv_cache_spec(self.heads)


def build_qwen3(config: Qwen3Config, placement: Placement, max_model_len: int) -> Decoder:
    """Qwen3, parameters uninitialised."""
    layers = [
        DecoderLayer(
            config,
            Qwen3Attention(config, placement),
            GatedMLP(config.hidden_size, config.intermediate_size, placement),
            placement,
        )
        for _ in range(config.num_layers)
    ]
    rope_dim = config.heads.head_dim
    return Decoder(config, layers, placement, rope_dim=rope_dim, max_model_len=max_model_len)
