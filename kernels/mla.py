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
depends on the model and on where the sequence's chunk ends. The torch body always absorbs: then a
row has the same bits decoded or in any chunk, and on the CPU attention is a small part of a step.
Sparse (DeepSeek-V3.2): absorbed, to the keys that ``kernels.indexer`` chose. What sees no more keys
than are chosen goes the dense way, with the same bits as in a step where everything is dense: the
torch body decides that by token, the Triton body by where the sequence's chunk ends.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels import attention_triton, sparse_mla_triton
from kernels.attention import (
    MAX_GATHERED_ROWS,
    attend_chunk,
    attend_decodes,
    future_keys,
    gather_heads,
    plan_of,
)
from kernels.batch import PagedBatch
from kernels.dispatch import use_triton
from kernels.linear import heads_linear, linear

# values of expanded keys and values that exist at a time: 256 MiB in bf16
MAX_EXPANDED_VALUES = 1 << 27


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    scale: float,
    *,
    batch_invariant: bool = False,
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
        batch_invariant: on a GPU, and in bf16 and fp16 on a CPU, keep a row's bits from following
            the number of rows in products with ``kv_b_weight`` too, as they do not anywhere else.

    Returns:
        [num_tokens, num_heads, v], dtype of ``q_nope``. A row's bits do not depend on the other
        sequences, on a GPU and below fp32 on a CPU if ``batch_invariant``; in the torch body nor on
        how the sequence was cut into chunks.
    """
    num_tokens, num_heads, nope = q_nope.shape
    rank = kv_b_weight.shape[2]
    if num_tokens == 0:
        return q_nope.new_empty((0, num_heads, kv_b_weight.shape[1] - nope))
    if use_triton(q_nope):
        return _launch(q_nope, q_pe, latent_cache, kv_b_weight, batch, scale, batch_invariant)
    q_latent = absorb(q_nope, kv_b_weight, batch_invariant)
    q = torch.cat((q_latent, q_pe), dim=-1).float() * scale
    attended = _attend_all(q, latent_cache, rank, batch)
    return expand_values(attended.to(q_nope.dtype), kv_b_weight[:, nope:], batch_invariant)


def sparse_mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    scale: float,
    selected: Tensor,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """``mla_attention`` to chosen keys only.

    Args:
        selected: [num_tokens, top_k] int32, contiguous, from ``kernels.indexer.select_keys``:
            ascending positions up to the token's own, all of them and then -1 if they are fewer.
            The other arguments are those of ``mla_attention``.

    Returns:
        [num_tokens, num_heads, v], dtype of ``q_nope``. A token at a position below top_k has the
        result of ``mla_attention``: bit by bit in the torch body, and in the Triton body if its
        sequence has no more than top_k tokens. Promises about batches are those of
        ``mla_attention``.
    """
    num_tokens, num_heads, nope = q_nope.shape
    rank, top_k = kv_b_weight.shape[2], selected.shape[1]
    if num_tokens == 0:
        return q_nope.new_empty((0, num_heads, kv_b_weight.shape[1] - nope))
    if use_triton(q_nope):
        return _launch_sparse(
            q_nope, q_pe, latent_cache, kv_b_weight, batch, scale, selected, batch_invariant
        )
    q_latent = absorb(q_nope, kv_b_weight, batch_invariant)
    q = torch.cat((q_latent, q_pe), dim=-1).float() * scale
    attended = q.new_empty((num_tokens, num_heads, rank))
    is_dense = batch.positions < top_k
    if bool(is_dense.any()):
        attended[is_dense] = _attend_all(q[is_dense], latent_cache, rank, _first(batch, top_k))
    seq_ids = torch.bucketize(torch.arange(num_tokens), batch.cu_seqlens_q[1:], right=True)
    pages = latent_cache.unsqueeze(2)  # [num_pages, page_size, 1, rank + rope]
    page_size = latent_cache.shape[1]
    sparse_rows = (~is_dense).nonzero()[:, 0]
    at_once = max(MAX_GATHERED_ROWS // top_k, 1)
    for start in range(0, len(sparse_rows), at_once):
        rows = sparse_rows[start : start + at_once]
        positions = selected[rows].long()  # [num_rows, top_k]
        ids = batch.block_table[seq_ids[rows]].gather(1, positions // page_size)
        slots = ids.long() * page_size + positions % page_size
        latents = gather_heads(pages, slots, range(1)).transpose(1, 2)
        values = latents[..., :rank]  # [num_rows, top_k, 1, rank]
        attended[rows] = attend_decodes(q[rows], [latents], [values], rank)
    return expand_values(attended.to(q_nope.dtype), kv_b_weight[:, nope:], batch_invariant)


def _attend_all(q: Tensor, latent_cache: Tensor, rank: int, batch: PagedBatch) -> Tensor:
    """Attended latents [num_tokens, num_heads, rank] of scaled [..., rank + rope], all in fp32."""
    pages = latent_cache.unsqueeze(2)  # [num_pages, page_size, 1, rank + rope]
    attended = q.new_empty((*q.shape[:2], rank))
    plan = plan_of(batch, pages)
    for contexts in plan.decodes:
        latents = [span.load(pages) for span in contexts.spans]
        values = [span[..., :rank] for span in latents]
        rows = q[contexts.tokens]
        attended[contexts.tokens] = attend_decodes(rows, latents, values, rank, contexts.beyond)
    for contexts in plan.chunks:
        future = batch.once(future_keys, q.shape[1])
        (span,) = contexts.spans
        keys = span.load(pages)  # [1, num_keys, 1, rank + rope]
        rows = q[contexts.tokens]
        attended[contexts.tokens] = attend_chunk(rows, keys, keys[..., :rank], contexts, future)
    return attended


def _first(batch: PagedBatch, num_positions: int) -> PagedBatch:
    """The step of those tokens of ``batch`` whose position is below ``num_positions``."""
    kept = batch.positions < num_positions
    counts = torch.cat((torch.zeros(1, dtype=torch.int64), kept.cumsum(0)))
    counts = counts[batch.cu_seqlens_q.long()].diff()  # [num_seqs], tokens kept
    seqs = counts.nonzero()[:, 0]
    counts, context_lens = counts[seqs], batch.context_lens[seqs].clamp(max=num_positions)
    num_decodes = int((seqs < batch.num_decodes).sum())
    return PagedBatch(
        positions=batch.positions[kept],
        slot_mapping=batch.slot_mapping[kept],
        cu_seqlens_q=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        context_lens=context_lens,
        block_table=batch.block_table[seqs],
        num_decodes=num_decodes,
        max_query_len=int(counts.max()),
        max_context_len=int(context_lens.max()),
        min_chunk_context_len=min(context_lens[num_decodes:].tolist(), default=0),
    )


def absorb(q_nope: Tensor, kv_b_weight: Tensor, batch_invariant: bool = False) -> Tensor:
    """Queries in the space of the latents: [num_tokens, num_heads, rank]."""
    key_weight = kv_b_weight[:, : q_nope.shape[2]]  # [num_heads, nope, rank]
    return heads_linear(q_nope, key_weight.mT, batch_invariant=batch_invariant)


def expand_values(attended: Tensor, value_weight: Tensor, batch_invariant: bool = False) -> Tensor:
    """Head outputs of attended latents: [num_tokens, num_heads, rank] to [..., v]."""
    return heads_linear(attended, value_weight, batch_invariant=batch_invariant)


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
    batch_invariant: bool,
) -> Tensor:
    num_tokens, num_heads, nope = q_nope.shape
    v_head_dim = kv_b_weight.shape[1] - nope
    bound = max_expanded_context(num_heads, nope, q_pe.shape[2], v_head_dim)
    has_long = batch.num_decodes < batch.num_seqs and batch.max_context_len > bound
    num_absorbed = num_tokens if has_long else batch.num_decodes
    absorbed = None
    if num_absorbed > 0:
        q_latent = absorb(q_nope[:num_absorbed], kv_b_weight, batch_invariant)
        heads = _absorbed_heads(q_latent, q_pe, latent_cache, batch)
        attended = _attended_rows(heads.q, has_long)  # [num_absorbed, num_heads, rank]
        _attend_absorbed(heads, batch, scale, bound, attended)
        absorbed = expand_values(attended, kv_b_weight[:, nope:], batch_invariant)
        if batch.num_decodes == num_tokens:
            return absorbed
    out = q_nope.new_empty((num_tokens, num_heads, v_head_dim))
    if absorbed is not None:
        out[:num_absorbed] = absorbed
    _attend_expanded(
        q_nope, q_pe, latent_cache, kv_b_weight, batch, scale, bound, batch_invariant, out
    )
    return out


def _launch_sparse(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    scale: float,
    selected: Tensor,
    batch_invariant: bool,
) -> Tensor:
    num_heads, nope = q_nope.shape[1:]
    v_head_dim = kv_b_weight.shape[1] - nope
    top_k = selected.shape[1]
    bound = max_expanded_context(num_heads, nope, q_pe.shape[2], v_head_dim)
    q_latent = absorb(q_nope, kv_b_weight, batch_invariant)
    heads = _absorbed_heads(q_latent, q_pe, latent_cache, batch)
    shape = latent_shape(num_heads, kv_b_weight.shape[2], q_pe.shape[2])
    has_chunks = batch.num_decodes < batch.num_seqs
    attended = _attended_rows(heads.q, has_chunks)  # [num_tokens, num_heads, rank]
    # to the dense kernels a sequence that is attended sparsely has no context: they skip it
    dense = replace(
        batch,
        context_lens=torch.where(batch.context_lens > top_k, 0, batch.context_lens),
        max_context_len=min(batch.max_context_len, top_k),
    )
    _attend_absorbed(heads, dense, scale, bound, attended)
    sparse_mla_triton.attend_selected(heads, shape, batch, scale, selected, attended)
    out = expand_values(attended, kv_b_weight[:, nope:], batch_invariant)
    if batch.min_chunk_context_len <= top_k:
        _attend_expanded(
            q_nope, q_pe, latent_cache, kv_b_weight, dense, scale, bound, batch_invariant, out
        )
    return out


def _absorbed_heads(
    q_latent: Tensor, q_pe: Tensor, latent_cache: Tensor, batch: PagedBatch
) -> attention_triton.PagedHeads:
    pages = latent_cache.unsqueeze(2)  # [num_pages, page_size, 1, rank + rope]
    return attention_triton.PagedHeads(
        q=q_latent,
        q_tail=q_pe,
        k=pages,
        k_tail=pages[..., q_latent.shape[2] :],
        v=None,
        block_table=batch.block_table,
    )


def _attended_rows(q_latent: Tensor, has_chunks: bool) -> Tensor:
    """Room for attended latents; rows of expanded chunks stay as they are, and must be numbers."""
    return torch.zeros_like(q_latent) if has_chunks else torch.empty_like(q_latent)


def _attend_absorbed(
    heads: attention_triton.PagedHeads,
    batch: PagedBatch,
    scale: float,
    bound: int,
    attended: Tensor,
) -> None:
    """Rows of ``attended`` [num_tokens, num_heads, rank]: decodes, chunks of long contexts."""
    num_decodes, num_seqs = batch.num_decodes, batch.num_seqs
    num_heads, rank = heads.q.shape[1:]
    shape = latent_shape(num_heads, rank, heads.k.shape[3] - rank)
    if num_decodes:
        attention_triton.attend_decodes(heads, shape, batch, scale, attended)
    if num_decodes < num_seqs and batch.max_context_len > bound:
        chunks = range(num_decodes, num_seqs)
        contexts = range(bound + 1, attention_triton.NO_LIMIT)
        attention_triton.attend_chunks(heads, shape, batch, scale, attended, chunks, contexts)


def _attend_expanded(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_b_weight: Tensor,
    batch: PagedBatch,
    scale: float,
    bound: int,
    batch_invariant: bool,
    out: Tensor,
) -> None:
    """Rows of ``out`` [num_tokens, num_heads, v] of chunks with a context of at most ``bound``."""
    page_size = latent_cache.shape[1]
    width = q_nope.shape[2] + q_pe.shape[2]
    num_pages = -(-min(batch.max_context_len, bound) // page_size)  # of a sequence, at most
    seqs_at_a_time = max(bound // (num_pages * page_size), 1)
    for first in range(batch.num_decodes, batch.num_seqs, seqs_at_a_time):
        seqs = range(first, min(first + seqs_at_a_time, batch.num_seqs))
        heads = _expand(
            q_nope, q_pe, latent_cache, kv_b_weight, batch, seqs, num_pages, batch_invariant
        )
        attention_triton.attend_chunks(
            heads,
            attention_triton.head_shape(1, width, out.shape[2]),
            batch,
            scale,
            out,
            seqs,
            range(1, bound + 1),
        )


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
    batch_invariant: bool,
) -> attention_triton.PagedHeads:
    """Keys and values of the first ``num_pages`` pages of ``seqs``, as pages of their own.

    Free slots hold what the latents' free slots made of them; the kernel masks both.
    """
    num_heads, width, rank = kv_b_weight.shape
    nope = q_nope.shape[2]
    table = batch.block_table[seqs.start : seqs.stop, :num_pages].long()
    latents = latent_cache[table.flatten()]  # [pages, page_size, rank + rope]
    matrix = kv_b_weight.view(-1, rank)  # [num_heads * (nope + v), rank]
    if batch_invariant:
        keys_values = linear(latents.flatten(0, 1)[:, :rank], matrix, batch_invariant=True)
    else:
        keys_values = torch.matmul(latents[..., :rank], matrix.mT)
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
