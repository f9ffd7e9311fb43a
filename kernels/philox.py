"""Philox-4x32-10: random numbers that are a function of (seed, position) and of nothing else.

A block is ten rounds over four 32-bit counter words with two 32-bit key words (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11). The key is the seed and the counter is the
position a token will take, so a draw never depends on the batch, the step or earlier draws. The
same arithmetic runs on plain ints, on numpy arrays and, as ``tl.philox``, inside the sampler.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Word: TypeAlias = Any  # an int, or a uint64 array, below 2**32

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, in 32 bits
_MASK32 = 0xFFFFFFFF
_NUM_ROUNDS = 10
_MAX_SCALAR_ROWS = 6  # below, plain ints are faster than numpy's calls (measured)


def philox_4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Return the four output words for four counter words and two key words.

    Words are ints, or uint64 arrays of one shape whose values are below 2**32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32) ^ c1 ^ k0, (product0 >> 32) ^ c3 ^ k1
        c1, c3 = product1 & _MASK32, product0 & _MASK32
        k0 = (k0 + _KEY_STEPS[0]) & _MASK32
        k1 = (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def uniforms(seeds: Tensor, positions: Tensor) -> NDArray[np.float64]:
    """Return one number in [0, 1) with 53 random bits for each (seed, position).

    Args:
        seeds: [num_rows] int64 on the CPU; read as 64 unsigned bits.
        positions: [num_rows] int64 on the CPU.

    Returns:
        [num_rows] float64: the upper 27 bits of word 0, then the upper 26 bits of word 1.
    """
    if seeds.shape[0] <= _MAX_SCALAR_ROWS:
        pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
        return np.array([_uniform_of(seed, position) for seed, position in pairs])
    seed_bits = seeds.numpy().view(np.uint64)
    position_bits = positions.numpy().view(np.uint64)
    zero = np.zeros_like(seed_bits)
    counter = (position_bits & _MASK32, position_bits >> 32, zero, zero)
    word0, word1, _, _ = philox_4x32(counter, (seed_bits & _MASK32, seed_bits >> 32))
    numbers: NDArray[np.float64] = _join(word0, word1) * 2.0**-53
    return numbers


def _uniform_of(seed: int, position: int) -> float:
    counter = (position & _MASK32, position >> 32 & _MASK32, 0, 0)
    word0, word1, _, _ = philox_4x32(counter, (seed & _MASK32, seed >> 32 & _MASK32))
    return float(_join(word0, word1) * 2.0**-53)


def _join(word0: Word, word1: Word) -> Word:
    return (word0 >> 5) * 2**26 + (word1 >> 6)  # 27 + 26 bits
