"""The lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556, section 2.1): which keys a token sees.

    index_cache [num_pages, page_size, index_dim]: normed keys, their first rope_dim rotated
    I[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]),  s <= position of t,  in fp32
    selected[t] = positions of the top_k largest I[t]; the lowest position wins among equals

Scores are ranked as int32 keys in the order of the fp32 scores, so that ties, which relu makes
often, and even NaN are decided, and exactly top_k positions come out.
``kernels.indexer_triton`` is the Triton body. In the torch body a row meets key slices that start
at fixed positions and end where the key block of its own position ends, so its bits do not depend
on its neighbours or on how the prompt was cut into chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels import indexer_triton
from kernels.attention import KEY_BLOCK, MAX_SCORES, gather_heads, gathered_slots, pad_rows
from kernels.batch import PagedBatch
from kernels.cache import cos_and_signed_sin, write_rows
from kernels.dispatch import use_triton
from kernels.rope import rotate_halves

# keys of a slice of scores: a multiple of KEY_BLOCK
KEY_SLICE = 1024
# scores ranked at a time: 8 MiB, and some 32 MiB of what ranking them takes
MAX_RANKED = 1 << 21


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
    """Norm ``k``, rotate the first dimensions of ``q`` and ``k``, write ``k`` into its page.

    All of it is in fp32 and rounds once.

    Args:
        q: [num_tokens, num_heads, index_dim], any float dtype, contiguous.
        k: [num_tokens, index_dim], dtype of ``q``, raw; the last dimension contiguous.
        norm_weight: [index_dim] fp32, of the LayerNorm of k.
        norm_bias: [index_dim] fp32.
        eps: added to the variance.
        cos_sin: [num_positions, rope_dim] fp32, from ``kernels.rope.rotary_table``. The first
            rope_dim dimensions are half-split pairs, the others are not rotated.
        batch: gives each token's position and slot; slot -1 is not written.
        index_cache: [num_pages, page_size, index_dim], dtype of ``q``, written in place.

    Returns:
        The rotated q, [num_tokens, num_heads, index_dim], contiguous.
    """
    if q.shape[0] == 0:
        return q
    if use_triton(q):
        return indexer_triton.norm_rope_and_write_index(
            q, k, norm_weight, norm_bias, eps, cos_sin, batch, index_cache
        )
    cos, sin = batch.once(cos_and_signed_sin, cos_sin)
    normed = functional.layer_norm(k.float(), k.shape[-1:], norm_weight, norm_bias, eps)
    keys = _rotate_front(normed.unsqueeze(1), cos, sin).squeeze(1).to(index_cache.dtype)
    write_rows(keys, batch, index_cache)
    return _rotate_front(q, cos, sin)


def select_keys(
    q: Tensor, weights: Tensor, index_cache: Tensor, batch: PagedBatch, top_k: int
) -> Tensor:
    """Choose the keys that each token of the step attends to.

    Args:
        q: [num_tokens, num_heads, index_dim], rotated, contiguous.
        weights: [num_tokens, num_heads] fp32, contiguous; they hold every scale.
        index_cache: [num_pages, page_size, index_dim], dtype of ``q``, contiguous. This step's keys
            are already written; what lies past a context has no influence.
        batch: where the tokens sit.
        top_k: keys per token, at least 1.

    Returns:
        [num_tokens, top_k] int32: positions in ascending order. A token at a position below
        ``top_k`` sees all of its context, 0 .. position, then -1; none of it is scored. A row does
        not depend on the other sequences, nor on how its sequence was cut into chunks.
    """
    num_tokens = q.shape[0]
    if num_tokens == 0:
        return torch.empty((0, top_k), dtype=torch.int32, device=q.device)
    if use_triton(q):
        return indexer_triton.select_keys(q, weights, index_cache, batch, top_k)
    ids = torch.arange(top_k, dtype=torch.int32)
    selected = torch.where(ids <= batch.positions[:, None], ids, -1)  # [num_tokens, top_k]
    pages = index_cache.unsqueeze(2)  # [num_pages, page_size, 1, index_dim]
    starts = batch.cu_seqlens_q.tolist()
    for seq, context_len in enumerate(batch.context_lens.tolist()):
        if context_len <= top_k:
            continue
        slots, _ = gathered_slots(batch, torch.tensor([seq]), index_cache.shape[1])
        keys = gather_heads(pages, slots, range(1))[0, 0]  # [num_keys, index_dim] fp32
        end = starts[seq + 1]
        at = max(starts[seq], end - (context_len - top_k))  # the first row that sees too many keys
        while at < end:
            position = int(batch.positions[at])
            num_keys = (position // KEY_BLOCK + 1) * KEY_BLOCK
            tile = slice(
                at, min(end, at + num_keys - position, at + max(MAX_RANKED // num_keys, 1))
            )
            scores = _scores(q[tile].float(), weights[tile], keys[:num_keys])
            selected[tile] = _top_positions(scores, batch.positions[tile], top_k)
            at = tile.stop
    return selected


def _rotate_front(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate the first dimensions of every head, as many as ``cos`` [num_tokens, 1, n] has."""
    front, rest = x.tensor_split([cos.shape[-1]], dim=-1)
    return torch.cat((rotate_halves(front, cos, signed_sin), rest), dim=-1)


def _scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Scores of at most KEY_BLOCK queries: [num_tokens, num_keys] fp32, slice by slice."""
    num_tokens, num_heads, dim = q.shape
    num_keys = keys.shape[0]
    scores = q.new_empty((num_tokens, num_keys))
    at_once = max(MAX_SCORES // (num_heads * KEY_SLICE), 1)
    for first in range(0, num_tokens, at_once):
        rows = slice(first, min(first + at_once, num_tokens))
        stacked = pad_rows(q[rows].reshape(1, -1, dim), dim * KEY_BLOCK)  # a row per token and head
        by_head = pad_rows(weights[rows].unsqueeze(1), num_heads * KEY_BLOCK)  # row 0 counts
        for start in range(0, num_keys, KEY_SLICE):
            part = keys[None, start : start + KEY_SLICE]
            dots = torch.bmm(stacked, part.mT).relu_()[0, : by_head.shape[0] * num_heads]
            dots = dots.view(-1, num_heads, part.shape[1])
            scores[rows, start : start + KEY_SLICE] = torch.bmm(by_head, dots)[:, 0]
    return scores


def _top_positions(scores: Tensor, positions: Tensor, top_k: int) -> Tensor:
    """Positions of the ``top_k`` best among each row's past: [num_tokens, top_k], ascending."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0 is 0
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the scores are
    future = torch.arange(scores.shape[1]) > positions[:, None]
    ranks.masked_fill_(future, torch.iinfo(torch.int32).min)
    least = ranks.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    better = ranks > least
    equal = ranks == least
    num_equal = top_k - better.sum(dim=-1, keepdim=True)  # how many of the equals are taken
    chosen = better | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= num_equal))
    return chosen.nonzero()[:, 1].view(-1, top_k).to(torch.int32)
