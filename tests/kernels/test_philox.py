"""Philox-4x32-10 against Random123's vectors, in ints, in numpy and in Triton."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import triton
import triton.language as tl

from kernels.philox import philox_4x32, uniforms
from kernels.sampling_triton import uniform
from tests.kernels.passes import INTERPRETED

ONES = 0xFFFFFFFF
# counter, key, output: the known-answer file of Random123 1.14 (kat_vectors)
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822, 12345, 7]
POSITIONS = [0, 1, 5, 2**31, 2**40 + 3, 0x7FFFFFFF85A308D3, 131072, 2**32 - 1]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], output: tuple[int, int, int, int]
) -> None:
    assert philox_4x32(counter, key) == output
    words = philox_4x32(
        tuple(np.array([word, 0], dtype=np.uint64) for word in counter),
        tuple(np.array([word, 0], dtype=np.uint64) for word in key),
    )
    assert tuple(int(word[0]) for word in words) == output
    assert tuple(int(word[1]) for word in words) == VECTORS[0][2]


def test_a_number_is_made_of_the_first_two_words() -> None:
    first, second, _, _ = VECTORS[0][2]
    expected = ((first >> 5) * 2**26 + (second >> 6)) / 2**53
    assert uniforms(torch.tensor([0]), torch.tensor([0])).tolist() == [expected]


def test_one_row_equals_its_row_of_many() -> None:
    seeds, positions = torch.tensor(SEEDS), torch.tensor(POSITIONS)
    whole = uniforms(seeds, positions)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(len(SEEDS))]
    assert whole.tolist() == alone
    assert len(set(alone)) == len(SEEDS)
    assert all(0 <= number < 1 for number in alone)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_numbers_are_uniform_and_unrelated(vary: str) -> None:
    count, fixed = torch.arange(100_000), torch.full((100_000,), 42)
    numbers = uniforms(count, fixed) if vary == "seed" else uniforms(fixed, count)
    assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015


@triton.jit
def uniform_kernel(seeds_ptr, positions_ptr, out_ptr):
    row = tl.program_id(0)
    number = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    tl.store(out_ptr + row, number)


TRITON_DEVICES = [
    pytest.param(
        "cpu" if INTERPRETED else "cuda",
        marks=pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu,
    )
]


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_draws_the_same_bits(device: str) -> None:
    seeds, positions = torch.tensor(SEEDS), torch.tensor(POSITIONS)
    out = torch.empty(len(SEEDS), dtype=torch.float64, device=device)
    uniform_kernel[(len(SEEDS),)](seeds.to(device), positions.to(device), out)
    assert out.tolist() == uniforms(seeds, positions).tolist()
