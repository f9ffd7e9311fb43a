"""DeepSeek-V4 and V4.1: their config.json. `runtime.models.deepseek_v4_layout` is what follows.

Neither runs yet; `fathom inspect` describes them.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from typing import Any

from runtime.config import MAX_POSITION, MAX_WIDTH, Fields, show

MAX_ROWS = 1 << 32  # of an n-gram table


class Storage(Enum):
    """How the release stores a tensor."""

    FP4 = "fp4"  # two e2m1 in a byte; scales of 8 bits
    FP8 = "fp8"  # e4m3 in square blocks; scales of 8 bits
    FP8_ROWS = "fp8 rows"  # e4m3 in pieces of a row, each with a scale
    BF16 = "bf16"
    F32 = "f32"
    IDS = "ids"  # 64-bit integers, which are no parameters


@dataclass(frozen=True, slots=True)
class DSparkConfig:
    """A block of draft stages behind the main model."""

    num_stages: int  # one for each layer of the main model that it reads
    markov_rank: int
    num_experts: int


@dataclass(frozen=True, slots=True)
class EngramConfig:
    layer_ids: tuple[int, ...]
    num_rows: tuple[int, ...]  # of the table of each of these layers
    row_size: int
    num_columns: int  # rows that one token looks up: one per n-gram length and head


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV4Config:
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    num_output_groups: int
    num_streams: int
    sliding_window: int
    compress_ratios: tuple[int, ...]  # per layer; 0: window only
    index_num_heads: int
    index_head_dim: int
    num_experts: int
    num_shared_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    num_hash_layers: int
    num_mtp_layers: int  # 0 if the drafts are DSpark's
    dspark: DSparkConfig | None
    block_size: int  # rows and columns that share a scale
    expert_storage: Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV41Config(DeepseekV4Config):
    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    engram: EngramConfig


def parse_deepseek_v4(fields: Fields, tensor_names: Container[str]) -> DeepseekV4Config:
    """A `DeepseekV4ForCausalLM` config.json. Raises `CheckpointError`."""
    return DeepseekV4Config(**_parse(fields, fields, fields))


def parse_deepseek_v41(fields: Fields, tensor_names: Container[str]) -> DeepseekV41Config:
    """A `DeepseekV41ForCausalLM` config.json. Raises `CheckpointError`."""
    text = fields.object("text_config")
    common = _parse(text, fields, fields.object("quantization_config"))
    layer_ids = _integers(text, "engram_layer_ids", common["num_layers"] - 1)
    num_rows = _integers(text, "engram_num_embeddings", MAX_ROWS)
    if len(num_rows) != len(layer_ids):
        raise text.error(
            "engram_num_embeddings", f"{len(num_rows)} tables for {len(layer_ids)} layers"
        )
    num_lengths = text.integer("engram_max_ngram_size", low=2, high=64) - 1
    return DeepseekV41Config(
        **common,
        kv_source_layer_ids=_integers(text, "kv_source_layer_ids", common["num_layers"] - 1),
        index_source_layer_ids=_integers(text, "index_source_layer_ids", common["num_layers"] - 1),
        engram=EngramConfig(
            layer_ids=layer_ids,
            num_rows=num_rows,
            row_size=text.integer("engram_head_dim", high=MAX_WIDTH),
            num_columns=num_lengths * text.integer("engram_n_heads", high=4096),
        ),
    )


def _parse(text: Fields, config: Fields, experts: Fields) -> dict[str, Any]:
    """The fields of `DeepseekV4Config`; ``experts`` has the key that says how they are stored."""
    num_layers = text.integer("num_hidden_layers", high=1024)
    num_experts = text.integer("n_routed_experts", high=8192)
    num_heads = text.integer("num_attention_heads", high=4096)
    head_dim = text.integer("head_dim", high=MAX_WIDTH)
    num_output_groups = text.integer("o_groups", high=num_heads)
    if num_heads % num_output_groups:
        raise text.error("o_groups", f"{num_output_groups} does not divide {num_heads} heads")
    ratios = _integers(text, "compress_ratios", MAX_POSITION)
    if len(ratios) < num_layers:
        raise text.error("compress_ratios", f"{len(ratios)} entries for {num_layers} layers")
    dspark = _parse_dspark(text, num_experts)
    num_mtp_layers = text.integer("num_nextn_predict_layers", 0, low=0, high=16)
    quantization = config.object("quantization_config")
    block = quantization.raw("weight_block_size", [128, 128])
    if block not in ([128, 128], [32, 32]):
        why = f"{show(block)} is not [128, 128] or [32, 32]"
        raise quantization.error("weight_block_size", why)
    return {
        "vocab_size": text.integer("vocab_size", high=MAX_WIDTH),
        "hidden_size": text.integer("hidden_size", high=MAX_WIDTH),
        "num_layers": num_layers,
        "max_position_embeddings": text.integer("max_position_embeddings", high=MAX_POSITION),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "q_lora_rank": text.integer("q_lora_rank", high=MAX_WIDTH),
        "o_lora_rank": text.integer("o_lora_rank", high=MAX_WIDTH),
        "num_output_groups": num_output_groups,
        "num_streams": text.integer("hc_mult", high=64),
        "sliding_window": text.integer("sliding_window", high=MAX_POSITION),
        "compress_ratios": ratios[:num_layers],  # behind them stand the draft layers'
        "index_num_heads": text.integer("index_n_heads", high=4096),
        "index_head_dim": text.integer("index_head_dim", high=MAX_WIDTH),
        "num_experts": num_experts,
        "num_shared_experts": text.integer("n_shared_experts", high=64),
        "num_experts_per_token": text.integer("num_experts_per_tok", high=num_experts),
        "moe_intermediate_size": text.integer("moe_intermediate_size", high=MAX_WIDTH),
        "num_hash_layers": text.integer("num_hash_layers", 0, low=0, high=num_layers),
        "num_mtp_layers": 0 if dspark else num_mtp_layers,
        "dspark": dspark,
        "block_size": block[0],
        "expert_storage": Storage(experts.choice("expert_dtype", ("fp4", "fp8"), "fp8")),
    }


def _parse_dspark(text: Fields, num_experts: int) -> DSparkConfig | None:
    if not text.has("dspark_block_size"):
        return None
    return DSparkConfig(
        num_stages=len(_integers(text, "dspark_target_layer_ids", 1024)),
        markov_rank=text.integer("dspark_markov_rank", high=MAX_WIDTH),
        num_experts=text.integer("dspark_n_routed_experts", num_experts, high=8192),
    )


def _integers(fields: Fields, key: str, high: int) -> tuple[int, ...]:
    values = fields.raw(key)
    if not isinstance(values, list) or not 1 <= len(values) <= 2048:
        raise fields.error(key, f"{show(values)} is not a list of 1 to 2048 integers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
            raise fields.error(key, f"{show(value)} is not an integer from 0 to {high}")
    return tuple(values)
