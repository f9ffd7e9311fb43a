"""DeepSeek-V3, R1 and V3.1 (arXiv:2412.19437): latent attention, experts, and the MTP layer."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from runtime.config import Fields
from runtime.models.decoder import (
    Attention,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    parse_decoder,
)
from runtime.models.experts import (
    ExpertsConfig,
    SigmoidRouter,
    dense_or_experts,
    parse_experts,
)
from runtime.models.latent import LatentAttention, LatentConfig, parse_latent
from runtime.models.layers import Placement
from runtime.models.mtp import MTPLayer, MTPLayers, parse_mtp


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV3Config(DecoderConfig):
    latent: LatentConfig
    q_lora_rank: int
    experts: ExpertsConfig
    mtp: MTPLayers


def parse_deepseek_v3(fields: Fields, tensor_names: Container[str]) -> DeepseekV3Config:
    """A `DeepseekV3ForCausalLM` config.json. Raises `CheckpointError`."""
    return DeepseekV3Config(**parse_v3_fields(fields, tensor_names))


def parse_v3_fields(fields: Fields, tensor_names: Container[str]) -> dict[str, Any]:
    """The fields of `DeepseekV3Config`, which V3.2 has too. Raises `CheckpointError`."""
    fields.choice("scoring_func", ("sigmoid",), "sigmoid")
    fields.choice("topk_method", ("noaux_tc",), "noaux_tc")
    if not fields.boolean("rope_interleave", True):
        raise fields.error("rope_interleave", "false is not supported for DeepSeek models")
    experts = parse_experts(fields, smallest_group=2)  # a group is scored by its two best
    latent = parse_latent(fields)
    if latent.q_lora_rank is None:
        raise fields.error(
            "q_lora_rank", "null or missing; only queries with a latent are supported"
        )
    return {
        **parse_decoder(fields),
        "latent": latent,
        "q_lora_rank": latent.q_lora_rank,
        "experts": experts,
        "mtp": parse_mtp(fields, tensor_names),
    }


def build_deepseek_v3(
    config: DeepseekV3Config, placement: Placement, max_model_len: int
) -> Decoder:
    """V3 with its MTP layers, parameters uninitialised."""

    def attention() -> Attention:
        return LatentAttention(
            config.latent, config.q_lora_rank, config.hidden_size, config.rope, placement
        )

    return v3_decoder(config, attention, placement, max_model_len)


def v3_decoder(
    config: DeepseekV3Config,
    make_attention: Callable[[], Attention],
    placement: Placement,
    max_model_len: int,
) -> Decoder:
    """All of V3 around an attention, which V3.2 replaces."""

    def layer(layer_id: int) -> DecoderLayer:
        mlp = dense_or_experts(
            config.experts, config.hidden_size, layer_id, SigmoidRouter, placement
        )
        return DecoderLayer(config, make_attention(), mlp, placement)

    return Decoder(
        config,
        [layer(i) for i in range(config.num_layers)],
        placement,
        rope_dim=config.latent.qk_rope_head_dim,
        max_model_len=max_model_len,
        extra_layers=[MTPLayer(config, layer(i), placement) for i in config.mtp.loaded],
        ignored_layers=config.mtp.ignored,
    )
