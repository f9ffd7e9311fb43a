"""rms_norm and add_rms_norm against float64, the order of rounding, and batch invariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.norm import add_rms_norm, rms_norm
from tests.kernels.passes import DEVICES, DTYPES, HALF, assert_matches, assert_test_has_power

pytestmark = pytest.mark.usefixtures("cpu_body")

EPS = 1e-6
SHAPES = [(1, 192), (5, 33), (3, 2, 37), (2, 1000)]


def oracle_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x64 = x.double()
    return weight.double() * x64 / (x64.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    residual = torch.randn(shape, generator=generator).to(dtype)
    weight = (1 + torch.rand(shape[-1], generator=generator)).to(dtype)
    return x, residual, weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, _, weight = make(shape, dtype)
    actual = rms_norm(x.to(device), weight.to(device), EPS)
    assert actual.dtype == dtype
    assert_matches(actual, oracle_rms_norm(x, weight))
    assert_test_has_power(actual, oracle_rms_norm(x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight = make(shape, dtype)
    given = residual.to(device, copy=True)
    normed, total = add_rms_norm(x.to(device), given, weight.to(device), EPS)
    assert torch.equal(total.cpu(), x + residual)
    assert torch.equal(given.cpu(), residual)
    assert_matches(normed, oracle_rms_norm(x + residual, weight))
    assert_test_has_power(normed, oracle_rms_norm(x + residual, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_the_quotient_is_rounded_before_the_weight(device: str) -> None:
    """As transformers does it; rounding once, at the end, gives other bits."""
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)).to(HALF)
    weight = torch.full((48,), 1.5, dtype=HALF)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    quotient, late = exact.to(HALF), (1.5 * exact).to(HALF)
    actual = rms_norm(x.to(device), weight.to(device), EPS).cpu()
    assert (late != quotient * weight).sum() > 100
    assert (actual != quotient * weight).sum() <= 2  # fp32 and fp64 quotients may round apart


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    x, residual, weight = (tensor.to(device) for tensor in make((9, 37), torch.float32))
    normed, total = add_rms_norm(x, residual, weight, EPS)
    for row in range(9):
        alone = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, EPS)
        assert torch.equal(alone[0], normed[row : row + 1])
        assert torch.equal(alone[1], total[row : row + 1])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor(device: str) -> None:
    x, _, weight = make((6, 40), torch.float32)
    part = x.to(device)[:, 7:27]
    expected = rms_norm(part.contiguous(), weight[:20].to(device), EPS)
    assert torch.equal(rms_norm(part, weight[:20].to(device), EPS), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_rows(device: str) -> None:
    empty = torch.empty((0, 16), device=device)
    weight = torch.ones(16, device=device)
    assert rms_norm(empty, weight, EPS).shape == (0, 16)
    assert [tensor.shape for tensor in add_rms_norm(empty, empty, weight, EPS)] == [(0, 16)] * 2
