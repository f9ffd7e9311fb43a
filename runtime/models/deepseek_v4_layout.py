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
from dataclasses import dataclass, replace
from fractions import Fraction

from runtime.models.deepseek_v4 import DeepseekV4Config, DeepseekV41Config, Storage

CSA_RATIO = 4
"""V4: layers whose entries overlap and are chosen by an indexer; other ratios see all entries."""
FP4_BLOCK = 32  # columns of a row that share a scale
DRAFT_PREFIX = "mtp."
TABLE_SUFFIX = "engram.embed.weight"


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
