"""Llama (arXiv:2302.13971) and Qwen2 (arXiv:2407.10671): dense decoders with grouped queries.

DeepSeek-LLM, -Math and -Coder and the R1 distills are of these two families. They differ in one
thing: Qwen2 adds a bias to q, k and v.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kernels.attention import paged_attention
from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_kv
from kernels.linear import linear
from runtime.config import MAX_POSITION, MAX_WIDTH, Fields, RopeConfig, parse_rope
from runtime.models.layers import GatedMLP, Linear, Placement, RMSNorm, Targets, rope_table


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


def parse_llama(fields: Fields, tensor_names: Container[str]) -> LlamaConfig:
    """A `LlamaForCausalLM` config.json. Raises `CheckpointError`."""
    bias = fields.boolean("attention_bias", False)
    return _parse(fields, qkv_bias=bias, output_bias=bias)


def parse_qwen2(fields: Fields, tensor_names: Container[str]) -> LlamaConfig:
    """A `Qwen2ForCausalLM` config.json. Raises `CheckpointError`."""
    if fields.boolean("use_sliding_window", False):
        raise fields.error("use_sliding_window", "sliding-window attention is not supported")
    return _parse(fields, qkv_bias=True, output_bias=False)


def _parse(fields: Fields, *, qkv_bias: bool, output_bias: bool) -> LlamaConfig:
    fields.choice("hidden_act", ("silu",), "silu")
    hidden_size = fields.integer("hidden_size", high=MAX_WIDTH)
    num_heads = fields.integer("num_attention_heads", high=4096)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=4096)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads"
        )
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"{num_heads} does not divide {hidden_size}")
    head_dim = fields.integer("head_dim", hidden_size // num_heads, low=2, high=1024)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding needs pairs")
    max_position = fields.integer("max_position_embeddings", high=MAX_POSITION)
    return LlamaConfig(
        vocab_size=fields.integer("vocab_size", high=MAX_WIDTH),
        hidden_size=hidden_size,
        num_layers=fields.integer("num_hidden_layers", high=1024),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        max_position_embeddings=max_position,
        rope=parse_rope(fields, max_position),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
    )


class Attention:
    """Causal attention with ``num_heads / num_kv_heads`` query heads on each key-value head."""

    def __init__(self, config: LlamaConfig, placement: Placement) -> None:
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        qkv = {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        self.qkv_proj = Linear(config.hidden_size, qkv, placement, bias=config.qkv_bias)
        self.o_proj = Linear(
            self.q_size, {"o_proj": config.hidden_size}, placement, bias=config.output_bias
        )

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        qkv = self.qkv_proj(x)  # [num_tokens, q_size + 2 * kv_size]
        q, k, v = qkv.split_with_sizes([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = q.view(-1, self.num_heads, self.head_dim)
        k = k.view(-1, self.num_kv_heads, self.head_dim)
        v = v.view(-1, self.num_kv_heads, self.head_dim)
        q = rope_and_write_kv(q, k, v, cos_sin, batch, cache["k"], cache["v"])
        out = paged_attention(q, cache["k"], cache["v"], batch, self.scale)
        return self.o_proj(out.flatten(1))  # [num_tokens, hidden]

    def targets(self, prefix: str) -> Targets:
        return self.qkv_proj.targets(prefix) | self.o_proj.targets(prefix)


class DecoderLayer:
    """h = h + attention(norm(h)); h = h + mlp(norm(h))."""

    def __init__(self, config: LlamaConfig, placement: Placement) -> None:
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden_size, eps, placement)
        self.self_attn = Attention(config, placement)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, placement)
        self.mlp = GatedMLP(hidden_size, config.intermediate_size, placement, bias=config.mlp_bias)

    def __call__(
        self,
        normed: Tensor,
        residual: Tensor,
        cos_sin: Tensor,
        batch: PagedBatch,
        cache: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``normed`` is ``input_layernorm(residual)``; the MLP's output is not added yet."""
        out = self.self_attn(normed, cos_sin, batch, cache)
        normed, residual = self.post_attention_layernorm.add(out, residual)
        return self.mlp(normed), residual

    def targets(self, prefix: str) -> Targets:
        return {
            f"{prefix}input_layernorm.weight": self.input_layernorm.weight,
            **self.self_attn.targets(f"{prefix}self_attn."),
            f"{prefix}post_attention_layernorm.weight": self.post_attention_layernorm.weight,
            **self.mlp.targets(f"{prefix}mlp."),
        }


class Llama:
    """Token ids to hidden states to logits. See `runtime.models.CausalLM` for the interface."""

    def __init__(
        self, config: LlamaConfig, *, device: torch.device, dtype: torch.dtype, max_model_len: int
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        placement = Placement(device, dtype)
        self.embed_tokens = placement.empty(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, placement) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = placement.empty(config.vocab_size, config.hidden_size)
        self.cos_sin = placement.empty(0)

    def weight_targets(self) -> Targets:
        targets = {
            "model.embed_tokens.weight": self.embed_tokens,
            "model.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate(self.layers):
            targets |= layer.targets(f"model.layers.{i}.")
        if not self.config.tie_word_embeddings:
            targets["lm_head.weight"] = self.lm_head
        return targets

    def ignores(self, name: str) -> bool:
        tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        return tied_head or name.endswith(".rotary_emb.inv_freq")

    def finish_loading(self) -> None:
        self.cos_sin = rope_table(
            self.config.rope, self.config.head_dim, self.max_model_len, self.embed_tokens.device
        )

    def cache_spec(self) -> list[dict[str, tuple[int, ...]]]:
        shape = (self.config.num_kv_heads, self.config.head_dim)
        return [{"k": shape, "v": shape} for _ in self.layers]

    def forward(
        self, token_ids: Tensor, batch: PagedBatch, caches: list[dict[str, Tensor]]
    ) -> Tensor:
        residual = embedding(token_ids, self.embed_tokens)  # [num_tokens, hidden]
        normed = self.layers[0].input_layernorm(residual)
        following_norms = [layer.input_layernorm for layer in self.layers[1:]] + [self.norm]
        for layer, following_norm, cache in zip(self.layers, following_norms, caches, strict=True):
            out, residual = layer(normed, residual, self.cos_sin, batch, cache)
            normed, residual = following_norm.add(out, residual)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.lm_head).float()  # [num_rows, vocab]
