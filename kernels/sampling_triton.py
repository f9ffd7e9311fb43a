# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The sampler on the GPU; ``kernels.sampling`` holds the contract and the equations.

One program owns one row and loops over it in blocks, so a row's bits depend on nothing else. A
threshold is found without a sort: an fp32 logit maps to an unsigned 32-bit key in the same order,
and the largest key whose tail still holds enough (tokens for top-k, mass for top-p) is built two
bits at a time, from the top, in 16 passes over the row. The draw is one more pass, which stops
being interesting at the block where the cumulative mass passes u * total.
Graph-safe: the grid is the number of rows, every per-row value is loaded, nothing returns to the
host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.sampling import SamplingBatch

CONFIG = {"BLOCK": 4096, "num_warps": 8}
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["max_bias"])
def adjust_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    out_ptr,  # [num_rows, vocab_size] fp32
    counts_ptr,  # [num_count_rows, count_stride] int32
    rows_ptr,  # [num_rows] int64
    presence_ptr,  # [num_rows] fp32
    frequency_ptr,  # [num_rows] fp32
    repetition_ptr,  # [num_rows] fp32
    bias_ids_ptr,  # [num_rows, max_bias] int64, -1 unused
    bias_values_ptr,  # [num_rows, max_bias] fp32
    logits_stride,
    count_stride,
    vocab_size,
    max_bias,
    HAS_BIAS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + ids, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        for index in range(max_bias):
            bias_id = tl.load(bias_ids_ptr + row * max_bias + index)
            bias = tl.load(bias_values_ptr + row * max_bias + index)
            logits = tl.where(ids == bias_id, logits + bias, logits)
    if HAS_COUNTS:
        count_row = tl.load(rows_ptr + row)
        counts = tl.load(counts_ptr + count_row * count_stride + ids, mask=inside, other=0)
        seen = counts > 0
        repetition = tl.load(repetition_ptr + row)
        repeated = tl.where(logits > 0, logits / repetition, logits * repetition)
        logits = tl.where(seen, repeated, logits)
        logits -= tl.load(frequency_ptr + row) * counts.to(tl.float32)
        logits -= tl.load(presence_ptr + row) * seen.to(tl.float32)
    tl.store(out_ptr + row * vocab_size + ids, logits, mask=inside)


