"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv:2405.04434, section 2.1).

Sizes in comments: H heads, nope and rope the two parts of a query and key, v the value size,
r = kv_lora_rank. Each token caches r + rope numbers per layer, shared by all heads.

    q             = q_b(norm(q_a x))  or, without a query latent,  q_proj x        [H, nope | rope]
    c | k_pe      = kv_a x;  c = norm(c)                                           [r], [rope]
    k | value     = kv_b c  per head, k_pe joined to every k                       [H, nope | v]
    output        = o_proj(softmax(scale · q·k) value)
    scale         = (nope + rope)^-0.5 · mscale²,  mscale = 0.1 · mscale_all_dim · ln(factor) + 1
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_latent
from kernels.mla import mla_attention, sparse_mla_attention
from kernels.rope import yarn_mscale
from runtime.config import MAX_WIDTH, Fields, RopeConfig
from runtime.models.decoder import CacheSpec
from runtime.models.layers import Linear, Placement, RMSNorm, Targets

# of q_a_layernorm and kv_a_layernorm: the released code does not give them the config's eps
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LatentConfig:
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def parse_latent(fields: Fields) -> LatentConfig:
    """The attention of a config.json of V2 or later. Raises `CheckpointError`."""
    for key in ("attention_bias", "tie_word_embeddings"):
        if fields.boolean(key, False):
            raise fields.error(key, "true is not supported for DeepSeek models")
    rope_head_dim = fields.integer("qk_rope_head_dim", low=2, high=1024)
    if rope_head_dim % 2:
        raise fields.error(
            "qk_rope_head_dim", f"{rope_head_dim} is odd; rotary embedding needs pairs"
        )
    has_rank = fields.has("q_lora_rank")
    return LatentConfig(
        num_heads=fields.integer("num_attention_heads", high=4096),
        q_lora_rank=fields.integer("q_lora_rank", high=MAX_WIDTH) if has_rank else None,
        kv_lora_rank=fields.integer("kv_lora_rank", high=MAX_WIDTH),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", high=1024),
        qk_rope_head_dim=rope_head_dim,
        v_head_dim=fields.integer("v_head_dim", high=1024),
    )


