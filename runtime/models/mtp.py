"""The multi-token prediction layer of V3 to V3.2 (arXiv:2412.19437, 2.2): loaded, not yet run."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from runtime.config import Fields
from runtime.models.decoder import DecoderConfig, DecoderLayer
from runtime.models.layers import Linear, Placement, RMSNorm, Targets


@dataclass(frozen=True, slots=True)
class MTPLayers:
    """Layer numbers behind the main model's: to load, and to skip."""

    loaded: range  # declared in config.json and in the files
    ignored: range  # in the files only


def parse_mtp(fields: Fields, tensor_names: Container[str]) -> MTPLayers:
    """Declared MTP layers may be missing from the files; ``tensor_names`` tells."""
    first = fields.integer("num_hidden_layers", high=1024)
    num_declared = fields.integer("num_nextn_predict_layers", 0, low=0, high=16)
    end = first
    while f"model.layers.{end}.eh_proj.weight" in tensor_names:
        end += 1
    end_loaded = min(first + num_declared, end)
    return MTPLayers(range(first, end_loaded), range(end_loaded, end))


class MTPLayer:
    """Embedding of the next token and the main model's hidden state, through one more layer."""

    def __init__(self, config: DecoderConfig, layer: DecoderLayer, placement: Placement) -> None:
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = placement.empty(config.vocab_size, hidden_size)
        self.enorm = RMSNorm(hidden_size, eps, placement)
        self.hnorm = RMSNorm(hidden_size, eps, placement)
        self.eh_proj = Linear(2 * hidden_size, {"eh_proj": hidden_size}, placement.unquantized)
        self.layer = layer
        self.head_norm = RMSNorm(hidden_size, eps, placement)
        self.head = placement.empty(config.vocab_size, hidden_size)

    def targets(self, prefix: str) -> Targets:
        return {
            f"{prefix}embed_tokens.weight": self.embed_tokens,
            f"{prefix}enorm.weight": self.enorm.weight,
            f"{prefix}hnorm.weight": self.hnorm.weight,
            **self.eh_proj.targets(prefix),
            **self.layer.targets(prefix),
            f"{prefix}shared_head.norm.weight": self.head_norm.weight,
            f"{prefix}shared_head.head.weight": self.head,
        }
