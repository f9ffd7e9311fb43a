"""Grouped-query attention (arXiv:2305.13245) as Llama has it: also MHA and MQA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.attention import paged_attention
from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_kv
from runtime.config import Fields
from runtime.models.decoder import CacheSpec
from runtime.models.layers import Linear, Placement, Targets


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """Query heads, and the key-value heads they share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def parse_heads(fields: Fields, hidden_size: int) -> HeadsConfig:
    """Heads of a config.json. Raises `CheckpointError`."""
    num_heads = fields.integer("num_attention_heads", high=4096)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=4096)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads"
        )
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"{num_heads} does not divide {hidden_size}")
    head_dim = fields.integer("head_dim", hidden_size // num_heads, low=2, high=1024)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding needs pairs")
    return HeadsConfig(num_heads, num_kv_heads, head_dim)


class GroupedQueryAttention:
    """Causal attention with ``num_heads / num_kv_heads`` query heads on each key-value head."""

    def __init__(
        self,
        hidden_size: int,
        heads: HeadsConfig,
        placement: Placement,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        self.heads = heads
        self.scale = heads.head_dim**-0.5
        self.batch_invariant = placement.batch_invariant
        qkv = {"q_proj": heads.q_size, "k_proj": heads.kv_size, "v_proj": heads.kv_size}
        self.qkv_proj = Linear(hidden_size, qkv, placement, bias=qkv_bias)
        self.o_proj = Linear(heads.q_size, {"o_proj": hidden_size}, placement, bias=output_bias)

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.heads)
        q = rope_and_write_kv(q, k, v, cos_sin, batch, cache["k"], cache["v"])
        out = paged_attention(
            q, cache["k"], cache["v"], batch, self.scale, batch_invariant=self.batch_invariant
        )
        return self.o_proj(out.flatten(1))  # [num_tokens, hidden]

    def targets(self, prefix: str) -> Targets:
        return self.qkv_proj.targets(prefix) | self.o_proj.targets(prefix)

    def cache_spec(self) -> CacheSpec:
        return kv_cache_spec(self.heads)


def split_heads(qkv: Tensor, heads: HeadsConfig) -> tuple[Tensor, Tensor, Tensor]:
    """[num_tokens, q_size + 2 * kv_size] to q [num_tokens, num_heads, head_dim] and its k and v."""
    q, k, v = qkv.split_with_sizes([heads.q_size, heads.kv_size, heads.kv_size], dim=-1)
    return (
        q.view(-1, heads.num_heads, heads.head_dim),
        k.view(-1, heads.num_kv_heads, heads.head_dim),
        v.view(-1, heads.num_kv_heads, heads.head_dim),
    )


def kv_cache_spec(heads: HeadsConfig) -> CacheSpec:
    shape = (heads.num_kv_heads, heads.head_dim)
    return {"k": shape, "v": shape}
