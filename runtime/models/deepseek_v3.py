"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, mixture of experts, and the MTP layer.

Sizes in comments: H heads, nope and rope the two parts of a query and key, v the value size,
r = kv_lora_rank. Each token caches r + rope numbers per layer, shared by all heads.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_latent
from kernels.linear import linear
from kernels.mla import mla_attention
from kernels.moe import moe_experts, route_noaux_tc
from kernels.rope import yarn_mscale
from runtime.config import MAX_POSITION, MAX_WIDTH, Fields, RopeConfig, parse_rope
from runtime.models.layers import GatedMLP, Linear, Placement, RMSNorm, Targets, rope_table

# of q_a_layernorm and kv_a_layernorm: the released code does not give them the config's eps
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DeepseekV3Config:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_dense_layers: int
    num_experts: int
    num_shared_experts: int
    num_experts_per_token: int
    num_groups: int
    num_top_groups: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    num_mtp_layers: int  # declared and in the files
    num_undeclared_mtp_layers: int  # in the files only; not loaded


def parse_deepseek_v3(fields: Fields, tensor_names: Container[str]) -> DeepseekV3Config:
    """A `DeepseekV3ForCausalLM` config.json. Raises `CheckpointError`.

    Declared MTP layers may be missing from the files; ``tensor_names`` tells.
    """
    _refuse_variants(fields)
    num_experts = fields.integer("n_routed_experts", high=8192)
    num_groups = fields.integer("n_group", high=num_experts)
    num_top_groups = fields.integer("topk_group", high=num_groups)
    if num_experts % num_groups or num_experts < 2 * num_groups:
        raise fields.error(
            "n_group", f"{num_experts} experts do not make {num_groups} groups of two or more"
        )
    num_eligible = num_experts // num_groups * num_top_groups
    rope_head_dim = fields.integer("qk_rope_head_dim", low=2, high=1024)
    if rope_head_dim % 2:
        raise fields.error(
            "qk_rope_head_dim", f"{rope_head_dim} is odd; rotary embedding needs pairs"
        )
    max_position = fields.integer("max_position_embeddings", high=MAX_POSITION)
    num_layers = fields.integer("num_hidden_layers", high=1024)
    num_declared = fields.integer("num_nextn_predict_layers", 0, low=0, high=16)
    num_present = 0
    while f"model.layers.{num_layers + num_present}.eh_proj.weight" in tensor_names:
        num_present += 1
    num_mtp_layers = min(num_declared, num_present)
    return DeepseekV3Config(
        vocab_size=fields.integer("vocab_size", high=MAX_WIDTH),
        hidden_size=fields.integer("hidden_size", high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=fields.integer("num_attention_heads", high=4096),
        q_lora_rank=fields.integer("q_lora_rank", high=MAX_WIDTH),
        kv_lora_rank=fields.integer("kv_lora_rank", high=MAX_WIDTH),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", high=1024),
        qk_rope_head_dim=rope_head_dim,
        v_head_dim=fields.integer("v_head_dim", high=1024),
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
        moe_intermediate_size=fields.integer("moe_intermediate_size", high=MAX_WIDTH),
        num_dense_layers=fields.integer("first_k_dense_replace", low=0, high=num_layers),
        num_experts=num_experts,
        num_shared_experts=fields.integer("n_shared_experts", high=64),
        num_experts_per_token=fields.integer("num_experts_per_tok", high=num_eligible),
        num_groups=num_groups,
        num_top_groups=num_top_groups,
        norm_topk_prob=fields.boolean("norm_topk_prob", True),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0, low=0.0, high=1e3),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        max_position_embeddings=max_position,
        rope=parse_rope(fields, max_position),
        num_mtp_layers=num_mtp_layers,
        num_undeclared_mtp_layers=num_present - num_mtp_layers,
    )


def _refuse_variants(fields: Fields) -> None:
    """Settings of other families or of experiments, which would silently change the result."""
    fields.choice("hidden_act", ("silu",), "silu")
    fields.choice("scoring_func", ("sigmoid",), "sigmoid")
    fields.choice("topk_method", ("noaux_tc",), "noaux_tc")
    if not fields.has("q_lora_rank"):
        raise fields.error(
            "q_lora_rank", "null or missing; only queries with a latent are supported"
        )
    for key in ("attention_bias", "tie_word_embeddings"):
        if fields.boolean(key, False):
            raise fields.error(key, "true is not supported for DeepseekV3ForCausalLM")
    if not fields.boolean("rope_interleave", True):
        raise fields.error("rope_interleave", "false is not supported for DeepseekV3ForCausalLM")
    fields.integer("moe_layer_freq", 1, low=1, high=1)


