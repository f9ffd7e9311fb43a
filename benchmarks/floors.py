"""The least a step can cost: bytes that must be read, operations that must be done.

    decode step, bytes  = weights read + batch * context * cache bytes per token
    weights read        = all but the embedding table and the experts that no token chose
    experts hit         = n * (1 - (1 - k / n)^batch)      k of n chosen by each token, at random
    prompt, operations  = 2 * weights a token meets * tokens + causal attention

The embedding table is a look-up of a few rows, unless it is the head as well. Times follow from the
bandwidth and the matmul rate that the same run measured (`benchmarks.ceilings`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from runtime.models import CausalLM

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Floor:
    """What a model costs per step, in bytes as they are stored and in parameters."""

    dense_bytes: int  # read by every step: attention, norms, shared experts, routers, head
    routed_bytes: int  # of all routed experts
    num_experts: int  # of a layer; 0: no experts
    experts_per_token: int
    cache_bytes_per_token: int
    params_per_token: int  # that multiply each prompt token: no embedding, no head
    attention_flops_per_pair: int  # for one query and one key, all layers and heads

    def experts_hit(self, batch: int) -> float:
        """How many experts of a layer a step of ``batch`` tokens is expected to read."""
        if not self.num_experts:
            return 0.0
        missed = (1 - self.experts_per_token / self.num_experts) ** batch
        return self.num_experts * (1 - missed)

    def weight_bytes(self, batch: int) -> float:
        """Bytes of weights that a decode step of ``batch`` sequences reads."""
        if not self.num_experts:
            return float(self.dense_bytes)
        return self.dense_bytes + self.routed_bytes * self.experts_hit(batch) / self.num_experts

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step reads; ``context`` is the mean number of cached tokens."""
        return self.weight_bytes(batch) + batch * context * self.cache_bytes_per_token

    def scaled(self, share: float) -> Floor:
        """The floor of the same model with weights of ``share`` times the bytes."""
        return replace(
            self,
            dense_bytes=round(self.dense_bytes * share),
            routed_bytes=round(self.routed_bytes * share),
        )

    def prompt_flops(self, num_tokens: int) -> float:
        """Operations of a prompt from its first token, head not counted."""
        pairs = num_tokens * num_tokens / 2
        return 2.0 * self.params_per_token * num_tokens + self.attention_flops_per_pair * pairs


def model_floor(model: CausalLM, cache_itemsize: int) -> Floor:
    """Count the tensors of a model, which may lie on the meta device.

    Args:
        model: of a family with ``heads`` or ``latent`` in its config; it has no draft layers.
        cache_itemsize: bytes of a cached number.
    """
    config: Any = model.config
    targets = model.weight_targets()
    routed = {name: target for name, target in targets.items() if ".mlp.experts." in name}
    dense = {name: target for name, target in targets.items() if name not in routed}
    if not config.tie_word_embeddings:
        dense.pop(EMBEDDING)
    experts = getattr(config, "experts", None)
    num_experts = experts.num_experts if experts else 0
    per_token = experts.num_experts_per_token if experts else 0
    inner = [target for name, target in dense.items() if name not in (EMBEDDING, HEAD)]
    routed_per_token = _numel(routed.values()) * per_token // num_experts if num_experts else 0
    shapes = [shape for layer in model.cache_spec() for shape in layer.values()]
    return Floor(
        dense_bytes=sum(target.nbytes for target in dense.values()),
        routed_bytes=sum(target.nbytes for target in routed.values()),
        num_experts=num_experts,
        experts_per_token=per_token,
        cache_bytes_per_token=sum(math.prod(shape) for shape in shapes) * cache_itemsize,
        params_per_token=_numel(inner) + routed_per_token,
        attention_flops_per_pair=config.num_layers * _flops_per_pair(config),
    )


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _flops_per_pair(config: Any) -> int:
    """Of one layer: a multiply-add for each number of a key and of a value, in every head."""
    if hasattr(config, "latent"):
        latent = config.latent
        return int(2 * latent.num_heads * (latent.qk_head_dim + latent.v_head_dim))
    return int(2 * config.heads.num_heads * 2 * config.heads.head_dim)
