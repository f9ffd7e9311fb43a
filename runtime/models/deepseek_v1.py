"""DeepSeekMoE 16B (arXiv:2401.06066): Llama's attention, and experts from the second layer on.

The checkpoints call the architecture `DeepseekForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from runtime.config import Fields
from runtime.models.decoder import (
    MLP,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    parse_decoder,
)
from runtime.models.experts import (
    ExpertsConfig,
    SoftmaxRouter,
    dense_or_experts,
    parse_experts,
)
from runtime.models.grouped_query import GroupedQueryAttention, HeadsConfig, parse_heads
from runtime.models.layers import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV1Config(DecoderConfig):
    heads: HeadsConfig
    experts: ExpertsConfig


def parse_deepseek_v1(fields: Fields, tensor_names: Container[str]) -> DeepseekV1Config:
    """A `DeepseekForCausalLM` config.json. Raises `CheckpointError`."""
    fields.choice("scoring_func", ("softmax",), "softmax")
    for key in ("attention_bias", "norm_topk_prob"):
        if fields.boolean(key, False):
            raise fields.error(key, "true is not supported for DeepseekForCausalLM")
    common = parse_decoder(fields)
    return DeepseekV1Config(
        **common,
        heads=parse_heads(fields, common["hidden_size"]),
        experts=parse_experts(fields, smallest_group=None),
    )


def build_deepseek_v1(
    config: DeepseekV1Config, placement: Placement, max_model_len: int
) -> Decoder:
    """DeepSeekMoE, parameters uninitialised."""
    experts, hidden_size = config.experts, config.hidden_size

    def mlp(layer_id: int) -> MLP:
        return dense_or_experts(experts, hidden_size, layer_id, SoftmaxRouter, placement)

    layers = [
        DecoderLayer(
            config,
            GroupedQueryAttention(hidden_size, config.heads, placement),
            mlp(layer_id),
            placement,
        )
        for layer_id in range(config.num_layers)
    ]
    rope_dim = config.heads.head_dim
    return Decoder(config, layers, placement, rope_dim=rope_dim, max_model_len=max_model_len)