class LatentAttention:
    """Multi-head latent attention (MLA, arXiv:2405.04434, 2.1) with compressed queries.

    softmax scale = (nope + rope)^-0.5 · mscale², mscale = 0.1 · mscale_all_dim · ln(factor) + 1
    """

    def __init__(self, config: DeepseekV3Config, placement: Placement) -> None:
        self.num_heads = config.num_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        qk_head_dim = self.nope + self.rope
        self.scale = qk_head_dim**-0.5
        if config.rope.mscale_all_dim:
            self.scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
        self.qkv_a_proj = Linear(
            config.hidden_size,
            {"q_a_proj": self.q_lora_rank, "kv_a_proj_with_mqa": self.kv_lora_rank + self.rope},
            placement,
        )
        self.q_a_layernorm = RMSNorm(self.q_lora_rank, LATENT_NORM_EPS, placement)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS, placement)
        self.q_b_proj = Linear(
            self.q_lora_rank, {"q_b_proj": self.num_heads * qk_head_dim}, placement
        )
        self.kv_b_proj = Linear(
            self.kv_lora_rank,
            {"kv_b_proj": self.num_heads * (self.nope + config.v_head_dim)},
            placement,
        )
        self.o_proj = Linear(
            self.num_heads * config.v_head_dim, {"o_proj": config.hidden_size}, placement
        )

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: PagedBatch, cache: dict[str, Tensor]
    ) -> Tensor:
        q_latent, kv_latent, k_pe = self.qkv_a_proj(x).split_with_sizes(
            [self.q_lora_rank, self.kv_lora_rank, self.rope], dim=-1
        )
        q = self.q_b_proj(self.q_a_layernorm(q_latent))
        q = q.view(-1, self.num_heads, self.nope + self.rope)
        q_nope, q_pe = q.split_with_sizes(
            [self.nope, self.rope], dim=-1
        )  # [num_tokens, H, nope | rope]
        kv_latent = self.kv_a_layernorm(kv_latent)  # [num_tokens, r]; k_pe is not normed
        q_pe = rope_and_write_latent(q_pe, kv_latent, k_pe, cos_sin, batch, cache["latent"])
        kv_b = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)  # [H, nope + v, r]
        out = mla_attention(q_nope, q_pe, cache["latent"], kv_b, batch, self.scale)
        return self.o_proj(out.flatten(1))  # [num_tokens, H, v] -> [num_tokens, hidden]

    def targets(self, prefix: str) -> Targets:
        return {
            **self.qkv_a_proj.targets(prefix),
            f"{prefix}q_a_layernorm.weight": self.q_a_layernorm.weight,
            f"{prefix}kv_a_layernorm.weight": self.kv_a_layernorm.weight,
            **self.q_b_proj.targets(prefix),
            **self.kv_b_proj.targets(prefix),
            **self.o_proj.targets(prefix),
        }


