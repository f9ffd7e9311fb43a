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
    launch,
    loop,
    share,
    store,
    widen,
)


@loop
def _softmax(scores):
    highest = scores[0]
    for i in range(scores.size):
        highest = max(highest, scores[i])
    total = np.float32(0)
    for i in range(scores.size):
        weight = exp_of_negative(scores[i] - highest)
        scores[i] = weight
        total += weight
    for i in range(scores.size):
        scores[i] /= total


@loop
def _read(cache_at, page_ids, page_size, position, num_kv_heads, kv_head, row):
    slot = np.int64(page_ids[position // page_size]) * page_size + position % page_size
    kept = array(cache_at, (slot * num_kv_heads + kv_head) * row.size, row.size, BF16)
    for i in range(row.size):
        row[i] = widen(kept[i])


def _attend_bf16(data):
    given, scale = arguments(data)
    q_at, k_cache_at, v_cache_at, out_at, block_table_at, context_lens_at = given[:6]
    num_decodes, max_pages, page_size, num_heads, num_kv_heads, dim, max_keys, q_stride = given[
        6:14
    ]
    group = num_heads // num_kv_heads
    context_lens = array(context_lens_at, 0, num_decodes, INT32)
    query = np.empty((group, dim), np.float32)
    attended = np.empty((group, dim), np.float32)
    row = np.empty(dim, np.float32)  # a key, or a value
    first, last = share(num_decodes * num_kv_heads)
    for item in range(first, last):
        seq, kv_head = item // num_kv_heads, item % num_kv_heads
        num_keys = np.int64(context_lens[seq])
        if num_keys > max_keys:
            continue
        page_ids = array(block_table_at, seq * max_pages, max_pages, INT32)
        first_head = kv_head * group
        q = array(q_at, seq * q_stride + first_head * dim, group * dim, BF16)
        out = array(out_at, (seq * num_heads + first_head) * dim, group * dim, BF16)
        for head in range(group):
            for i in range(dim):
                query[head, i] = widen(q[head * dim + i]) * np.float32(scale)
                attended[head, i] = 0
        scores = np.empty((group, num_keys), np.float32)
        for position in range(num_keys):
            _read(k_cache_at, page_ids, page_size, position, num_kv_heads, kv_head, row)
            for head in range(group):
                score = np.float32(0)
                for i in range(dim):
                    score += query[head, i] * row[i]
                scores[head, position] = score
        for head in range(group):
            _softmax(scores[head])
        for position in range(num_keys):
            _read(v_cache_at, page_ids, page_size, position, num_kv_heads, kv_head, row)
            for head in range(group):
                weight = scores[head, position]
                for i in range(dim):
                    attended[head, i] += weight * row[i]
        for head in range(group):
            for i in range(dim):
                store(out, head * dim + i, attended[head, i])


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
