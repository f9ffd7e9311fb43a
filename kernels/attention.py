"""Causal attention over keys and values that lie in pages: MHA, GQA and MQA, any chunk length.

    k_cache [num_pages, page_size, num_kv_heads, head_dim]     v_cache [..., v_head_dim]
    out[t, h] = softmax(scale * q[t, h] . k[0 .. p]) @ v[0 .. p],  p = positions[t]

``kernels.attention_triton`` is the Triton body. The torch body gathers pages, heads before tokens,
and multiplies by batches of heads. Keys are padded to the end of the key block of the query's own
position, and rows by `pad_rows`, so a row has the same bits alone, among neighbours, decoded or in
a chunk of any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import attention_triton
from kernels.batch import PagedBatch
from kernels.dispatch import use_triton

# context lengths are padded to a multiple of this; a row's bits follow from its own position alone
KEY_BLOCK = 64
# keys of heads gathered at a time for decodes: past a MiB or two, fresh memory costs more than the
# gather itself; and scores held at a time for chunks
MAX_GATHERED_ROWS = 2048
MAX_SCORES = 1 << 22
# torch.bmm multiplies matrices with fewer multiplications than this itself, not by MKL
MIN_MULTIPLICATIONS = 400


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """Attend from every token of the step to the keys of its sequence, up to its own.

    Args:
        q: [num_tokens, num_heads, head_dim], roped; heads and dimensions contiguous.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], contiguous, dtype of ``q``. This
            step's keys are already written; what lies past a context is never read.
        v_cache: [num_pages, page_size, num_kv_heads, v_head_dim], likewise.
        batch: where the tokens sit. In the Triton body ``max_context_len`` may be any limit that no
            context exceeds, and decodes with a context of 0 are padding: their rows become 0.
        scale: multiplies the scores, often head_dim ** -0.5.

    Returns:
        [num_tokens, num_heads, v_head_dim], dtype of ``q``. Query head h reads KV head
        h // (num_heads / num_kv_heads). A row's bits do not depend on the other sequences; in the
        torch body they do not depend on how the sequence was cut into chunks either.
    """
    out = q.new_empty((*q.shape[:2], v_cache.shape[-1]))
    if q.shape[0] == 0:
        return out
    if use_triton(q):
        _launch(q, k_cache, v_cache, batch, scale, out)
        return out
    num_kv_heads = k_cache.shape[2]
    group_size = q.shape[1] // num_kv_heads
    for seqs in decode_groups(batch):
        slots, lens = gathered_slots(batch, seqs, k_cache.shape[1])
        at_once = max(MAX_GATHERED_ROWS // slots.numel(), 1)
        scaled = q[seqs].float() * scale
        for first in range(0, num_kv_heads, at_once):
            kv_heads = range(first, min(first + at_once, num_kv_heads))
            heads = slice(kv_heads.start * group_size, kv_heads.stop * group_size)
            keys = gather_heads(
                k_cache, slots, kv_heads
            )  # [num_seqs, kv_heads, num_keys, head_dim]
            values = gather_heads(v_cache, slots, kv_heads)
            attended = attend_decodes(scaled[:, heads], keys, values, lens)
            out[seqs, heads] = attended.to(out.dtype)
    for seq, rows in chunks_of(batch):
        slots, _ = gathered_slots(batch, torch.tensor([seq]), k_cache.shape[1])
        every = range(num_kv_heads)
        keys = gather_heads(k_cache, slots, every)[0]  # [num_kv_heads, num_keys, head_dim]
        values = gather_heads(v_cache, slots, every)[0]
        first = int(batch.positions[rows.start])
        out[rows] = attend_chunk(q[rows].float() * scale, keys, values, first).to(out.dtype)
    return out


def _launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float, out: Tensor
) -> None:
    shape = attention_triton.head_shape(
        q.shape[1] // k_cache.shape[2], q.shape[2], v_cache.shape[3]
    )
    main = shape.main_dim
    heads = attention_triton.PagedHeads(
        q=q,
        q_tail=q[..., main:] if shape.tail_dim else None,
        k=k_cache,
        k_tail=k_cache[..., main:] if shape.tail_dim else None,
        v=v_cache,
        block_table=batch.block_table,
    )
    if batch.num_decodes:
        attention_triton.attend_decodes(heads, shape, batch, scale, out)
    if batch.num_decodes < batch.num_seqs:
        chunks = range(batch.num_decodes, batch.num_seqs)
        attention_triton.attend_chunks(heads, shape, batch, scale, out, chunks)


def decode_groups(batch: PagedBatch) -> list[Tensor]:
    """Decodes in groups of one padded context length, few enough to gather at a time."""
    groups: dict[int, list[int]] = {}
    for seq, context_len in enumerate(batch.context_lens[: batch.num_decodes].tolist()):
        groups.setdefault(-(-context_len // KEY_BLOCK), []).append(seq)
    parts = []
    for num_blocks, seqs in groups.items():
        size = max(MAX_GATHERED_ROWS // (num_blocks * KEY_BLOCK), 1)
        parts += [torch.tensor(seqs[at : at + size]) for at in range(0, len(seqs), size)]
    return parts


def chunks_of(batch: PagedBatch) -> list[tuple[int, slice]]:
    """Every sequence that is not a decode, with its token rows."""
    starts = batch.cu_seqlens_q.tolist()
    chunks = range(batch.num_decodes, batch.num_seqs)
    return [(seq, slice(starts[seq], starts[seq + 1])) for seq in chunks]


def gathered_slots(batch: PagedBatch, seqs: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Slots of the keys of sequences that share a padded length.

    Returns:
        ``(slots [num_seqs, num_keys], context_lens [num_seqs])``. Padding repeats the last key, so
        nothing unwritten is ever read: 0 * NaN in a page's free slots would be NaN.
    """
    lens = batch.context_lens[seqs].long()
    num_keys = -(-int(lens[0]) // KEY_BLOCK) * KEY_BLOCK
    positions = torch.minimum(torch.arange(num_keys), lens[:, None] - 1)
    pages = batch.block_table[seqs].gather(1, positions // page_size)
    return pages.long() * page_size + positions % page_size, lens


def gather_heads(cache: Tensor, slots: Tensor, kv_heads: range) -> Tensor:
    """Keys or values in fp32, heads before tokens: [num_seqs, len(kv_heads), num_keys, dim]."""
    num_kv_heads, dim = cache.shape[2:]
    rows = slots[:, None] * num_kv_heads + torch.arange(kv_heads.start, kv_heads.stop)[:, None]
    gathered = cache.view(-1, dim).index_select(0, rows.flatten())
    return gathered.view(*rows.shape, dim).float()


def attend_decodes(q: Tensor, keys: Tensor, values: Tensor, context_lens: Tensor) -> Tensor:
    """One query per sequence: [num_seqs, num_heads, v_head_dim] fp32, from scaled queries."""
    num_seqs, num_heads, dim = q.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    least = num_keys * min(dim, values.shape[-1])
    q = pad_rows(q.reshape(num_seqs * num_kv_heads, -1, dim), least)
    scores = torch.bmm(q, keys.view(-1, num_keys, dim).mT)  # [num_seqs * num_kv_heads, group, keys]
    beyond = torch.arange(num_keys) >= context_lens[:, None]
    scores.view(num_seqs, -1, num_keys).masked_fill_(beyond[:, None], float("-inf"))
    out = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))
    return out[:, : num_heads // num_kv_heads].reshape(num_seqs, num_heads, -1)


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor, first_position: int) -> Tensor:
    """Consecutive queries of one sequence: [num_tokens, num_heads, v_head_dim] fp32.

    Queries are taken in tiles that end where a key block ends, so that a row meets the same keys in
    the same order however its prompt was cut into chunks.
    """
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = keys.shape[0]
    group_size = num_heads // num_kv_heads
    out = q.new_empty((num_tokens, num_heads, values.shape[-1]))
    at = 0
    while at < num_tokens:
        position = first_position + at
        num_keys = (position // KEY_BLOCK + 1) * KEY_BLOCK
        limit = max(MAX_SCORES // (num_heads * num_keys), 1)
        end = min(num_tokens, num_keys - first_position, at + limit)
        tile = q[at:end].view(end - at, num_kv_heads, group_size, dim).transpose(0, 1)
        least = num_keys * min(dim, values.shape[-1])
        tile = pad_rows(tile.reshape(num_kv_heads, -1, dim), least)  # one row per token and head
        scores = torch.bmm(tile, keys[:, :num_keys].mT)
        rows = torch.arange(scores.shape[1]) // group_size + position
        future = torch.arange(num_keys - KEY_BLOCK, num_keys) > rows[:, None]
        scores[..., num_keys - KEY_BLOCK :].masked_fill_(future, float("-inf"))
        attended = torch.bmm(scores.softmax(dim=-1), values[:, :num_keys])
        attended = attended[:, : (end - at) * group_size]
        attended = attended.view(num_kv_heads, end - at, group_size, -1).transpose(0, 1)
        out[at:end] = attended.reshape(end - at, num_heads, -1)
        at = end
    return out


def pad_rows(matrices: Tensor, row_multiplications: int) -> Tensor:
    """Add zero rows, so that on CPUs the bits of an fp32 row ignore how many rows there are.

    They must be a multiple of 4 and enough for MKL. ``row_multiplications`` is what the smallest
    product that follows takes for a row.
    """
    enough = -(-MIN_MULTIPLICATIONS // row_multiplications)
    num_rows = -(-max(matrices.shape[-2], enough) // 4) * 4
    missing = num_rows - matrices.shape[-2]
    return torch.nn.functional.pad(matrices, (0, 0, 0, missing)) if missing else matrices
