"""linear: float64 products on ragged shapes, and rows whose bits do not depend on neighbours."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import linear
from tests.kernels.passes import DEVICES, DTYPES, assert_matches, assert_test_has_power

SHAPES = [(1, 13, 7), (5, 192, 96), (7, 33, 129), (64, 100, 31)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    in_features: int,
    out_features: int,
    with_bias: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    oracle = x.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    actual = linear(x.to(device), weight.to(device), bias.to(device) if with_bias else None)
    assert actual.dtype == dtype
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(192, 576), (37, 151), (2048, 2048)])
def test_a_row_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    if dtype == torch.bfloat16:
        x = x[:32]
    whole = linear(x, weight, bias)
    for num_tokens in (1, 2, 3, 4, 5, 6, 7, 9, 11, 16, 25):
        assert torch.equal(linear(x[:num_tokens], weight, bias), whole[:num_tokens])
    assert torch.equal(linear(x[-1:], weight, bias), whole[-1:])


def test_no_rows_give_no_rows() -> None:
    assert linear(torch.empty(0, 8), torch.ones(3, 8)).shape == (0, 3)
