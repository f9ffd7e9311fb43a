"""The skeleton of every family up to V3.2: a pre-norm decoder around an attention and an MLP.

    h = embed(ids)
    each layer: h = h + attention(input_layernorm(h)); h = h + mlp(post_attention_layernorm(h))
    logits = lm_head(norm(h))

A family brings its attention, its MLP and its config; everything else is here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.embedding import embedding
from runtime.config import MAX_POSITION, MAX_WIDTH, Fields, RopeConfig, parse_rope
from runtime.models.layers import Linear, Placement, RMSNorm, Targets, rope_table

CacheSpec = dict[str, tuple[int, ...]]
"""Name -> shape per token. A cache is [num_pages, page_size, *shape]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What every family's config.json has."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool


def parse_decoder(fields: Fields) -> dict[str, Any]:
    """The fields of `DecoderConfig` from a config.json. Raises `CheckpointError`."""
    fields.choice("hidden_act", ("silu",), "silu")
    max_position = fields.integer("max_position_embeddings", high=MAX_POSITION)
    return {
        "vocab_size": fields.integer("vocab_size", high=MAX_WIDTH),
        "hidden_size": fields.integer("hidden_size", high=MAX_WIDTH),
        "num_layers": fields.integer("num_hidden_layers", high=1024),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        "max_position_embeddings": max_position,
        "rope": parse_rope(fields, max_position),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }


class Attention(Protocol):
    """Attention of one layer; writes the step's tokens into ``cache`` before it reads."""

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor: ...
    def targets(self, prefix: str) -> Targets: ...
    def cache_spec(self) -> CacheSpec: ...


class MLP(Protocol):
    """A function of each token alone: dense, or a mixture of experts."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def targets(self, prefix: str) -> Targets: ...


class ExtraLayer(Protocol):
    """A layer that the forward pass does not visit, such as a draft layer; only loaded."""

    def targets(self, prefix: str) -> Targets: ...


class DecoderLayer:
    """h = h + attention(norm(h)); h = h + mlp(norm(h))."""

    def __init__(
        self, config: DecoderConfig, self_attn: Attention, mlp: MLP, placement: Placement
    ) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.mlp = mlp

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


class Decoder:
    """Token ids to hidden states to logits. See `runtime.models.CausalLM` for the interface."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[DecoderLayer],
        placement: Placement,
        *,
        rope_dim: int,
        max_model_len: int,
        extra_layers: Sequence[ExtraLayer] = (),
        ignored_layers: Sequence[int] = (),
    ) -> None:
        """``extra_layers`` come behind ``layers``; the files may hold ``ignored_layers`` too."""
        self.config = config
        self.layers = layers
        self.extra_layers = extra_layers
        self._rope_dim = rope_dim
        self._max_model_len = max_model_len
        self._ignored_prefixes = tuple(f"model.layers.{i}." for i in ignored_layers)
        self.embed_tokens = placement.empty(config.vocab_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.lm_head = Linear(
            config.hidden_size,
            {"lm_head": config.vocab_size},
            placement.for_head,
            shared=self.embed_tokens if config.tie_word_embeddings else None,
        )
        self.cos_sin = torch.empty(0, device=placement.device)

    def weight_targets(self) -> Targets:
        targets = {
            "model.embed_tokens.weight": self.embed_tokens,
            "model.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate([*self.layers, *self.extra_layers]):
            targets |= layer.targets(f"model.layers.{i}.")
        if not self.config.tie_word_embeddings:
            targets |= self.lm_head.targets("")
        return targets

    def ignores(self, name: str) -> bool:
        tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        derived = name.endswith(".rotary_emb.inv_freq")
        return tied_head or derived or name.startswith(self._ignored_prefixes)

    def finish_loading(self) -> None:
        self.cos_sin = rope_table(
            self.config.rope, self._rope_dim, self._max_model_len, self.embed_tokens.device
        )

    def cache_spec(self) -> list[CacheSpec]:
        return [layer.self_attn.cache_spec() for layer in self.layers]

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
        return self.lm_head(hidden, torch.float32)  # [num_rows, vocab]
