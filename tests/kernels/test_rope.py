"""Frequencies and tables against transformers, rotation against complex numbers in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.rope import (
    apply_rope,
    default_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    rotary_table,
    yarn_inv_freq,
    yarn_mscale,
)
from tests.kernels.passes import assert_matches, assert_test_has_power


def transformers_rope(dim: int, rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=rope)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return inv_freq, attention_factor


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_llama3_frequencies_are_those_of_transformers(dim: int) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected, _ = transformers_rope(dim, rope)
    actual = llama3_inv_freq(dim, 5e5, 8.0, 1.0, 4.0, 8192)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize(("factor", "original"), [(40.0, 4096), (4.0, 2048), (4.0, 32768)])
def test_yarn_frequencies_are_those_of_transformers(dim: int, factor: float, original: int) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "beta_fast": 32}
    rope |= {"beta_slow": 1, "original_max_position_embeddings": original}
    expected, attention_factor = transformers_rope(dim, rope)
    actual = yarn_inv_freq(dim, 1e4, factor, original)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert yarn_mscale(factor, 1.0) == pytest.approx(attention_factor)


def test_linear_scaling_divides_positions() -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
    expected, _ = transformers_rope(128, rope)
    assert torch.equal(linear_inv_freq(128, 1e5, 4.0), expected)
    assert torch.equal(linear_inv_freq(128, 1e5, 1.0), default_inv_freq(128, 1e5))


def test_mscale_of_the_releases() -> None:
    """V2-Lite's and V3's factor on the softmax scale, as measured in transformers."""
    assert yarn_mscale(40, 0.707) ** 2 == pytest.approx(1.58963, abs=1e-5)
    assert yarn_mscale(40, 1.0) ** 2 == pytest.approx(1.87385, abs=1e-5)
    assert yarn_mscale(1.0, 1.0) == 1.0


def test_table_rounds_angles_in_float32() -> None:
    """At position 100000 the rounding of the angle shows; transformers rounds it, so we do."""
    inv_freq = default_inv_freq(8, 1e4)
    table = rotary_table(inv_freq, 100_001, attention_factor=1.25)
    angles = (torch.tensor(100_000.0) * inv_freq).double()
    expected = 1.25 * torch.cat((angles.cos(), angles.sin()))
    assert table.dtype == torch.float32 and table.shape == (100_001, 8)
    torch.testing.assert_close(table[-1].double(), expected, rtol=0, atol=1e-6)


def test_a_table_on_meta_has_its_shape() -> None:
    assert rotary_table(default_inv_freq(8, 1e4), 5, device="meta").shape == (5, 8)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_turn_as_complex_numbers(interleaved: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 16, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (7,), generator=generator)
    inv_freq = default_inv_freq(16, 1e4)
    actual = apply_rope(x, positions, rotary_table(inv_freq, 50), interleaved)

    pairs = x.double().unflatten(-1, (8, 2) if interleaved else (2, 8))
    first, second = pairs.unbind(-1 if interleaved else -2)
    angles = positions.double()[:, None, None] * inv_freq.double()
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    oracle = torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
    assert actual.dtype == dtype
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(1))
    table = rotary_table(default_inv_freq(32, 1e4), 200)

    def score(at: int) -> float:
        turned = apply_rope(q, torch.tensor([at + 9]), table, interleaved)
        return float((turned * apply_rope(k, torch.tensor([at]), table, interleaved)).sum())

    assert score(150) == pytest.approx(score(0), abs=1e-4)
