# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Paged attention on the GPU, for K/V pages and for latent pages; one kernel for any chunk length.

    rows of a tile: (token, query head) pairs of one sequence that share one KV head, token-major
    key block:      BLOCK_N positions, gathered through the block table; page_size is arbitrary
    S = Q K^T * scale, online softmax in base 2 (arXiv:2205.14135), O = P V, all sums in fp32

A head dimension is MAIN + TAIL, so that 192 = 128 + 64 and 576 = 512 + 64 waste no lanes. For MLA
all heads share one KV head whose values ARE the main part of its keys: pages are read once.
Decodes are cut into splits of keys (arXiv:2311.01282, "flash decoding"), each leaves a partial
output and its log-sum-exp, and a second kernel combines them. How long a split is follows from the
row's own context, never from the batch, so a row has the same bits in any company.
Graph-safe: lengths are read on the device, the grid follows from host-known limits, and programs
past a sequence's end return. Keys past the context are masked at the load: pages may hold NaN.
A decode's limits may exceed every context, and rows of context 0 are padding; their output is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.combine_splits_triton import combine_splits, keys_per_split, max_splits_of
from kernels.configs import Fact, launch_config
from kernels.dispatch import capability_of

LOG2_E = 1.4426950408889634
NO_LIMIT = 2**31 - 1
# fp32 values of partial outputs that exist at a time, 128 MiB; more decodes take several launches
MAX_PARTIAL_VALUES = 1 << 25


