# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rotary embedding fused with the write of a step's keys and values into their pages.

    k_cache      [num_pages, page_size, num_kv_heads, head_dim]
    v_cache      [num_pages, page_size, num_kv_heads, v_head_dim]
    latent_cache [num_pages, page_size, rank + rope_dim]: normed latent, then the roped k_pe

Token t goes to slot slot_mapping[t] = page_id * page_size + offset; -1 writes nothing. Rotation is
in fp32 and rounds once; the equation is in ``kernels.rope``. Where a model norms query and key
heads, or the latent, the same kernel does it first, with the roundings of ``kernels.norm``.
In Triton a program takes one token and a block of heads; the programs after the query heads' rotate
and write. Graph-safe: the grid follows from shapes, positions and slots are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.configs import launch_config
from kernels.dispatch import capability_of, native, use_native, use_triton
from kernels.norm import rms_norm, scale_normed
from kernels.rope import for_halves, rotate, rotate_halves


@triton.jit
def _norm_and_rotate(
    source_ptr,  # [heads, DIM] of one token
    target_ptr,  # likewise
    norm_ptr,  # [DIM] or None: not normed
    offsets,  # [BLOCK_HEADS, HALF_BLOCK]: where the first halves of the heads lie
    inside,
    pairs,
    is_pair,
    cos,
    sin,
    eps,
    DIM: tl.constexpr,
):
    first = tl.load(source_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + DIM // 2 + offsets, mask=inside, other=0.0).to(tl.float32)
    dtype = target_ptr.dtype.element_ty
    if norm_ptr is not None:
        mean_square = (tl.sum(first * first + second * second, axis=1) / DIM)[:, None]
        weight = tl.load(norm_ptr + pairs, mask=is_pair, other=0.0)
        first = scale_normed(first, mean_square, eps, weight, dtype).to(tl.float32)
        weight = tl.load(norm_ptr + DIM // 2 + pairs, mask=is_pair, other=0.0)
        second = scale_normed(second, mean_square, eps, weight, dtype).to(tl.float32)
    tl.store(target_ptr + offsets, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(target_ptr + DIM // 2 + offsets, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def rope_and_write_kv_kernel(
    q_ptr,  # [num_tokens, num_heads, DIM]
    k_ptr,  # [num_tokens, num_kv_heads, DIM]
    v_ptr,  # [num_tokens, num_kv_heads, V_DIM]
    q_norm_ptr,  # [DIM] or None
    k_norm_ptr,  # [DIM] or None
    cos_sin_ptr,  # [num_positions, DIM] fp32
    positions_ptr,  # [num_tokens] int64
    slots_ptr,  # [num_tokens] int64
    q_out_ptr,  # [num_tokens, num_heads, DIM]
    k_cache_ptr,  # [num_slots, num_kv_heads, DIM]
    v_cache_ptr,  # [num_slots, num_kv_heads, V_DIM]
    q_stride,  # of a token
    k_stride,
    v_stride,
    num_heads,
    num_kv_heads,
    eps,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # powers of two that hold half a key and a value
    V_BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_q_blocks = tl.cdiv(num_heads, BLOCK_HEADS)
    pairs = tl.arange(0, HALF_BLOCK)
    is_pair = pairs < DIM // 2
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * DIM + pairs, mask=is_pair, other=0.0)
    sin = tl.load(cos_sin_ptr + position * DIM + DIM // 2 + pairs, mask=is_pair, other=0.0)
    if block < num_q_blocks:
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        offsets = heads[:, None] * DIM + pairs[None, :]
        inside = (heads < num_heads)[:, None] & is_pair[None, :]
        source_ptr = q_ptr + token * q_stride
        target_ptr = q_out_ptr + token * num_heads * DIM
        _norm_and_rotate(
            source_ptr, target_ptr, q_norm_ptr, offsets, inside, pairs, is_pair, cos, sin, eps, DIM
        )
    else:
        slot = tl.load(slots_ptr + token)
        if slot < 0:
            return
        heads = (block - num_q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        is_head = (heads < num_kv_heads)[:, None]
        columns = tl.arange(0, V_BLOCK)
        offsets = heads[:, None] * V_DIM + columns[None, :]
        inside = is_head & (columns < V_DIM)[None, :]
        values = tl.load(v_ptr + token * v_stride + offsets, mask=inside, other=0.0)
        tl.store(v_cache_ptr + slot * num_kv_heads * V_DIM + offsets, values, mask=inside)
        offsets = heads[:, None] * DIM + pairs[None, :]
        inside = is_head & is_pair[None, :]
        source_ptr = k_ptr + token * k_stride
        target_ptr = k_cache_ptr + slot * num_kv_heads * DIM
        _norm_and_rotate(
            source_ptr, target_ptr, k_norm_ptr, offsets, inside, pairs, is_pair, cos, sin, eps, DIM
        )


@triton.jit
def rope_and_write_latent_kernel(
    q_pe_ptr,  # [num_tokens, num_heads, DIM]
    latent_ptr,  # [num_tokens, RANK]
    k_pe_ptr,  # [num_tokens, DIM]
    latent_norm_ptr,  # [RANK] or None
    cos_sin_ptr,  # [num_positions, DIM] fp32
    positions_ptr,  # [num_tokens] int64
    slots_ptr,  # [num_tokens] int64
    q_out_ptr,  # [num_tokens, num_heads, DIM]
    latent_cache_ptr,  # [num_slots, RANK + DIM]
    q_stride,  # of a token
    q_head_stride,
    latent_stride,
    k_pe_stride,
    num_heads,
    eps,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # powers of two that hold half a k_pe and a latent
    RANK_BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    pairs = tl.arange(0, HALF_BLOCK)
    is_pair = pairs < DIM // 2
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * DIM + pairs, mask=is_pair, other=0.0)
    sin = tl.load(cos_sin_ptr + position * DIM + DIM // 2 + pairs, mask=is_pair, other=0.0)
    dtype = q_out_ptr.dtype.element_ty
    heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    if block < tl.cdiv(num_heads, BLOCK_HEADS):
        sources = q_pe_ptr + token * q_stride + heads * q_head_stride + 2 * pairs[None, :]
        targets = q_out_ptr + (token * num_heads + heads) * DIM + 2 * pairs[None, :]
        inside = (heads < num_heads) & is_pair[None, :]
    else:
        slot = tl.load(slots_ptr + token)
        if slot < 0:
            return
        row_ptr = latent_cache_ptr + slot * (RANK + DIM)
        columns = tl.arange(0, RANK_BLOCK)
        is_column = columns < RANK
        latent = tl.load(latent_ptr + token * latent_stride + columns, mask=is_column, other=0.0)
        if latent_norm_ptr is not None:
            latent = latent.to(tl.float32)
            mean_square = tl.sum(latent * latent, axis=0) / RANK
            weight = tl.load(latent_norm_ptr + columns, mask=is_column, other=0.0)
            latent = scale_normed(latent, mean_square, eps, weight, dtype)
        tl.store(row_ptr + columns, latent, mask=is_column)
        # k_pe has one head: the first row of the tile
        row = heads - block * BLOCK_HEADS
        sources = k_pe_ptr + token * k_pe_stride + row * 0 + 2 * pairs[None, :]
        targets = row_ptr + RANK + row * 0 + 2 * pairs[None, :]
        inside = (row == 0) & is_pair[None, :]
    first = tl.load(sources, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_HEADS, HALF_BLOCK]
    second = tl.load(sources + 1, mask=inside, other=0.0).to(tl.float32)
    tl.store(targets, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(targets + 1, (second * cos + first * sin).to(dtype), mask=inside)


def kv_config(dim: int, v_dim: int, capability: int) -> dict[str, int]:
    """Blocks and warps of a launch. ``capability`` is 90 for sm_90."""
    return {
        "DIM": dim,
        "V_DIM": v_dim,
        "HALF_BLOCK": triton.next_power_of_2(dim // 2),
        "V_BLOCK": triton.next_power_of_2(v_dim),
        **launch_config("rope_and_write_kv", arch=capability, head_dim=dim),
    }


def latent_config(rope_dim: int, rank: int, capability: int) -> dict[str, int]:
    """Blocks and warps of a launch. ``capability`` is 90 for sm_90."""
    return {
        "DIM": rope_dim,
        "RANK": rank,
        "HALF_BLOCK": triton.next_power_of_2(rope_dim // 2),
        "RANK_BLOCK": triton.next_power_of_2(rank),
        **launch_config("rope_and_write_latent", arch=capability, rank=rank),
    }


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: PagedBatch,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm the heads of ``q`` and ``k``, rotate them, and write ``k`` and ``v`` into their pages.

    Args:
        q: [num_tokens, num_heads, head_dim], half-split pairs, any float dtype. In q, k and v heads
            and dimensions are contiguous, tokens may be rows of a wider tensor.
        k: [num_tokens, num_kv_heads, head_dim].
        v: [num_tokens, num_kv_heads, v_head_dim], neither normed nor rotated.
        cos_sin: [num_positions, head_dim] fp32, from ``kernels.rope.rotary_table``.
        batch: gives each token's position and slot.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], dtype of ``q``, written in place.
        v_cache: [num_pages, page_size, num_kv_heads, v_head_dim], likewise.
        q_norm: [head_dim], dtype of ``q``: each head of q first goes through ``rms_norm`` with this
            weight (Qwen3, arXiv:2505.09388). None: it does not.
        k_norm: likewise for k.
        eps: of both norms.

    Returns:
        The rotated q, [num_tokens, num_heads, head_dim]; heads and dimensions contiguous.
    """
    num_tokens, num_heads, dim = q.shape
    if num_tokens > 0 and use_native(q):
        rotated: Tensor = native("rows").rope_and_write_kv(
            q, k, v, cos_sin, batch, k_cache, v_cache, q_norm, k_norm, eps
        )
        return rotated
    if num_tokens == 0 or not use_triton(q):
        if q_norm is not None:
            q = rms_norm(q.reshape(-1, dim), q_norm, eps).view(q.shape)
        if k_norm is not None:
            k = rms_norm(k.reshape(-1, dim), k_norm, eps).view(k.shape)
        cos, sin = batch.once(cos_and_signed_sin, cos_sin)
        roped = rotate_halves(torch.cat((q, k), dim=1), cos, sin)
        write_rows(roped[:, num_heads:], batch, k_cache)
        write_rows(v, batch, v_cache)
        return roped[:, :num_heads]
    num_kv_heads = k.shape[1]
    config = kv_config(dim, v.shape[2], capability_of(q.device))
    q_out = torch.empty((num_tokens, num_heads, dim), dtype=q.dtype, device=q.device)
    block_heads = config["BLOCK_HEADS"]
    num_blocks = triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads)
    rope_and_write_kv_kernel[(num_tokens, num_blocks)](
        q,
        k,
        v,
        q_norm,
        k_norm,
        cos_sin,
        batch.positions,
        batch.slot_mapping,
        q_out,
        k_cache,
        v_cache,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        num_heads,
        num_kv_heads,
        eps,
        **config,
    )
    return q_out


def rope_and_write_latent(
    q_pe: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    cos_sin: Tensor,
    batch: PagedBatch,
    latent_cache: Tensor,
    *,
    latent_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm the latent, rotate ``q_pe`` and ``k_pe``, write latent and ``k_pe`` into their page.

    Args:
        q_pe: [num_tokens, num_heads, rope_dim], interleaved pairs, any float dtype. Here and in
            latent and k_pe the last dimension is contiguous, others may be strided.
        latent: [num_tokens, rank].
        k_pe: [num_tokens, rope_dim], interleaved pairs, one head for all.
        cos_sin: [num_positions, rope_dim] fp32, from ``kernels.rope.rotary_table``.
        batch: gives each token's position and slot.
        latent_cache: [num_pages, page_size, rank + rope_dim], dtype of ``q_pe``, written in place.
        latent_norm: [rank], dtype of ``q_pe``: the latent first goes through ``rms_norm`` with this
            weight (DeepSeek-V2, arXiv:2405.04434). None: it is already normed.
        eps: of the norm.

    Returns:
        The rotated q_pe, [num_tokens, num_heads, rope_dim], contiguous; still interleaved, like
        the k_pe in the cache.
    """
    num_tokens, num_heads, dim = q_pe.shape
    rank = latent.shape[1]
    if num_tokens == 0 or not use_triton(q_pe):
        rows = batch.once(_rows_of_positions, cos_sin)
        if latent_norm is not None:
            latent = rms_norm(latent, latent_norm, eps)
        roped = rotate(k_pe.unsqueeze(1), rows, interleaved=True).squeeze(1)
        write_rows(torch.cat((latent, roped), dim=-1), batch, latent_cache)
        return rotate(q_pe, rows, interleaved=True)
    config = latent_config(dim, rank, capability_of(q_pe.device))
    q_out = torch.empty((num_tokens, num_heads, dim), dtype=q_pe.dtype, device=q_pe.device)
    num_blocks = triton.cdiv(num_heads, config["BLOCK_HEADS"]) + 1
    rope_and_write_latent_kernel[(num_tokens, num_blocks)](
        q_pe,
        latent,
        k_pe,
        latent_norm,
        cos_sin,
        batch.positions,
        batch.slot_mapping,
        q_out,
        latent_cache,
        q_pe.stride(0),
        q_pe.stride(1),
        latent.stride(0),
        k_pe.stride(0),
        num_heads,
        eps,
        **config,
    )
    return q_out


def _rows_of_positions(batch: PagedBatch, cos_sin: Tensor) -> Tensor:
    """[num_tokens, 1, dim] of a table."""
    return cos_sin[batch.positions].unsqueeze(1)


def cos_and_signed_sin(batch: PagedBatch, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate_halves` takes, for the positions of a step."""
    return for_halves(_rows_of_positions(batch, cos_sin))


def _slots_of_written(batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
    """Slots, and which tokens they are of, None for all."""
    written = batch.slot_mapping >= 0
    if bool(written.all()):
        return batch.slot_mapping, None
    return batch.slot_mapping[written], written


def write_rows(values: Tensor, batch: PagedBatch, pages: Tensor) -> None:
    """Write rows into their slots; ``pages`` is contiguous, so a view reaches every slot."""
    slots, written = batch.once(_slots_of_written)
    rows = values if written is None else values[written]
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, rows)
