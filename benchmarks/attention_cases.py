"""All of a step that is no matrix product: norms, pages, attention, sampling.

The counted bytes are what must be read and written once, keys and values above all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernel_inputs import OURS, PAGE_SIZE, Case, Maker, Work, short
from benchmarks.timing import Call, num_sets
from kernels.attention import paged_attention
from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_kv, rope_and_write_latent
from kernels.mla import mla_attention
from kernels.norm import add_rms_norm, rms_norm
from kernels.sampling import SamplingBatch, sample

EPS = 1e-6


def norms(maker: Maker, model: str) -> Iterator[Case]:
    hidden = maker.config(model)["hidden_size"]
    for adds in (False, True):
        for rows in (maker.grid.rows[0], maker.grid.rows[-1], maker.grid.prompt_rows):

            def prepare(rows: int = rows, adds: bool = adds) -> Work:
                num_bytes = maker.dtype.itemsize * rows * hidden * (4 if adds else 2)

                def one() -> dict[str, Call]:
                    x, residual = maker.normal(rows, hidden), maker.normal(rows, hidden)
                    weight = maker.normal(hidden)
                    if adds:
                        return {OURS: lambda: add_rms_norm(x, residual, weight, EPS)}
                    return {OURS: lambda: rms_norm(x, weight, EPS)}

                return Work([one() for _ in range(num_sets(num_bytes))], num_bytes)

            op = "add_rms_norm" if adds else "rms_norm"
            yield Case(op, model, f"{hidden}", f"{rows}", prepare)


def key_value_writes(maker: Maker, model: str) -> Iterator[Case]:
    num_heads, num_kv_heads, dim = maker.heads(model)
    sizes = [num_heads * dim, num_kv_heads * dim, num_kv_heads * dim]
    for rows in (maker.grid.rows[0], maker.grid.rows[-1], maker.grid.prompt_rows):

        def prepare(rows: int = rows) -> Work:
            batch = maker.chunk(rows) if rows == maker.grid.prompt_rows else maker.decodes(rows, 64)
            table = maker.rotations(dim, rows + 64)
            pages = maker.num_pages(batch)
            k_cache = maker.normal(pages, PAGE_SIZE, num_kv_heads, dim)
            v_cache = maker.normal(pages, PAGE_SIZE, num_kv_heads, dim)

            def one() -> dict[str, Call]:
                parts = maker.normal(rows, sum(sizes)).split_with_sizes(sizes, dim=-1)
                q, k, v = (part.unflatten(-1, (-1, dim)) for part in parts)
                return {OURS: lambda: rope_and_write_kv(q, k, v, table, batch, k_cache, v_cache)}

            num_bytes = 2 * maker.dtype.itemsize * rows * sum(sizes)
            return Work([one() for _ in range(num_sets(num_bytes))], num_bytes)

        shape = f"{num_heads}+2x{num_kv_heads} heads of {dim}"
        yield Case("rope_and_write_kv", model, shape, f"{rows}", prepare)


def latent_writes(maker: Maker, model: str) -> Iterator[Case]:
    num_heads, rank, nope, rope, _ = maker.latent_heads(model)
    sizes = [num_heads * (nope + rope), rank, rope]
    for rows in (maker.grid.rows[0], maker.grid.rows[-1], maker.grid.prompt_rows):

        def prepare(rows: int = rows) -> Work:
            batch = maker.chunk(rows) if rows == maker.grid.prompt_rows else maker.decodes(rows, 64)
            table = maker.rotations(rope, rows + 64)
            cache = maker.normal(maker.num_pages(batch), PAGE_SIZE, rank + rope)
            norm = maker.normal(rank)

            def one() -> dict[str, Call]:
                projected = maker.normal(rows, sum(sizes))
                q, latent, k_pe = projected.split_with_sizes(sizes, dim=-1)
                q_pe = q.unflatten(-1, (num_heads, nope + rope))[..., nope:]
                return {
                    OURS: lambda: rope_and_write_latent(
                        q_pe, latent, k_pe, table, batch, cache, latent_norm=norm, eps=EPS
                    )
                }

            num_bytes = 2 * maker.dtype.itemsize * rows * (num_heads * rope + rank + rope)
            return Work([one() for _ in range(num_sets(num_bytes))], num_bytes)

        shape = f"{num_heads} heads, {rank}+{rope}"
        yield Case("rope_and_write_latent", model, shape, f"{rows}", prepare)


def decode_attention(maker: Maker, model: str) -> Iterator[Case]:
    num_heads, num_kv_heads, dim = maker.heads(model)
    for context in maker.grid.contexts:
        for size in maker.grid.batches:

            def prepare(context: int = context, size: int = size) -> Work:
                kept = 2 * num_kv_heads * dim * size * context
                num_bytes = maker.dtype.itemsize * (kept + 2 * size * num_heads * dim)
                batches = maker.rotated_decodes(size, context, num_sets(num_bytes))
                pages = maker.num_pages(*batches)
                k_cache = maker.normal(pages, PAGE_SIZE, num_kv_heads, dim)
                v_cache = maker.normal(pages, PAGE_SIZE, num_kv_heads, dim)

                def one(batch: PagedBatch) -> dict[str, Call]:
                    q = maker.normal(size, num_heads, dim)
                    return {OURS: lambda: paged_attention(q, k_cache, v_cache, batch, dim**-0.5)}

                flops = 4.0 * size * context * num_heads * dim
                return Work([one(batch) for batch in batches], num_bytes, flops)

            shape = f"{num_heads}/{num_kv_heads} heads of {dim}"
            yield Case("attention decode", model, shape, f"{size}x{short(context)}", prepare)


def latent_decode_attention(maker: Maker, model: str) -> Iterator[Case]:
    num_heads, rank, nope, rope, v_dim = maker.latent_heads(model)
    for context in maker.grid.contexts:
        for size in maker.grid.batches:

            def prepare(context: int = context, size: int = size) -> Work:
                kept = (rank + rope) * size * context
                absorbing = num_heads * (nope + v_dim) * rank  # both products with kv_b
                num_bytes = maker.dtype.itemsize * (kept + absorbing)
                batches = maker.rotated_decodes(size, context, num_sets(num_bytes))
                cache = maker.normal(maker.num_pages(*batches), PAGE_SIZE, rank + rope)

                def one(batch: PagedBatch) -> dict[str, Call]:
                    q_nope = maker.normal(size, num_heads, nope)
                    q_pe = maker.normal(size, num_heads, rope)
                    kv_b = maker.normal(num_heads, nope + v_dim, rank, scale=0.02)
                    return {OURS: lambda: mla_attention(q_nope, q_pe, cache, kv_b, batch, 0.07)}

                flops = (
                    2.0 * size * num_heads * (context * (2 * rank + rope) + (nope + v_dim) * rank)
                )
                return Work([one(batch) for batch in batches], num_bytes, flops)

            shape = f"{num_heads} heads on {rank}+{rope}"
            yield Case("mla decode", model, shape, f"{size}x{short(context)}", prepare)


def prompt_attention(maker: Maker, model: str) -> Iterator[Case]:
    num_heads, num_kv_heads, dim = maker.heads(model)
    for num_tokens in maker.grid.prompts:

        def prepare(num_tokens: int = num_tokens) -> Work:
            batch = maker.chunk(num_tokens)
            pages = maker.num_pages(batch)
            q = maker.normal(num_tokens, num_heads, dim)
            k_cache = maker.normal(pages, PAGE_SIZE, num_kv_heads, dim)
            v_cache = maker.normal(pages, PAGE_SIZE, num_kv_heads, dim)
            call = lambda: paged_attention(q, k_cache, v_cache, batch, dim**-0.5)  # noqa: E731
            values = num_tokens * dim * 2 * (num_heads + num_kv_heads)
            flops = 4.0 * num_heads * dim * num_tokens**2 / 2
            return Work([{OURS: call}], maker.dtype.itemsize * values, flops)

        shape = f"{num_heads}/{num_kv_heads} heads of {dim}"
        yield Case("attention prompt", model, shape, short(num_tokens), prepare)


def latent_prompt_attention(maker: Maker, model: str) -> Iterator[Case]:
    num_heads, rank, nope, rope, v_dim = maker.latent_heads(model)
    for num_tokens in maker.grid.prompts:

        def prepare(num_tokens: int = num_tokens) -> Work:
            batch = maker.chunk(num_tokens)
            q_nope = maker.normal(num_tokens, num_heads, nope)
            q_pe = maker.normal(num_tokens, num_heads, rope)
            cache = maker.normal(maker.num_pages(batch), PAGE_SIZE, rank + rope)
            kv_b = maker.normal(num_heads, nope + v_dim, rank, scale=0.02)
            call = lambda: mla_attention(q_nope, q_pe, cache, kv_b, batch, 0.07)  # noqa: E731
            expanding = 2.0 * num_tokens * rank * num_heads * (nope + v_dim)
            flops = expanding + num_heads * (nope + rope + v_dim) * num_tokens**2
            values = num_tokens * (num_heads * (nope + rope + v_dim) + rank + rope)
            return Work([{OURS: call}], maker.dtype.itemsize * values, flops)

        shape = f"{num_heads} heads on {rank}+{rope}"
        yield Case("mla prompt", model, shape, short(num_tokens), prepare)


def samplings(maker: Maker, model: str) -> Iterator[Case]:
    vocab_size = maker.config(model)["vocab_size"]
    kinds = {"greedy": (0.0, 1.0), "temperature": (0.7, 1.0), "top_p": (0.7, 0.9)}
    for kind, (temperature, top_p) in kinds.items():
        for rows in (maker.grid.rows[0], maker.grid.rows[-1]):

            def prepare(
                rows: int = rows, temperature: float = temperature, top_p: float = top_p
            ) -> Work:
                def full(value: float, dtype: torch.dtype) -> Tensor:
                    return torch.full((rows,), value, device=maker.device, dtype=dtype)

                batch = SamplingBatch(
                    temperature=full(temperature, torch.float32),
                    top_k=full(0, torch.int32),
                    top_p=full(top_p, torch.float32),
                    min_p=full(0.0, torch.float32),
                    seeds=torch.arange(rows, device=maker.device),
                    positions=full(7, torch.int64),
                    vocab_size=vocab_size,
                    all_greedy=temperature == 0.0,
                    any_filter=top_p < 1.0,
                )
                num_bytes = 4 * rows * vocab_size

                def one() -> dict[str, Call]:
                    logits = torch.randn(rows, vocab_size, device=maker.device)
                    return {OURS: lambda: sample(logits, batch)}

                return Work([one() for _ in range(num_sets(num_bytes))], num_bytes)

            yield Case("sample", model, f"{kind} of {vocab_size}", f"{rows}", prepare)
