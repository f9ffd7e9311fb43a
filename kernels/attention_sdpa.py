"""Attention over pages by torch's flash kernel for CPUs: bf16 and fp16, as they lie in the cache.

A context is cut into pieces, each one call. Pages that follow each other in the pool are a strided
view of the cache, others are copied page by page. Softmaxes of pieces are merged by their log sums,
as flash-decoding does (arXiv:2311.12037, section 2.2), so a piece may hold keys in any order. A
row's last bits therefore follow its pages, its chunk and the number of threads.

    decodes of short contexts   one call for many, padded and masked
    other decodes               the pieces of each, not masked: exactly the context
    chunks                      the pieces before the chunk, then the chunk itself, causal
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.dispatch import native, use_native

# sizes of keys, in bytes. Decodes of shorter contexts share a call; a shorter run of pages is
# copied, as calls cost more than copies; longer copies leave the processor's cache
SHORT_CONTEXT = 1 << 17
MIN_RUN = 1 << 16
MAX_COPY = 1 << 21
# keys of decodes that compiled loops take. They are faster than this kernel, but give a KV head to
# a thread, where it shares one head's keys among threads: fewer keys if threads would idle
MAX_NATIVE_KEYS = 8192
MIN_NATIVE_KEYS = 1024
# the kernel takes a thread for a head's tile of rows; for so many keys another one pays
QUERY_TILE = 32
MIN_KEYS_PER_THREAD = 512
# decodes in a group have contexts that end in the same block of keys
GROUP_KEYS = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """``num_keys`` slots from ``start``, of the cache or of a copy of the pages ``page_ids``."""

    start: int
    num_keys: int
    page_ids: Tensor | None  # [num_pages] int64

    def of(self, cache: Tensor, scratch: Tensor) -> Tensor:
        """[num_kv_heads, num_keys, dim], strided; lives until the next copy to ``scratch``."""
        pages = cache if self.page_ids is None else copy_pages(cache, self.page_ids, scratch)
        return pages.flatten(0, 1).narrow(0, self.start, self.num_keys).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes of short contexts."""

    seqs: Tensor  # [num_seqs] int64
    page_ids: Tensor  # [num_seqs * pages of each] int64
    mask: Tensor  # [num_seqs, 1, 1, num_keys], dtype of the cache: 0, past a context -inf
    padding: Tensor  # [n] int64, which of the num_seqs * num_keys lie past a context

    def of(self, cache: Tensor, scratch: Tensor) -> Tensor:
        """[num_seqs, num_kv_heads, num_keys, dim], strided, in ``scratch``."""
        rows = copy_pages(cache, self.page_ids, scratch).flatten(0, 1)
        rows.index_fill_(0, self.padding, 0.0)  # it may be NaN, which no mask can hide
        return rows.view(len(self.seqs), -1, *rows.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls of one layer, the same in all."""

    groups: list[DecodeGroup]
    decodes: list[tuple[int, list[Piece]]]  # sequences by themselves
    chunks: list[tuple[slice, list[Piece], Piece]]  # token rows, keys before them, their own keys
    scratch: Tensor  # [2, values]: fresh memory would cost each layer more than a copy


@dataclass(frozen=True, slots=True)
class Caches:
    """Keys and values of a layer, and room for copies of some of their pages."""

    keys: Tensor  # [num_pages, page_size, num_kv_heads, dim]
    values: Tensor
    scratch: Tensor  # [2, values]

    def read(self, part: Piece | DecodeGroup) -> tuple[Tensor, Tensor]:
        """Keys and values of a part; they live until the next is read."""
        return part.of(self.keys, self.scratch[0]), part.of(self.values, self.scratch[1])


def takes(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether torch's flash kernel takes these caches as they are."""
    return k_cache.dtype in (torch.bfloat16, torch.float16) and k_cache.shape == v_cache.shape


def native_keys(k_cache: Tensor) -> int:
    """Up to how many keys decodes run in compiled loops; 0 if there are none for such a cache.

    Args:
        k_cache: [num_pages, page_size, num_kv_heads, dim].
    """
    if not use_native(k_cache) or not native("attention").takes(k_cache):
        return 0
    share_of_busy_threads = min(k_cache.shape[2] / torch.get_num_threads(), 1.0)
    return max(int(MAX_NATIVE_KEYS * share_of_busy_threads), MIN_NATIVE_KEYS)


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float, out: Tensor
) -> None:
    """The rows of ``out`` [num_tokens, num_heads, head_dim]; see `kernels.attention`."""
    max_native_keys = native_keys(k_cache) if use_native(q) else 0
    if max_native_keys and batch.num_decodes:
        native("attention").attend_decodes(q, k_cache, v_cache, batch, scale, max_native_keys, out)
        if batch.num_decodes == batch.num_seqs and batch.max_context_len <= max_native_keys:
            return
    page_size, num_kv_heads, dim = k_cache.shape[1:]
    plan = batch.once(plan_step, page_size, num_kv_heads * dim, k_cache.dtype, max_native_keys)
    caches = Caches(k_cache, v_cache, plan.scratch)
    queries = q.view(q.shape[0], num_kv_heads, -1, dim)  # [num_tokens, num_kv_heads, group, dim]
    attended = out.view(queries.shape)
    for group in plan.groups:
        attended[group.seqs], _ = flash(queries[group.seqs], *caches.read(group), scale, group.mask)
    for seq, pieces in plan.decodes:
        attended[seq], _ = attend_pieces(queries[seq], caches, pieces, scale)
    for tokens, before, own in plan.chunks:
        attended[tokens] = attend_chunk(queries[tokens], caches, before, own, scale)