@triton.jit(
    do_not_specialize=[
        *("first_seq", "num_tiles", "max_splits"),
        *("min_split", "split_limit", "context_above", "context_up_to", "table_stride"),
    ]
)  # they change from step to step: a compilation for 1 or for multiples of 16 would stall one
def paged_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, MAIN_DIM]
    q_tail_ptr,  # [num_tokens, num_heads, TAIL_DIM] or None
    k_ptr,  # [num_slots, num_kv_heads, MAIN_DIM]
    k_tail_ptr,  # [num_slots, num_kv_heads, TAIL_DIM] or None, strides of k
    v_ptr,  # [num_slots, num_kv_heads, V_DIM] or None: the main part of k
    out_ptr,  # [num_tokens, num_heads, V_DIM]; PARTIAL: [num_tokens, num_heads, max_splits, V_DIM]
    lse_ptr,  # None; PARTIAL: [num_tokens, num_heads, max_splits] fp32, base 2
    block_table_ptr,  # [num_seqs, max_pages] int32
    cu_seqlens_ptr,  # [num_seqs + 1] int32
    context_lens_ptr,  # [num_seqs] int32
    scale_log2,
    first_seq,
    num_tiles,  # row tiles per sequence
    max_splits,
    min_split,  # keys of a split at least, of decodes
    split_limit,  # splits of a row at most, of decodes
    context_above,  # chunks with other contexts than (context_above, context_up_to] are skipped
    context_up_to,
    q_token_stride,
    q_head_stride,
    q_tail_token_stride,
    q_tail_head_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    GROUP: tl.constexpr,  # query heads per KV head
    PAGE_SIZE: tl.constexpr,
    IS_DECODE: tl.constexpr,  # sequence i has one token, row i; else one program walks all keys
    PARTIAL: tl.constexpr,
    MAIN_DIM: tl.constexpr,
    MAIN_BLOCK: tl.constexpr,
    TAIL_DIM: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,  # 0: no tail
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    seq = first_seq + tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    kv_head = tl.program_id(1)
    first_row = tile * BLOCK_M
    context_len = tl.load(context_lens_ptr + seq)
    if IS_DECODE:  # queries travel while the context is waited for
        first_token = seq
        num_tokens = 1
    else:
        first_token = tl.load(cu_seqlens_ptr + seq)
        num_tokens = tl.load(cu_seqlens_ptr + seq + 1) - first_token
        if first_row >= num_tokens * GROUP:
            return
        if (context_len <= context_above) | (context_len > context_up_to):
            return
        # [start, end) keys of this program: no row of the tile sees past its last token
        first_position = context_len - num_tokens
        start = 0
        end = tl.minimum(first_position + (first_row + BLOCK_M - 1) // GROUP + 1, context_len)

    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = (rows < num_tokens * GROUP)[:, None]
    tokens = (first_token + rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    main = tl.arange(0, MAIN_BLOCK)
    q_rows = tokens * q_token_stride + heads * q_head_stride
    q = tl.load(
        q_ptr + q_rows[:, None] + main[None, :], mask=is_row & (main < MAIN_DIM)[None, :], other=0.0
    )
    if TAIL_BLOCK:
        tail = tl.arange(0, TAIL_BLOCK)
        q_rows = tokens * q_tail_token_stride + heads * q_tail_head_stride
        q_tail = tl.load(
            q_tail_ptr + q_rows[:, None] + tail[None, :],
            mask=is_row & (tail < TAIL_DIM)[None, :],
            other=0.0,
        )

    if IS_DECODE:
        split = keys_per_split(context_len, min_split, split_limit, BLOCK_N)
        start = tl.program_id(2) * split
        end = tl.minimum(start + split, context_len)
        if PARTIAL & (start >= end):
            return
    else:
        positions = first_position + rows // GROUP
    columns = tl.arange(0, V_BLOCK)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out = tl.zeros((BLOCK_M, V_BLOCK), dtype=tl.float32)
    # chunks: every row of the tile sees all keys of [start, whole), so that no mask is needed there
    whole = start
    if not IS_DECODE:
        whole = tl.minimum(first_position + first_row // GROUP + 1, end) // BLOCK_N * BLOCK_N
    for is_masked in tl.static_range(1 if IS_DECODE else 0, 2):
        first_key = whole if is_masked else start
        last_key = end if is_masked else whole
        for block_start in range(first_key, last_key, BLOCK_N):
            keys = block_start + tl.arange(0, BLOCK_N)
            is_key = keys < end if is_masked else tl.full((BLOCK_N,), True, dtype=tl.int1)
            pages = tl.load(
                block_table_ptr + seq.to(tl.int64) * table_stride + keys // PAGE_SIZE,
                mask=is_key,
                other=0,
            )
            slots = pages.to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE
            k_starts = slots * k_slot_stride + kv_head * k_head_stride
            # loaded as rows, which are also the values of latents: else no copy runs ahead
            k = tl.load(
                k_ptr + k_starts[:, None] + main[None, :],
                mask=is_key[:, None] & (main < MAIN_DIM)[None, :],
                other=0.0,
            )  # [BLOCK_N, MAIN_BLOCK]
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if TAIL_BLOCK:
                k_tail = tl.load(
                    k_tail_ptr + k_starts[None, :] + tail[:, None],
                    mask=is_key[None, :] & (tail < TAIL_DIM)[:, None],
                    other=0.0,
                )
                scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
            scores = scores * scale_log2
            if is_masked:
                seen = is_key[None, :]
                if not IS_DECODE:
                    seen = seen & (keys[None, :] <= positions[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            # every row sees the first key of [start, end): the maximum is finite from then on
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weights, axis=1)
            if v_ptr is None:
                v = k
            else:
                v_rows = slots * v_slot_stride + kv_head * v_head_stride
                v = tl.load(
                    v_ptr + v_rows[:, None] + columns[None, :],
                    mask=is_key[:, None] & (columns < V_DIM)[None, :],
                    other=0.0,
                )  # [BLOCK_N, V_BLOCK]
            out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            highest = new_highest

    if IS_DECODE and not PARTIAL:  # a padding row without context has met no key; its output is 0
        total = tl.where(total > 0, total, 1.0)
    out = out / total[:, None]
    num_heads = tl.num_programs(1) * GROUP
    out_rows = tokens * num_heads + heads
    if PARTIAL:
        out_rows = out_rows * max_splits + tl.program_id(2)
        lse = highest + tl.log2(total)
        tl.store(lse_ptr + out_rows, lse, mask=rows < num_tokens * GROUP)
    tl.store(
        out_ptr + out_rows[:, None] * V_DIM + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_row & (columns < V_DIM)[None, :],
    )


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What fixes the tiles of a launch, apart from the chip and whether rows are decodes."""

    group_size: int  # query heads per KV head
    main_dim: int
    tail_dim: int
    v_dim: int
    values_are_keys: bool  # MLA: the values are the main part of the keys


def head_shape(group_size: int, head_dim: int, v_head_dim: int) -> HeadShape:
    """The shape of plain heads: the largest power of two in ``head_dim``, then the rest."""
    main_dim = 1 << (head_dim.bit_length() - 1)
    return HeadShape(group_size, main_dim, head_dim - main_dim, v_head_dim, False)


def attention_config(
    shape: HeadShape, dtype: torch.dtype, capability: int, is_decode: bool
) -> dict[str, int]:
    """Blocks, warps and stages of a launch. ``capability`` is 90 for sm_90."""
    table = launch_config("paged_attention", **attention_facts(shape, dtype, capability, is_decode))
    return {"SPLIT": 0, "MAX_SPLITS": 0, "IS_DECODE": is_decode, **shape_constants(shape), **table}


def kernel_constants(config: dict[str, int]) -> dict[str, int]:
    """What of a launch's configuration is compiled in; how keys are split is not."""
    return {key: value for key, value in config.items() if key not in ("SPLIT", "MAX_SPLITS")}


def attention_facts(
    shape: HeadShape, dtype: torch.dtype, capability: int, is_decode: bool
) -> dict[str, Fact | torch.dtype]:
    """What a row of the table of launch configurations may ask of an attention."""
    return {
        "arch": capability,
        "dtype": dtype,
        "kind": "decode" if is_decode else "chunk",
        "head_dim": shape.main_dim + shape.tail_dim,
        "group_size": shape.group_size,
        "latent": shape.values_are_keys,
    }


def shape_constants(shape: HeadShape) -> dict[str, int]:
    """The constexprs that follow from the shape alone."""
    return {
        "MAIN_DIM": shape.main_dim,
        "MAIN_BLOCK": _block(shape.main_dim),
        "TAIL_DIM": shape.tail_dim,
        "TAIL_BLOCK": _block(shape.tail_dim) if shape.tail_dim else 0,
        "V_DIM": shape.v_dim,
        "V_BLOCK": _block(shape.v_dim),
        "GROUP": shape.group_size,
    }


def _block(dim: int) -> int:
    return max(1 << (dim - 1).bit_length(), 16)  # tl.dot takes 16 or more


@dataclass(frozen=True, slots=True)
class PagedHeads:
    """Queries and pages of one launch; tails are None where a head dimension is a power of two."""

    q: Tensor  # [num_tokens, num_heads, main_dim]
    q_tail: Tensor | None  # [num_tokens, num_heads, tail_dim]
    k: Tensor  # [num_pages, page_size, num_kv_heads, main_dim]
    k_tail: Tensor | None  # [num_pages, page_size, num_kv_heads, tail_dim]
    v: Tensor | None  # [num_pages, page_size, num_kv_heads, v_dim]; None: k
    block_table: Tensor  # [num_seqs, max_pages] int32


def attend_decodes(
    heads: PagedHeads, shape: HeadShape, batch: PagedBatch, scale: float, out: Tensor
) -> None:
    """Rows [0, num_decodes) of ``out`` [num_tokens, num_heads, v_dim]."""
    capability = capability_of(heads.q.device)
    config = attention_config(shape, heads.q.dtype, capability, is_decode=True)
    max_splits = max_splits_of(config, batch.max_context_len)
    num_tiles = triton.cdiv(shape.group_size, config["BLOCK_M"])
    if max_splits == 1:
        grid = (0, batch.num_decodes, num_tiles, 1)
        _launch(heads, batch, scale, config, out, None, grid)
        return
    num_heads = heads.q.shape[1]
    at_once = decodes_at_once(num_heads * max_splits * shape.v_dim)
    for first in range(0, batch.num_decodes, at_once):
        last = min(first + at_once, batch.num_decodes)
        partial_shape = (last - first, num_heads, max_splits)
        lse = torch.empty(partial_shape, dtype=torch.float32, device=out.device)
        partial = torch.empty((*partial_shape, shape.v_dim), dtype=torch.float32, device=out.device)
        grid = (0, last - first, num_tiles, max_splits)
        rows = _decode_rows(heads, first, last)
        few = replace(batch, context_lens=batch.context_lens[first:last])
        _launch(rows, few, scale, config, partial, lse, grid)
        combine_splits(partial, lse, out[first:last], few.context_lens, config)


def decodes_at_once(values_per_decode: int) -> int:
    """How many decodes one launch takes, within `MAX_PARTIAL_VALUES`.

    A multiple of 4 where it can be, so that each launch's part of an int32 array is aligned alike.
    """
    count = max(MAX_PARTIAL_VALUES // values_per_decode, 1)
    return count if count < 4 else count // 4 * 4


def _decode_rows(heads: PagedHeads, first: int, last: int) -> PagedHeads:
    """Decodes [first, last) alone; where their tokens sit needs no ``cu_seqlens_q``."""
    return replace(
        heads,
        q=heads.q[first:last],
        q_tail=None if heads.q_tail is None else heads.q_tail[first:last],
        block_table=heads.block_table[first:last],
    )


def attend_chunks(
    heads: PagedHeads,
    shape: HeadShape,
    batch: PagedBatch,
    scale: float,
    out: Tensor,
    seqs: range,
    contexts: range = range(1, NO_LIMIT),
) -> None:
    """Rows of ``out`` that belong to ``seqs`` and whose sequence has one of ``contexts``."""
    capability = capability_of(heads.q.device)
    config = attention_config(shape, heads.q.dtype, capability, is_decode=False)
    num_tiles = triton.cdiv(batch.max_query_len * shape.group_size, config["BLOCK_M"])
    grid = (seqs.start, len(seqs), num_tiles, 1)
    _launch(heads, batch, scale, config, out, None, grid, contexts)


def _launch(
    heads: PagedHeads,
    batch: PagedBatch,
    scale: float,
    config: dict[str, int],
    out: Tensor,
    lse: Tensor | None,
    grid: tuple[int, int, int, int],
    contexts: range = range(1, NO_LIMIT),
) -> None:
    first_seq, num_seqs, num_tiles, max_splits = grid
    q, q_tail, k, v = heads.q, heads.q_tail, heads.k, heads.v
    num_kv_heads = k.shape[2]
    paged_attention_kernel[(num_seqs * num_tiles, num_kv_heads, max_splits)](
        q,
        q_tail,
        k,
        heads.k_tail,
        v,
        out,
        lse,
        heads.block_table,
        batch.cu_seqlens_q,
        batch.context_lens,
        scale * LOG2_E,
        first_seq,
        num_tiles,
        max_splits,
        config["SPLIT"],
        config["MAX_SPLITS"],
        contexts.start - 1,
        contexts.stop - 1,
        q.stride(0),
        q.stride(1),
        0 if q_tail is None else q_tail.stride(0),
        0 if q_tail is None else q_tail.stride(1),
        k.stride(1),
        k.stride(2),
        0 if v is None else v.stride(1),
        0 if v is None else v.stride(2),
        heads.block_table.stride(0),
        PAGE_SIZE=k.shape[1],
        PARTIAL=lse is not None,
        **kernel_constants(config),
    )
