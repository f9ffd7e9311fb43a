# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The lightning indexer on the GPU; ``kernels.indexer`` holds the contracts and the equations.

Keys are normed, rotated and written by one program per token, queries by one per block of heads.
Scores: a program takes one token and a range of keys, all heads; [HEADS, BLOCK_N] products, relu,
weights and the sum over heads stay in registers, one fp32 score per key is written.
Selection: one program per token. The k-th largest score is found without a sort: an fp32 score maps
to a uint32 in the same order, and a histogram of 256 fixes a byte of the threshold, from the top,
in 4 passes over the scores; a fifth writes the positions of what reaches it, by prefix sums.
Counts are integers, so the result is exact and the same on every run and in any company.
Graph-safe: the grid follows from host-known limits, positions are read on the device, programs with
nothing to do return.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.configs import launch_config
from kernels.dispatch import capability_of
from kernels.sparse_mla_triton import sequence_of_row

# fp32 scores that exist at a time, 256 MiB; more tokens take several launches
MAX_SCORES = 1 << 26


@triton.jit
def norm_rope_and_write_index_kernel(
    q_ptr,  # [num_tokens, num_heads, DIM]
    k_ptr,  # [num_tokens, DIM]
    norm_weight_ptr,  # [DIM] fp32
    norm_bias_ptr,  # [DIM] fp32
    cos_sin_ptr,  # [num_positions, ROPE_DIM] fp32
    positions_ptr,  # [num_tokens] int64
    slots_ptr,  # [num_tokens] int64
    q_out_ptr,  # [num_tokens, num_heads, DIM]
    index_cache_ptr,  # [num_slots, DIM]
    k_stride,
    num_heads,
    eps,
    DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,  # the power of two that holds a key
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    half = ROPE_DIM // 2
    columns = tl.arange(0, DIM_BLOCK)
    inside = columns < DIM
    is_first = columns < half
    is_roped = columns < ROPE_DIM
    pairs = tl.where(is_first, columns, columns - half)
    # the other number of a dimension's pair, and the sign of its part; unrotated ones: themselves
    others = tl.where(is_roped, tl.where(is_first, columns + half, columns - half), columns)
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * ROPE_DIM + pairs
    cos = tl.load(angles, mask=is_roped, other=1.0)
    sin = tl.load(angles + half, mask=is_roped, other=0.0)
    sin = tl.where(is_first, -sin, sin)
    dtype = q_out_ptr.dtype.element_ty
    if block < tl.cdiv(num_heads, BLOCK_HEADS):
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        rows = (token * num_heads + heads) * DIM
        is_value = (heads < num_heads) & inside[None, :]
        q = tl.load(q_ptr + rows + columns[None, :], mask=is_value, other=0.0).to(tl.float32)
        q_other = tl.load(q_ptr + rows + others[None, :], mask=is_value, other=0.0).to(tl.float32)
        q = q * cos[None, :] + q_other * sin[None, :]
        tl.store(q_out_ptr + rows + columns[None, :], q.to(dtype), mask=is_value)
    else:
        slot = tl.load(slots_ptr + token)
        if slot < 0:
            return
        k_ptr += token * k_stride
        k = tl.load(k_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        k_other = tl.load(k_ptr + others, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(k, axis=0) / DIM
        k = tl.where(inside, k - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(k * k, axis=0) / DIM + eps)
        weight = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0)
        bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)
        k = k * inverse * weight + bias
        weight = tl.load(norm_weight_ptr + others, mask=inside, other=0.0)
        bias = tl.load(norm_bias_ptr + others, mask=inside, other=0.0)
        k_other = (k_other - mean) * inverse * weight + bias
        k = k * cos + k_other * sin
        tl.store(index_cache_ptr + slot * DIM + columns, k.to(dtype), mask=inside)


@triton.jit
def _load_heads(
    q_ptr,  # of one token
    weights_ptr,
    first_head,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
):
    heads = first_head + tl.arange(0, HEADS_BLOCK)
    columns = tl.arange(0, DIM_BLOCK)
    q = tl.load(
        q_ptr + heads[:, None] * DIM + columns[None, :],
        mask=(heads < NUM_HEADS)[:, None] & (columns < DIM)[None, :],
        other=0.0,
    )
    return q, tl.load(weights_ptr + heads, mask=heads < NUM_HEADS, other=0.0)


@triton.jit
def _weighted_sum(q, weights, k):
    dots = tl.dot(q, k, input_precision="ieee")  # [HEADS_BLOCK, BLOCK_N]
    return tl.sum(tl.maximum(dots, 0.0) * weights[:, None], axis=0)


@triton.jit(do_not_specialize=["first_row", "num_seqs", "scores_stride", "table_stride"])
def index_scores_kernel(
    q_ptr,  # [num_tokens, NUM_HEADS, DIM]
    weights_ptr,  # [num_tokens, NUM_HEADS] fp32
    index_cache_ptr,  # [num_slots, DIM]
    scores_ptr,  # [num_rows, scores_stride] fp32, out; row 0 is token first_row
    positions_ptr,  # [num_tokens] int64
    cu_seqlens_ptr,  # [num_seqs + 1] int32
    block_table_ptr,  # [num_seqs, max_pages] int32
    first_row,
    num_seqs,
    scores_stride,
    table_stride,
    top_k,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,  # keys per program
):
    token = first_row + tl.program_id(0).to(tl.int64)
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    start = tl.program_id(1) * KEYS
    if (num_keys <= top_k) | (start >= num_keys):
        return
    seq = sequence_of_row(token, cu_seqlens_ptr, num_seqs)
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
    q_ptr += token * NUM_HEADS * DIM
    weights_ptr += token * NUM_HEADS
    columns = tl.arange(0, DIM_BLOCK)
    if NUM_HEADS <= HEADS_BLOCK:
        q, weights = _load_heads(q_ptr, weights_ptr, 0, NUM_HEADS, DIM, DIM_BLOCK, HEADS_BLOCK)
    for block_start in range(start, tl.minimum(start + KEYS, num_keys), BLOCK_N):
        keys = block_start + tl.arange(0, BLOCK_N)
        is_key = keys < num_keys
        pages = tl.load(table_ptr + keys // PAGE_SIZE, mask=is_key, other=0)
        slots = pages.to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE
        k = tl.load(
            index_cache_ptr + slots[None, :] * DIM + columns[:, None],
            mask=is_key[None, :] & (columns < DIM)[:, None],
            other=0.0,
        )  # [DIM_BLOCK, BLOCK_N]
        if NUM_HEADS <= HEADS_BLOCK:
            scores = _weighted_sum(q, weights, k)
        else:
            scores = tl.zeros((BLOCK_N,), dtype=tl.float32)
            for first_head in range(0, NUM_HEADS, HEADS_BLOCK):
                some, some_weights = _load_heads(
                    q_ptr, weights_ptr, first_head, NUM_HEADS, DIM, DIM_BLOCK, HEADS_BLOCK
                )
                scores += _weighted_sum(some, some_weights, k)
        row_ptr = scores_ptr + (token - first_row) * scores_stride
        tl.store(row_ptr + keys, scores, mask=is_key)


@triton.jit
def _load_ranks(row_ptr, start, num_keys, BLOCK: tl.constexpr):
    """Positions of a block, which of them are keys, and uint32 ranks in the order of the scores."""
    ids = start + tl.arange(0, BLOCK)
    inside = ids < num_keys
    scores = tl.load(row_ptr + ids, mask=inside, other=0.0)
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0 is 0
    ranks = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return ids, inside, ranks


@triton.jit(do_not_specialize=["first_row", "scores_stride"])
def select_top_k_kernel(
    scores_ptr,  # [num_rows, scores_stride] fp32; row 0 is token first_row
    positions_ptr,  # [num_tokens] int64
    selected_ptr,  # [num_tokens, top_k] int32, out
    first_row,
    scores_stride,
    top_k,
    BLOCK: tl.constexpr,
):
    token = first_row + tl.program_id(0).to(tl.int64)
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    out_ptr = selected_ptr + token * top_k
    if num_keys <= top_k:
        for start in range(0, top_k, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + ids, tl.where(ids < num_keys, ids, -1), mask=ids < top_k)
        return
    row_ptr = scores_ptr + (token - first_row) * scores_stride
    bins = tl.arange(0, 256)
    threshold = tl.zeros((), dtype=tl.uint32)
    wanted = top_k + tl.zeros((), dtype=tl.int32)  # how many of the ranks that begin like threshold
    for byte in tl.static_range(4):
        shift = 24 - 8 * byte
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, num_keys, BLOCK):
            _, inside, ranks = _load_ranks(row_ptr, start, num_keys, BLOCK)
            # two shifts: one of 32 bits would be undefined
            begins_alike = ((ranks ^ threshold) >> shift >> 7 >> 1) == 0
            digits = ((ranks >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digits, 256, mask=inside & begins_alike)
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.max(tl.where(at_least >= wanted, bins, 0), axis=0)
        wanted -= tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        threshold |= digit.to(tl.uint32) << shift
    num_written = tl.zeros((), dtype=tl.int32)
    num_equal = tl.zeros((), dtype=tl.int32)
    for start in range(0, num_keys, BLOCK):
        ids, inside, ranks = _load_ranks(row_ptr, start, num_keys, BLOCK)
        equal = (inside & (ranks == threshold)).to(tl.int32)
        is_taken = num_equal + tl.cumsum(equal, axis=0) <= wanted
        chosen = inside & ((ranks > threshold) | ((equal > 0) & is_taken))
        counted = chosen.to(tl.int32)
        places = num_written + tl.cumsum(counted, axis=0) - 1
        tl.store(out_ptr + places, ids, mask=chosen)
        num_written += tl.sum(counted, axis=0)
        num_equal += tl.sum(equal, axis=0)


def index_config(dim: int, rope_dim: int, capability: int) -> dict[str, int]:
    """Blocks and warps of the launch that writes keys. ``capability`` is 90 for sm_90."""
    return {
        "DIM": dim,
        "ROPE_DIM": rope_dim,
        "DIM_BLOCK": triton.next_power_of_2(dim),
        **launch_config("norm_rope_and_write_index", arch=capability, head_dim=dim),
    }


def scores_config(num_heads: int, dim: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Blocks, warps and stages of the launch that scores keys."""
    table = launch_config(
        "index_scores",
        arch=capability,
        dtype=dtype,
        head_dim=dim,
        num_heads=num_heads,
    )
    # tl.dot takes 16 or more
    heads_block = min(max(triton.next_power_of_2(num_heads), 16), table["HEADS_BLOCK"])
    return {
        **table,
        "NUM_HEADS": num_heads,
        "DIM": dim,
        "DIM_BLOCK": max(triton.next_power_of_2(dim), 16),
        "HEADS_BLOCK": heads_block,
    }


def select_config(top_k: int, capability: int) -> dict[str, int]:
    """Block and warps of the launch that selects keys."""
    return launch_config("select_top_k", arch=capability, top_k=top_k)


def norm_rope_and_write_index(
    q: Tensor,
    k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cos_sin: Tensor,
    batch: PagedBatch,
    index_cache: Tensor,
) -> Tensor:
    """Launch the kernel, for at least one token."""
    num_tokens, num_heads, dim = q.shape
    q_out = torch.empty_like(q)
    config = index_config(dim, cos_sin.shape[1], capability_of(q.device))
    num_blocks = triton.cdiv(num_heads, config["BLOCK_HEADS"]) + 1
    norm_rope_and_write_index_kernel[(num_tokens, num_blocks)](
        q,
        k,
        norm_weight,
        norm_bias,
        cos_sin,
        batch.positions,
        batch.slot_mapping,
        q_out,
        index_cache,
        k.stride(0),
        num_heads,
        eps,
        **config,
    )
    return q_out


def select_keys(
    q: Tensor, weights: Tensor, index_cache: Tensor, batch: PagedBatch, top_k: int
) -> Tensor:
    """Launch the kernels, for at least one token."""
    num_tokens, num_heads, dim = q.shape
    selected = torch.empty((num_tokens, top_k), dtype=torch.int32, device=q.device)
    capability = capability_of(q.device)
    config = scores_config(num_heads, dim, q.dtype, capability)
    width = batch.max_context_len
    is_scored = width > top_k
    at_once = max(MAX_SCORES // width, 1)
    scores = torch.empty(
        (min(at_once, num_tokens) if is_scored else 1, width), dtype=torch.float32, device=q.device
    )
    for first in range(0, num_tokens, at_once):
        num_rows = min(at_once, num_tokens - first)
        if is_scored:
            index_scores_kernel[(num_rows, triton.cdiv(width, config["KEYS"]))](
                q,
                weights,
                index_cache,
                scores,
                batch.positions,
                batch.cu_seqlens_q,
                batch.block_table,
                first,
                batch.num_seqs,
                width,
                batch.block_table.stride(0),
                top_k,
                PAGE_SIZE=index_cache.shape[1],
                **config,
            )
        select_top_k_kernel[(num_rows,)](
            scores,
            batch.positions,
            selected,
            first,
            width,
            top_k,
            **select_config(top_k, capability),
        )
    return selected
