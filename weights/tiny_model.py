"""The embedded model for training: DeepSeek-V3's formulas under the released tensor names.

Written out here, not taken from transformers, for two reasons: the multi-token prediction layer is
trained too, and the router's bias needs the experts' load. `make_tiny.py` checks the result with
transformers as an independent reader.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.sizes = (heads, nope, rope, config.v_head_dim, rank)
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(rank, heads * (nope + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        scaling = config.rope_scaling
        mscale = 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0
        self.scale = (nope + rope) ** -0.5 * mscale**2

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention over x [batch, length, hidden]."""
        heads, nope, rope, value_dim, rank = self.sizes
        batch, length, _ = x.shape
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.view(batch, length, heads, nope + rope).transpose(1, 2)
        latent, key_rope = self.kv_a_proj_with_mqa(x).split([rank, rope], dim=-1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))
        key_value = key_value.view(batch, length, heads, nope + value_dim).transpose(1, 2)
        query_nope, query_rope = query.split([nope, rope], dim=-1)
        key_nope, value = key_value.split([nope, value_dim], dim=-1)
        query_rope, key_rope = apply_rotary_pos_emb_interleave(
            query_rope, key_rope[:, None], *rotary
        )
        query = torch.cat([query_nope, query_rope], dim=-1)
        key = torch.cat([key_nope, key_rope.expand(-1, heads, -1, -1)], dim=-1)
        # Values as wide as keys let torch take its flash path.
        value = F.pad(value, (0, nope + rope - value_dim))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return self.o_proj(out[..., :value_dim].transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate x) · up x)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores, group-limited top-k, balanced by a bias instead of a loss (noaux_tc)."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.loads: list[Tensor] = []  # one count per batch; appending is safe between threads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights, both [num_tokens, num_experts_per_tok]."""
        config = self.config
        scores = F.linear(x, self.weight).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        grouped = choice.view(len(x), config.n_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        choice = grouped.masked_fill(closed[..., None], -math.inf).flatten(1)
        chosen = choice.topk(config.num_experts_per_tok, dim=-1).indices
        if self.training:
            self.loads.append(torch.bincount(chosen.flatten(), minlength=config.n_routed_experts))
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        return chosen, weights

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Raises the bias of experts with less than their share of the load, lowers the others."""
        if self.loads:
            load = torch.stack(self.loads).sum(0).float()
            self.e_score_correction_bias += speed * (load.mean() - load).sign()
        self.loads.clear()


class MoE(nn.Module):
    """Routed experts and one shared expert."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(hidden, inter) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(hidden, inter * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Runs x [batch, length, hidden] through the chosen experts, tokens sorted by expert."""
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat)
        order = chosen.flatten().argsort(stable=True)
        rows = order // chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = flat[rows].split(counts)
        pairs = zip(self.experts, parts, strict=True)
        outputs = torch.cat([expert(part) for expert, part in pairs])
        outputs = outputs * weights.flatten()[order, None]
        routed = torch.zeros_like(flat).index_add(0, rows, outputs)
        return routed.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    """Attention and feed-forward, each after its norm."""

    def __init__(self, config: SimpleNamespace, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """One decoder layer."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTPLayer(Layer):
    """The multi-token prediction layer: from h_i and token i+1 to token i+2."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.shared_head = nn.ModuleDict({"norm": norm})

    def draft(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Normed hidden states; `embedded` are the embeddings of the tokens one place later."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        return self.shared_head["norm"](self(x, rotary))


class TinyModel(nn.Module):
    """The main model with its MTP layer as `model.layers.{num_hidden_layers}`."""

    def __init__(self, config: SimpleNamespace, rotary: nn.Module) -> None:
        super().__init__()
        layers = [Layer(config, index) for index in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList([*layers, MTPLayer(config)]),
                "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                fan_in = 4 if "embed_tokens" in name else weight.shape[1]
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                branches = 2 * config.num_hidden_layers if adds else 1
                nn.init.normal_(weight, std=(fan_in * branches) ** -0.5)
        self.look_back()

    @torch.no_grad()
    def look_back(self) -> None:
        """Starts the first layer's heads as looking 1, 1, 2 and 3 tokens back.

        Copying from the prompt is learned through such heads; finding them takes longer than the
        whole training here. The first embedding feature starts as a constant that drives them.
        """
        attention = self.model["layers"][0].self_attn
        heads, nope, rope, _, rank = attention.sizes
        self.model["embed_tokens"].weight[:, 0] = 2.0
        attention.q_a_proj.weight[0] = 0.0
        attention.q_a_proj.weight[0, 0] = 1.0
        key_rows = attention.kv_a_proj_with_mqa.weight[rank:]
        key_rows *= 0.1
        key_rows[0:8:2, 0] = 1.6  # the four fastest pairs tell neighbours apart
        query_rows = attention.q_b_proj.weight.view(heads, nope + rope, -1)[:, nope:]
        query_rows *= 0.1
        for head, distance in enumerate((1, 1, 2, 3)[:heads]):
            angle = self.rotary.inv_freq * distance
            query_rows[head, 0:8:2, 0] = 1.7 * angle[:4].cos()
            query_rows[head, 1:8:2, 0] = -1.7 * angle[:4].sin()

    def losses(self, ids: Tensor, scored: Tensor, with_mtp: bool) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of next and next-next tokens where `scored` marks the target."""
        *layers, mtp = self.model["layers"]
        embedded = self.model["embed_tokens"](ids)
        rotary = self.rotary(embedded, torch.arange(ids.shape[1], device=ids.device)[None])
        hidden = embedded
        for layer in layers:
            hidden = layer(hidden, rotary)
        hidden = self.model["norm"](hidden)
        mask = scored[:, 1:]
        main = F.cross_entropy(self.lm_head(hidden[:, :-1][mask]), ids[:, 1:][mask])
        if not with_mtp:
            return main, torch.zeros(())
        cut = tuple(table[:, :-2] for table in rotary)
        drafted = mtp.draft(embedded[:, 1:-1], hidden[:, :-2], cut)
        mask = scored[:, 2:]
        return main, F.cross_entropy(self.lm_head(drafted[mask]), ids[:, 2:][mask])


class Muon:
    """Momentum whose update is orthogonalised (Jordan et al. 2024), batched over equal shapes."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        self.param_groups = [{"lr": lr}]
        self.momentum = momentum
        shapes: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            shapes.setdefault(weight.shape, []).append(weight)
        self.stacks = [(stack, torch.zeros_like(torch.stack(stack))) for stack in shapes.values()]

    @torch.no_grad()
    def step(self) -> None:
        """One update; weights without a gradient (the MTP layer at first) stay as they are."""
        for stack, buffer in self.stacks:
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in stack]
            gradient = torch.stack(grads)
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(buffer, self.momentum))
            # 0.2 * sqrt(larger side) gives the update AdamW's usual size per element.
            rate = self.param_groups[0]["lr"] * 0.2 * max(update.shape[1:]) ** 0.5
            for weight, part in zip(stack, update, strict=True):
                if weight.grad is not None:
                    weight.sub_(part, alpha=rate)


def orthogonal(update: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices to update [n, rows, columns], by Newton-Schulz steps."""
    wide = update.mT if update.shape[1] > update.shape[2] else update
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
    return wide.mT if update.shape[1] > update.shape[2] else wide
