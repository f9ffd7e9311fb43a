# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The second kernel of a decode that was cut into splits (arXiv:2311.01282, "flash decoding").

    out = sum_s w_s out_s / sum_s w_s,    w_s = 2^(lse_s - max lse)

Each split left its own normalised output and the base 2 logarithm of its sum of exponentials, both
in fp32. A program takes some columns of one row of heads and walks its splits in order. How many
there are follows from the row's context alone, read on the device: short contexts have splits of
SPLIT keys, long ones MAX_SPLITS longer splits. One split is handed through bit by bit. Graph-safe.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import launch_config
from kernels.dispatch import capability_of


@triton.jit
def keys_per_split(context_len, min_split, split_limit, block_n):
    """``min_split``, or whole blocks of keys so that ``split_limit`` splits cover the context."""
    return tl.maximum(tl.cdiv(context_len, split_limit * block_n) * block_n, min_split)


def max_splits_of(config: Mapping[str, int], max_context_len: int) -> int:
    """A number of splits that no context up to ``max_context_len`` exceeds, 1 or more.

    A split has at least SPLIT keys, and MAX_SPLITS of them cover the context; so both bound it.
    """
    num_splits = -(-max_context_len // config["SPLIT"])
    return max(min(num_splits, config["MAX_SPLITS"]), 1)


@triton.jit(do_not_specialize=["max_splits", "min_split", "split_limit", "block_n"])
def combine_splits_kernel(
    partial_ptr,  # [num_decodes, num_heads, max_splits, V_DIM] fp32
    lse_ptr,  # [num_decodes, num_heads, max_splits] fp32, base 2
    out_ptr,  # [num_decodes, num_heads, V_DIM]
    context_lens_ptr,  # [num_decodes] int32
    num_heads,
    max_splits,
    min_split,  # these three are those of the launch that left the partial outputs
    split_limit,
    block_n,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,  # columns of a program
    BLOCK_SPLITS: tl.constexpr,
    KEEP_EMPTY: tl.constexpr,  # rows without a split stay as they are, instead of 0
):
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens_ptr + row // num_heads)
    num_splits = tl.cdiv(context_len, keys_per_split(context_len, min_split, split_limit, block_n))
    if (num_splits == 0) & KEEP_EMPTY:
        return
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    highest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    out = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        is_split = splits < num_splits
        lse = tl.load(lse_ptr + row * max_splits + splits, mask=is_split, other=float("-inf"))
        partial = tl.load(
            partial_ptr + (row * max_splits + splits)[:, None] * V_DIM + columns[None, :],
            mask=is_split[:, None] & (columns < V_DIM)[None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_highest)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(partial * weights[:, None], axis=0)
        highest = new_highest
    # a padding row without context has no split; its output is 0
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + row * V_DIM + columns,
        out.to(out_ptr.dtype.element_ty),
        mask=columns < V_DIM,
    )


def combine_config(config: dict[str, int], capability: int, keep_empty: bool) -> dict[str, int]:
    """The launch that combines the partial outputs of a launch with ``config``."""
    table = launch_config("combine_splits", arch=capability, v_dim=config["V_DIM"])
    return {
        **table,
        "V_DIM": config["V_DIM"],
        "BLOCK_V": min(table["BLOCK_V"], config["V_BLOCK"]),
        "KEEP_EMPTY": keep_empty,
    }


def combine_splits(
    partial: Tensor,
    lse: Tensor,
    out: Tensor,
    context_lens: Tensor,
    config: dict[str, int],
    *,
    keep_empty: bool = False,
) -> None:
    """Fill ``out`` [num_decodes, num_heads, v_dim], contiguous, from its splits.

    ``partial`` [num_decodes, num_heads, max_splits, v_dim] and ``lse`` [num_decodes, num_heads,
    max_splits] are fp32, written by a launch with ``config``; of a row those splits are read that
    its context has. Rows of context 0 become 0, or stay as they are with ``keep_empty``.
    """
    num_decodes, num_heads, max_splits = lse.shape
    launch = combine_config(config, capability_of(out.device), keep_empty)
    num_parts = triton.cdiv(launch["V_DIM"], launch["BLOCK_V"])
    combine_splits_kernel[(num_decodes * num_heads, num_parts)](
        partial,
        lse,
        out,
        context_lens,
        num_heads,
        max_splits,
        config["SPLIT"],
        config["MAX_SPLITS"],
        config["BLOCK_N"],
        **launch,
    )