class LatentHeads:
    """What all of MLA shares: from queries and a token's raw latent to the layer's output.

    ``kv_b_proj`` is kept in the compute dtype also in FP8 models: absorbed attention multiplies by
    slices of it, not by the whole.
    """

    def __init__(
        self, config: LatentConfig, hidden_size: int, rope: RopeConfig, placement: Placement
    ) -> None:
        self.config = config
        self.batch_invariant = placement.batch_invariant
        self.scale = config.qk_head_dim**-0.5
        if rope.mscale_all_dim:
            self.scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, placement)
        rows = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b = placement.empty(rows, config.kv_lora_rank)
        self.o_proj = Linear(
            config.num_heads * config.v_head_dim, {"o_proj": hidden_size}, placement
        )

    def write(
        self,
        q: Tensor,
        kv_latent: Tensor,
        k_pe: Tensor,
        cos_sin: Tensor,
        batch: PagedBatch,
        cache: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Write the tokens' latents into their pages; q [num_tokens, H · (nope + rope)] in parts.

        Returns ``(q_nope, q_pe)``, [num_tokens, H, nope] and the rotated [num_tokens, H, rope].
        """
        sizes = [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim]
        q_nope, q_pe = q.view(-1, self.config.num_heads, sum(sizes)).split_with_sizes(sizes, dim=-1)
        norm = self.kv_a_layernorm  # of the latent; k_pe is not normed
        q_pe = rope_and_write_latent(
            q_pe,
            kv_latent,  # [num_tokens, r], raw
            k_pe,
            cos_sin,
            batch,
            cache["latent"],
            latent_norm=norm.weight,
            eps=norm.eps,
        )
        return q_nope, q_pe

    def attend(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        batch: PagedBatch,
        cache: dict[str, Tensor],
        selected: Tensor | None = None,
    ) -> Tensor:
        """[num_tokens, hidden]; with ``selected`` [num_tokens, top_k] only to those positions."""
        kv_b = self.kv_b.view(self.config.num_heads, -1, self.config.kv_lora_rank)  # [H, nope+v, r]
        latents = cache["latent"]
        attention = (q_nope, q_pe, latents, kv_b, batch, self.scale)
        if selected is None:
            out = mla_attention(*attention, batch_invariant=self.batch_invariant)
        else:
            out = sparse_mla_attention(*attention, selected, batch_invariant=self.batch_invariant)
        return self.o_proj(out.flatten(1))  # [num_tokens, H, v] -> [num_tokens, hidden]

    def targets(self, prefix: str) -> Targets:
        return {
            f"{prefix}kv_a_layernorm.weight": self.kv_a_layernorm.weight,
            f"{prefix}kv_b_proj.weight": self.kv_b,
            **self.o_proj.targets(prefix),
        }

    def cache_spec(self) -> CacheSpec:
        return {"latent": (self.config.kv_lora_rank + self.config.qk_rope_head_dim,)}


class DirectQueryAttention:
    """MLA whose queries come straight from the hidden state: V2-Lite."""

    def __init__(
        self, config: LatentConfig, hidden_size: int, rope: RopeConfig, placement: Placement
    ) -> None:
        self.parts = {
            "q_proj": config.num_heads * config.qk_head_dim,
            "kv_a_proj_with_mqa": config.kv_lora_rank + config.qk_rope_head_dim,
        }
        self.sizes = [self.parts["q_proj"], config.kv_lora_rank, config.qk_rope_head_dim]
        self.q_kv_a_proj = Linear(hidden_size, self.parts, placement)
        self.heads = LatentHeads(config, hidden_size, rope, placement)

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        q, kv_latent, k_pe = self.q_kv_a_proj(x).split_with_sizes(self.sizes, dim=-1)
        q_nope, q_pe = self.heads.write(q, kv_latent, k_pe, cos_sin, batch, cache)
        return self.heads.attend(q_nope, q_pe, batch, cache)

    def targets(self, prefix: str) -> Targets:
        return self.q_kv_a_proj.targets(prefix) | self.heads.targets(prefix)

    def cache_spec(self) -> CacheSpec:
        return self.heads.cache_spec()


class QueryLatent:
    """The compressed queries of V2 and later, and the product they share with the keys' latent."""

    def __init__(
        self, config: LatentConfig, q_lora_rank: int, hidden_size: int, placement: Placement
    ) -> None:
        kv_a = config.kv_lora_rank + config.qk_rope_head_dim
        self.sizes = [q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim]
        self.qkv_a_proj = Linear(
            hidden_size, {"q_a_proj": q_lora_rank, "kv_a_proj_with_mqa": kv_a}, placement
        )
        self.q_a_layernorm = RMSNorm(q_lora_rank, LATENT_NORM_EPS, placement)
        self.q_b_proj = Linear(
            q_lora_rank, {"q_b_proj": config.num_heads * config.qk_head_dim}, placement
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed query latent [num_tokens, q_lora_rank], the raw c and k_pe."""
        q_latent, kv_latent, k_pe = self.qkv_a_proj(x).split_with_sizes(self.sizes, dim=-1)
        return self.q_a_layernorm(q_latent), kv_latent, k_pe

    def targets(self, prefix: str) -> Targets:
        return {
            **self.qkv_a_proj.targets(prefix),
            f"{prefix}q_a_layernorm.weight": self.q_a_layernorm.weight,
            **self.q_b_proj.targets(prefix),
        }


class LatentAttention:
    """MLA with compressed queries: V2, V3, R1, V3.1."""

    def __init__(
        self,
        config: LatentConfig,
        q_lora_rank: int,
        hidden_size: int,
        rope: RopeConfig,
        placement: Placement,
    ) -> None:
        self.query = QueryLatent(config, q_lora_rank, hidden_size, placement)
        self.heads = LatentHeads(config, hidden_size, rope, placement)

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        q_latent, kv_latent, k_pe = self.query(x)
        q = self.query.q_b_proj(q_latent)
        q_nope, q_pe = self.heads.write(q, kv_latent, k_pe, cos_sin, batch, cache)
        return self.heads.attend(q_nope, q_pe, batch, cache)

    def targets(self, prefix: str) -> Targets:
        return self.query.targets(prefix) | self.heads.targets(prefix)

    def cache_spec(self) -> CacheSpec:
        return self.heads.cache_spec()
