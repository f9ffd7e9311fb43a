# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Weights of tokens, and the thresholds of top-k and top-p without a sort.

Mass is counted in integers: a weight w in [0, 1] is the nearest multiple of 2^-40, so 18 bits are
left for the vocabulary and a sum is exact, the same in any order and for any cut into blocks.

A threshold is the largest key whose tail (all keys at or above it) still holds ``remaining``: so
many tokens for top-k, so much mass for top-p. Keys are uint32 in the order of the logits, and above
their four bytes stands a fifth in the same order: how near the logit is to the row's largest, 255
down to 0. The search fixes them one byte a launch, from the top: programs add the tokens whose
upper bytes are already right to 256 bins, and the next launch takes the largest byte

    d with  bins[d] + ... + bins[255] >= remaining,    remaining -= bins[d + 1] + ... + bins[255]

so five launches find a key. The bins are integers in memory and tokens are added by atomics, exact
in any order. Logits share the upper byte of their keys, and would all wait for a few bins; the
nearness spreads them over many, and later bytes only count tokens of one nearness.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_BINS = 256
NUM_LEVELS = 5  # nearness, then the bytes of a key
# of one level: the bins, then the bytes known and what remained when the level began
LEVEL_SIZE = NUM_BINS + 2
EMPTY = -(2**63)  # a ranked token below every other
NOT_FINITE = 2**63 - 1  # above every other: marks a block whose raw logits are not all finite

_NUM_BINS = tl.constexpr(NUM_BINS)
_NUM_LEVELS = tl.constexpr(NUM_LEVELS)
_LEVEL_SIZE = tl.constexpr(LEVEL_SIZE)
_EMPTY = tl.constexpr(EMPTY)
_LAST_ID = tl.constexpr(2**31 - 1)
_UNITS = tl.constexpr(float(2**40))  # of a weight of 1
# Steps of nearness that the weight falls by a factor of e in, or the logit by 1 for top-k. Nearness
# 0 is a weight below exp(-31.8): 0 units, which end at exp(-28.4).
_STEPS = tl.constexpr(8.0)


@triton.jit
def load_logits(row_ptr, ids, vocab_size):
    """Logits in fp32; NaN, and what lies past the end of the row, is -inf."""
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def _ordered(logits):
    """An int32 in the order of the logits: a < b if and only if ordered(a) < ordered(b)."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0 is 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def ranked(logits, ids, vocab_size):
    """Logit and id in one int64: the larger has the larger logit or, among equals, the lower id."""
    packed = (_ordered(logits).to(tl.int64) << 32) | (ids ^ _LAST_ID).to(tl.int64)
    return tl.where(ids < vocab_size, packed, _EMPTY)


@triton.jit
def ranked_logit(packed):
    """The logit; NaN, which compares false with all, of NOT_FINITE."""
    ordered = (packed >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    logit = bits.to(tl.float32, bitcast=True)
    return tl.where(packed == _EMPTY, float("-inf"), logit)


@triton.jit
def ranked_id(packed):
    return tl.where(packed == _EMPTY, 0, (packed & _LAST_ID) ^ _LAST_ID)


@triton.jit
def _key_of_ordered(ordered):
    return (ordered ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def ranked_key(packed):
    return _key_of_ordered((packed >> 32).to(tl.int32))


@triton.jit
def best_of_row(best_ptr, row, num_blocks, BLOCKS: tl.constexpr):
    """The first of the row's ranking, from the first of each block."""
    blocks = tl.arange(0, BLOCKS)
    best = tl.load(best_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=_EMPTY)
    return tl.max(best, axis=0)


@triton.jit
def weigh(logits, largest, temperature):
    """Weights exp((l - largest) / temperature) in [0, 1]; ``largest`` is above -inf."""
    weights = tl.exp((logits - largest) / temperature)
    return tl.where(logits == largest, 1.0, weights)  # also where both are infinite


@triton.jit
def kept_units(logits, largest, temperature, floor, min_p):
    """The mass of each token, 0 where a filter removes it."""
    keys = _key_of_ordered(_ordered(logits))
    weights = weigh(logits, largest, temperature)
    kept = (keys >= floor) & (weights >= min_p)
    return tl.where(kept, (weights * _UNITS + 0.5).to(tl.int64), 0)


@triton.jit
def _nearness(logits, largest, scale):
    """255 at the largest, down by 1 for each 1 / ``scale``, and never below 0.

    In the order of the logits: differences, products and int() are rounded in that order.
    """
    distances = (largest - logits) * scale
    distances = tl.where(distances < 255.0, distances, 255.0)  # NaN is not below
    return 255 - tl.where(logits == largest, 0.0, distances).to(tl.int32)  # also of two infinities


@triton.jit
def _level_ptr(search_ptr, row, level, BY_MASS: tl.constexpr):
    return search_ptr + ((row * 2 + BY_MASS) * _NUM_LEVELS + level) * _LEVEL_SIZE


@triton.jit
def clear_bins(search_ptr, row, block, num_blocks):
    """Set the row's bins to 0; its programs share the work."""
    for index in range(block, 2 * _NUM_LEVELS, num_blocks):
        bins_ptr = search_ptr + (row * 2 * _NUM_LEVELS + index) * _LEVEL_SIZE
        tl.store(bins_ptr + tl.arange(0, _NUM_BINS), tl.zeros((_NUM_BINS,), dtype=tl.int64))


