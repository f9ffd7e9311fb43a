# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Log-probabilities and token counts on the GPU; ``kernels.sampling`` holds the contract.

    log p(id) = l[id] - m - log(sum over blocks of s_b exp(m_b - m)),   m = max m_b

where m_b and s_b, a block's largest raw logit and its sum of exp(l - m_b), come from the sampler's
first launch. The largest ids are ranked per block, one maximum a rank, and the rankings merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling_search_triton import (
    EMPTY,
    load_logits,
    ranked,
    ranked_id,
    ranked_logit,
)

COUNT_BLOCK = 128  # tokens a program counts
_EMPTY = tl.constexpr(EMPTY)


@triton.jit(do_not_specialize=["num_top"])
def block_top_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    tops_ptr,  # [num_rows, num_blocks, num_top] int64, out: the ranking of each block
    logits_stride,
    vocab_size,
    num_blocks,
    num_top,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = load_logits(logits_ptr + row * logits_stride, ids, vocab_size)
    packed = ranked(logits, ids, vocab_size)
    tops_ptr += (row * num_blocks + block) * num_top
    for rank in range(num_top):
        best = tl.max(packed, axis=0)
        tl.store(tops_ptr + rank, best)
        packed = tl.where(packed == best, _EMPTY, packed)


@triton.jit(do_not_specialize=["num_top"])
def logprobs_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    raw_sums_ptr,  # [num_rows, 2, num_blocks] fp32
    tops_ptr,  # [num_rows, num_blocks, num_top] int64
    token_ids_ptr,  # [num_rows] int64; -1 for a row that is not finite
    logprobs_ptr,  # [num_rows] fp32, out
    top_ids_ptr,  # [num_rows, num_top] int64, out
    top_logprobs_ptr,  # [num_rows, num_top] fp32, out
    logits_stride,
    num_blocks,
    num_top,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    raw_sums_ptr += row * 2 * num_blocks + blocks
    block_largest = tl.load(raw_sums_ptr, mask=inside, other=float("-inf"))
    sums = tl.load(raw_sums_ptr + num_blocks, mask=inside, other=0.0)
    largest = tl.max(block_largest, axis=0)
    largest = tl.where(largest > float("-inf"), largest, 0.0)  # a row of NaN has no largest
    total = tl.sum(sums * tl.exp(block_largest - largest), axis=0)
    log_total = tl.log(tl.maximum(total, 1.0))  # it is at least 1, unless the row is NaN
    token_id = tl.maximum(tl.load(token_ids_ptr + row), 0)  # -1 lies before the row
    drawn = tl.load(logits_ptr + row * logits_stride + token_id)
    tl.store(logprobs_ptr + row, drawn.to(tl.float32) - largest - log_total)
    # a merge of the blocks' rankings: the first of their heads, and that block moves on
    ranks = tl.zeros((BLOCKS,), dtype=tl.int32)
    tops_ptr += (row * num_blocks + blocks) * num_top
    for rank in range(num_top):
        heads = tl.load(tops_ptr + ranks, mask=inside & (ranks < num_top), other=_EMPTY)
        best = tl.max(heads, axis=0)
        tl.store(top_ids_ptr + row * num_top + rank, ranked_id(best).to(tl.int64))
        logprob = ranked_logit(best) - largest - log_total
        tl.store(top_logprobs_ptr + row * num_top + rank, logprob)
        ranks += (heads == best).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    counts_ptr,  # [num_count_rows, count_stride] int32
    rows_ptr,  # [num_tokens] int64
    token_ids_ptr,  # [num_tokens] int64
    count_stride,
    num_tokens,
    BLOCK: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    rows = tl.load(rows_ptr + tokens, mask=inside, other=-1)
    token_ids = tl.load(token_ids_ptr + tokens, mask=inside, other=0)
    counted = (rows >= 0) & (token_ids >= 0)
    tl.atomic_add(counts_ptr + rows * count_stride + token_ids, 1, mask=counted, sem="relaxed")


def logprobs(
    logits: Tensor,
    raw_sums: Tensor,
    token_ids: Tensor,
    vocab_size: int,
    num_top: int,
    config: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels: log-probabilities of the drawn ids, the largest ids, and theirs.

    Args:
        logits: [num_rows, vocab], raw.
        raw_sums: [num_rows, 2, num_blocks] fp32, of blocks of ``config["BLOCK"]`` ids.
        token_ids: [num_rows] int64, -1 for a row that is not finite.
        vocab_size: ids at and above it are padding.
        num_top: how many of the largest ids to report.
        config: as the sampler's first launch, and BLOCKS.
    """
    num_rows, _, num_blocks = raw_sums.shape
    device = logits.device
    tops = torch.empty((num_rows, num_blocks, num_top), dtype=torch.int64, device=device)
    drawn = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_top > 0:
        block_top_kernel[(num_rows, num_blocks)](
            logits,
            tops,
            logits.stride(0),
            vocab_size,
            num_blocks,
            num_top,
            BLOCK=config["BLOCK"],
            num_warps=config["num_warps"],
        )
    logprobs_kernel[(num_rows,)](
        logits,
        raw_sums,
        tops,
        token_ids,
        drawn,
        top_ids,
        top_logprobs,
        logits.stride(0),
        num_blocks,
        num_top,
        BLOCKS=config["BLOCKS"],
        num_warps=config["num_warps"],
    )
    return drawn, top_ids, top_logprobs


def count_tokens(output_counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Launch the kernel, for at least one token."""
    num_tokens = token_ids.shape[0]
    count_kernel[(triton.cdiv(num_tokens, COUNT_BLOCK),)](
        output_counts,
        rows,
        token_ids,
        output_counts.stride(0),
        num_tokens,
        BLOCK=COUNT_BLOCK,
        num_warps=4,
    )
