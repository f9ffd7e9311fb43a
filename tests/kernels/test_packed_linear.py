"""Products with packed weights: float64 on ragged shapes, and fp32 rows that ignore neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.packed_linear import pack_format, pack_matrix, packed_linear
from tests.kernels.passes import assert_matches, assert_test_has_power
from tests.kernels.test_linear import draw

CPU = torch.device("cpu")
LARGE = (1024, 1024)
PACKED = [
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if pack_format(LARGE, dtype, CPU, "dtype") == "dtype"
]

pytestmark = [
    pytest.mark.skipif(not PACKED, reason="this CPU or pass packs no weights"),
    pytest.mark.usefixtures("cpu_body"),
]


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    [(1, 13, 7), (1, 192, 96), (3, 192, 96), (7, 33, 129), (64, 100, 31), (200, 64, 48)],
)
def test_agrees_with_float64(
    dtype: torch.dtype, with_bias: bool, num_tokens: int, in_features: int, out_features: int
) -> None:
    """Rows are a part of wider ones, as those of a stacked product are."""
    x = draw(num_tokens, in_features + 9).to(dtype)[:, 4:-5]
    weight = draw(out_features, in_features, seed=1).to(dtype)
    bias = draw(out_features, seed=2).to(dtype) if with_bias else None
    oracle = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    packed = pack_matrix(weight, "dtype")
    weight.fill_(float("nan"))  # the packed weight is a copy
    actual = packed_linear(x, packed, bias)
    assert actual.dtype == dtype
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)
    as_logits = packed_linear(x, packed, bias, out_dtype=torch.float32)
    assert as_logits.dtype == torch.float32 and torch.equal(as_logits, actual.float())


@pytest.mark.parametrize("dtype", PACKED)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    packed = pack_matrix(draw(4, 8).to(dtype), "dtype")
    out = packed_linear(torch.empty(0, 8, dtype=dtype), packed, out_dtype=torch.float32)
    assert out.shape == (0, 4) and out.dtype == torch.float32


def assert_rows_ignore_neighbours(in_features: int, out_features: int) -> None:
    x = draw(150, in_features)
    weight, bias = draw(out_features, in_features, seed=1), draw(out_features, seed=2)
    packed = pack_matrix(weight, "dtype")
    whole = packed_linear(x, packed, bias)
    for num_rows in (*range(1, 20), 31, 32, 33, 48, 64, 65, 100, 149):
        assert torch.equal(packed_linear(x[:num_rows], packed, bias), whole[:num_rows]), num_rows
        assert torch.equal(packed_linear(x[-num_rows:], packed, bias), whole[-num_rows:]), num_rows


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(192, 576), (37, 151), (64, 8), (4864, 896), (512, 4096)]
)
def test_an_fp32_row_has_the_same_bits_in_any_batch(in_features: int, out_features: int) -> None:
    assert_rows_ignore_neighbours(in_features, out_features)


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_the_same_with_the_instructions_of_other_cpus(instructions: str) -> None:
    """A process of its own, since oneDNN settles on its kernels once."""
    code = (
        "from tests.kernels.test_packed_linear import assert_rows_ignore_neighbours as check\n"
        "check(192, 576), check(37, 151), check(4864, 896)"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True, timeout=120)


def test_what_cannot_keep_its_promise_or_does_not_pay_is_not_packed() -> None:
    assert pack_format(LARGE, torch.bfloat16, CPU, "dtype", batch_invariant=True) is None
    assert pack_format(LARGE, torch.float32, CPU, "dtype", batch_invariant=True) == "dtype"
    assert pack_format(LARGE, torch.float32, torch.device("cuda"), "dtype") is None
    assert pack_format((192, 576), torch.float32, CPU, "dtype") is None  # would be slower


def test_weights_lie_in_huge_pages_where_the_system_lends_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("no huge pages here")
    code = (
        "import torch\n"
        "from kernels.packed_linear import pack_matrix\n"
        "kept = [pack_matrix(torch.ones(4096, 4096), 'dtype') for _ in range(2)]\n"
        "print(open('/proc/self/smaps_rollup').read())"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("AnonHugePages")]
    assert int(line.split()[1]) > 100 << 10  # kB of 128 MB
