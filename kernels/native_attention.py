# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The compiled body for a CPU of attention by single queries over contexts of moderate length.

Keys and values are read from their pages, in bf16; scores, softmax and sums are fp32. A thread
takes a sequence's queries of one KV head, so that their bits follow from nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.native import (
    BF16,
    INT32,
    arguments,
    array,
    entry,
    exp_of_negative,
    has_features,
    launch,
    loop,
    share,
    store,
)
from kernels.native_sums import (
    KEY_TILE,
    MAX_VALUE_HEADS,
    WORD_DIMS,
    dots_of_keys,
    weighted_values,
)

_add_for_one_head = weighted_values(1)
_add_for_two_heads = weighted_values(2)
_add_for_three_heads = weighted_values(3)
_add_for_four_heads = weighted_values(MAX_VALUE_HEADS)


@loop
def _exponentials(scores, scale):
    # in place; their sum
    highest = scores[0] * scale
    for i in range(scores.size):
        scores[i] *= scale
        highest = max(highest, scores[i])
    total = np.float32(0)
    for i in range(scores.size):
        weight = exp_of_negative(scores[i] - highest)
        scores[i] = weight
        total += weight
    return total


@loop
def _add_values(values_at, value_bytes, weights_at, weight_bytes, num_values, attended):
    num_heads, dim = attended.shape
    for head in range(0, num_heads, MAX_VALUE_HEADS):
        num_left = num_heads - head
        for first in range(0, dim, WORD_DIMS):
            at = values_at + first * 2
            weights = weights_at + head * weight_bytes
            sums = attended.ctypes.data + (head * dim + first) * 4
            if num_left == 1:
                _add_for_one_head(at, value_bytes, weights, weight_bytes, num_values, sums, dim * 4)
            elif num_left == 2:
                _add_for_two_heads(
                    at, value_bytes, weights, weight_bytes, num_values, sums, dim * 4
                )
            elif num_left == 3:
                _add_for_three_heads(
                    at, value_bytes, weights, weight_bytes, num_values, sums, dim * 4
                )
            else:
                _add_for_four_heads(
                    at, value_bytes, weights, weight_bytes, num_values, sums, dim * 4
                )


def _attend_bf16(data):
    given, scale = arguments(data)
    q_at, k_cache_at, v_cache_at, out_at, block_table_at, context_lens_at = given[:6]
    num_decodes, max_pages, page_size, num_heads, num_kv_heads, dim, max_keys, q_stride = given[
        6:14
    ]
    group, token_bytes = num_heads // num_kv_heads, num_kv_heads * dim * 2
    context_lens = array(context_lens_at, 0, num_decodes, INT32)
    attended = np.empty((group, dim), np.float32)
    totals = np.empty(group, np.float32)
    first, last = share(num_decodes * num_kv_heads)
    for item in range(first, last):
        seq, kv_head = item // num_kv_heads, item % num_kv_heads
        num_keys = np.int64(context_lens[seq])
        if num_keys > max_keys:
            continue
        page_ids = array(block_table_at, seq * max_pages, max_pages, INT32)
        first_head = kv_head * group
        queries_at = q_at + (seq * q_stride + first_head * dim) * 2
        scores = np.empty((group, -(-num_keys // KEY_TILE) * KEY_TILE), np.float32)
        scores_at, scores_bytes = scores.ctypes.data, scores.shape[1] * 4
        for position in range(0, num_keys, KEY_TILE):
            slot = np.int64(page_ids[position // page_size]) * page_size + position % page_size
            keys_at = k_cache_at + slot * token_bytes + kv_head * dim * 2
            for head in range(group):
                at = scores_at + head * scores_bytes + position * 4
                dots_of_keys(keys_at, token_bytes, queries_at + head * dim * 2, dim, at)
        for head in range(group):
            totals[head] = _exponentials(scores[head, :num_keys], np.float32(scale))
        attended[:] = 0
        for position in range(0, num_keys, KEY_TILE):
            slot = np.int64(page_ids[position // page_size]) * page_size + position % page_size
            values_at = v_cache_at + slot * token_bytes + kv_head * dim * 2
            num_values = min(KEY_TILE, num_keys - position)
            weights_at = scores_at + position * 4
            _add_values(values_at, token_bytes, weights_at, scores_bytes, num_values, attended)
        out = array(out_at, (seq * num_heads + first_head) * dim, group * dim, BF16)
        for head in range(group):
            for i in range(dim):  # a vector's even dimensions, then its odd ones
                vector, lane = i // WORD_DIMS, i % WORD_DIMS
                kept = vector * WORD_DIMS + lane // 2 + lane % 2 * (WORD_DIMS // 2)
                store(out, head * dim + i, attended[head, kept] / totals[head])


def takes(k_cache: Tensor) -> bool:
    """Whether `attend_decodes` takes [num_pages, page_size, num_kv_heads, dim]."""
    is_tiled = k_cache.shape[1] % KEY_TILE == 0 and k_cache.shape[3] % WORD_DIMS == 0
    return k_cache.dtype == torch.bfloat16 and is_tiled and has_features("avx512f")


def attend_decodes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    max_keys: int,
    out: Tensor,
) -> None:
    """The rows of ``out`` [num_tokens, num_heads, head_dim], bf16, of decodes of short contexts.

    Those hold one key at least and ``max_keys`` at most; keys and values are as wide as each other.
    """
    num_heads, dim = q.shape[1:]
    page_size, num_kv_heads = k_cache.shape[1:3]
    launch(
        entry(_attend_bf16),
        batch.num_decodes * num_heads * dim * 16,
        scale,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        batch.block_table.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.num_decodes,
        batch.block_table.stride(0),
        page_size,
        num_heads,
        num_kv_heads,
        dim,
        max_keys,
        q.stride(0),
    )


def prepare(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        entry(_attend_bf16)
