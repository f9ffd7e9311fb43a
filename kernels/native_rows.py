# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The compiled bodies for a CPU of embedding, norms, gates, and rope with the write of pages.

What they compute, and how it is rounded, is said in ``kernels.norm``, ``kernels.activation`` and
``kernels.cache``. A token is one thread's, so its bits follow from nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.native import (
    BF16,
    FP32,
    INT64,
    arguments,
    array,
    entry,
    exp_of_negative,
    launch,
    loop,
    rounded,
    share,
    store,
    widen,
)


@loop
def _inverse_rms(row, eps):
    squares = np.float32(0)
    for i in range(row.size):
        value = widen(row[i])
        squares += value * value
    return np.float32(1) / np.sqrt(squares / np.float32(row.size) + np.float32(eps))


@loop
def _rms_norm(data, dtype):
    given, eps = arguments(data)
    x_at, residual_at, weight_at, out_at, total_at, num_rows, size, x_stride = given[:8]
    weight = array(weight_at, 0, size, dtype)
    first, last = share(num_rows)
    for row in range(first, last):
        x = array(x_at, row * x_stride, size, dtype)
        out = array(out_at, row * size, size, dtype)
        if residual_at != 0:
            residual = array(residual_at, row * size, size, dtype)
            total = array(total_at, row * size, size, dtype)
            for i in range(size):
                store(total, i, widen(x[i]) + widen(residual[i]))
            x = total
        inverse = _inverse_rms(x, eps)
        for i in range(size):
            store(out, i, rounded(out, widen(x[i]) * inverse) * widen(weight[i]))


def _rms_norm_bf16(data):
    _rms_norm(data, BF16)


def _rms_norm_fp32(data):
    _rms_norm(data, FP32)


_RMS_NORM = {torch.bfloat16: _rms_norm_bf16, torch.float32: _rms_norm_fp32}


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm``, or without a residual ``rms_norm`` twice. x: [..., hidden_size]."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype)
    total = out if residual is None else torch.empty(x.shape, dtype=x.dtype)
    launch(
        entry(_RMS_NORM[x.dtype]),
        x.numel(),
        eps,
        rows.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        rows.shape[0],
        size,
        rows.stride(0),
    )
    return out, total


@loop
def _silu_and_mul(data, dtype):
    given, _ = arguments(data)
    gate_up_at, out_at, num_rows, size, row_stride = given[:5]
    first, last = share(num_rows)
    for row in range(first, last):
        gate = array(gate_up_at, row * row_stride, size, dtype)
        up = array(gate_up_at, row * row_stride + size, size, dtype)
        out = array(out_at, row * size, size, dtype)
        for i in range(size):
            value = widen(gate[i])
            decay = exp_of_negative(-abs(value))
            sigmoid = (np.float32(1) if value >= 0 else decay) / (np.float32(1) + decay)
            store(out, i, rounded(out, value * sigmoid) * widen(up[i]))


def _silu_and_mul_bf16(data):
    _silu_and_mul(data, BF16)


def _silu_and_mul_fp32(data):
    _silu_and_mul(data, FP32)


_SILU_AND_MUL = {torch.bfloat16: _silu_and_mul_bf16, torch.float32: _silu_and_mul_fp32}


def silu_and_mul(gate_up: Tensor) -> Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype)
    launch(
        entry(_SILU_AND_MUL[out.dtype]),
        gate_up.numel(),
        0.0,
        gate_up.data_ptr(),
        out.data_ptr(),
        num_rows,
        size,
        gate_up.stride(0),
    )
    return out


@loop
def _norm_and_rotate(sources, targets, num_heads, dim, cos_sin, norm, eps, normed):
    # heads of one token; normed: [dim] fp32 of the calling thread
    half = dim // 2
    for head in range(num_heads):
        source = sources[head * dim : (head + 1) * dim]
        target = targets[head * dim : (head + 1) * dim]
        for i in range(dim):
            normed[i] = widen(source[i])
        if norm.size > 0:
            inverse = _inverse_rms(source, eps)
            for i in range(dim):
                normed[i] = rounded(target, rounded(target, normed[i] * inverse) * widen(norm[i]))
        for i in range(half):
            cos, sin = cos_sin[i], cos_sin[half + i]
            store(target, i, normed[i] * cos - normed[half + i] * sin)
            store(target, half + i, normed[half + i] * cos + normed[i] * sin)


