# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The sampler on the GPU; ``kernels.sampling`` holds the contract and the equations.

A pass over the vocabulary is spread over (row, block of ids) programs, so that one row uses the
whole chip; between passes a launch ends. What the next launch needs is one number per block, or the
bins of ``kernels.sampling_search_triton``, which also says how a threshold is found.

    launches                            reads of a row's logits (+ one write if they are adjusted)
    greedy                 2            1
    plain, or min-p only   3            2 and one block
    top-p or top-k         8            7 and one block
    both                  13           12 and one block
    log-probabilities     +1, +2 with top ids: none, or 1

A flag that is set without need costs its 5 launches, which return at once, and changes no bit.
After the first, a pass skips the blocks whose largest logit lies below what it looks for. A logit
is 4 bytes in fp32: 0.6 MB a pass for 152k ids, which the L2 cache keeps.
A block whose raw logits are not all finite says so in place of its largest, and that is above every
logit: the row's later passes find it where they look for the largest, and do nothing.
Mass is added up in integers, so a row's token depends on the row alone: not on the batch, not on
BLOCK, and not on filters that other rows use.
Graph-safe: grids follow from shapes, what is per row is loaded, nothing returns to the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import launch_config
from kernels.dispatch import capability_of
from kernels.sampling_logprobs_triton import logprobs
from kernels.sampling_search_triton import (
    LEVEL_SIZE,
    NOT_FINITE,
    NUM_LEVELS,
    best_of_row,
    clear_bins,
    floor_of_row,
    kept_units,
    load_logits,
    ranked,
    ranked_id,
    ranked_key,
    ranked_logit,
    search_kernel,
)

if TYPE_CHECKING:
    from kernels.sampling import SamplingBatch

_BIASES = tl.constexpr(16)  # looked at together
_NOT_FINITE = tl.constexpr(NOT_FINITE)


@triton.jit
def _add_bias(logits, ids, block, row, bias_ids_ptr, bias_values_ptr, max_bias, BLOCK):
    """Add the biases of ids in this block; most groups of biases have none."""
    bias_ids_ptr += row * max_bias
    bias_values_ptr += row * max_bias
    for first in range(0, max_bias, _BIASES):
        index = first + tl.arange(0, _BIASES)
        bias_ids = tl.load(bias_ids_ptr + index, mask=index < max_bias, other=-1)
        here = (bias_ids >= block * BLOCK) & (bias_ids < (block + 1) * BLOCK)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            for one in range(first, tl.minimum(first + _BIASES, max_bias)):
                bias = tl.load(bias_values_ptr + one)
                logits = tl.where(ids == tl.load(bias_ids_ptr + one), logits + bias, logits)
    return logits


