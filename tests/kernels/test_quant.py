"""FP8 blocks against e4m3's definition and float64, and bits that do not depend on neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import quant, quant_triton
from kernels.quant import (
    ActivationScale,
    Fp8Weight,
    dequantize_activations,
    dequantize_weight,
    fp8_linear,
    quantize_activations,
    quantize_weight,
)
from tests.kernels.allocations import LargestTensor
from tests.kernels.fp8_oracle import (
    BLOCK,
    NAN_CODES,
    POSITIVE,
    TABLE,
    assert_product_matches,
    make_weight,
    on_device,
    quantize_rows,
    quantized,
    round_scale,
)
from tests.kernels.passes import (
    DEVICES,
    DTYPES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

FORMATS: list[ActivationScale | None] = [None, "float32"] + ([] if INTERPRETED else ["ue8m0"])
SCALES: list[ActivationScale] = ["float32", "ue8m0"]
# parts, in_features: partial blocks everywhere; less than one block; whole blocks; K off 16 bytes
SHAPES = [([136, 64], 160), ([9, 5], 13), ([70, 60], 299), ([128], 256)]
# rows, and whether a bias is added
LAUNCHES = [(1, True), (2, False), (17, True), (33, False), (130, True)]
if INTERPRETED:
    LAUNCHES = [(1, True), (17, False), (23, True)]
# the interpreter is slow: fewer rows already take the launch for prompts
MAX_DECODE_ROWS = 20 if INTERPRETED else quant_triton.MAX_DECODE_ROWS


@pytest.fixture(autouse=True)
def _decodes_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_triton, "MAX_DECODE_ROWS", MAX_DECODE_ROWS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edges() -> Tensor:
    """Rows whose scale is 1 and that hold every number of e4m3, every midpoint, and neighbours."""
    midpoints = ((POSITIVE[1:] + POSITIVE[:-1]) / 2).astype(np.float32)
    up, down = (np.nextafter(midpoints, np.float32(end)) for end in (448.0, 0.0))
    rows = torch.zeros(8, BLOCK)
    for row, magnitudes in enumerate([POSITIVE.astype(np.float32), midpoints, up, down]):
        rows[row, : magnitudes.size] = torch.from_numpy(magnitudes)
    rows[:4, -1] = 448.0
    rows[4:] = -rows[:4]  # with it -0.0
    return rows


def groups_of_every_size() -> Tensor:
    """[24, 299]: zeros, groups below 1e-4, just at it, huge; scales at and around powers of two."""
    x = draw(24, 299, seed=1)
    x *= torch.logspace(-44, 37, 24)[:, None]
    x[3] = 0.0
    x[4, :BLOCK] = -0.0
    x[5, :BLOCK] = 1e-4
    x[6, :BLOCK] = torch.finfo(torch.float32).max
    x[7, BLOCK : 2 * BLOCK] = 1e-45
    exact = torch.tensor(448.0 * 2.0**-9)
    for row, highest in enumerate(
        [exact, exact.nextafter(torch.tensor(1.0)), exact.nextafter(torch.tensor(0.0))]
    ):
        x[8 + row] = x[8 + row].sign() * torch.rand(299) * highest * 0.9
        x[8 + row, [0, 200, 298]] = highest
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code_decodes_to_its_number(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    weight = Fp8Weight(
        values=codes.view(torch.float8_e4m3fn),
        scale_inv=torch.ones(2, 1),
        scale_rows=(torch.arange(256) // BLOCK).int(),
    )
    decoded = dequantize_weight(weight, dtype)[:, 0].double().numpy()
    finite = [code for code in range(256) if code not in NAN_CODES]
    assert np.array_equal(decoded[finite], TABLE[finite])
    assert np.array_equal(np.signbit(decoded[finite]), np.signbit(TABLE[finite]))
    assert np.isnan(decoded[list(NAN_CODES)]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [None, "ue8m0"])
def test_a_product_with_the_identity_gives_every_code(
    device: str, dtype: torch.dtype, activations: ActivationScale | None
) -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes[list(NAN_CODES)] = 0
    weight = Fp8Weight(
        values=torch.from_numpy(codes.reshape(16, 16)).view(torch.float8_e4m3fn),
        scale_inv=torch.tensor([[2.0**-3]]),
        scale_rows=torch.zeros(16, dtype=torch.int32),
        activations=activations,
    )
    actual = fp8_linear(torch.eye(16, dtype=dtype, device=device), on_device(weight, device))
    expected = torch.from_numpy(TABLE[codes].reshape(16, 16).T * 2.0**-3)
    assert torch.equal(actual.cpu().double(), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "columns"), [(200, 160), (128, 384), (5, 3), (129, 257)])
def test_quantized_weights_are_near_and_their_scales_exact(
    scale: ActivationScale, rows: int, columns: int
) -> None:
    weight = draw(rows, columns) * torch.logspace(-3, 3, columns)
    weight[:BLOCK, :BLOCK] = 0.0
    values, scale_inv = quantize_weight(weight, scale)
    assert values.dtype == torch.float8_e4m3fn and scale_inv.dtype == torch.float32
    assert values.shape == weight.shape
    assert scale_inv.shape == (-(-rows // BLOCK), -(-columns // BLOCK))
    stored = Fp8Weight(values, scale_inv, (torch.arange(rows) // BLOCK).int())
    decoded = dequantize_weight(stored, torch.float32)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            highest = np.float32(weight[block].abs().max())
            expected = round_scale(highest / np.float32(448.0), scale) if highest else 1.0
            assert scale_inv[i, j] == expected
            if scale == "float32" and highest:
                assert values[block].float().abs().max() == 448.0
            # half the distance of neighbours: 2^-4 of a number, or 2^-10 where they are 2^-9 apart
            bound = torch.maximum(weight[block].abs() * 2.0**-4, scale_inv[i, j] * 2.0**-10)
            error = (decoded[block].double() - weight[block].double()).abs()
            assert bool((error <= bound.double() * (1 + 1e-6)).all())


@pytest.mark.parametrize("num_experts", [None, 3])
@pytest.mark.parametrize(("parts", "in_features"), SHAPES)
def test_stacked_matrices_keep_their_own_blocks(
    num_experts: int | None, parts: list[int], in_features: int
) -> None:
    weight, oracle = make_weight(parts, in_features, None, num_experts=num_experts)
    decoded = dequantize_weight(weight, torch.float32)
    assert decoded.shape == oracle.shape
    assert torch.equal(decoded, oracle.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("x", [edges(), groups_of_every_size(), draw(5, 7)], ids=["edges", *"ab"])
def test_activations_have_the_bits_of_the_nearest_numbers(
    device: str, scale: ActivationScale, x: Tensor
) -> None:
    values, scales = quantize_activations(x.to(device), scale)
    codes, oracle_scales = quantize_rows(x, scale)
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert np.array_equal(scales.cpu().numpy(), oracle_scales)
    assert np.array_equal(values.cpu().view(torch.uint8).numpy(), codes)
    assert torch.equal(dequantize_activations(values, scales).cpu(), quantized(x, scale).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_any_dtype_and_stride(device: str, dtype: torch.dtype) -> None:
    wide = draw(6, 500).to(dtype)
    for x in (wide[:, 3:303], wide[::2, :200], wide[:, :140].T, wide[:0]):
        values, scales = quantize_activations(x.to(device), "float32")
        codes, oracle_scales = quantize_rows(x, "float32")
        assert np.array_equal(values.cpu().view(torch.uint8).numpy(), codes)
        assert np.array_equal(scales.cpu().numpy(), oracle_scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "in_features"), SHAPES)
def test_fp8_linear(
    device: str,
    activations: ActivationScale | None,
    dtype: torch.dtype,
    parts: list[int],
    in_features: int,
) -> None:
    weight, decoded = make_weight(parts, in_features, activations)
    bias = draw(sum(parts), seed=2).to(dtype)
    for num_rows, with_bias in LAUNCHES:
        x = draw(num_rows, in_features, seed=num_rows).to(dtype)
        actual = fp8_linear(
            x.to(device), on_device(weight, device), bias.to(device) if with_bias else None
        )
        assert actual.dtype == dtype
        oracle = quantized(x, activations) @ decoded.T + (bias.double() if with_bias else 0.0)
        assert_product_matches(actual, oracle, activations is not None)
        assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", FORMATS)
def test_the_bias_is_added_before_rounding(
    device: str, activations: ActivationScale | None
) -> None:
    """1 + 2^-9 rounds to 1 in bf16, and 1 + 2^-12 in fp16; the bias that cancels it comes first."""
    dtype, small = (torch.float16, 2.0**-12) if INTERPRETED else (torch.bfloat16, 2.0**-9)
    weight = Fp8Weight(
        values=torch.tensor([[1.0, small * 256] + [0.0] * 14] * 16).to(torch.float8_e4m3fn),
        scale_inv=torch.ones(1, 1),
        scale_rows=torch.zeros(16, dtype=torch.int32),
        activations=activations and "ue8m0",
    )
    x = torch.tensor([[1.0, 2.0**-8] + [0.0] * 14], dtype=dtype, device=device)
    bias = torch.full((16,), -1.0, dtype=dtype, device=device)
    actual = fp8_linear(x, on_device(weight, device), bias)
    assert actual.tolist() == [[small] * 16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", FORMATS)
def test_no_rows_give_no_rows(device: str, activations: ActivationScale | None) -> None:
    weight, _ = make_weight([136, 64], 160, activations)
    empty = torch.empty((0, 160), dtype=HALF, device=device)
    actual = fp8_linear(empty, on_device(weight, device), torch.ones(200, dtype=HALF))
    assert actual.shape == (0, 200) and actual.dtype == HALF


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", FORMATS)
def test_rows_may_be_strided(device: str, activations: ActivationScale | None) -> None:
    weight = on_device(make_weight([136, 64], 160, activations)[0], device)
    wide = draw(160, 200).to(device)
    for x in (wide[:5, 3:163], wide[:10:3, :160], wide[:, :7].T):
        assert torch.equal(fp8_linear(x, weight), fp8_linear(x.clone().contiguous(), weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_row_has_the_same_bits_in_any_batch(
    device: str, activations: ActivationScale | None, dtype: torch.dtype
) -> None:
    """On a GPU: among batches up to MAX_DECODE_ROWS, and among larger ones."""
    weight = on_device(make_weight([136, 64], 160, activations)[0], device)
    bias = draw(200, seed=2).to(device, dtype)
    x = draw(MAX_DECODE_ROWS + (5 if INTERPRETED else 70), 160).to(device, dtype)
    decodes = x[:MAX_DECODE_ROWS]
    batches = [
        (decodes, [(0, 1), (7, 9), (1, MAX_DECODE_ROWS)]),
        (x, [(3, x.shape[0] - 1)]),
    ]
    for rows, parts in batches:
        whole = fp8_linear(rows, weight, bias)
        assert torch.equal(fp8_linear(rows.flip(0), weight, bias), whole.flip(0))
        for start, end in parts:
            assert torch.equal(fp8_linear(rows[start:end], weight, bias), whole[start:end])
    if device == "cpu" and not INTERPRETED:
        assert torch.equal(fp8_linear(decodes, weight, bias), whole[:MAX_DECODE_ROWS])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_row_of_nan_stays_one_and_harms_no_other(device: str, scale: ActivationScale) -> None:
    weight = on_device(make_weight([136, 64], 160, scale)[0], device)
    x = draw(5, 160)
    expected = fp8_linear(x.to(device), weight)
    x[2, 130] = float("nan")
    actual = fp8_linear(x.to(device), weight)
    assert bool(actual[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(actual[others], expected[others])


@pytest.mark.skipif(INTERPRETED, reason="the torch body's")
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_body_decodes_a_slice_at_a_time(
    activations: ActivationScale | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, decoded = make_weight([300, 260], 320, activations)
    x, bias = draw(3, 320).to(dtype), draw(560, seed=2).to(dtype)
    oracle = quantized(x, activations) @ decoded.T + bias.double()
    with LargestTensor() as whole:
        assert_matches(fp8_linear(x, weight, bias), oracle)
    assert whole.num_elements == 560 * 320
    monkeypatch.setattr(quant, "MAX_DECODED_BYTES", 4 * 320 * 50)
    with LargestTensor() as sliced:
        assert_matches(fp8_linear(x, weight, bias), oracle)
    assert sliced.num_elements == 50 * 320


def test_w8a16_and_w8a8_differ() -> None:
    """So that a test of one says nothing of the other."""
    weight, _ = make_weight([136, 64], 160, None)
    x = draw(4, 160)
    plain = fp8_linear(x, weight)
    rounded = fp8_linear(x, replace(weight, activations="float32"))
    error = (plain - rounded).norm() / plain.norm()
    assert 5e-3 < float(error) < 0.1
