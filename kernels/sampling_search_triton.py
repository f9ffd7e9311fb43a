# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Weights of tokens, and the thresholds of top-k and top-p without a sort.

Mass is counted in integers: a weight w in [0, 1] is the nearest multiple of 2^-40, so 18 bits are
left for the vocabulary and a sum is exact, the same in any order and for any cut into blocks.

A threshold is the largest key whose tail (all keys at or above it) still holds ``remaining``: so
many tokens for top-k, so much mass for top-p. Keys are uint32 in the order of the logits. The
search fixes them one byte a launch, from the top: programs add the tokens whose upper bytes are
already right to 256 bins, and the next launch takes the largest byte

    d with  bins[d] + ... + bins[255] >= remaining,    remaining -= bins[d + 1] + ... + bins[255]

so four launches find a key. 256 bins are a 16 x 16 product of a byte's halves, each as one-hot rows
[16, CHUNK] x [CHUNK, 16], for the tensor cores: an amount travels in pieces of 11 bits, which fp16
holds exactly, and up to 2^13 of them add up exactly in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_BINS = 256
NUM_LEVELS = 4  # bytes of a key
# of one level: the bins, then the upper bytes of the key and what remained when the level began
LEVEL_SIZE = NUM_BINS + 2
EMPTY = -(2**63)  # a ranked token below every other
NOT_FINITE = 2**63 - 1  # above every other: marks a block whose raw logits are not all finite

_NUM_BINS = tl.constexpr(NUM_BINS)
_NUM_LEVELS = tl.constexpr(NUM_LEVELS)
_LEVEL_SIZE = tl.constexpr(LEVEL_SIZE)
_EMPTY = tl.constexpr(EMPTY)
_LAST_ID = tl.constexpr(2**31 - 1)
_UNITS = tl.constexpr(float(2**40))  # of a weight of 1
_PIECE_BITS = tl.constexpr(11)
_PIECE_MASK = tl.constexpr(2**11 - 1)


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
def _level_ptr(search_ptr, row, level, BY_MASS: tl.constexpr):
    return search_ptr + ((row * 2 + BY_MASS) * _NUM_LEVELS + level) * _LEVEL_SIZE


@triton.jit
def clear_bins(search_ptr, row, block, num_blocks):
    """Set the row's bins to 0; its programs share the work."""
    for index in range(block, 2 * _NUM_LEVELS, num_blocks):
        bins_ptr = search_ptr + (row * 2 * _NUM_LEVELS + index) * _LEVEL_SIZE
        tl.store(bins_ptr + tl.arange(0, _NUM_BINS), tl.zeros((_NUM_BINS,), dtype=tl.int64))


@triton.jit
def _next_byte(search_ptr, row, level, wanted, BY_MASS: tl.constexpr):
    """The key down to the byte of ``level``, whose bins are full, and what remains below it.

    ``wanted``: how many tokens (int32), or which share of the mass (fp32).
    """
    level_ptr = _level_ptr(search_ptr, row, level, BY_MASS)
    values = tl.arange(0, _NUM_BINS)
    bins = tl.load(level_ptr + values)
    if level == 0:
        key = tl.zeros((), dtype=tl.int64)
        total = tl.sum(bins, axis=0)
        if BY_MASS:
            share = wanted.to(tl.float64) * total.to(tl.float64)
            remaining = tl.ceil(share).to(tl.int64)
        else:
            remaining = tl.minimum(wanted.to(tl.int64), total)
        remaining = tl.maximum(remaining, 1)  # the largest stays
    else:
        key = tl.load(level_ptr + _NUM_BINS)
        remaining = tl.load(level_ptr + _NUM_BINS + 1)
    tails = tl.cumsum(bins, axis=0, reverse=True)
    byte = tl.sum((tails >= remaining).to(tl.int32), axis=0) - 1
    remaining -= tl.sum(tl.where(values > byte, bins, 0), axis=0)
    return key * _NUM_BINS + byte, remaining