class MoE:
    """The chosen experts, weighted, plus the shared ones. The router is fp32 in every dtype."""

    def __init__(self, config: DeepseekV3Config, placement: Placement) -> None:
        self.config = config
        num_experts, hidden_size = config.num_experts, config.hidden_size
        intermediate_size = config.moe_intermediate_size
        self.gate = placement.empty(num_experts, hidden_size, dtype=torch.float32)
        self.correction_bias = placement.empty(num_experts, dtype=torch.float32)
        self.gate_up = placement.empty(num_experts, 2 * intermediate_size, hidden_size)
        self.down = placement.empty(num_experts, hidden_size, intermediate_size)
        self.shared_experts = GatedMLP(
            hidden_size, config.num_shared_experts * intermediate_size, placement
        )

    def __call__(self, x: Tensor) -> Tensor:
        config = self.config
        expert_ids, expert_weights = route_noaux_tc(
            linear(x.float(), self.gate),  # [num_tokens, num_experts]
            self.correction_bias,
            config.num_experts_per_token,
            config.num_groups,
            config.num_top_groups,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        routed = moe_experts(x, expert_ids, expert_weights, self.gate_up, self.down)
        return routed + self.shared_experts(x)

    def targets(self, prefix: str) -> Targets:
        targets = {
            f"{prefix}gate.weight": self.gate,
            f"{prefix}gate.e_score_correction_bias": self.correction_bias,
            **self.shared_experts.targets(f"{prefix}shared_experts."),
        }
        gates_and_ups = self.gate_up.view(
            2 * self.gate_up.shape[0], -1, self.gate_up.shape[2]
        ).unbind()
        for expert_id, down in enumerate(self.down.unbind()):
            expert = f"{prefix}experts.{expert_id}."
            targets[f"{expert}gate_proj.weight"] = gates_and_ups[2 * expert_id]
            targets[f"{expert}up_proj.weight"] = gates_and_ups[2 * expert_id + 1]
            targets[f"{expert}down_proj.weight"] = down
        return targets


class DecoderLayer:
    """h = h + attention(norm(h)); h = h + mlp(norm(h)), the MLP dense in the first layers."""

    def __init__(self, config: DeepseekV3Config, layer_id: int, placement: Placement) -> None:
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden_size, eps, placement)
        self.self_attn = LatentAttention(config, placement)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, placement)
        self.mlp: GatedMLP | MoE = (
            GatedMLP(hidden_size, config.intermediate_size, placement)
            if layer_id < config.num_dense_layers
            else MoE(config, placement)
        )

    def __call__(
        self,
        normed: Tensor,
        residual: Tensor,
        cos_sin: Tensor,
        batch: PagedBatch,
        cache: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``normed`` is ``input_layernorm(residual)``; the MLP's output is not added yet."""
        out = self.self_attn(normed, cos_sin, batch, cache)
        normed, residual = self.post_attention_layernorm.add(out, residual)
        return self.mlp(normed), residual

    def targets(self, prefix: str) -> Targets:
        return {
            f"{prefix}input_layernorm.weight": self.input_layernorm.weight,
            **self.self_attn.targets(f"{prefix}self_attn."),
            f"{prefix}post_attention_layernorm.weight": self.post_attention_layernorm.weight,
            **self.mlp.targets(f"{prefix}mlp."),
        }


class MTPLayer:
    """Weights of the multi-token prediction layer (arXiv:2412.19437, 2.2): loaded, not yet run."""

    def __init__(self, config: DeepseekV3Config, layer_id: int, placement: Placement) -> None:
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = placement.empty(config.vocab_size, hidden_size)
        self.enorm = RMSNorm(hidden_size, eps, placement)
        self.hnorm = RMSNorm(hidden_size, eps, placement)
        self.eh_proj = Linear(2 * hidden_size, {"eh_proj": hidden_size}, placement)
        self.layer = DecoderLayer(config, layer_id, placement)
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


class DeepseekV3:
    """Token ids to hidden states to logits. See `runtime.models.CausalLM` for the interface."""

    def __init__(
        self,
        config: DeepseekV3Config,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        placement = Placement(device, dtype)
        self.embed_tokens = placement.empty(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i, placement) for i in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.lm_head = placement.empty(config.vocab_size, config.hidden_size)
        self.mtp_layers = [
            MTPLayer(config, config.num_layers + i, placement) for i in range(config.num_mtp_layers)
        ]
        self.cos_sin = placement.empty(0)

    def weight_targets(self) -> Targets:
        targets = {
            "model.embed_tokens.weight": self.embed_tokens,
            "model.norm.weight": self.norm.weight,
            "lm_head.weight": self.lm_head,
        }
        layers: list[DecoderLayer | MTPLayer] = [*self.layers, *self.mtp_layers]
        for i, layer in enumerate(layers):
            targets |= layer.targets(f"model.layers.{i}.")
        return targets

    def ignores(self, name: str) -> bool:
        first = self.config.num_layers + self.config.num_mtp_layers
        undeclared = range(first, first + self.config.num_undeclared_mtp_layers)
        prefixes = tuple(f"model.layers.{i}." for i in undeclared)
        return name.endswith(".rotary_emb.inv_freq") or name.startswith(prefixes)

    def finish_loading(self) -> None:
        self.cos_sin = rope_table(
            self.config.rope,
            self.config.qk_rope_head_dim,
            self.max_model_len,
            self.embed_tokens.device,
        )

    def cache_spec(self) -> list[dict[str, tuple[int, ...]]]:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return [{"latent": (width,)} for _ in self.layers]

    def forward(
        self, token_ids: Tensor, batch: PagedBatch, caches: list[dict[str, Tensor]]
    ) -> Tensor:
        residual = embedding(token_ids, self.embed_tokens)  # [num_tokens, hidden]
        normed = self.layers[0].input_layernorm(residual)
        following_norms = [layer.input_layernorm for layer in self.layers[1:]] + [self.norm]
        for layer, following_norm, cache in zip(self.layers, following_norms, caches, strict=True):
            out, residual = layer(normed, residual, self.cos_sin, batch, cache)
            normed, residual = following_norm.add(out, residual)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.lm_head).float()  # [num_rows, vocab]
