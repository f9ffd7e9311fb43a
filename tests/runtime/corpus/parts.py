"""Models that lack a part or have one too many: experts, routers, MTP layers, indexers, biases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.runtime.checkpoints import DEEPSEEK_V32, QWEN2, QWEN3, Config
from tests.runtime.corpus.case import (
    NUM_TOKENS,
    SERVED_V3,
    WEIGHTS,
    Case,
    Damage,
    edit_tensors,
    set_tensor,
    with_value,
)

SERVED_V32: Config = DEEPSEEK_V32 | {"vocab_size": NUM_TOKENS}
SERVED_QWEN2: Config = QWEN2 | {"vocab_size": NUM_TOKENS}
SERVED_QWEN3: Config = QWEN3 | {"vocab_size": NUM_TOKENS}
MLP, MTP = "model.layers.2.mlp.", "model.layers.3."
INDEXER = "model.layers.1.self_attn.indexer."
NAN = float("nan")


def _without(part: str, *says: str, config: Config = SERVED_V3) -> Case:
    """Every tensor whose name begins with ``part`` is left out."""
    return Case(_drop(part, config), "", (part, *says), config)


def _drop(part: str, config: Config) -> Damage:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(part)]:
            del tensors[name]

    return edit_tensors(drop, config)


def _changed(
    name: str, make: Callable[[Tensor], Tensor], *says: str, config: Config = SERVED_V3
) -> Case:
    return Case(set_tensor(name, make, config), WEIGHTS, (name, *says), config)


def _extra(name: str, config: Config = SERVED_V3) -> Case:
    edit = edit_tensors(lambda tensors: tensors.update({name: torch.ones(24, 48)}), config)
    return Case(edit, WEIGHTS, (name, "does not have"), config)


PARTS: dict[str, Case] = {
    "expert without a matrix": _without(f"{MLP}experts.11.up_proj.weight", "1 of"),
    "expert missing": _without(f"{MLP}experts.11.", "3 of"),
    "expert too many": _extra(f"{MLP}experts.12.gate_proj.weight"),
    "shared experts missing": _without(f"{MLP}shared_experts.", "3 of"),
    "router missing": _without(f"{MLP}gate.weight", "1 of"),
    "router of another number of experts": _changed(
        f"{MLP}gate.weight", lambda w: w[:-1].clone(), "[11, 48]", "[12, 48]"
    ),
    "router bias missing": _without(f"{MLP}gate.e_score_correction_bias", "1 of"),
    "router bias NaN": _changed(f"{MLP}gate.e_score_correction_bias", with_value(NAN), "NaN"),
    "NaN in the last expert": _changed(f"{MLP}experts.11.down_proj.weight", with_value(NAN), "NaN"),
    "NaN in what is split": _changed(
        "model.layers.0.self_attn.kv_b_proj.weight", with_value(NAN), "holds NaN"
    ),
    "query norm missing": _without("model.layers.0.self_attn.q_a_layernorm.weight", "1 of"),
    "MTP layer without a norm": _without(f"{MTP}enorm.weight", "1 of"),
    "MTP layer without experts": _without(f"{MTP}mlp.experts.", "36 of"),
    "MTP layer without its projection": Case(
        _drop(f"{MTP}eh_proj.weight", SERVED_V3), WEIGHTS, (MTP, "does not have"), SERVED_V3
    ),
    "NaN in the MTP layer": _changed(f"{MTP}eh_proj.weight", with_value(NAN), "holds NaN"),
    "indexer in a V3": _extra(f"{INDEXER}wk.weight"),
    "indexer missing": _without(INDEXER, "5 of", config=SERVED_V32),
    "indexer without its norm's bias": _without(f"{INDEXER}k_norm.bias", config=SERVED_V32),
    "indexer of another width": _changed(
        f"{INDEXER}wk.weight", lambda w: w[:-2].clone(), "[10, 48]", config=SERVED_V32
    ),
    "NaN in an indexer": _changed(
        f"{INDEXER}k_norm.bias", with_value(NAN), "holds NaN", config=SERVED_V32
    ),
    "query bias missing": _without("model.layers.1.self_attn.q_proj.bias", config=SERVED_QWEN2),
    "output bias too many": _extra("model.layers.1.self_attn.o_proj.bias", SERVED_QWEN2),
    "norm of the heads missing": _without(
        "model.layers.1.self_attn.k_norm.weight", config=SERVED_QWEN3
    ),
}
