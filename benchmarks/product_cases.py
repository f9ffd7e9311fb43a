"""The matrix products of a step at the shapes of released models.

A case makes its inputs when it is measured: several sets that together exceed the L2, each with the
op's call (`OURS`), what torch offers for the same (`TORCH`), and the op in its batch-invariant mode
(`INVARIANT`). Weights are counted as read once, activations as read and written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from benchmarks.kernel_inputs import INVARIANT, OURS, TORCH, Case, Maker, Work
from benchmarks.timing import Call, num_sets
from kernels.activation import silu_and_mul
from kernels.linear import heads_linear, linear, linear_silu_and_mul
from kernels.moe import moe_experts, route_noaux_tc, route_softmax
from kernels.quant import ActivationScale, fp8_linear


def dense_linears(maker: Maker, model: str) -> Iterator[Case]:
    """The products of a dense decoder's layer, and its head."""
    config = maker.config(model)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = hidden // num_heads
    qkv = (num_heads + 2 * num_kv_heads) * head_dim
    yield from linears(maker, model, "qkv", qkv, hidden, bias="Qwen2" in config["architectures"][0])
    yield from linears(maker, model, "o", hidden, num_heads * head_dim)
    yield from linears(maker, model, "gate_up", 2 * inner, hidden, gated=True)
    yield from linears(maker, model, "down", hidden, inner)
    yield from linears(maker, model, "lm_head", config["vocab_size"], hidden)


def latent_linears(maker: Maker, model: str) -> Iterator[Case]:
    """The products of V2-Lite that are not grouped."""
    config = maker.config(model)
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    q_size = num_heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    yield from linears(maker, model, "q_kv_a", q_size + latent, hidden)
    yield from linears(maker, model, "o", hidden, num_heads * config["v_head_dim"])
    yield from linears(maker, model, "gate_up", 2 * shared, hidden, gated=True)
    yield from linears(maker, model, "down", hidden, shared)
    yield from linears(maker, model, "lm_head", config["vocab_size"], hidden)


def linears(
    maker: Maker,
    model: str,
    name: str,
    out: int,
    size: int,
    *,
    bias: bool = False,
    gated: bool = False,
) -> Iterator[Case]:
    for rows in maker.grid.rows:

        def prepare(rows: int = rows) -> Work:
            def one() -> dict[str, Call]:
                x, weight = maker.normal(rows, size), maker.normal(out, size, scale=0.02)
                added = maker.normal(out) if bias else None
                if gated:
                    return {
                        OURS: lambda: linear_silu_and_mul(x, weight),
                        TORCH: lambda: silu_and_mul(functional.linear(x, weight)),
                        INVARIANT: lambda: linear_silu_and_mul(x, weight, batch_invariant=True),
                    }
                return {
                    OURS: lambda: linear(x, weight, added),
                    TORCH: lambda: functional.linear(x, weight, added),
                    INVARIANT: lambda: linear(x, weight, added, batch_invariant=True),
                }

            written = out // 2 if gated else out
            num_bytes = maker.dtype.itemsize * (out * size + rows * (size + written))
            sets = [one() for _ in range(num_sets(num_bytes))]
            return Work(sets, num_bytes, 2.0 * rows * out * size)

        yield Case("linear", model, f"{name} {out}x{size}", f"{rows}", prepare)


def heads_linears(maker: Maker, model: str) -> Iterator[Case]:
    """Queries into the latent space, and attended latents out of it."""
    num_heads, rank, nope, _, v_dim = maker.latent_heads(model)
    shapes = {"absorb": (rank, nope), "values": (v_dim, rank)}
    for name, (out, size) in shapes.items():
        for rows in maker.grid.rows:

            def prepare(rows: int = rows, out: int = out, size: int = size) -> Work:
                def one() -> dict[str, Call]:
                    x = maker.normal(rows, num_heads, size)
                    weight = maker.normal(num_heads, out, size, scale=0.02)
                    return {
                        OURS: lambda: heads_linear(x, weight),
                        TORCH: lambda: torch.bmm(x.transpose(0, 1), weight.mT),
                        INVARIANT: lambda: heads_linear(x, weight, batch_invariant=True),
                    }

                values = num_heads * (out * size + rows * (out + size))
                num_bytes = maker.dtype.itemsize * values
                sets = [one() for _ in range(num_sets(num_bytes))]
                return Work(sets, num_bytes, 2.0 * rows * num_heads * out * size)

            shape = f"{name} {num_heads}x{out}x{size}"
            yield Case("heads_linear", model, shape, f"{rows}", prepare)