@triton.jit
def _next_byte(search_ptr, row, level, wanted, vocab_size, BY_MASS: tl.constexpr):
    """The bytes down to that of ``level``, whose bins are full, and what remains below it.

    ``wanted``: how many tokens (int32), or which share of the mass (fp32).
    """
    level_ptr = _level_ptr(search_ptr, row, level, BY_MASS)
    values = tl.arange(0, _NUM_BINS)
    bins = tl.load(level_ptr + values)
    if level == 0:
        known = tl.zeros((), dtype=tl.int64)
        total = tl.sum(bins, axis=0)
        if BY_MASS:
            share = wanted.to(tl.float64) * total.to(tl.float64)
            remaining = tl.ceil(share).to(tl.int64)
        else:
            bins = tl.where(values == 0, vocab_size - total, bins)  # those that nobody counted
            remaining = tl.minimum(wanted, vocab_size).to(tl.int64)
        remaining = tl.maximum(remaining, 1)  # the largest stays
    else:
        known = tl.load(level_ptr + _NUM_BINS)
        remaining = tl.load(level_ptr + _NUM_BINS + 1)
    tails = tl.cumsum(bins, axis=0, reverse=True)
    byte = tl.sum((tails >= remaining).to(tl.int32), axis=0) - 1
    remaining -= tl.sum(tl.where(values > byte, bins, 0), axis=0)
    return known * _NUM_BINS + byte, remaining


@triton.jit
def floor_of_row(
    search_ptr, row, top_k, top_p, vocab_size, ANY_TOP_K: tl.constexpr, ANY_TOP_P: tl.constexpr
):
    """The lowest key that top-k and top-p keep, once all their launches are done."""
    floor = tl.zeros((), dtype=tl.int64)
    if ANY_TOP_K and top_k > 0:
        floor, _ = _next_byte(search_ptr, row, _NUM_LEVELS - 1, top_k, vocab_size, False)
    if ANY_TOP_P and top_p < 1:  # found among what top-k keeps
        floor, _ = _next_byte(search_ptr, row, _NUM_LEVELS - 1, top_p, vocab_size, True)
    return floor.to(tl.uint32)  # without the nearness


@triton.jit(do_not_specialize=["level"])
def search_kernel(
    logits_ptr,  # [num_rows, vocab] any float
    best_ptr,  # [num_rows, num_blocks] int64
    search_ptr,  # [num_rows, 2, NUM_LEVELS, LEVEL_SIZE] int64: by count, by mass
    temperature_ptr,  # [num_rows] fp32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] fp32
    logits_stride,
    vocab_size,
    num_blocks,
    level,  # the byte that this launch counts; 0 is the nearness
    BY_MASS: tl.constexpr,  # top-p; else top-k
    ANY_TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # num_blocks, rounded up to a power of two
    SPAN: tl.constexpr,  # blocks of a program
):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    largest = ranked_logit(best_of_row(best_ptr, row, num_blocks, BLOCKS))
    is_used = top_p < 1 if BY_MASS else top_k > 0
    if not (is_used & (temperature > 0) & (largest > float("-inf"))):
        return
    wanted = top_p if BY_MASS else top_k
    scale = _STEPS / temperature if BY_MASS else _STEPS
    level_ptr = _level_ptr(search_ptr, row, level, BY_MASS)
    known = tl.zeros((), dtype=tl.int64)  # the upper bytes
    floor = tl.zeros((), dtype=tl.uint32)
    if level > 0:
        known, remaining = _next_byte(search_ptr, row, level - 1, wanted, vocab_size, BY_MASS)
        if first == 0:
            tl.store(level_ptr + _NUM_BINS, known)
            tl.store(level_ptr + _NUM_BINS + 1, remaining)
    elif BY_MASS and ANY_TOP_K:
        # later bytes need no floor: the share of what top-k left ends above what it removed
        floor = floor_of_row(search_ptr, row, top_k, 1.0, vocab_size, True, False)
    shift = 8 * (_NUM_LEVELS - 1 - level)
    lowest = tl.where(level == 0, 1, 0)  # nobody counts nearness 0
    for block in range(first, tl.minimum(first + SPAN, num_blocks)):
        best = tl.load(best_ptr + row * num_blocks + block)
        best_key, best_near = ranked_key(best), _nearness(ranked_logit(best), largest, scale)
        best_bytes = ((best_near.to(tl.int64) << 32) | best_key.to(tl.int64)) >> shift
        if (best_bytes >> 8 >= known) & (best_key >= floor) & (best_near >= lowest):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            logits = load_logits(logits_ptr + row * logits_stride, ids, vocab_size)
            keys, near = _key_of_ordered(_ordered(logits)), _nearness(logits, largest, scale)
            upper = ((near.to(tl.int64) << 32) | keys.to(tl.int64)) >> shift
            counted = (upper >> 8 == known) & (keys >= floor) & (near >= lowest)
            counted &= ids < vocab_size
            if BY_MASS:
                amounts = (weigh(logits, largest, temperature) * _UNITS + 0.5).to(tl.int64)
            else:
                amounts = tl.full((BLOCK,), 1, dtype=tl.int64)
            amounts = tl.where(counted, amounts, 0)
            bins = (upper & 255).to(tl.int32)
            # one sum for the bin of the best, so that ties, however many, do not queue for it
            best_bin = (best_bytes & 255).to(tl.int32)
            together = tl.sum(tl.where(bins == best_bin, amounts, 0), axis=0)
            tl.atomic_add(level_ptr + best_bin, together, mask=together > 0, sem="relaxed")
            apart = (amounts > 0) & (bins != best_bin)
            tl.atomic_add(level_ptr + bins, amounts, mask=apart, sem="relaxed")
