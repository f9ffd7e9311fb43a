"""DeepSeekMoE 16B in float64, written from the paper (arXiv:2401.06066), for want of another.

transformers has no `deepseek` model type. No cache, no batch, one loop per equation; the weights
are read under their released names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class ReferenceMoE:
    """Logits of a whole prompt."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.config = config
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, token_ids: list[int]) -> Tensor:
        """[num_tokens, vocab] float64"""
        hidden = self.weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            normed = self._norm(hidden, f"{prefix}input_layernorm.weight")
            hidden = hidden + self._attention(normed, f"{prefix}self_attn.")
            normed = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
            if layer < self.config["first_k_dense_replace"]:
                hidden = hidden + self._mlp(normed, f"{prefix}mlp.")
            else:
                hidden = hidden + self._experts(normed, f"{prefix}mlp.")
        return self._norm(hidden, "model.norm.weight") @ self.weights["lm_head.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        variance = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(variance + self.config["rms_norm_eps"]) * self.weights[name]

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        num_heads = self.config["num_attention_heads"]
        q, k, v = (
            (x @ self.weights[f"{prefix}{name}_proj.weight"].T).unflatten(1, (num_heads, -1))
            for name in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        out = torch.zeros_like(v)
        for t in range(x.shape[0]):
            scores = torch.einsum("hd,shd->hs", q[t], k[: t + 1]) / q.shape[2] ** 0.5
            out[t] = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v[: t + 1])
        return out.flatten(1) @ self.weights[f"{prefix}o_proj.weight"].T

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotary embedding (arXiv:2104.09864), pairs (i, i + dim / 2), as complex numbers."""
        half = heads.shape[2] // 2
        frequencies = self.config["rope_theta"] ** (-torch.arange(half).double() / half)
        angles = torch.arange(heads.shape[0]).double()[:, None] * frequencies
        turned = torch.complex(heads[..., :half], heads[..., half:])
        turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate = x @ self.weights[f"{prefix}gate_proj.weight"].T
        up = x @ self.weights[f"{prefix}up_proj.weight"].T
        return (gate * torch.sigmoid(gate) * up) @ self.weights[f"{prefix}down_proj.weight"].T

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        """Σ over the top k of softmax(gate x), as they are, plus the shared experts."""
        affinities = (x @ self.weights[f"{prefix}gate.weight"].T).softmax(dim=-1)
        out = self._mlp(x, f"{prefix}shared_experts.")
        for t in range(x.shape[0]):
            best = affinities[t].argsort(descending=True)[: self.config["num_experts_per_tok"]]
            for expert in best.tolist():
                y = self._mlp(x[t : t + 1], f"{prefix}experts.{expert}.")[0]
                out[t] += affinities[t, expert] * y
        return out
