"""DeepSeek-V4 and V4.1: what their checkpoints hold and what their caches take. Not run yet.

Sizes: D = hidden_size, R = hc_mult residual streams, H heads of d = head_dim, E routed experts.

    residual     R streams of D; before and after attention and MLP they are mixed (hc_*)
    attention    one key-value head, key = value; a window of the last tokens, and behind it entries
                 that stand for ``ratio`` tokens each: V4 per layer, V4.1 shared from source layers
    indexer      chooses entries: V4 where the ratio is 4, V4.1 in its index source layers
    output       in groups: [H · d / groups] -> o_lora_rank each, then all of them to D
    MLP          experts everywhere; V4's first layers choose them by token id, not by score
    engram       V4.1, in two layers: n-grams of token ids look up rows of a table
    mtp          a draft layer (V4), or a DSpark block of several stages (V4.1, later V4)

Names and shapes as released; a matrix of fp8 or fp4 has a ``.scale`` beside its ``.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from typing import Any

from runtime.config import MAX_POSITION, MAX_WIDTH, Fields, show

CSA_RATIO = 4
"""V4: layers whose entries overlap and are chosen by an indexer; other ratios see all entries."""
MAX_ROWS = 1 << 32  # of an n-gram table
FP4_BLOCK = 32  # columns of a row that share a scale
DRAFT_PREFIX = "mtp."
TABLE_SUFFIX = "engram.embed.weight"


class Storage(Enum):
    """How the release stores a tensor."""

    FP4 = "fp4"  # two e2m1 in a byte; scales of 8 bits
    FP8 = "fp8"  # e4m3 in square blocks; scales of 8 bits
    FP8_ROWS = "fp8 rows"  # e4m3 in pieces of a row, each with a scale
    BF16 = "bf16"
    F32 = "f32"
    IDS = "ids"  # 64-bit integers, which are no parameters


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor: its shape with one entry a number, and how the release stores it."""

    shape: tuple[int, ...]
    storage: Storage

    @property
    def num_parameters(self) -> int:
        return 0 if self.storage is Storage.IDS else math.prod(self.shape)

    def stored_bytes(self, block_size: int) -> int:
        """Bytes in the release, scales included."""
        count, columns = math.prod(self.shape), self.shape[-1]
        num_rows = count // columns
        match self.storage:
            case Storage.FP4:
                return count // 2 + num_rows * -(-columns // FP4_BLOCK)
            case Storage.FP8:
                return count + -(-num_rows // block_size) * -(-columns // block_size)
            case Storage.FP8_ROWS:
                return count + num_rows * -(-columns // block_size)
            case Storage.BF16:
                return 2 * count
            case Storage.F32:
                return 4 * count
            case Storage.IDS:
                return 8 * count


Layout = dict[str, TensorLayout]


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


# -- config.json ---------------------------------------------------------------------------------


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


# -- tensors -------------------------------------------------------------------------------------


def tensor_layout(config: DeepseekV4Config) -> Layout:
    """Every tensor of the text model and its drafts; scales are not named, they follow."""
    hidden_size = config.hidden_size
    embeddings = TensorLayout((config.vocab_size, hidden_size), Storage.BF16)
    layout = {"embed.weight": embeddings, "head.weight": embeddings}
    layout["norm.weight"] = _bf16(hidden_size)
    if not isinstance(config, DeepseekV41Config):
        layout |= _stream_head("", config)
    for layer_id in range(config.num_layers):
        prefix = f"layers.{layer_id}."
        layout |= _block(prefix, config, is_hashed=layer_id < config.num_hash_layers)
        if isinstance(config, DeepseekV41Config):
            layout |= _shared_compression(f"{prefix}attn.", config, layer_id)
            layout |= _engram(f"{prefix}engram.", config, layer_id)
        else:
            layout |= _own_compression(f"{prefix}attn.", config, config.compress_ratios[layer_id])
    return layout | _mtp(config) | _dspark(config)


def _block(prefix: str, config: DeepseekV4Config, *, is_hashed: bool = False) -> Layout:
    """A layer without its compression: attention to a window, experts, and the streams around."""
    hidden_size = config.hidden_size
    return {
        f"{prefix}attn_norm.weight": _bf16(hidden_size),
        f"{prefix}ffn_norm.weight": _bf16(hidden_size),
        **_streams(f"{prefix}hc_attn_", config),
        **_streams(f"{prefix}hc_ffn_", config),
        **_attention(f"{prefix}attn.", config),
        **_experts(f"{prefix}ffn.", config, is_hashed=is_hashed),
    }


def _streams(prefix: str, config: DeepseekV4Config) -> Layout:
    """Mixes of R streams: R weights in, R out, and R x R among them."""
    streams = config.num_streams
    num_mixes = streams * (2 + streams)
    return {
        f"{prefix}fn": _f32(num_mixes, streams * config.hidden_size),
        f"{prefix}base": _f32(num_mixes),
        f"{prefix}scale": _f32(3),
    }


def _stream_head(prefix: str, config: DeepseekV4Config) -> Layout:
    """V4: the R streams become one before the last norm."""
    streams = config.num_streams
    return {
        f"{prefix}hc_head_fn": _f32(streams, streams * config.hidden_size),
        f"{prefix}hc_head_base": _f32(streams),
        f"{prefix}hc_head_scale": _f32(1),
    }


def _attention(prefix: str, config: DeepseekV4Config) -> Layout:
    hidden_size, q_rank = config.hidden_size, config.q_lora_rank
    q_size = config.num_heads * config.head_dim
    groups, o_size = config.num_output_groups, config.num_output_groups * config.o_lora_rank
    return {
        f"{prefix}wq_a.weight": _fp8(q_rank, hidden_size),
        f"{prefix}q_norm.weight": _bf16(q_rank),
        f"{prefix}wq_b.weight": _fp8(q_size, q_rank),
        f"{prefix}wkv.weight": _fp8(config.head_dim, hidden_size),
        f"{prefix}kv_norm.weight": _bf16(config.head_dim),
        f"{prefix}attn_sink": _f32(config.num_heads),
        f"{prefix}wo_a.weight": _fp8(o_size, q_size // groups),
        f"{prefix}wo_b.weight": _fp8(hidden_size, o_size),
    }


def _own_compression(prefix: str, config: DeepseekV4Config, ratio: int) -> Layout:
    """V4: each layer with a ratio compresses for itself; those of ratio 4 have an indexer."""
    if not ratio:
        return {}
    layout = _compressor(f"{prefix}compressor.", config, ratio, config.head_dim)
    if ratio != CSA_RATIO:
        return layout
    index_dim = config.index_head_dim
    index_size = config.index_num_heads * index_dim
    return {
        **layout,
        f"{prefix}indexer.wq_b.weight": _fp8(index_size, config.q_lora_rank),
        f"{prefix}indexer.weights_proj.weight": _bf16(config.index_num_heads, config.hidden_size),
        **_compressor(f"{prefix}indexer.compressor.", config, ratio, index_dim),
    }


def _compressor(prefix: str, config: DeepseekV4Config, ratio: int, dim: int) -> Layout:
    """``ratio`` tokens to one entry of ``dim``; overlapping groups have two halves each."""
    width = 2 * dim if ratio == CSA_RATIO else dim
    return {
        f"{prefix}wkv.weight": _bf16(width, config.hidden_size),
        f"{prefix}wgate.weight": _bf16(width, config.hidden_size),
        f"{prefix}norm.weight": _bf16(dim),
        f"{prefix}ape": _f32(ratio, width),
    }


def _shared_compression(prefix: str, config: DeepseekV41Config, layer_id: int) -> Layout:
    """V4.1: entries and their index keys come from source layers, choices from index sources."""
    hidden_size, head_dim = config.hidden_size, config.head_dim
    layout: Layout = {}
    if layer_id in config.kv_source_layer_ids:
        layout |= {
            f"{prefix}compressor.wkv.weight": _bf16(head_dim, hidden_size),
            f"{prefix}compressor.norm.weight": _bf16(head_dim),
            f"{prefix}indexer.wk.weight": _bf16(config.index_head_dim, head_dim),
            f"{prefix}indexer.k_norm.weight": _bf16(config.index_head_dim),
        }
        if config.compress_ratios[layer_id] > 1:
            layout[f"{prefix}compressor.wgate.weight"] = _bf16(head_dim, hidden_size)
    if layer_id in config.index_source_layer_ids:
        index_size = config.index_num_heads * config.index_head_dim
        layout |= {
            f"{prefix}indexer.wq_b.weight": _fp8(index_size, config.q_lora_rank),
            f"{prefix}indexer.weights_proj.weight": _bf16(config.index_num_heads, hidden_size),
        }
    return layout


def _engram(prefix: str, config: DeepseekV41Config, layer_id: int) -> Layout:
    """A table of n-grams, and what makes R keys and one value of the rows looked up."""
    engram, hidden_size = config.engram, config.hidden_size
    if layer_id not in engram.layer_ids:
        return {}
    num_rows = engram.num_rows[engram.layer_ids.index(layer_id)]
    num_outputs = config.num_streams + 1
    looked_up = engram.num_columns * engram.row_size
    return {
        f"{prefix}embed.weight": TensorLayout((num_rows, engram.row_size), Storage.FP8_ROWS),
        f"{prefix}wkv.weight": _fp8(num_outputs * hidden_size, looked_up),
        f"{prefix}q_weight": _bf16(config.num_streams, hidden_size),
        f"{prefix}k_weight": _bf16(config.num_streams, hidden_size),
    }


def _experts(prefix: str, config: DeepseekV4Config, *, is_hashed: bool) -> Layout:
    """w1 and w3 are gate and up, w2 is down; a hashed layer looks its experts up by token id."""
    hidden_size, size = config.hidden_size, config.moe_intermediate_size
    layout = {f"{prefix}gate.weight": _bf16(config.num_experts, hidden_size)}
    if is_hashed:
        ids_shape = (config.vocab_size, config.num_experts_per_token)
        layout[f"{prefix}gate.tid2eid"] = TensorLayout(ids_shape, Storage.IDS)
    else:
        layout[f"{prefix}gate.bias"] = _f32(config.num_experts)
    if isinstance(config, DeepseekV41Config):
        layout[f"{prefix}gate.bias_vl"] = _f32(config.num_experts)  # for tokens of images
    up = TensorLayout((size, hidden_size), config.expert_storage)
    down = TensorLayout((hidden_size, size), config.expert_storage)
    for expert_id in range(config.num_experts):
        expert = f"{prefix}experts.{expert_id}."
        layout[f"{expert}w1.weight"] = layout[f"{expert}w3.weight"] = up
        layout[f"{expert}w2.weight"] = down
    shared, shared_size = f"{prefix}shared_experts.", config.num_shared_experts * size
    return layout | {
        f"{shared}w1.weight": _fp8(shared_size, hidden_size),
        f"{shared}w2.weight": _fp8(hidden_size, shared_size),
        f"{shared}w3.weight": _fp8(shared_size, hidden_size),
    }


def _mtp(config: DeepseekV4Config) -> Layout:
    """V4's first releases: a layer on the next token's embedding and the streams."""
    hidden_size = config.hidden_size
    layout: Layout = {}
    for i in range(config.num_mtp_layers):
        prefix = f"{DRAFT_PREFIX}{i}."
        layout |= {
            f"{prefix}e_proj.weight": _fp8(hidden_size, hidden_size),
            f"{prefix}h_proj.weight": _fp8(hidden_size, hidden_size),
            f"{prefix}enorm.weight": _bf16(hidden_size),
            f"{prefix}hnorm.weight": _bf16(hidden_size),
            f"{prefix}norm.weight": _bf16(hidden_size),
            **_stream_head(prefix, config),
            **_block(prefix, config),
        }
    return layout


def _dspark(config: DeepseekV4Config) -> Layout:
    """Draft stages: in front what reads the main model, behind what writes tokens."""
    if config.dspark is None:
        return {}
    hidden_size, rank, num_stages = (
        config.hidden_size,
        config.dspark.markov_rank,
        config.dspark.num_stages,
    )
    is_v41 = isinstance(config, DeepseekV41Config)
    stage_config = replace(config, num_experts=config.dspark.num_experts)
    layout: Layout = {}
    for stage in range(num_stages):
        layout |= _block(f"{DRAFT_PREFIX}{stage}.", stage_config)
    first, last = f"{DRAFT_PREFIX}0.", f"{DRAFT_PREFIX}{num_stages - 1}."
    markov_names = ("embed", "head") if is_v41 else ("markov_w1", "markov_w2")
    layout |= {
        f"{first}main_proj.weight": _fp8(hidden_size, num_stages * hidden_size),
        f"{first}main_norm.weight": _bf16(hidden_size),
        f"{last}norm.weight": _bf16(hidden_size),
        f"{last}confidence_head.proj.weight": _bf16(1, hidden_size + rank),
        **{f"{last}markov_head.{n}.weight": _bf16(config.vocab_size, rank) for n in markov_names},
    }
    return layout if is_v41 else layout | _stream_head(last, config)


def _fp8(rows: int, columns: int) -> TensorLayout:
    return TensorLayout((rows, columns), Storage.FP8)


def _bf16(*shape: int) -> TensorLayout:
    return TensorLayout(shape, Storage.BF16)


def _f32(*shape: int) -> TensorLayout:
    return TensorLayout(shape, Storage.F32)


# -- cache ---------------------------------------------------------------------------------------


def cache_values_per_token(config: DeepseekV4Config) -> dict[str, Fraction]:
    """Numbers that a token adds to the cache, by kind; an entry is shared by ``ratio`` tokens."""
    if isinstance(config, DeepseekV41Config):
        ratios = [config.compress_ratios[i] for i in config.kv_source_layer_ids]
        indexed = ratios
    else:
        ratios = list(config.compress_ratios)
        indexed = [ratio for ratio in ratios if ratio == CSA_RATIO]
    return {
        "kv": sum((Fraction(config.head_dim, ratio) for ratio in ratios if ratio), Fraction()),
        "index_k": sum((Fraction(config.index_head_dim, r) for r in indexed if r), Fraction()),
    }


def window_values(config: DeepseekV4Config) -> int:
    """Numbers in the windows of one sequence, however long it is."""
    return config.num_layers * config.sliding_window * config.head_dim
