"""Causal attention over keys and values that lie in pages: MHA, GQA and MQA, any chunk length.

    k_cache [num_pages, page_size, num_kv_heads, head_dim]     v_cache [..., v_head_dim]
    out[t, h] = softmax(scale * q[t, h] . k[0 .. p]) @ v[0 .. p],  p = positions[t]

``kernels.attention_triton`` is the Triton body. There are two torch bodies: here is the exact one,
of fp32 and of batch-invariant attention in other dtypes; ``kernels.attention_sdpa`` is the other's.

The exact body multiplies matrices of keys by MKL, in fp32, where they lie in the cache if the pages
of a sequence follow each other, else in a copy. A query sees keys padded to the end of the key
block of its own position; the last block is weighted by itself, with zeros past the context; and
rows are padded by `pad_rows`. So a row has the same bits alone, among neighbours, decoded or in a
chunk of any length, whatever its pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import attention_sdpa, attention_triton
from kernels.attention_sdpa import copy_pages
from kernels.batch import PagedBatch
from kernels.dispatch import use_triton

# context lengths are padded to a multiple of this; a row's bits follow from its own position alone
KEY_BLOCK = 64
# keys weighted at a time: decodes copy no more, which stay in the processor's cache
SPAN = 2048
# sizes of keys, in values. Decodes are copied together while they fit in the processor's cache;
# shorter contexts are never viewed by themselves, as calls by sequence cost more than copies
MAX_COPIED_VALUES = 1 << 18
MIN_VIEWED_VALUES = 1 << 17
# keys of tokens gathered at a time
MAX_GATHERED_ROWS = 2048
# scores held at a time for chunks
MAX_SCORES = 1 << 21
# torch.bmm multiplies matrices with fewer multiplications than this itself, not by MKL
MIN_MULTIPLICATIONS = 400


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend from every token of the step to the keys of its sequence, up to its own.

    Args:
        q: [num_tokens, num_heads, head_dim], roped; heads and dimensions contiguous.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], contiguous, dtype of ``q``. This
            step's keys are already written; what lies past a context has no influence. On a CPU
            page_size divides `SPAN`.
        v_cache: [num_pages, page_size, num_kv_heads, v_head_dim], likewise.
        batch: where the tokens sit. In the Triton body ``max_context_len`` may be any limit that no
            context exceeds, and decodes with a context of 0 are padding: their rows become 0.
        scale: multiplies the scores, often head_dim ** -0.5.
        batch_invariant: on a CPU, in bf16 and fp16, compute as in fp32, which takes several times
            as long; without influence elsewhere.

    Returns:
        [num_tokens, num_heads, v_head_dim], dtype of ``q``. Query head h reads KV head
        h // (num_heads / num_kv_heads). A row's bits do not depend on the other sequences; on a
        CPU they do not depend on pages or on how the sequence was cut into chunks either. In bf16
        and fp16 on a CPU all that takes ``batch_invariant``.
    """
    out = q.new_empty((*q.shape[:2], v_cache.shape[-1]))
    if q.shape[0] == 0:
        return out
    if use_triton(q):
        _launch(q, k_cache, v_cache, batch, scale, out)
    elif not batch_invariant and attention_sdpa.takes(k_cache, v_cache):
        attention_sdpa.attend(q, k_cache, v_cache, batch, scale, out)
    else:
        _attend_exactly(q, k_cache, v_cache, batch, scale, out)
    return out


