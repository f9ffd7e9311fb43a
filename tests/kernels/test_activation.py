"""silu_and_mul against float64, at its extremes, and batch invariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from tests.kernels.passes import DEVICES, DTYPES, assert_matches, assert_test_has_power

pytestmark = pytest.mark.usefixtures("cpu_body")


def oracle_silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 96), (5, 13), (3, 1025)])
def test_silu_and_mul(device: str, dtype: torch.dtype, num_tokens: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gate_up = (2 * torch.randn(num_tokens, 2 * size, generator=generator)).to(dtype)
    actual = silu_and_mul(gate_up.to(device))
    assert actual.dtype == dtype
    assert_matches(actual, oracle_silu_and_mul(gate_up))
    assert_test_has_power(actual, oracle_silu_and_mul(gate_up))


@pytest.mark.parametrize("device", DEVICES)
def test_large_gates_saturate(device: str) -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]])
    actual = silu_and_mul(gate_up.to(device)).cpu()
    torch.testing.assert_close(actual, torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    gate_up = torch.randn(50, 2 * 13, generator=torch.Generator().manual_seed(5)).to(device)
    whole = silu_and_mul(gate_up)
    for row in range(50):
        assert torch.equal(silu_and_mul(gate_up[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_threads_split_a_row_does_not_matter(dtype: torch.dtype) -> None:
    """Two threads part these tensors inside a row, where vector code gives way to scalar code."""
    size = 126
    gate_up = torch.randn(541, 2 * size, generator=torch.Generator().manual_seed(6)).to(dtype)
    alone = torch.cat([silu_and_mul(gate_up[row : row + 1]) for row in range(541)])
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for num_tokens in range(521, 542, 2):
            assert torch.equal(silu_and_mul(gate_up[:num_tokens]), alone[:num_tokens])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_gate_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    """In vector code, and in the scalar code that takes what is left of a row."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    gates = every[every.isfinite()]
    ones = torch.ones_like(gates)
    together = silu_and_mul(torch.stack((gates, ones)).view(1, -1))[0]
    in_tails = silu_and_mul(torch.stack((gates, ones), dim=1))[:, 0]
    assert torch.equal(together, in_tails)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_rows(device: str) -> None:
    assert silu_and_mul(torch.empty((0, 12), device=device)).shape == (0, 6)


def test_rows_beyond_what_a_cpu_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = torch.randn(50, 2 * 13, generator=torch.Generator().manual_seed(7))
    whole = silu_and_mul(gate_up)
    monkeypatch.setattr("kernels.activation._VALUES_AT_ONCE", 13 * 7)
    assert torch.equal(silu_and_mul(gate_up), whole)
    monkeypatch.setattr("kernels.activation._VALUES_AT_ONCE", 1)
    assert torch.equal(silu_and_mul(gate_up), whole)
