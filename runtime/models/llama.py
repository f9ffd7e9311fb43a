"""Llama (arXiv:2302.13971) and Qwen2 (arXiv:2407.10671): dense decoders with grouped queries.

DeepSeek-LLM, -Math and -Coder and the R1 distills are of these two families. They differ in one
thing: Qwen2 adds a bias to q, k and v.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from runtime.config import MAX_WIDTH, Fields
from runtime.models.decoder import Decoder, DecoderConfig, DecoderLayer, parse_decoder
from runtime.models.grouped_query import GroupedQueryAttention, HeadsConfig, parse_heads
from runtime.models.layers import GatedMLP, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    heads: HeadsConfig
    intermediate_size: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool


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
    common = parse_decoder(fields)
    return LlamaConfig(
        **common,
        heads=parse_heads(fields, common["hidden_size"]),
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def build_llama(config: LlamaConfig, placement: Placement, max_model_len: int) -> Decoder:
    """Llama and Qwen2, parameters uninitialised."""

    def layer() -> DecoderLayer:
        attention = GroupedQueryAttention(
            config.hidden_size,
            config.heads,
            placement,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
        )
        mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, placement, bias=config.mlp_bias
        )
        return DecoderLayer(config, attention, mlp, placement)

    layers = [layer() for _ in range(config.num_layers)]
    rope_dim = config.heads.head_dim
    return Decoder(config, layers, placement, rope_dim=rope_dim, max_model_len=max_model_len)