@triton.jit
def _load_logits(row_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """Ids of a block and their logits in fp32, -inf past the end of the row."""
    ids = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    return ids, logits


@triton.jit
def _load_weights(row_ptr, start, vocab_size, largest, temperature, BLOCK: tl.constexpr):
    """Ids of a block, their sort keys and their weights; past the end of the row both are 0.

    A key is a uint32 in the order of the fp32 logits: a < b if and only if key(a) < key(b).
    """
    ids = start + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    logits = tl.load(row_ptr + ids, mask=inside, other=float("-inf")).to(tl.float32)
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0 is 0
    keys = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    weights = tl.where(inside, tl.exp((logits - largest) / temperature), 0.0)
    return ids, tl.where(inside, keys, 0), weights


@triton.jit
def _kept_mass(row_ptr, vocab_size, floor, min_p, largest, temperature, BLOCK: tl.constexpr):
    mass = tl.zeros((), dtype=tl.float64)
    for start in range(0, vocab_size, BLOCK):
        _, keys, weights = _load_weights(row_ptr, start, vocab_size, largest, temperature, BLOCK)
        weights = tl.where((keys >= floor) & (weights >= min_p), weights, 0.0)
        mass += tl.sum(weights, axis=0).to(tl.float64)
    return mass


@triton.jit
def _raise_floor(
    row_ptr,
    vocab_size,
    floor,  # uint32, the key below which nothing counts
    target,  # fp64, above 0
    largest,
    temperature,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest key whose tail still holds ``target`` tokens, or that much mass."""
    key = tl.zeros((), dtype=tl.uint32)
    digit = tl.full((), 1 << 30, dtype=tl.uint32)
    for _digit in range(16):  # `_` belongs to the inner loop: names keep one type
        tail1 = tl.zeros((), dtype=tl.float64)
        tail2 = tl.zeros((), dtype=tl.float64)
        tail3 = tl.zeros((), dtype=tl.float64)
        for start in range(0, vocab_size, BLOCK):
            _, keys, amounts = _load_weights(
                row_ptr, start, vocab_size, largest, temperature, BLOCK
            )
            if not BY_MASS:
                amounts = tl.full((BLOCK,), 1.0, dtype=tl.float32)
            amounts = tl.where(keys >= floor, amounts, 0.0)
            tail1 += tl.sum(tl.where(keys >= key + digit, amounts, 0.0), axis=0).to(tl.float64)
            tail2 += tl.sum(tl.where(keys >= key + 2 * digit, amounts, 0.0), axis=0).to(tl.float64)
            tail3 += tl.sum(tl.where(keys >= key + 3 * digit, amounts, 0.0), axis=0).to(tl.float64)
        if tail3 >= target:
            key += 3 * digit
        elif tail2 >= target:
            key += 2 * digit
        elif tail1 >= target:
            key += digit
        digit = digit >> 2
    return tl.maximum(key, floor)


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
def sample_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    token_ids_ptr,  # [num_rows] int64, out
    temperature_ptr,  # [num_rows] fp32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] fp32
    min_p_ptr,  # [num_rows] fp32
    seeds_ptr,  # [num_rows] int64
    positions_ptr,  # [num_rows] int64
    logits_stride,
    vocab_size,
    ALL_GREEDY: tl.constexpr,
    ANY_FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    token_id = tl.zeros((), dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids, logits = _load_logits(row_ptr, start, vocab_size, BLOCK)
        block_largest = tl.max(logits, axis=0)
        block_id = tl.min(tl.where(logits == block_largest, ids, _NO_ID), axis=0)
        if block_largest > largest:  # strictly: the lowest id wins among equals
            largest = block_largest
            token_id = block_id
    if not ALL_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if (temperature > 0) & (largest > float("-inf")):  # a row of NaN has no largest
            floor = tl.zeros((), dtype=tl.uint32)
            min_p = tl.zeros((), dtype=tl.float32)
            if ANY_FILTER:
                min_p = tl.load(min_p_ptr + row)
                top_k = tl.load(top_k_ptr + row)
                top_p = tl.load(top_p_ptr + row)
                if top_k > 0:
                    num_kept = tl.minimum(top_k, vocab_size).to(tl.float64)
                    floor = _raise_floor(
                        row_ptr, vocab_size, floor, num_kept, largest, temperature, False, BLOCK
                    )
                if top_p < 1:
                    target = top_p.to(tl.float64) * _kept_mass(
                        row_ptr, vocab_size, floor, 0.0, largest, temperature, BLOCK
                    )
                    target = tl.maximum(target, 1e-300)  # the largest stays, whatever top_p
                    floor = _raise_floor(
                        row_ptr, vocab_size, floor, target, largest, temperature, True, BLOCK
                    )
            total = _kept_mass(row_ptr, vocab_size, floor, min_p, largest, temperature, BLOCK)
            target = total * uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            mass = tl.zeros((), dtype=tl.float64)
            drawn = False
            for start in range(0, vocab_size, BLOCK):
                ids, keys, weights = _load_weights(
                    row_ptr, start, vocab_size, largest, temperature, BLOCK
                )
                weights = tl.where((keys >= floor) & (weights >= min_p), weights, 0.0)
                block_mass = tl.sum(weights, axis=0).to(tl.float64)
                if (mass + block_mass > target) & (not drawn):
                    drawn = True
                    passed = (mass + tl.cumsum(weights.to(tl.float64), axis=0) > target) & (
                        weights > 0
                    )
                    last_id = tl.max(tl.where(weights > 0, ids, 0), axis=0)
                    token_id = tl.minimum(tl.min(tl.where(passed, ids, _NO_ID), axis=0), last_id)
                mass += block_mass
    tl.store(token_ids_ptr + row, token_id.to(tl.int64))


@triton.jit(do_not_specialize=["num_top"])
def logprobs_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    token_ids_ptr,  # [num_rows] int64
    logprobs_ptr,  # [num_rows] fp32, out
    top_ids_ptr,  # [num_rows, num_top] int64, out
    top_logprobs_ptr,  # [num_rows, num_top] fp32, out
    logits_stride,
    vocab_size,
    num_top,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        _, logits = _load_logits(row_ptr, start, vocab_size, BLOCK)
        largest = tl.maximum(largest, tl.max(logits, axis=0))
    largest = tl.where(largest > float("-inf"), largest, 0.0)  # a row of NaN has no largest
    total = tl.zeros((), dtype=tl.float64)
    for start in range(0, vocab_size, BLOCK):
        _, logits = _load_logits(row_ptr, start, vocab_size, BLOCK)
        total += tl.sum(tl.exp(logits - largest), axis=0).to(tl.float64)
    log_total = tl.log(total.to(tl.float32))
    drawn = tl.load(row_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, drawn - largest - log_total)
    # the next of the ranking is the largest logit after the previous (logit, id)
    previous = tl.full((), float("inf"), dtype=tl.float32)
    previous_id = tl.full((), -1, dtype=tl.int32)
    for rank in range(num_top):
        best = tl.full((), float("-inf"), dtype=tl.float32)
        best_id = tl.zeros((), dtype=tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids, logits = _load_logits(row_ptr, start, vocab_size, BLOCK)
            later = (logits < previous) | ((logits == previous) & (ids > previous_id))
            logits = tl.where(later, logits, float("-inf"))
            block_best = tl.max(logits, axis=0)
            if block_best > best:
                best_id = tl.min(tl.where(logits == block_best, ids, _NO_ID), axis=0)
                best = block_best
        tl.store(top_ids_ptr + row * num_top + rank, best_id.to(tl.int64))
        tl.store(top_logprobs_ptr + row * num_top + rank, best - largest - log_total)
        previous = best
        previous_id = best_id


def sample(
    logits: Tensor, batch: SamplingBatch
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the kernels; the fields of ``Sampled``, for at least one row."""
    num_rows = logits.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    adjusted = _adjust(logits, batch)
    sample_kernel[(num_rows,)](
        adjusted,
        token_ids,
        batch.temperature,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        batch.seeds,
        batch.positions,
        adjusted.stride(0),
        batch.vocab_size,
        ALL_GREEDY=batch.all_greedy,
        ANY_FILTER=batch.any_filter,
        **CONFIG,
    )
    num_top = batch.num_logprobs
    if num_top < 0:
        return token_ids, None, None, None
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=logits.device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=logits.device)
    logprobs_kernel[(num_rows,)](
        logits,
        token_ids,
        logprobs,
        top_ids,
        top_logprobs,
        logits.stride(0),
        batch.vocab_size,
        num_top,
        **CONFIG,
    )
    return token_ids, logprobs, top_ids, top_logprobs


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the logits with bias and penalties in a new fp32 tensor, or as they are."""
    if batch.bias_ids is None and batch.output_counts is None:
        return logits
    num_rows = logits.shape[0]
    adjusted = torch.empty((num_rows, batch.vocab_size), dtype=torch.float32, device=logits.device)
    counts, bias_ids = batch.output_counts, batch.bias_ids
    adjust_kernel[(num_rows, triton.cdiv(batch.vocab_size, CONFIG["BLOCK"]))](
        logits,
        adjusted,
        counts,
        batch.rows,
        batch.presence,
        batch.frequency,
        batch.repetition,
        bias_ids,
        batch.bias_values,
        logits.stride(0),
        0 if counts is None else counts.stride(0),
        batch.vocab_size,
        0 if bias_ids is None else bias_ids.shape[1],
        HAS_BIAS=bias_ids is not None,
        HAS_COUNTS=counts is not None,
        **CONFIG,
    )
    return adjusted
