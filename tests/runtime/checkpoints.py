"""Tiny random checkpoints in the released layout and spelling, for tests.

Names and shapes are written out here, not taken from `runtime.models`, so that a test that loads
one holds the loader to the release. Values are chosen so that every mechanism shows in the logits:
weights have std 1/sqrt(fan_in), norms differ from one, biases (the router's too) are not zero.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FATHOM_TINY = Path(__file__).parents[2] / "weights" / "fathom-tiny"

Config = dict[str, Any]
Tensors = dict[str, Tensor]

LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"type": "linear", "factor": 4.0}
YARN_ROPE = {
    "type": "yarn",
    "factor": 8,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
QWEN2: Config = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_sliding_window": False,
    "sliding_window": 16,
    "max_window_layers": 1,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN_ROPE,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 101,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DEEPSEEK_V1: Config = LLAMA | {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rms_norm_eps": 1e-6,
}
QWEN3: Config = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attn_factor": 0.8782488562869419,
    },
}
DEEPSEEK_V2: Config = {
    key: value
    for key, value in DEEPSEEK_V3.items()
    if key not in ("num_nextn_predict_layers", "auto_map")
} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
}
DEEPSEEK_V2_LITE: Config = DEEPSEEK_V2 | {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "rope_scaling": YARN_ROPE | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
}
DEEPSEEK_V32: Config = {key: value for key, value in DEEPSEEK_V3.items() if key != "auto_map"} | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 16,
    "index_head_dim": 12,
    "index_topk": 24,
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# wide enough that matrices have several blocks, the last ones partial
FP8_SIZES = {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "q_lora_rank": 136,
    "kv_lora_rank": 132,
    "n_routed_experts": 8,
}
DEEPSEEK_V3_FP8 = DEEPSEEK_V3 | FP8_SIZES | {"quantization_config": FP8}
DEEPSEEK_V31_FP8 = DEEPSEEK_V3_FP8 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}
DEEPSEEK_V32_FP8 = (
    DEEPSEEK_V32
    | FP8_SIZES
    | {
        "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
        "index_head_dim": 136,
    }
)

# one checkpoint of each mechanism that a step can have
MECHANISMS: dict[str, Config] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "deepseek_v1": DEEPSEEK_V1,
    "deepseek_v2_lite": DEEPSEEK_V2_LITE,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3 fp8": DEEPSEEK_V3_FP8,
    "deepseek_v32, sparse": DEEPSEEK_V32,
}


def make_tensors(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random tensors under the released names.

    ``e_score_correction_bias`` and the indexer's norm are always float32; a config that declares
    FP8 gets its matrices quantized.
    """
    shapes = _v3_shapes(config) if "kv_lora_rank" in config else _dense_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = 0.2 * values
            continue
        if "indexer.k_norm" in name:
            tensors[name] = 0.3 * values + name.endswith("weight")
            continue
        if "norm" in name:
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.5 * values
        elif "embed_tokens" not in name:
            values /= math.sqrt(shape[-1])
        tensors[name] = values.to(dtype)
    if "quantization_config" in config:
        tensors |= _quantized(tensors, config["quantization_config"].get("scale_fmt") == "ue8m0")
    return tensors


