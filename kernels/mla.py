"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over latent pages.

    latent_cache [num_pages, page_size, rank + rope]: normed latent c, then the roped k_pe
    kv_b_weight  [num_heads, nope + v, rank]: per head W_UK above W_UV
    s = scale * (q_nope . W_UK c + q_pe . k_pe)        out = softmax(s) @ (W_UV c)

Unlike plain attention all heads share the one latent of a token; keys and values need not exist.
Absorbed: q_latent = q_nope W_UK, s = scale * [q_latent | q_pe] . [c | k_pe],
  out = W_UV softmax(s) c: one KV head of rank + rope whose values are part of its keys.
Expanded: k = [W_UK c | k_pe] and v = W_UV c are made, then plain attention with num_heads KV heads;
  (nope + rope + v) / (2 rank + rope) of the work per key, 0.29 for V3, once they exist.
Decodes are absorbed: they would make the keys anew each step. On the GPU chunks are expanded while
the context is at most ``max_expanded_context``, so that the buffer stays small, else absorbed; that
depends on the model and the sequence alone. The torch body always absorbs: then a row has the same
bits decoded or in any chunk, and on the CPU attention is a small part of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import attention_triton
from kernels.attention import (
    attend_chunk,
    attend_decodes,
    chunks_of,
    decode_groups,
    gather_heads,
    gathered_slots,
    pad_rows,
)
from kernels.batch import PagedBatch
from kernels.dispatch import use_triton

# values of expanded keys and values that exist at a time: 256 MiB in bf16
MAX_EXPANDED_VALUES = 1 << 27


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    scale: float,
) -> Tensor:
    """Attend from every token of the step to the latents of its sequence, up to its own.

    Args:
        q_nope: [num_tokens, num_heads, nope]; the last dimension contiguous, others may be strided.
        q_pe: [num_tokens, num_heads, rope], roped, in the layout of the cached k_pe.
        latent_cache: [num_pages, page_size, rank + rope], contiguous, dtype of ``q_nope``. This
            step's latents are already written; what lies past a context has no influence.
        kv_b_weight: [num_heads, nope + v, rank], dtype of ``q_nope``.
        batch: where the tokens sit.
        scale: multiplies the scores; with YaRN it holds the square of ``yarn_mscale``.

    Returns:
        [num_tokens, num_heads, v], dtype of ``q_nope``. A row's bits do not depend on the other
        sequences; in the torch body nor on how the sequence was cut into chunks.
    """
    num_tokens, num_heads, nope = q_nope.shape
    rank = kv_b_weight.shape[2]
    if num_tokens == 0:
        return q_nope.new_empty((0, num_heads, kv_b_weight.shape[1] - nope))
    if use_triton(q_nope):
        return _launch(q_nope, q_pe, latent_cache, kv_b_weight, batch, scale)
    pages = latent_cache.unsqueeze(2)  # [num_pages, page_size, 1, rank + rope]
    page_size = latent_cache.shape[1]
    q_latent = absorb(q_nope, kv_b_weight)
    q = torch.cat((q_latent, q_pe), dim=-1).float() * scale  # [num_tokens, num_heads, rank + rope]
    attended = q.new_empty((num_tokens, num_heads, rank))
    for seqs in decode_groups(batch):
        slots, lens = gathered_slots(batch, seqs, page_size)
        latents = gather_heads(pages, slots, range(1))  # [num_seqs, 1, num_keys, rank + rope]
        attended[seqs] = attend_decodes(q[seqs], latents, latents[..., :rank], lens)
    for seq, rows in chunks_of(batch):
        slots, _ = gathered_slots(batch, torch.tensor([seq]), page_size)
        latents = gather_heads(pages, slots, range(1))[0]  # [1, num_keys, rank + rope]
        first = int(batch.positions[rows.start])
        attended[rows] = attend_chunk(q[rows], latents, latents[..., :rank], first)
    return expand_values(attended.to(q_nope.dtype), kv_b_weight[:, nope:])


def absorb(q_nope: Tensor, kv_b_weight: Tensor) -> Tensor:
    """Queries in the space of the latents: [num_tokens, num_heads, rank]."""
    num_tokens, _, nope = q_nope.shape
    by_head = pad_rows(q_nope.transpose(0, 1))  # [num_heads, num_tokens, nope]
    return torch.bmm(by_head, kv_b_weight[:, :nope])[:, :num_tokens].transpose(0, 1)


def expand_values(attended: Tensor, value_weight: Tensor) -> Tensor:
    """Head outputs of attended latents: [num_tokens, num_heads, rank] to [..., v]."""
    by_head = pad_rows(attended.transpose(0, 1))  # [num_heads, num_tokens, rank]
    return torch.bmm(by_head, value_weight.mT)[:, : attended.shape[0]].transpose(0, 1)


