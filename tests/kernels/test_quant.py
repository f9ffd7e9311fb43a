"""FP8 blocks against e4m3's definition and float64, and bits that do not depend on neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import quant, quant_triton
from kernels.configs import launch_config
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
MAX_DECODE_ROWS = 20 if INTERPRETED else 64
TRITON_DEVICES = DEVICES[-1:]  # where Triton bodies run
Config = dict[str, Any]


@pytest.fixture(autouse=True)
def _decodes_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(op: str, **facts: Any) -> Config:
        rows = facts.get("rows", 1)
        more = {"rows": rows if rows <= MAX_DECODE_ROWS else rows + 44} if "rows" in facts else {}
        return launch_config(op, **facts | more)

    if INTERPRETED:
        monkeypatch.setattr(quant_triton, "launch_config", scaled)


@pytest.fixture
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """How products are launched from now on, cut into slices along their channels, by default 4."""
    slices = getattr(request, "param", 4)
    seen: list[Config] = []
    choose = quant_triton.launch_config

    def sliced(op: str, **facts: Any) -> Config:
        config = choose(op, **facts)
        if op == "fp8_linear":
            config |= {"SLICES": slices}
            seen.append(config)
        return config

    monkeypatch.setattr(quant_triton, "launch_config", sliced)
    return seen


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "columns"), [(200, 160), (128, 384), (5, 3), (129, 257)])
def test_quantized_weights_are_near_and_their_scales_exact(
    device: str, scale: ActivationScale, rows: int, columns: int
) -> None:
    weight = draw(rows, columns) * torch.logspace(-3, 3, columns)
    weight[:BLOCK, :BLOCK] = 0.0
    values, scale_inv = (made.cpu() for made in quantize_weight(weight.to(device), scale))
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


def weights_to_quantize() -> list[Tensor]:
    """Every rounding of e4m3, any magnitude of a block, halves, strides, blocks cut short."""
    sizes = torch.logspace(-44, 38, 3).repeat_interleave(BLOCK)
    powers = 448.0 * torch.exp2(torch.arange(-40, -37)).repeat_interleave(BLOCK)
    powers[0] = powers[0].nextafter(torch.tensor(1.0))
    return [
        edges(),
        41.0 * edges(),  # midpoints, but not if multiplied by 1 / 41
        draw(130, 3 * BLOCK, seed=1).clamp(-3, 3) * sizes,
        draw(2, 3 * BLOCK).sign() * powers,  # scales that are powers of two, one just above
        torch.full((3, 5), -1e-45),
        torch.zeros(3, 5),
        draw(140, 129).half(),
        draw(3, 300).bfloat16()[:, 4:290],
        draw(129, 140).T,
    ]


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("scale", SCALES)
def test_both_bodies_quantize_a_weight_to_the_same_bits(
    device: str, scale: ActivationScale, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_to_quantize()
    actual = [quantize_weight(weight.to(device), scale) for weight in weights]
    monkeypatch.setattr(quant, "use_triton", lambda _: False)
    for weight, (values, scale_inv) in zip(weights, actual, strict=True):
        expected_values, expected_scale_inv = quantize_weight(weight, scale)
        assert (values.dtype, values.shape) == (torch.float8_e4m3fn, weight.shape)
        assert torch.equal(scale_inv.cpu(), expected_scale_inv)
        assert torch.equal(values.cpu().view(torch.uint8), expected_values.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_the_smallest_weights_are_not_divided_by_zero(device: str) -> None:
    values, scale_inv = quantize_weight(torch.full((3, 5), 1e-45, device=device))
    assert values.float().tolist() == [[0.0] * 5] * 3
    assert scale_inv.tolist() == [[2.0**-126]]


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
    """On a GPU: among batches of up to 64 rows, and among larger ones."""
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
@pytest.mark.parametrize("activations", [None, "float32"])
@pytest.mark.parametrize(
    ("dtype", "launches"), [(HALF, 1), (torch.float32, 4)], indirect=["launches"]
)
def test_a_batch_invariant_row_has_the_same_bits_in_any_batch(
    device: str, activations: ActivationScale | None, dtype: torch.dtype, launches: list[Config]
) -> None:
    """With slices too, which are split among programs for up to 64 rows only."""
    weight = on_device(make_weight([32], 272, activations)[0], device)
    bias, x = draw(32, seed=2).to(device, dtype), draw(200, 272).to(device, dtype)
    whole = fp8_linear(x, weight, bias, batch_invariant=True)
    for num_rows in (1, 2, 3, 16, 33, 64, 65):
        part = fp8_linear(x[-num_rows:], weight, bias, batch_invariant=True)
        assert torch.equal(part, whole[-num_rows:])
    assert all(launch == launches[0] for launch in launches)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("activations", [None, "float32"])
@pytest.mark.parametrize("in_features", [100, 299, 640])  # of four slices the last are empty
def test_slices_add_up(
    device: str, activations: ActivationScale | None, in_features: int, launches: list[Config]
) -> None:
    weight, decoded = make_weight([20, 9], in_features, activations)
    bias = draw(29, seed=2).to(HALF)
    for num_rows in (3, 65):  # the last is not split among programs
        x = draw(num_rows, in_features, seed=num_rows).to(HALF)
        actual = fp8_linear(x.to(device), on_device(weight, device), bias.to(device))
        oracle = quantized(x, activations) @ decoded.T + bias.double()
        assert_product_matches(actual, oracle, activations is not None)
        assert_test_has_power(actual, oracle)
    assert launches


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_a_split_product_writes_its_rows_and_no_others(
    device: str, launches: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory around the rows, and the partial sums before they are written, are NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    weight, decoded = make_weight([45], 299, None)
    wide = torch.full((9, 310), float("nan"), dtype=HALF)
    wide[2:5, 5:304] = draw(3, 299).to(HALF)
    monkeypatch.setattr(quant_triton.torch, "empty", poisoned)
    actual = fp8_linear(wide.to(device)[2:5, 5:304], on_device(weight, device))
    assert_matches(actual, wide[2:5, 5:304].double() @ decoded.T)
    assert launches


@pytest.mark.parametrize("arch", [80, 90])
def test_small_matrices_are_sliced_by_their_shape_alone(arch: int) -> None:
    """So that 132 multiprocessors have work, whatever the number of rows of a decode."""

    def slices(num_rows: int, out_features: int, in_features: int) -> int:
        config = quant_triton.fp8_linear_config(
            arch, torch.uint8, num_rows, out_features, in_features, fp8_dot=arch >= 89
        )
        return int(config["SLICES"])

    for num_rows in (1, 7, MAX_DECODE_ROWS):
        assert slices(num_rows, 576, 7168) * 18 >= 132
        assert slices(num_rows, 1536, 7168) * 48 >= 132
        assert slices(num_rows, 2112, 7168) * 66 >= 132
        assert slices(num_rows, 7168, 2048) == 1
    assert slices(MAX_DECODE_ROWS + 1, 576, 7168) == 1


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
