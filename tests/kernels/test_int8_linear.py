"""Products with int8 weights: float64, outliers, and rows that ignore neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.dispatch import interpreting
from kernels.int8_linear import int8_linear, multiplies_int8, pack_int8, quantize_int8
from tests.kernels.passes import DTYPES, assert_matches, assert_test_has_power
from tests.kernels.test_linear import draw

pytestmark = pytest.mark.usefixtures("cpu_body")
needs_int8 = pytest.mark.skipif(
    interpreting() or not multiplies_int8(), reason="this CPU or pass multiplies no int8"
)


def decoded(weight: torch.Tensor) -> torch.Tensor:
    values, scale = quantize_int8(weight)
    return values.double() * scale.double()[:, None]


def test_each_weight_becomes_the_nearest_of_its_outputs_255_steps() -> None:
    weight = draw(33, 70) * torch.logspace(-6, 6, 33)[:, None]
    weight[4] = 0
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((decoded(weight) - weight).abs() <= step * 0.5001).all())
    assert int(quantize_int8(weight)[0].abs().max()) == 127


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    [
        *[(1, 13, 7), (1, 192, 96), (3, 192, 96), (7, 33, 129), (64, 100, 31), (200, 64, 48)],
        *[(1, 64, 64), (5, 192, 128), (8, 1024, 64)],
    ],
)
def test_agrees_with_float64(
    dtype: torch.dtype, with_bias: bool, num_tokens: int, in_features: int, out_features: int
) -> None:
    """Rows are a part of wider ones, as those of a stacked product are."""
    x = draw(num_tokens, in_features + 9).to(dtype)[:, 4:-5]
    weight = draw(out_features, in_features, seed=1).to(dtype)
    bias = draw(out_features, seed=2).to(dtype) if with_bias else None
    oracle = x.double() @ decoded(weight).T + (0.0 if bias is None else bias.double())
    actual = int8_linear(x, pack_int8(weight), bias)
    assert actual.dtype == dtype
    # 15 bits of the row's largest are what is left of an fp32 input
    half = actual.half() if dtype == torch.float32 else actual
    assert_matches(half, oracle)
    assert_test_has_power(half, oracle)
    as_logits = int8_linear(x, pack_int8(weight), bias, out_dtype=torch.float32)
    assert float((as_logits.double() - oracle).norm() / oracle.norm()) < 1e-4


@needs_int8
def test_what_is_small_beside_an_outlier_is_kept() -> None:
    """One int8 per input would round everything but the outlier to nothing."""
    x, weight = draw(4, 64), draw(48, 64, seed=1)
    x[:, 5] = 300.0
    weight[:, 5] = 0
    oracle = x.double() @ decoded(weight).T
    error = (int8_linear(x, pack_int8(weight)).double() - oracle).norm() / oracle.norm()
    assert float(error) < 0.01


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 192), (192, 1024)])  # outputs, inputs
def test_a_row_has_the_same_bits_in_any_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = draw(150, shape[1]).to(dtype), pack_int8(draw(*shape, seed=1))
    bias = draw(shape[0], seed=2).to(dtype)
    whole = int8_linear(x, weight, bias)
    for num_rows in (*range(1, 20), 31, 32, 33, 64, 100, 149):
        assert torch.equal(int8_linear(x[:num_rows], weight, bias), whole[:num_rows]), num_rows
        assert torch.equal(int8_linear(x[-num_rows:], weight, bias), whole[-num_rows:]), num_rows
    logits = int8_linear(x, weight, out_dtype=torch.float32)
    for num_rows in (1, 2, 8):
        few = int8_linear(x[:num_rows], weight, out_dtype=torch.float32)
        assert torch.equal(few, logits[:num_rows]), num_rows


@needs_int8
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("out_features", [96, 128])
def test_a_row_that_is_not_finite_says_so_and_disturbs_no_other(
    out_features: int, value: float
) -> None:
    x, weight = draw(5, 192), pack_int8(draw(out_features, 192, seed=1))
    expected = int8_linear(x, weight)
    x[2, 7] = value
    out = int8_linear(x, weight)
    assert not bool(out[2].isfinite().any())
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])


@needs_int8
def test_zeros_and_no_rows() -> None:
    weight, bias = pack_int8(draw(8, 16)), draw(8, seed=2)
    assert torch.equal(int8_linear(torch.zeros(2, 16), weight, bias), bias.expand(2, 8))
    out = int8_linear(torch.empty(0, 16, dtype=torch.bfloat16), weight, out_dtype=torch.float32)
    assert out.shape == (0, 8) and out.dtype == torch.float32


@pytest.mark.skipif(interpreting(), reason="says no in this pass")
@pytest.mark.parametrize(
    ("instructions", "is_exact"),
    [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_VNNI", True)],
)
def test_a_cpu_whose_int8_products_saturate_is_found_out(instructions: str, is_exact: bool) -> None:
    """A process of its own, since oneDNN settles on its kernels once."""
    if instructions.startswith("AVX512") and not torch.cpu._is_avx512_supported():
        pytest.skip("this CPU has no AVX-512")
    if instructions.endswith("VNNI") and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI")
    code = "from kernels.int8_linear import multiplies_int8; print(multiplies_int8())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == str(is_exact)


@needs_int8
@pytest.mark.parametrize("instructions", ["AVX512_CORE_VNNI", "DEFAULT"])
def test_no_product_is_left_to_the_reference_kernel(instructions: str) -> None:
    """It is correct and takes a thousand times as long; oneDNN says what it runs."""
    code = (
        "import torch\n"
        "from kernels.int8_linear import int8_linear, pack_int8\n"
        "weight = pack_int8(torch.randn(192, 256))\n"
        "int8_linear(torch.randn(40, 256), weight)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "ONEDNN_VERBOSE": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    products = [line for line in done.stdout.splitlines() if "exec,cpu,matmul," in line]
    assert products
    assert not [line for line in products if "matmul,ref" in line]
