"""DeepSeek-V2, V2-Lite, V2.5 and Coder-V2 (arXiv:2405.04434): latent attention and experts.

V2-Lite has no query latent and one group of experts; V2 takes its experts from few groups.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from runtime.config import Fields
from runtime.models.decoder import (
    MLP,
    Attention,
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
from runtime.models.latent import (
    DirectQueryAttention,
    LatentAttention,
    LatentConfig,
    parse_latent,
)
from runtime.models.layers import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV2Config(DecoderConfig):
    latent: LatentConfig
    experts: ExpertsConfig


def parse_deepseek_v2(fields: Fields, tensor_names: Container[str]) -> DeepseekV2Config:
    """A `DeepseekV2ForCausalLM` config.json. Raises `CheckpointError`."""
    fields.choice("scoring_func", ("softmax",), "softmax")
    if fields.boolean("norm_topk_prob", False):
        raise fields.error("norm_topk_prob", "true is not supported for DeepseekV2ForCausalLM")
    experts = parse_experts(fields, smallest_group=1)
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    if method == "greedy" and experts.num_top_groups < experts.num_groups:
        raise fields.error("topk_method", "greedy takes experts from all groups, not topk_group")
    return DeepseekV2Config(**parse_decoder(fields), latent=parse_latent(fields), experts=experts)


def build_deepseek_v2(
    config: DeepseekV2Config, placement: Placement, max_model_len: int
) -> Decoder:
    """V2 and V2-Lite, parameters uninitialised."""
    latent, experts, hidden_size = config.latent, config.experts, config.hidden_size

    def attention() -> Attention:
        if latent.q_lora_rank is None:
            return DirectQueryAttention(latent, hidden_size, config.rope, placement)
        return LatentAttention(latent, latent.q_lora_rank, hidden_size, config.rope, placement)

    def mlp(layer_id: int) -> MLP:
        return dense_or_experts(experts, hidden_size, layer_id, SoftmaxRouter, placement)

    layers = [
        DecoderLayer(config, attention(), mlp(layer_id), placement)
        for layer_id in range(config.num_layers)
    ]
    rope_dim = latent.qk_rope_head_dim
    return Decoder(config, layers, placement, rope_dim=rope_dim, max_model_len=max_model_len)
