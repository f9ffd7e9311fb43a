"""Models of released sizes with random weights, made on the device: no files, no download."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from runtime.config import Fields
from runtime.models import FAMILIES, CausalLM
from runtime.models.layers import Placement

CONFIG_FILES = [
    Path(__file__).with_name("released_configs.json"),
    Path(__file__).with_name("peer_configs.json"),  # not DeepSeek's: sizes that peers report
]
WEIGHT_SCALE = 0.02

_TINY_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}
_TINY_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def known_configs() -> dict[str, dict[str, Any]]:
    """Name -> config.json of every model that can be made."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in CONFIG_FILES]
    return {name: entry["config"] for entries in files for name, entry in entries.items()}


def config_json(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """The config.json of a released model; ``tiny`` keeps its family and shrinks its sizes."""
    config: dict[str, Any] = copy.deepcopy(known_configs()[name])
    if tiny:
        config |= _TINY_SIZES | (_TINY_LATENT if "kv_lora_rank" in config else _TINY_HEADS)
        config.pop("head_dim", None)
        if config.get("q_lora_rank"):
            config["q_lora_rank"] = 48
        if config.get("n_group", 1) > 1:
            config |= {"n_group": 2, "topk_group": 1}
    return config


def num_bytes(config: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of the weights of a config.json's model."""
    model = build(config, device=torch.device("meta"), dtype=dtype, max_model_len=1)
    return sum(target.nbytes for target in model.weight_targets().values())


def build(
    config: dict[str, Any], *, device: torch.device, dtype: torch.dtype, max_model_len: int
) -> CausalLM:
    """The model of a config.json with uninitialised parameters in ``dtype``."""
    family = FAMILIES[config["architectures"][0]]
    parsed = family.parse_config(Fields(config, "released_configs.json"), ())
    return family.build(parsed, Placement(device, dtype), max_model_len)


def fill(model: CausalLM, device: torch.device) -> None:
    """Random normal weights, norms around 1, the same for the same device; finishes the model."""
    generator = torch.Generator(device).manual_seed(0)
    for name, target in model.weight_targets().items():
        target.normal_(0.0, WEIGHT_SCALE, generator=generator)
        if name.endswith("norm.weight"):
            target.add_(1.0)
    model.finish_loading()