def max_expanded_context(num_heads: int, nope: int, rope: int, v_head_dim: int) -> int:
    """Longest context whose keys and values are expanded, in tokens."""
    return MAX_EXPANDED_VALUES // (num_heads * (nope + rope + v_head_dim))


def _launch(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    scale: float,
) -> Tensor:
    num_tokens, num_heads, nope = q_nope.shape
    num_decodes, num_seqs = batch.num_decodes, batch.num_seqs
    rank, rope = kv_b_weight.shape[2], q_pe.shape[2]
    v_head_dim = kv_b_weight.shape[1] - nope
    bound = max_expanded_context(num_heads, nope, rope, v_head_dim)
    has_long = num_decodes < num_seqs and batch.max_context_len > bound
    num_absorbed = num_tokens if has_long else num_decodes
    out = q_nope.new_empty((num_tokens, num_heads, v_head_dim))
    if num_absorbed:
        pages = latent_cache.unsqueeze(2)  # [num_pages, page_size, 1, rank + rope]
        heads = attention_triton.PagedHeads(
            q=absorb(q_nope[:num_absorbed], kv_b_weight),
            q_tail=q_pe,
            k=pages,
            k_tail=pages[..., rank:],
            v=None,
            block_table=batch.block_table,
        )
        shape = latent_shape(num_heads, rank, rope)
        attended = torch.empty((num_absorbed, num_heads, rank), dtype=out.dtype, device=out.device)
        if num_decodes:
            attention_triton.attend_decodes(heads, shape, batch, scale, attended)
        if has_long:
            attention_triton.attend_chunks(
                heads,
                shape,
                batch,
                scale,
                attended,
                range(num_decodes, num_seqs),
                range(bound + 1, attention_triton.NO_LIMIT),
            )
        out[:num_absorbed] = expand_values(attended, kv_b_weight[:, nope:])
    page_size = latent_cache.shape[1]
    num_pages = -(-min(batch.max_context_len, bound) // page_size)  # of a sequence, at most
    seqs_at_a_time = max(bound // (num_pages * page_size), 1)
    for first in range(num_decodes, num_seqs, seqs_at_a_time):
        seqs = range(first, min(first + seqs_at_a_time, num_seqs))
        heads = _expand(q_nope, q_pe, latent_cache, kv_b_weight, batch, seqs, num_pages)
        attention_triton.attend_chunks(
            heads,
            attention_triton.head_shape(1, nope + rope, v_head_dim),
            batch,
            scale,
            out,
            seqs,
            range(1, bound + 1),
        )
    return out


def latent_shape(num_heads: int, rank: int, rope: int) -> attention_triton.HeadShape:
    """All heads share one key of rank + rope, whose first rank columns are the value."""
    return attention_triton.HeadShape(num_heads, rank, rope, rank, True)


def _expand(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    seqs: range,
    num_pages: int,
) -> attention_triton.PagedHeads:
    """Keys and values of the first ``num_pages`` pages of ``seqs``, as pages of their own.

    Free slots hold what the latents' free slots made of them; the kernel masks both.
    """
    num_heads, width, rank = kv_b_weight.shape
    nope = q_nope.shape[2]
    table = batch.block_table[seqs.start : seqs.stop, :num_pages].long()
    latents = latent_cache[table.flatten()]  # [pages, page_size, rank + rope]
    keys_values = torch.matmul(latents[..., :rank], kv_b_weight.view(-1, rank).mT)
    keys_values = keys_values.view(*latents.shape[:2], num_heads, width)
    k_pe = latents[..., None, rank:].expand(-1, -1, num_heads, -1)
    keys = torch.cat(
        (keys_values[..., :nope], k_pe), dim=-1
    )  # [pages, page_size, heads, nope|rope]
    q = torch.cat((q_nope, q_pe), dim=-1)
    main = attention_triton.head_shape(1, q.shape[2], width - nope).main_dim
    has_tail = main < q.shape[2]
    first_rows = torch.arange(batch.num_seqs, device=q.device, dtype=torch.int32) - seqs.start
    pages = torch.arange(table.shape[1], device=q.device, dtype=torch.int32)
    return attention_triton.PagedHeads(
        q=q,
        q_tail=q[..., main:] if has_tail else None,
        k=keys,
        k_tail=keys[..., main:] if has_tail else None,
        v=keys_values[..., nope:],
        block_table=first_rows[:, None] * table.shape[1] + pages,
    )