def attend_pieces(
    q: Tensor, caches: Caches, pieces: list[Piece], scale: float
) -> tuple[Tensor, Tensor]:
    """Queries [num_kv_heads, num_rows, dim] to all keys of the pieces; as `flash`, less a batch."""
    num_tiles = q.shape[0] * -(-q.shape[1] // QUERY_TILE)
    spare_threads = torch.get_num_threads() // num_tiles
    attended: tuple[Tensor, Tensor] | None = None
    for piece in pieces:
        keys, values = caches.read(piece)
        num_splits = min(spare_threads, piece.num_keys // MIN_KEYS_PER_THREAD)
        parts: list[tuple[Tensor, Tensor]] = []
        end = 0
        if num_splits > 1:
            end = piece.num_keys // num_splits * num_splits
            of_split = (q.shape[0], num_splits, -1, q.shape[2])
            every_rows, every_log_sums = flash(
                q.expand(num_splits, *q.shape),
                keys[:, :end].view(of_split).transpose(0, 1),
                values[:, :end].view(of_split).transpose(0, 1),
                scale,
            )
            parts += zip(every_rows, every_log_sums, strict=True)
        if end < piece.num_keys:
            rows, log_sums = flash(q[None], keys[None, :, end:], values[None, :, end:], scale)
            parts.append((rows[0], log_sums[0]))
        for part in parts:
            attended = part if attended is None else merge(*attended, *part)
    assert attended is not None
    return attended


def attend_chunk(
    q: Tensor, caches: Caches, before: list[Piece], own: Piece, scale: float
) -> Tensor:
    """Consecutive queries of one sequence, [num_tokens, num_kv_heads, group, dim] as the result."""
    q = q.permute(1, 2, 0, 3)  # [num_kv_heads, group, num_tokens, dim]
    keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in caches.read(own))
    rows, log_sums = flash(q, keys, values, scale, is_causal=True)
    if before:
        stacked = q.flatten(1, 2)  # heads that share a KV head are rows of one matrix
        rows_before, log_sums_before = attend_pieces(stacked, caches, before, scale)
        rows, log_sums = merge(
            rows, log_sums, rows_before.view(rows.shape), log_sums_before.view(log_sums.shape)
        )
    return rows.permute(2, 0, 1, 3)


def flash(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention calls on a CPU, with the log sums that it keeps to itself.

    Args:
        q: [batch, num_heads, num_rows, dim]; of this and the others only ``dim`` is contiguous.
        keys: [batch, num_heads, num_keys, dim]; ``values`` likewise.
        mask: [batch, 1, 1, num_keys], dtype of ``q``; added to the scores.

    Returns:
        Attended rows [batch, num_heads, num_rows, dim], dtype of ``q``, and the logarithms of their
        softmaxes' sums [batch, num_heads, num_rows] fp32.
    """
    rows, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return rows, log_sums


def merge(
    rows: Tensor, log_sums: Tensor, other_rows: Tensor, other_log_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, rows in fp32, from that to each."""
    other_share = (other_log_sums - log_sums).sigmoid().unsqueeze(-1)
    merged = rows.float().lerp(other_rows.float(), other_share)
    return merged, torch.logaddexp(log_sums, other_log_sums)


def copy_pages(cache: Tensor, page_ids: Tensor, scratch: Tensor | None) -> Tensor:
    """[num_pages, page_size, ...] of a cache, one behind another, in ``scratch`` or new memory."""
    if scratch is None:
        return cache.index_select(0, page_ids)
    shape = (len(page_ids), *cache.shape[1:])
    return torch.index_select(cache, 0, page_ids, out=scratch[: math.prod(shape)].view(shape))


def plan_step(
    batch: PagedBatch,
    page_size: int,
    values_per_key: int,
    dtype: torch.dtype,
    max_native_keys: int,
) -> Plan:
    """``values_per_key`` is num_kv_heads * head_dim. Decodes up to ``max_native_keys`` are done."""
    key_bytes = values_per_key * dtype.itemsize
    context_lens, starts = batch.context_lens.tolist(), batch.cu_seqlens_q.tolist()
    groups, alone, chunks = [], [], []
    short: dict[int, list[int]] = {}  # by blocks of keys
    for seq, context_len in enumerate(context_lens[: batch.num_decodes]):
        if context_len <= max_native_keys:
            continue
        if context_len * key_bytes > SHORT_CONTEXT:
            alone.append(seq)
        else:
            short.setdefault(-(-context_len // GROUP_KEYS), []).append(seq)
    for num_blocks, seqs in short.items():
        at_once = max(MAX_COPY // (num_blocks * GROUP_KEYS * key_bytes), 1)
        for at in range(0, len(seqs), at_once):
            members = seqs[at : at + at_once]
            if len(members) == 1:
                alone += members
            else:
                groups.append(_group(batch, members, page_size, dtype))
    decodes = [
        (seq, _pieces(batch.block_table[seq].long(), context_lens[seq], page_size, key_bytes))
        for seq in alone
    ]
    for seq in range(batch.num_decodes, batch.num_seqs):
        tokens = slice(starts[seq], starts[seq + 1])
        pages = batch.block_table[seq].long()
        first = context_lens[seq] - (tokens.stop - tokens.start)
        before = _pieces(pages, first, page_size, key_bytes) if first else []
        own = _whole(pages, first, context_lens[seq], page_size)
        chunks.append((tokens, before, own))
    pieces = [piece for _, of in decodes for piece in of]
    pieces += [piece for _, before, own in chunks for piece in (*before, own)]
    copied = [of.page_ids for of in groups] + [
        of.page_ids for of in pieces if of.page_ids is not None
    ]
    num_values = max(map(len, copied), default=0) * page_size * values_per_key
    return Plan(groups, decodes, chunks, torch.empty(2, num_values, dtype=dtype))


def _group(
    batch: PagedBatch, members: list[int], page_size: int, dtype: torch.dtype
) -> DecodeGroup:
    seqs = torch.tensor(members)
    lens = batch.context_lens[seqs]
    num_pages = -(-int(lens.max()) // page_size)
    beyond = torch.arange(num_pages * page_size) >= lens[:, None]  # [num_seqs, num_keys]
    mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf"))
    page_ids = batch.block_table[seqs, :num_pages].long().flatten()
    padding = beyond.flatten().nonzero()[:, 0]
    return DecodeGroup(seqs, page_ids, mask[:, None, None], padding)


def _pieces(pages: Tensor, num_keys: int, page_size: int, key_bytes: int) -> list[Piece]:
    """The first keys of a sequence: its long runs of pages, then copies of all others."""
    pages = pages[: -(-num_keys // page_size)]
    page_bytes = page_size * key_bytes
    ends = torch.cat(((pages.diff() != 1).nonzero()[:, 0] + 1, torch.tensor([len(pages)])))
    lens = ends.diff(prepend=torch.tensor([0]))  # pages in each run
    is_long = lens * page_bytes >= (MIN_RUN if len(lens) > 1 else 0)
    pieces = []
    for end, length in zip(ends[is_long].tolist(), lens[is_long].tolist(), strict=True):
        start = (end - length) * page_size
        slot = int(pages[end - length]) * page_size
        pieces.append(Piece(slot, min(end * page_size, num_keys) - start, None))
    scattered = (~is_long).repeat_interleave(lens).nonzero()[:, 0]
    for part in torch.split(scattered, max(MAX_COPY // page_bytes, 1)):
        if len(part) > 0:
            unfilled = max((int(part[-1]) + 1) * page_size - num_keys, 0)
            pieces.append(Piece(0, len(part) * page_size - unfilled, pages[part]))
    return pieces


def _whole(pages: Tensor, first: int, end: int, page_size: int) -> Piece:
    """The keys [first, end) of a sequence, in order."""
    pages = pages[first // page_size : -(-end // page_size)]
    offset = first % page_size
    if bool((pages.diff() == 1).all()):
        return Piece(int(pages[0]) * page_size + offset, end - first, None)
    return Piece(offset, end - first, pages)