@triton.jit
def floor_of_row(search_ptr, row, top_k, top_p, ANY_TOP_K: tl.constexpr, ANY_TOP_P: tl.constexpr):
    """The lowest key that top-k and top-p keep, once all their launches are done."""
    floor = tl.zeros((), dtype=tl.int64)
    if ANY_TOP_K and top_k > 0:
        floor, _ = _next_byte(search_ptr, row, _NUM_LEVELS - 1, top_k, False)
    if ANY_TOP_P and top_p < 1:  # found among what top-k keeps
        floor, _ = _next_byte(search_ptr, row, _NUM_LEVELS - 1, top_p, True)
    return floor.to(tl.uint32)


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
    level,  # the byte of the key that this launch counts; 0 is the uppermost
    BY_MASS: tl.constexpr,  # top-p; else top-k
    ANY_TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,  # num_blocks, rounded up to a power of two
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    largest = ranked_logit(best_of_row(best_ptr, row, num_blocks, BLOCKS))
    is_used = top_p < 1 if BY_MASS else top_k > 0
    if not (is_used & (temperature > 0) & (largest > float("-inf"))):
        return
    wanted = top_p if BY_MASS else top_k
    known = tl.zeros((), dtype=tl.int64)  # the upper bytes of the key
    floor = tl.zeros((), dtype=tl.uint32)
    if level > 0:
        known, remaining = _next_byte(search_ptr, row, level - 1, wanted, BY_MASS)
        if block == 0:
            level_ptr = _level_ptr(search_ptr, row, level, BY_MASS)
            tl.store(level_ptr + _NUM_BINS, known)
            tl.store(level_ptr + _NUM_BINS + 1, remaining)
    elif BY_MASS and ANY_TOP_K:
        # later bytes need no floor: the share of what top-k left ends above what it removed
        floor = floor_of_row(search_ptr, row, top_k, 1.0, True, False)
    known = known.to(tl.uint32)
    shift = (24 - 8 * level).to(tl.uint32)
    block_key = ranked_key(tl.load(best_ptr + row * num_blocks + block))
    if ((block_key >> shift) >> 8 < known) | (block_key < floor):
        return  # nothing here counts
    halves = tl.arange(0, 16)
    bins = tl.zeros((16, 16), dtype=tl.int64)
    for start in range(0, BLOCK, CHUNK):
        ids = block * BLOCK + start + tl.arange(0, CHUNK)
        logits = load_logits(logits_ptr + row * logits_stride, ids, vocab_size)
        keys = _key_of_ordered(_ordered(logits))
        counted = (ids < vocab_size) & ((keys >> shift) >> 8 == known) & (keys >= floor)
        byte = ((keys >> shift) & 255).to(tl.int32)
        is_high = (byte >> 4)[None, :] == halves[:, None]  # [16, CHUNK]
        is_low = ((byte & 15)[:, None] == halves[None, :]).to(tl.float16)  # [CHUNK, 16]
        if BY_MASS:
            units = (weigh(logits, largest, temperature) * _UNITS + 0.5).to(tl.int64)
            units = tl.where(counted, units, 0)
            for piece in tl.static_range(4):
                part = ((units >> (piece * _PIECE_BITS)) & _PIECE_MASK).to(tl.float16)
                rows = tl.where(is_high, part[None, :], 0.0)
                sums = tl.dot(rows, is_low, input_precision="ieee")
                bins += sums.to(tl.int64) << (piece * _PIECE_BITS)
        else:
            rows = (is_high & counted[None, :]).to(tl.float16)
            bins += tl.dot(rows, is_low, input_precision="ieee").to(tl.int64)
    values = halves[:, None] * 16 + halves[None, :]
    level_ptr = _level_ptr(search_ptr, row, level, BY_MASS)
    tl.atomic_add(level_ptr + values, bins, mask=bins > 0, sem="relaxed")