@triton.jit(do_not_specialize=["max_bias"])
def block_best_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    adjusted_ptr,  # [num_rows, vocab_size] fp32, out; None without masks, bias and counts
    best_ptr,  # [num_rows, num_blocks] int64, out: the first of the adjusted logits or NOT_FINITE
    raw_sums_ptr,  # [num_rows, 2, num_blocks] fp32, out: largest m, sum of exp(l - m); or None
    search_ptr,  # [num_rows, 2, NUM_LEVELS, LEVEL_SIZE] int64, cleared; None without top-k, top-p
    counts_ptr,  # [num_count_rows, count_stride] int32
    rows_ptr,  # [num_rows] int64
    presence_ptr,  # [num_rows] fp32
    frequency_ptr,  # [num_rows] fp32
    repetition_ptr,  # [num_rows] fp32
    bias_ids_ptr,  # [num_rows, max_bias] int64, -1 unused
    bias_values_ptr,  # [num_rows, max_bias] fp32
    masks_ptr,  # [num_masks, masks_stride] int32, a bit per id; or None
    mask_rows_ptr,  # [num_rows] int32, below 0: no mask
    logits_stride,
    count_stride,
    vocab_size,
    num_blocks,
    max_bias,
    masks_stride,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = load_logits(logits_ptr + row * logits_stride, ids, vocab_size)
    is_finite = (tl.abs(logits) < float("inf")) | (ids >= vocab_size)  # NaN was loaded as -inf
    if search_ptr is not None:
        clear_bins(search_ptr, row, block, num_blocks)
    if raw_sums_ptr is not None:
        largest = tl.max(logits, axis=0)
        reference = tl.where(largest > float("-inf"), largest, 0.0)
        raw_sums_ptr += row * 2 * num_blocks + block
        tl.store(raw_sums_ptr, largest)
        tl.store(raw_sums_ptr + num_blocks, tl.sum(tl.exp(logits - reference), axis=0))
    if bias_ids_ptr is not None:
        logits = _add_bias(logits, ids, block, row, bias_ids_ptr, bias_values_ptr, max_bias, BLOCK)
    if masks_ptr is not None:  # whatever the bias: what is -inf stays so
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
        is_masked = (ids < vocab_size) & (mask_row >= 0)
        words = tl.load(masks_ptr + mask_row * masks_stride + ids // 32, mask=is_masked, other=-1)
        logits = tl.where((words >> (ids % 32)) & 1 == 1, logits, float("-inf"))
    if counts_ptr is not None:
        count_row = tl.load(rows_ptr + row)
        counted = (ids < vocab_size) & (count_row >= 0)
        counts = tl.load(counts_ptr + count_row * count_stride + ids, mask=counted, other=0)
        seen = counts > 0
        repetition = tl.load(repetition_ptr + row)
        repeated = tl.where(logits > 0, logits / repetition, logits * repetition)
        logits = tl.where(seen, repeated, logits)
        logits -= tl.load(frequency_ptr + row) * counts.to(tl.float32)
        logits -= tl.load(presence_ptr + row) * seen.to(tl.float32)
    if adjusted_ptr is not None:
        logits = tl.where(logits == logits, logits, float("-inf"))
        tl.store(adjusted_ptr + row * vocab_size + ids, logits, mask=ids < vocab_size)
    packed = tl.where(is_finite, ranked(logits, ids, vocab_size), _NOT_FINITE)
    tl.store(best_ptr + row * num_blocks + block, tl.max(packed, axis=0))


@triton.jit
def block_mass_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    best_ptr,  # [num_rows, num_blocks] int64
    search_ptr,  # [num_rows, 2, NUM_LEVELS, LEVEL_SIZE] int64, or None
    masses_ptr,  # [num_rows, num_blocks] int64, out
    temperature_ptr,  # [num_rows] fp32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] fp32
    min_p_ptr,  # [num_rows] fp32
    logits_stride,
    vocab_size,
    num_blocks,
    ANY_FILTER: tl.constexpr,
    ANY_TOP_K: tl.constexpr,
    ANY_TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    largest = ranked_logit(best_of_row(best_ptr, row, num_blocks, BLOCKS))
    if (temperature > 0) & (largest > float("-inf")):  # others take the largest, or -1
        floor, min_p = _filters(
            search_ptr,
            row,
            top_k_ptr,
            top_p_ptr,
            min_p_ptr,
            vocab_size,
            ANY_FILTER,
            ANY_TOP_K,
            ANY_TOP_P,
        )
        mass = tl.zeros((), dtype=tl.int64)
        if ranked_key(tl.load(best_ptr + row * num_blocks + block)) >= floor:
            ids = block * BLOCK + tl.arange(0, BLOCK)
            logits = load_logits(logits_ptr + row * logits_stride, ids, vocab_size)
            mass = tl.sum(kept_units(logits, largest, temperature, floor, min_p), axis=0)
        tl.store(masses_ptr + row * num_blocks + block, mass)


@triton.jit
def _filters(
    search_ptr,
    row,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab_size,
    ANY_FILTER: tl.constexpr,
    ANY_TOP_K: tl.constexpr,
    ANY_TOP_P: tl.constexpr,
):
    """The lowest key and the lowest weight that are kept."""
    floor = tl.zeros((), dtype=tl.uint32)
    min_p = tl.zeros((), dtype=tl.float32)
    if ANY_FILTER:
        min_p = tl.load(min_p_ptr + row)
        if ANY_TOP_K or ANY_TOP_P:
            top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            floor = floor_of_row(search_ptr, row, top_k, top_p, vocab_size, ANY_TOP_K, ANY_TOP_P)
    return floor, min_p


@triton.jit
def uniform(seed, position):
    """The number in [0, 1) that ``kernels.philox.uniforms`` gives for (seed, position), in fp64."""
    position = position.to(tl.uint64, bitcast=True)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = tl.zeros((), dtype=tl.uint32)
    word0, word1, _, _ = tl.philox(seed.to(tl.uint64, bitcast=True), low, high, zero, zero)
    scaled = (word0 >> 5).to(tl.float64) * 67108864.0 + (word1 >> 6).to(tl.float64)
    return scaled * 1.1102230246251565e-16  # 2**-53


@triton.jit
def draw_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    best_ptr,  # [num_rows, num_blocks] int64
    search_ptr,  # [num_rows, 2, NUM_LEVELS, LEVEL_SIZE] int64, or None
    masses_ptr,  # [num_rows, num_blocks] int64, or None
    token_ids_ptr,  # [num_rows] int64, out; -1 for a row that is not finite
    temperature_ptr,  # [num_rows] fp32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] fp32
    min_p_ptr,  # [num_rows] fp32
    seeds_ptr,  # [num_rows] int64
    positions_ptr,  # [num_rows] int64
    logits_stride,
    vocab_size,
    num_blocks,
    ALL_GREEDY: tl.constexpr,
    ANY_FILTER: tl.constexpr,
    ANY_TOP_K: tl.constexpr,
    ANY_TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best = best_of_row(best_ptr, row, num_blocks, BLOCKS)
    token_id = tl.where(best == _NOT_FINITE, -1, ranked_id(best))
    if not ALL_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        largest = ranked_logit(best)
        if (temperature > 0) & (largest > float("-inf")):
            floor, min_p = _filters(
                search_ptr,
                row,
                top_k_ptr,
                top_p_ptr,
                min_p_ptr,
                vocab_size,
                ANY_FILTER,
                ANY_TOP_K,
                ANY_TOP_P,
            )
            blocks = tl.arange(0, BLOCKS)
            masses = tl.load(
                masses_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=0
            )
            total = tl.sum(masses, axis=0)
            number = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            # units are whole: more than u * total is more than its whole part, which is below total
            target = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
            block = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
            target -= tl.sum(tl.where(blocks < block, masses, 0), axis=0)
            ids = block * BLOCK + tl.arange(0, BLOCK)
            logits = load_logits(logits_ptr + row * logits_stride, ids, vocab_size)
            units = kept_units(logits, largest, temperature, floor, min_p)
            offset = tl.sum((tl.cumsum(units, axis=0) <= target).to(tl.int32), axis=0)
            token_id = (block * BLOCK + offset).to(tl.int64)
    tl.store(token_ids_ptr + row, token_id)


def sample(
    logits: Tensor, batch: SamplingBatch
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the kernels; the fields of ``Sampled``, for at least one row."""
    num_rows, vocab_size = logits.shape[0], batch.vocab_size
    config = launch_config("sample", arch=capability_of(logits.device))
    num_blocks = triton.cdiv(vocab_size, config["BLOCK"])
    row_config = {**config, "BLOCKS": triton.next_power_of_2(num_blocks)}
    grid = num_rows, num_blocks
    any_top_k = not batch.all_greedy and batch.any_filter and batch.any_top_k
    any_top_p = not batch.all_greedy and batch.any_filter and batch.any_top_p

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=logits.device)

    best, token_ids = empty(num_blocks), empty()
    masses = None if batch.all_greedy else empty(num_blocks)
    search = empty(2, NUM_LEVELS, LEVEL_SIZE) if any_top_k or any_top_p else None
    raw_sums = empty(2, num_blocks, dtype=torch.float32) if batch.num_logprobs >= 0 else None
    counts, bias_ids, masks = batch.output_counts, batch.bias_ids, batch.masks
    adjusted = None
    if counts is not None or bias_ids is not None or masks is not None:
        adjusted = empty(vocab_size, dtype=torch.float32)
    block_best_kernel[grid](
        logits,
        adjusted,
        best,
        raw_sums,
        search,
        counts,
        batch.rows,
        batch.presence,
        batch.frequency,
        batch.repetition,
        bias_ids,
        batch.bias_values,
        masks,
        batch.mask_rows,
        logits.stride(0),
        0 if counts is None else counts.stride(0),
        vocab_size,
        num_blocks,
        0 if bias_ids is None else bias_ids.shape[1],
        0 if masks is None else masks.stride(0),
        **config,
    )
    drawn_from = logits if adjusted is None else adjusted
    rows = (batch.temperature, batch.top_k, batch.top_p)
    sizes = (drawn_from.stride(0), vocab_size, num_blocks)
    search_config = launch_config("sample_search", arch=capability_of(logits.device), rows=num_rows)
    search_grid = num_rows, triton.cdiv(num_blocks, search_config["SPAN"])
    for by_mass in [False] * any_top_k + [True] * any_top_p:
        for level in range(NUM_LEVELS):
            search_kernel[search_grid](
                drawn_from,
                best,
                search,
                *rows,
                *sizes,
                level,
                BY_MASS=by_mass,
                ANY_TOP_K=any_top_k,
                BLOCK=config["BLOCK"],
                BLOCKS=row_config["BLOCKS"],
                **search_config,
            )
    filters = {
        "ANY_FILTER": batch.any_filter,
        "ANY_TOP_K": any_top_k,
        "ANY_TOP_P": any_top_p,
        **row_config,
    }
    if not batch.all_greedy:
        block_mass_kernel[grid](
            drawn_from, best, search, masses, *rows, batch.min_p, *sizes, **filters
        )
    draw_kernel[(num_rows,)](
        drawn_from,
        best,
        search,
        masses,
        token_ids,
        *rows,
        batch.min_p,
        batch.seeds,
        batch.positions,
        *sizes,
        ALL_GREEDY=batch.all_greedy,
        **filters,
    )
    if raw_sums is None:
        return token_ids, None, None, None
    return token_ids, *logprobs(
        logits, raw_sums, token_ids, vocab_size, batch.num_logprobs, row_config
    )