def fp8_linears(maker: Maker, model: str) -> Iterator[Case]:
    """V3's matrices in FP8 blocks, with bf16 activations and with quantized ones."""
    config = maker.config(model)
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    shared = config["moe_intermediate_size"]
    shapes = {
        "qkv_a": (config["q_lora_rank"] + latent, hidden),
        "q_b": (num_heads * head_dim, config["q_lora_rank"]),
        "o": (hidden, num_heads * config["v_head_dim"]),
        "gate_up": (2 * shared, hidden),
        "down": (hidden, shared),
    }
    formats: dict[str, ActivationScale | None] = {"W8A16": None, "W8A8": "float32"}
    for name, (out, size) in shapes.items():
        for format_name, activations in formats.items():
            for rows in maker.grid.expert_rows:

                def prepare(
                    rows: int = rows,
                    out: int = out,
                    size: int = size,
                    activations: ActivationScale | None = activations,
                ) -> Work:
                    def one() -> dict[str, Call]:
                        x, weight = maker.normal(rows, size), maker.fp8(out, size, activations)
                        return {
                            OURS: lambda: fp8_linear(x, weight),
                            INVARIANT: lambda: fp8_linear(x, weight, batch_invariant=True),
                        }

                    num_bytes = out * size + maker.dtype.itemsize * rows * (out + size)
                    sets = [one() for _ in range(num_sets(num_bytes))]
                    return Work(sets, num_bytes, 2.0 * rows * out * size)

                shape = f"{name} {out}x{size} {format_name}"
                yield Case("fp8_linear", model, shape, f"{rows}", prepare)


def experts(maker: Maker, model: str) -> Iterator[Case]:
    """The routed experts of one layer; a step reads those that its tokens chose."""
    config = maker.config(model)
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    num_experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    for rows in maker.grid.expert_rows:

        def prepare(rows: int = rows) -> Work:
            gate_up = maker.normal(num_experts, 2 * inner, hidden, scale=0.02)
            down = maker.normal(num_experts, hidden, inner, scale=0.02)
            num_hit = []

            def one() -> dict[str, Call]:
                x = maker.normal(rows, hidden)
                scores = torch.rand(rows, num_experts, device=maker.device)
                weights, ids = scores.topk(top_k, dim=-1)
                num_hit.append(int(ids.unique().numel()))
                return {
                    OURS: lambda: moe_experts(x, ids, weights, gate_up, down),
                    INVARIANT: lambda: moe_experts(
                        x, ids, weights, gate_up, down, batch_invariant=True
                    ),
                }

            sets = [one() for _ in range(8)]  # they choose other experts of the same weights
            mean_hit = sum(num_hit) / len(num_hit)
            values = mean_hit * 3 * hidden * inner + 2 * rows * hidden
            flops = 2.0 * rows * top_k * 3 * hidden * inner
            return Work(sets, maker.dtype.itemsize * values, flops)

        shape = f"{num_experts} of {inner}x{hidden}"
        yield Case("moe_experts", model, shape, f"{rows}", prepare)


def routers(maker: Maker, model: str) -> Iterator[Case]:
    config = maker.config(model)
    num_experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    groups = config["n_group"], config["topk_group"]
    for rows in (maker.grid.rows[0], maker.grid.rows[-1]):

        def prepare(rows: int = rows) -> Work:
            def one() -> dict[str, Call]:
                logits = torch.randn(rows, num_experts, device=maker.device)
                bias = torch.randn(num_experts, device=maker.device)
                if config["scoring_func"] == "softmax":
                    return {OURS: lambda: route_softmax(logits, top_k, *groups, 1.0)}
                return {OURS: lambda: route_noaux_tc(logits, bias, top_k, *groups, True, 2.5)}

            return Work([one() for _ in range(8)], 4.0 * rows * (num_experts + 3 * top_k))

        yield Case("route", model, f"{top_k} of {num_experts}", f"{rows}", prepare)
