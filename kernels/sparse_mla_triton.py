# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Absorbed latent attention to chosen keys on the GPU; ``kernels.mla`` holds the contract.

A program takes one token and a tile of its heads, which share the token's keys: their positions
come from ``selected``, their slots from the block table. Otherwise it is the kernel of
``kernels.attention_triton``: online softmax in base 2, sums in fp32, values are part of the keys.
Decodes are cut into splits of chosen keys as there, which the second kernel combines.
Only sequences with more than top_k tokens of context are attended, the others' rows stay as they
are: whether a row is sparse follows from its own sequence.
Graph-safe: the grid follows from shapes, positions and contexts are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_triton import (
    LOG2_E,
    HeadShape,
    PagedHeads,
    attention_facts,
    decodes_at_once,
    kernel_constants,
    shape_constants,
)
from kernels.batch import PagedBatch
from kernels.combine_splits_triton import combine_splits, keys_per_split, max_splits_of
from kernels.configs import launch_config
from kernels.dispatch import capability_of

_SEQS_BLOCK = tl.constexpr(128)


@triton.jit
def sequence_of_row(row, cu_seqlens_ptr, num_seqs):
    """The sequence that token row ``row`` belongs to: how many sequences end at or before it."""
    seq = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_seqs, _SEQS_BLOCK):
        seqs = first + tl.arange(0, _SEQS_BLOCK)
        inside = seqs < num_seqs
        ends = tl.load(cu_seqlens_ptr + 1 + seqs, mask=inside, other=0)
        seq += tl.sum((inside & (ends <= row)).to(tl.int32), axis=0)
    return seq