@loop
def _rope_and_write_kv(data, dtype):
    given, eps = arguments(data)
    q_at, k_at, v_at, q_stride, k_stride, v_stride, q_norm_at, k_norm_at, cos_sin_at = given[:9]
    positions_at, slots_at, q_out_at, k_cache_at, v_cache_at = given[9:14]
    num_tokens, num_heads, num_kv_heads, dim, v_dim = given[14:19]
    q_size, k_size, v_size = num_heads * dim, num_kv_heads * dim, num_kv_heads * v_dim
    q_norm = array(q_norm_at, 0, dim if q_norm_at != 0 else 0, dtype)
    k_norm = array(k_norm_at, 0, dim if k_norm_at != 0 else 0, dtype)
    positions = array(positions_at, 0, num_tokens, INT64)
    slots = array(slots_at, 0, num_tokens, INT64)
    normed = np.empty(dim, np.float32)
    first, last = share(num_tokens)
    for token in range(first, last):
        cos_sin = array(cos_sin_at, positions[token] * dim, dim, FP32)
        q = array(q_at, token * q_stride, q_size, dtype)
        q_out = array(q_out_at, token * q_size, q_size, dtype)
        _norm_and_rotate(q, q_out, num_heads, dim, cos_sin, q_norm, eps, normed)
        slot = slots[token]
        if slot >= 0:
            k = array(k_at, token * k_stride, k_size, dtype)
            k_out = array(k_cache_at, slot * k_size, k_size, dtype)
            _norm_and_rotate(k, k_out, num_kv_heads, dim, cos_sin, k_norm, eps, normed)
            v = array(v_at, token * v_stride, v_size, dtype)
            v_out = array(v_cache_at, slot * v_size, v_size, dtype)
            for i in range(v_size):
                v_out[i] = v[i]


def _rope_and_write_kv_bf16(data):
    _rope_and_write_kv(data, BF16)


def _rope_and_write_kv_fp32(data):
    _rope_and_write_kv(data, FP32)


_ROPE_AND_WRITE_KV = {
    torch.bfloat16: _rope_and_write_kv_bf16,
    torch.float32: _rope_and_write_kv_fp32,
}


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: PagedBatch,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    num_tokens, num_heads, dim = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype)
    launch(
        entry(_ROPE_AND_WRITE_KV[q.dtype]),
        q.numel(),
        eps,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        cos_sin.data_ptr(),
        batch.positions.data_ptr(),
        batch.slot_mapping.data_ptr(),
        q_out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        num_tokens,
        num_heads,
        k.shape[1],
        dim,
        v.shape[2],
    )
    return q_out


@loop
def _embedding(data, dtype):
    given, _ = arguments(data)
    token_ids_at, weight_at, out_at, num_tokens, size, vocab_size = given[:6]
    token_ids = array(token_ids_at, 0, num_tokens, INT64)
    first, last = share(num_tokens)
    for token in range(first, last):
        out = array(out_at, token * size, size, dtype)
        if 0 <= token_ids[token] < vocab_size:
            row = array(weight_at, token_ids[token] * size, size, dtype)
            for i in range(size):
                out[i] = row[i]
        else:
            for i in range(size):
                store(out, i, np.float32(np.nan))


def _embedding_bf16(data):
    _embedding(data, BF16)


def _embedding_fp32(data):
    _embedding(data, FP32)


_EMBEDDING = {torch.bfloat16: _embedding_bf16, torch.float32: _embedding_fp32}


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    num_tokens, size = token_ids.shape[0], weight.shape[1]
    out = torch.empty((num_tokens, size), dtype=weight.dtype)
    launch(
        entry(_EMBEDDING[weight.dtype]),
        out.numel(),
        0.0,
        token_ids.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_tokens,
        size,
        weight.shape[0],
    )
    return out


def prepare(dtype: torch.dtype) -> None:
    for functions in (_EMBEDDING, _RMS_NORM, _SILU_AND_MUL, _ROPE_AND_WRITE_KV):
        entry(functions[dtype])
