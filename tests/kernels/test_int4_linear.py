"""Products with int4 weights: float64 for few and many rows, and both layouts of the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.dispatch import interpreting
from kernels.int4_linear import (
    GROUP,
    decode_int4,
    fits_int4,
    int4_linear,
    pack_int4,
    quantize_int4,
)
from tests.kernels.passes import DTYPES, assert_matches, assert_test_has_power
from tests.kernels.test_linear import draw

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="this pass packs nothing"),
    pytest.mark.usefixtures("cpu_body"),
]


def decoded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Computed from the numbers, not from what is packed."""
    values, scale_and_middle = quantize_int4(weight, dtype)
    scale, middle = scale_and_middle.double().repeat_interleave(GROUP, dim=0).unbind(2)
    return (values.double() - 8) * scale.T + middle.T


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_becomes_the_nearest_of_its_groups_16_steps(dtype: torch.dtype) -> None:
    weight = draw(64, 96)
    weight[3, 32:64] = 0.25
    groups = weight.view(64, 3, 32)
    step = (groups.amax(dim=2) - groups.amin(dim=2)) / 15
    error = (decoded(weight, dtype) - weight).abs().view(64, 3, 32).amax(dim=2)
    # the ends of a group are further off if its scale and middle were rounded
    rounding = torch.finfo(dtype).eps * groups.abs().amax(dim=2) * 2
    assert bool((error <= step * 0.5001 + rounding).all())
    values, _ = quantize_int4(weight, dtype)
    assert int(values.min()) == 0 and int(values.max()) == 15


def check_products() -> None:
    """Also run in a process whose kernels are those of another CPU."""
    for dtype in DTYPES:
        for num_tokens, in_features, out_features in [
            *[(1, 32, 64), (1, 192, 128), (5, 96, 192), (33, 64, 64)],
            *[(127, 96, 64), (128, 96, 128), (300, 160, 448)],
        ]:
            x = draw(num_tokens, in_features + 9).to(dtype)[:, 4:-5]
            weight = draw(out_features, in_features, seed=1).to(dtype)
            bias = draw(out_features, seed=2).to(dtype)
            packed = pack_int4(weight, dtype)
            plain = decoded(weight, dtype)
            actual = int4_linear(x, packed, bias)
            oracle = x.double() @ plain.T + bias.double()
            assert_matches(actual, oracle)
            assert_test_has_power(actual, oracle)
            assert_matches(decode_int4(packed, slice(0, 64)), plain[:64])


def test_agrees_with_float64() -> None:
    check_products()


def test_the_same_with_the_layout_of_a_cpu_without_avx512() -> None:
    code = "from tests.kernels.test_int4_linear import check_products; check_products()"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True, timeout=120)


def test_large_matrices_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(130, 96).bfloat16(), pack_int4(draw(320, 96, seed=1), torch.bfloat16)
    whole = int4_linear(x, weight)
    monkeypatch.setattr("kernels.int4_linear._MAX_DECODED_VALUES", 1)
    assert torch.equal(int4_linear(x, weight), whole)


@pytest.mark.parametrize(
    ("dtype", "batch_invariant"), [(torch.float32, False), (torch.bfloat16, True)]
)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, batch_invariant: bool) -> None:
    x, weight = draw(150, 192).to(dtype), pack_int4(draw(128, 192, seed=1), dtype)
    whole = int4_linear(x, weight, batch_invariant=batch_invariant)
    for num_rows in (*range(1, 20), 31, 32, 33, 64, 100, 128, 149):
        part = int4_linear(x[:num_rows], weight, batch_invariant=batch_invariant)
        assert torch.equal(part, whole[:num_rows]), num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_says_so_and_disturbs_no_other(
    value: float, dtype: torch.dtype
) -> None:
    x, weight = draw(5, 192).to(dtype), pack_int4(draw(128, 192, seed=1), dtype)
    expected = int4_linear(x, weight)
    x[2, 7] = value
    out = int4_linear(x, weight)
    assert not bool(out[2].isfinite().any())
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])


def test_no_rows_give_no_rows() -> None:
    weight = pack_int4(draw(64, 32), torch.bfloat16)
    out = int4_linear(torch.empty(0, 32, dtype=torch.bfloat16), weight, out_dtype=torch.float32)
    assert out.shape == (0, 64) and out.dtype == torch.float32


def test_what_fits() -> None:
    assert fits_int4(128, 96)
    assert not fits_int4(96, 96) and not fits_int4(128, 80)