@triton.jit(
    do_not_specialize=[
        *("first_row", "num_seqs", "max_splits"),
        *("min_split", "split_limit", "table_stride"),
    ]
)
def sparse_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, MAIN_DIM]
    q_tail_ptr,  # [num_tokens, num_heads, TAIL_DIM]
    k_ptr,  # [num_slots, MAIN_DIM + TAIL_DIM]
    selected_ptr,  # [num_tokens, top_k] int32
    out_ptr,  # [num_rows, num_heads, V_DIM]; PARTIAL: [num_rows, num_heads, max_splits, V_DIM]
    lse_ptr,  # None; PARTIAL: [num_rows, num_heads, max_splits] fp32, base 2
    positions_ptr,  # [num_tokens] int64
    cu_seqlens_ptr,  # [num_seqs + 1] int32
    context_lens_ptr,  # [num_seqs] int32
    block_table_ptr,  # [num_seqs, max_pages] int32
    scale_log2,
    first_row,  # the token of row 0 of out
    num_seqs,
    max_splits,
    min_split,  # chosen keys of a split at least, of decodes
    split_limit,  # splits of a row at most, of decodes
    top_k,
    q_token_stride,
    q_head_stride,
    q_tail_token_stride,
    q_tail_head_stride,
    table_stride,
    GROUP: tl.constexpr,  # heads
    PAGE_SIZE: tl.constexpr,
    IS_DECODE: tl.constexpr,  # sequence i has one token, row i; else one program walks all keys
    PARTIAL: tl.constexpr,
    MAIN_DIM: tl.constexpr,
    MAIN_BLOCK: tl.constexpr,
    TAIL_DIM: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_tiles = tl.cdiv(GROUP, BLOCK_M)
    row = tl.program_id(0).to(tl.int64) // num_tiles
    tile = tl.program_id(0) % num_tiles
    token = first_row + row
    seq = token if IS_DECODE else sequence_of_row(token, cu_seqlens_ptr, num_seqs)
    if tl.load(context_lens_ptr + seq) <= top_k:
        return
    # [start, end) of the chosen keys; past end there is only -1
    if IS_DECODE:  # of a longer context: top_k are chosen
        split = keys_per_split(top_k, min_split, split_limit, BLOCK_N)
        start = tl.program_id(1) * split
        end = tl.minimum(start + split, top_k)
        if PARTIAL & (start >= end):
            return
    else:
        start = 0
        end = tl.minimum(tl.load(positions_ptr + token).to(tl.int32) + 1, top_k)

    heads = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_head = (heads < GROUP)[:, None]
    main = tl.arange(0, MAIN_BLOCK)
    is_main = main < MAIN_DIM
    tail = tl.arange(0, TAIL_BLOCK)
    is_tail = tail < TAIL_DIM
    q = tl.load(
        q_ptr + token * q_token_stride + heads[:, None] * q_head_stride + main[None, :],
        mask=is_head & is_main[None, :],
        other=0.0,
    )
    q_tail = tl.load(
        q_tail_ptr
        + token * q_tail_token_stride
        + heads[:, None] * q_tail_head_stride
        + tail[None, :],
        mask=is_head & is_tail[None, :],
        other=0.0,
    )
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out = tl.zeros((BLOCK_M, V_BLOCK), dtype=tl.float32)
    for block_start in range(start, end, BLOCK_N):
        places = block_start + tl.arange(0, BLOCK_N)
        is_key = places < end
        keys = tl.load(selected_ptr + token * top_k + places, mask=is_key, other=0)
        pages = tl.load(table_ptr + keys // PAGE_SIZE, mask=is_key, other=0)
        slots = pages.to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE
        k_starts = k_ptr + slots * (MAIN_DIM + TAIL_DIM)
        k = tl.load(
            k_starts[:, None] + main[None, :], mask=is_key[:, None] & is_main[None, :], other=0.0
        )  # [BLOCK_N, MAIN_BLOCK]
        k_tail = tl.load(
            k_starts[None, :] + MAIN_DIM + tail[:, None],
            mask=is_key[None, :] & is_tail[:, None],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
        scores = tl.where(is_key[None, :], scores * scale_log2, float("-inf"))
        # every block has a key: the maximum is finite from the first block
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(k.dtype), k, out * shrink[:, None], input_precision="ieee")
        highest = new_highest

    out = out / total[:, None]
    columns = tl.arange(0, V_BLOCK)
    out_rows = row * GROUP + heads
    if PARTIAL:
        out_rows = out_rows * max_splits + tl.program_id(1)
        tl.store(lse_ptr + out_rows, highest + tl.log2(total), mask=heads < GROUP)
    tl.store(
        out_ptr + out_rows[:, None] * V_DIM + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_head & (columns < V_DIM)[None, :],
    )


def sparse_config(
    shape: HeadShape, dtype: torch.dtype, capability: int, is_decode: bool
) -> dict[str, int]:
    """Blocks, warps and stages of a launch. ``capability`` is 90 for sm_90."""
    facts = attention_facts(shape, dtype, capability, is_decode)
    table = launch_config("sparse_attention", **facts)
    return {"SPLIT": 0, "MAX_SPLITS": 0, "IS_DECODE": is_decode, **shape_constants(shape), **table}


def attend_selected(
    heads: PagedHeads,
    shape: HeadShape,
    batch: PagedBatch,
    scale: float,
    selected: Tensor,
    out: Tensor,
) -> None:
    """Rows of ``out`` [num_tokens, num_heads, v_dim] whose sequence has more than top_k tokens.

    ``heads.k`` is [num_pages, page_size, 1, main_dim + tail_dim], contiguous; ``selected`` is
    [num_tokens, top_k] int32, as ``kernels.indexer.select_keys`` makes it.
    """
    num_tokens, top_k = selected.shape
    num_decodes = batch.num_decodes
    capability = capability_of(heads.q.device)
    if num_decodes < num_tokens:
        config = sparse_config(shape, heads.q.dtype, capability, is_decode=False)
        rows = range(num_decodes, num_tokens)
        _launch(heads, batch, scale, selected, config, out[num_decodes:], None, rows, 1)
    config = sparse_config(shape, heads.q.dtype, capability, is_decode=True)
    num_splits = max_splits_of(config, top_k)
    if num_splits == 1 and num_decodes:
        _launch(heads, batch, scale, selected, config, out, None, range(num_decodes), 1)
        return
    # the combining kernel counts splits by contexts: of what is attended here, 0 where nothing is
    context_lens = batch.context_lens[:num_decodes]
    attended_lens = torch.where(context_lens > top_k, top_k, 0).to(torch.int32)
    at_once = decodes_at_once(shape.group_size * num_splits * shape.v_dim)
    for first in range(0, num_decodes, at_once):
        rows = range(first, min(first + at_once, num_decodes))
        partial_shape = (len(rows), shape.group_size, num_splits)
        lse = torch.empty(partial_shape, dtype=torch.float32, device=out.device)
        partial = torch.empty((*partial_shape, shape.v_dim), dtype=torch.float32, device=out.device)
        _launch(heads, batch, scale, selected, config, partial, lse, rows, num_splits)
        lens = attended_lens[first : rows.stop]
        combine_splits(partial, lse, out[first : rows.stop], lens, config, keep_empty=True)


def _launch(
    heads: PagedHeads,
    batch: PagedBatch,
    scale: float,
    selected: Tensor,
    config: dict[str, int],
    out: Tensor,
    lse: Tensor | None,
    rows: range,
    num_splits: int,
) -> None:
    q, q_tail = heads.q, heads.q_tail
    assert q_tail is not None  # latents always have a roped tail
    num_tiles = triton.cdiv(config["GROUP"], config["BLOCK_M"])
    sparse_attention_kernel[(len(rows) * num_tiles, num_splits)](
        q,
        q_tail,
        heads.k,
        selected,
        out,
        lse,
        batch.positions,
        batch.cu_seqlens_q,
        batch.context_lens,
        heads.block_table,
        scale * LOG2_E,
        rows.start,
        batch.num_seqs,
        num_splits,
        config["SPLIT"],
        config["MAX_SPLITS"],
        selected.shape[1],
        q.stride(0),
        q.stride(1),
        q_tail.stride(0),
        q_tail.stride(1),
        heads.block_table.stride(0),
        PAGE_SIZE=heads.k.shape[1],
        PARTIAL=lse is not None,
        **kernel_constants(config),
    )