def _quantized(tensors: Tensors, ue8m0: bool) -> Tensors:
    """Matrices and scales as V3 stores them, block by block."""
    stored: Tensors = {}
    for name, weight in tensors.items():
        kept = ("embed_tokens", "lm_head", ".gate.", "eh_proj", "weights_proj", "shared_head.head")
        if weight.dim() != 2 or any(part in name for part in kept):
            continue
        rows, columns = weight.shape
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scale = float(weight[block].abs().max()) / 448
                scales[i, j] = 2 ** math.ceil(math.log2(scale)) if ue8m0 else scale
                values[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
        stored[name] = values
        stored[f"{name}_scale_inv"] = scales
    return stored


def dequantized(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The same model without FP8: every matrix multiplied out in float32."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            scales = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0)[: tensor.shape[0]]
            plain[name] = tensor.float() * scales.repeat_interleave(128, 1)[:, : tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    return {key: config[key] for key in config if key != "quantization_config"}, plain


def write_checkpoint(
    folder: Path,
    config: Config,
    tensors: Tensors | None = None,
    *,
    num_shards: int = 1,
    with_tokenizer: bool = False,
) -> Path:
    """Write config.json and safetensors, with an index if there are several; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    if with_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(FATHOM_TINY / name, folder)
    names = list(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:06}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _mlp_shapes(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (intermediate, hidden),
        f"{prefix}up_proj.weight": (intermediate, hidden),
        f"{prefix}down_proj.weight": (hidden, intermediate),
    }


def _dense_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{attention}q_proj.weight": (q_size, hidden),
            f"{attention}k_proj.weight": (kv_size, hidden),
            f"{attention}v_proj.weight": (kv_size, hidden),
            f"{attention}o_proj.weight": (hidden, q_size),
        }
        if layer < config.get("first_k_dense_replace", config["num_hidden_layers"]):
            shapes |= _mlp_shapes(f"{prefix}mlp.", hidden, intermediate)
        else:
            shapes |= _moe_shapes(config, f"{prefix}mlp.")
        if config["model_type"] == "qwen3":
            shapes |= {
                f"{attention}q_norm.weight": (head_dim,),
                f"{attention}k_norm.weight": (head_dim,),
            }
        if config["model_type"] == "qwen2" or config["attention_bias"]:
            shapes |= {
                f"{attention}q_proj.bias": (q_size,),
                f"{attention}k_proj.bias": (kv_size,),
                f"{attention}v_proj.bias": (kv_size,),
            }
        if config["model_type"] == "llama" and config["attention_bias"]:
            shapes[f"{attention}o_proj.bias"] = (hidden,)
        if config["model_type"] == "llama" and config["mlp_bias"]:
            shapes |= {
                f"{prefix}mlp.gate_proj.bias": (intermediate,),
                f"{prefix}mlp.up_proj.bias": (intermediate,),
                f"{prefix}mlp.down_proj.bias": (hidden,),
            }
    return shapes


def _v3_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    num_layers = config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(num_layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}."
        shapes |= _v3_layer_shapes(config, prefix, dense=layer < config["first_k_dense_replace"])
        if layer >= num_layers:
            shapes |= {
                f"{prefix}embed_tokens.weight": (vocab, hidden),
                f"{prefix}enorm.weight": (hidden,),
                f"{prefix}hnorm.weight": (hidden,),
                f"{prefix}eh_proj.weight": (hidden, 2 * hidden),
                f"{prefix}shared_head.norm.weight": (hidden,),
                f"{prefix}shared_head.head.weight": (vocab, hidden),
            }
    return shapes


def _v3_layer_shapes(config: Config, prefix: str, *, dense: bool) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{attention}kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        f"{attention}kv_a_layernorm.weight": (kv_rank,),
        f"{attention}kv_b_proj.weight": (heads * (nope + value), kv_rank),
        f"{attention}o_proj.weight": (hidden, heads * value),
    }
    if q_rank is None:
        shapes[f"{attention}q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        shapes |= {
            f"{attention}q_a_proj.weight": (q_rank, hidden),
            f"{attention}q_a_layernorm.weight": (q_rank,),
            f"{attention}q_b_proj.weight": (heads * (nope + rope), q_rank),
        }
    if "index_topk" in config:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        shapes |= {
            f"{attention}indexer.wq_b.weight": (index_heads * index_dim, q_rank),
            f"{attention}indexer.wk.weight": (index_dim, hidden),
            f"{attention}indexer.k_norm.weight": (index_dim,),
            f"{attention}indexer.k_norm.bias": (index_dim,),
            f"{attention}indexer.weights_proj.weight": (index_heads, hidden),
        }
    if dense:
        return shapes | _mlp_shapes(mlp, hidden, config["intermediate_size"])
    return shapes | _moe_shapes(config, mlp)


def _moe_shapes(config: Config, mlp: str) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    num_experts, intermediate = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{mlp}gate.weight": (num_experts, hidden),
        **_mlp_shapes(f"{mlp}shared_experts.", hidden, config["n_shared_experts"] * intermediate),
    }
    if config.get("topk_method") == "noaux_tc":
        shapes[f"{mlp}gate.e_score_correction_bias"] = (num_experts,)
    for expert in range(num_experts):
        shapes |= _mlp_shapes(f"{mlp}experts.{expert}.", hidden, intermediate)
    return shapes