def _attend_exactly(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float, out: Tensor
) -> None:
    plan = plan_of(batch, k_cache)
    page_values = max(k_cache[0].numel(), v_cache[0].numel())
    scratch = batch.once(new_scratch, plan.max_copied_pages * page_values, k_cache.dtype)
    for contexts in plan.decodes:
        keys = (span.load(k_cache, scratch) for span in contexts.spans)
        values = (span.load(v_cache, scratch) for span in contexts.spans)
        scaled = q[contexts.tokens].float() * scale
        attended = attend_decodes(scaled, keys, values, v_cache.shape[3], contexts.beyond)
        out[contexts.tokens] = attended.to(out.dtype)
    for contexts in plan.chunks:
        future = batch.once(future_keys, q.shape[1] // k_cache.shape[2])
        (span,) = contexts.spans
        scaled = q[contexts.tokens].float() * scale
        keys_and_values = span.load(k_cache), span.load(v_cache)
        attended = attend_chunk(scaled, *keys_and_values, contexts, future)
        out[contexts.tokens] = attended.to(out.dtype)


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


@dataclass(frozen=True, slots=True)
class Span:
    """As many keys of each of some sequences, from the same position on.

    They are a view of the cache from ``slot``, if they are of one sequence and their pages follow
    each other, or else a copy of ``page_ids``.
    """

    num_seqs: int
    num_keys: int
    slot: int | None
    page_ids: Tensor  # [num_seqs * pages of each] int64

    def load(self, cache: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Keys or values in fp32, [num_seqs, num_keys, num_kv_heads, dim].

        Padding is anything. The result lives until the next copy to ``scratch``.
        """
        if self.slot is not None:
            keys = cache.flatten(0, 1)[None, self.slot : self.slot + self.num_keys]
        else:
            pages = copy_pages(cache, self.page_ids, scratch)
            keys = pages.view(self.num_seqs, -1, *cache.shape[2:])[:, : self.num_keys]
        return keys.float()


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts of one padded length, attended together: of decodes, or of a chunk."""

    tokens: Tensor | slice  # their rows in the step; of decodes [num_seqs] int64
    position: int  # of the first token of a chunk
    spans: list[Span]  # of a chunk one; of decodes of SPAN keys each, the last of the rest
    beyond: Tensor  # [num_seqs, KEY_BLOCK] bool: which keys of the last block are padding


@dataclass(frozen=True, slots=True)
class Plan:
    """What is multiplied in each layer: decodes, together where that is faster, and chunks."""

    decodes: list[Contexts]
    chunks: list[Contexts]
    max_copied_pages: int  # of a span of decodes


def plan_of(batch: PagedBatch, cache: Tensor) -> Plan:
    """The plan of a step, made by its first layer.

    Args:
        batch: the step.
        cache: [num_pages, page_size, num_kv_heads, dim]; only its shape counts.
    """
    return batch.once(_plan_step, *cache.shape[:2], cache[0, 0].numel())


def _plan_step(batch: PagedBatch, num_pages: int, page_size: int, values_per_key: int) -> Plan:
    num_slots = num_pages * page_size
    context_lens, starts = batch.context_lens.tolist(), batch.cu_seqlens_q.tolist()
    decodes: list[Contexts] = []
    together: dict[int, list[int]] = {}  # by padded length
    for seq, context_len in enumerate(context_lens[: batch.num_decodes]):
        together.setdefault(_padded(context_len), []).append(seq)
    for num_keys, seqs in together.items():
        num_values = num_keys * values_per_key
        size = max(MAX_COPIED_VALUES // num_values, 1)
        if num_values >= MIN_VIEWED_VALUES:
            alone = [_contexts(batch, [seq], SPAN, page_size, num_slots) for seq in seqs]
            in_view = [all(span.slot is not None for span in of.spans) for of in alone]
            decodes += [of for of, is_in_view in zip(alone, in_view, strict=True) if is_in_view]
            seqs = [seq for seq, is_in_view in zip(seqs, in_view, strict=True) if not is_in_view]
        parts = [seqs[at : at + size] for at in range(0, len(seqs), size)]
        decodes += [_contexts(batch, part, SPAN, page_size, num_slots) for part in parts]
    copied = [len(span.page_ids) for of in decodes for span in of.spans if span.slot is None]
    chunks = []
    for seq in range(batch.num_decodes, batch.num_seqs):
        tokens = slice(starts[seq], starts[seq + 1])
        contexts = _contexts(batch, [seq], _padded(context_lens[seq]), page_size, num_slots)
        position = context_lens[seq] - (tokens.stop - tokens.start)
        chunks.append(replace(contexts, tokens=tokens, position=position))
    return Plan(decodes, chunks, max(copied, default=0))


def _contexts(
    batch: PagedBatch, seqs: list[int], span_keys: int, page_size: int, num_slots: int
) -> Contexts:
    """Decodes of one padded length, cut into spans of so many keys."""
    lens = batch.context_lens[seqs]
    num_keys = _padded(int(lens[0]))
    columns = torch.arange(-(-num_keys // page_size)).clamp(max=batch.block_table.shape[1] - 1)
    table = batch.block_table[seqs][:, columns].long()  # [num_seqs, pages of each]
    spans = []
    for start in range(0, num_keys, span_keys):
        end = min(start + span_keys, num_keys)
        ids = table[:, start // page_size : -(-end // page_size)]
        used = ids[0, : -(-min(end, int(lens[0])) // page_size) - start // page_size]
        slot = int(used[0]) * page_size
        fits = len(seqs) == 1 and slot + end - start <= num_slots
        in_view = fits and bool((used.diff() == 1).all())
        spans.append(Span(len(seqs), end - start, slot if in_view else None, ids.flatten()))
    beyond = torch.arange(num_keys - KEY_BLOCK, num_keys) >= lens[:, None]
    return Contexts(torch.tensor(seqs), 0, spans, beyond)


def new_scratch(batch: PagedBatch, num_values: int, dtype: torch.dtype) -> Tensor:
    """Room for the copies of a step: fresh memory would cost each layer more than the copy."""
    return torch.empty(num_values, dtype=dtype)


def _padded(context_len: int) -> int:
    return -(-context_len // KEY_BLOCK) * KEY_BLOCK


def future_keys(batch: PagedBatch, group_size: int) -> Tensor:
    """[KEY_BLOCK * group_size, KEY_BLOCK] bool: keys of a block after those of its queries' own.

    Rows are the heads of a group, token by token; the same for every ``batch``.
    """
    future = torch.ones(KEY_BLOCK, KEY_BLOCK, dtype=torch.bool).triu_(1)
    return future.repeat_interleave(group_size, dim=0)


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


def attend_decodes(
    q: Tensor,
    keys: Iterable[Tensor],
    values: Iterable[Tensor],
    v_dim: int,
    beyond: Tensor | None = None,
) -> Tensor:
    """One query per sequence: [num_seqs, num_heads, v_dim] fp32.

    Args:
        q: [num_seqs, num_heads, dim] fp32, scaled.
        keys: spans [num_seqs, keys of the span, num_kv_heads, dim] fp32 in order of positions, each
            used before the next is asked for.
        values: [num_seqs, keys of the span, num_kv_heads, v_dim], likewise.
        v_dim: of the values.
        beyond: [num_seqs, KEY_BLOCK] bool, which of the last keys are padding; None: none.
    """
    num_seqs, num_heads, dim = q.shape
    parts = []
    for span in keys:
        num_kv_heads = span.shape[2]
        # matrices of a sequence, or of a KV head, have uniform strides: the fewer products
        by = 0 if num_seqs <= num_kv_heads else 1
        queries = q.view(num_seqs, num_kv_heads, -1, dim).transpose(0, by)
        queries = pad_rows(queries, min(KEY_BLOCK, span.shape[1]) * min(dim, v_dim))
        part = q.new_empty((*queries.shape[:3], span.shape[1]))
        for rows, matrices, product in zip(
            queries, span.permute(0, 2, 3, 1).unbind(by), part, strict=True
        ):
            torch.bmm(rows, matrices, out=product)
        parts.append(part)
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if beyond is not None:
        of_scores = beyond.view(num_seqs, 1, 1, -1).transpose(0, by)
        scores[..., -KEY_BLOCK:].masked_fill_(of_scores, float("-inf"))
    weights = scores.softmax(dim=-1)  # like ``queries``, [..., rows, num_keys]
    out = q.new_zeros((*weights.shape[:3], v_dim))
    start = 0
    for span in values:
        pieces = [span]
        if beyond is not None and start + span.shape[1] == weights.shape[3]:
            last = span[:, -KEY_BLOCK:].masked_fill(beyond[..., None, None], 0.0)
            pieces = [span[:, :-KEY_BLOCK], last]
        for piece in pieces:
            of_piece = weights[..., start : start + piece.shape[1]]
            for product, rows, matrices in zip(
                out, of_piece, piece.transpose(1, 2).unbind(by), strict=True
            ):
                product.baddbmm_(rows, matrices)
            start += piece.shape[1]
    attended = out[:, :, : num_heads // num_kv_heads].transpose(0, by)
    return attended.reshape(num_seqs, num_heads, v_dim)


def attend_chunk(
    q: Tensor, keys: Tensor, values: Tensor, contexts: Contexts, future: Tensor
) -> Tensor:
    """Consecutive queries of one sequence: [num_tokens, num_heads, v_head_dim] fp32.

    Queries are taken in tiles that end where a key block ends, so that a row meets the same keys in
    the same order however its prompt was cut into chunks.

    Args:
        q: [num_tokens, num_heads, dim] fp32, scaled.
        keys: [1, num_keys, num_kv_heads, dim] fp32; ``values`` likewise.
        contexts: the chunk's.
        future: of `future_keys`.
    """
    num_tokens, num_heads, dim = q.shape
    _, total_keys, num_kv_heads, v_dim = values.shape
    group_size = num_heads // num_kv_heads
    transposed, values = keys[0].permute(1, 2, 0), values[0].transpose(0, 1)
    last = values[:, -KEY_BLOCK:].masked_fill(contexts.beyond[0, :, None], 0.0)
    out = q.new_empty((num_tokens, num_heads, v_dim))
    at = 0
    while at < num_tokens:
        position = contexts.position + at
        start = position // KEY_BLOCK * KEY_BLOCK  # of the block of keys where the tile lies
        num_keys = start + KEY_BLOCK
        limit = max(MAX_SCORES // (num_heads * num_keys), 1)
        end = min(num_tokens, num_keys - contexts.position, at + limit)
        num_rows = (end - at) * group_size  # one per token and head
        tile = q[at:end].view(end - at, num_kv_heads, group_size, dim).transpose(0, 1)
        tile = pad_rows(tile.reshape(num_kv_heads, num_rows, dim), KEY_BLOCK * min(dim, v_dim))
        scores = torch.bmm(tile, transposed[..., :num_keys])
        offset = (position - start) * group_size
        of_future = future[offset : offset + num_rows]
        scores[:, :num_rows, start:].masked_fill_(of_future, float("-inf"))
        weights = scores.softmax(dim=-1)
        attended = q.new_zeros((num_kv_heads, weights.shape[1], v_dim))
        for first in range(0, start, SPAN):
            span = slice(first, min(first + SPAN, start))
            attended.baddbmm_(weights[..., span], values[:, span])
        block = last if num_keys == total_keys else values[:, start:num_keys]
        attended.baddbmm_(weights[..., start:], block)
        attended = attended[:, :num_rows].view(num_kv_heads, end - at, group_size, v_dim)
        out[at:end] = attended.transpose(0, 1).reshape(end - at, num_heads, v_dim)
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
