"""The bodies of linear one by one: ragged blocks, poisoned neighbours, slices, and equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear_gemv_triton, linear_slices_triton, linear_triton
from kernels.activation import silu_and_mul
from kernels.linear import heads_linear, linear, linear_silu_and_mul
from tests.kernels.passes import DEVICES, HALF, INTERPRETED, assert_matches, assert_test_has_power
from tests.kernels.test_linear import draw, oracle_gated

TRITON_DEVICES = DEVICES if INTERPRETED else DEVICES[1:]
GEMV = {"BLOCK_N": 16, "BLOCK_K": 64, "STAGES": 2, "UNROLL": 2, "num_warps": 1}
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
LAUNCHES = {
    "gemv": ("gemv", GEMV | {"SLICES": 1}),
    "gemv sliced": ("gemv", GEMV | {"SLICES": 3}),
    "tile": ("tile", TILE | {"SLICES": 1}),
    "tile sliced": ("tile", TILE | {"SLICES": 4}),
    "tile unsliced": ("tile", TILE | {"SLICES": 4}),
}
# in_features, out_features: less than a block; 576 + 8; whole blocks; a last slice of one channel
SHAPES = [(13, 6), (584, 18), (128, 32), (129, 50)]
DTYPES = [torch.float32, HALF]
NUM_ROWS = [1, 2, 3, 16, 33, 64, 65]


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those that launches took; NaN before, and followed by NaN."""
    taken = []

    def poisoned(slices: int, num_rows: int, out_features: int, device: torch.device) -> Tensor:
        space = torch.full((slices + 1, num_rows, out_features), float("nan"), device=device)
        taken.append(space)
        return space[:slices]

    monkeypatch.setattr(linear_slices_triton, "workspace", poisoned)
    return taken


def launch(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gated: bool
) -> None:
    body, config = LAUNCHES[name]
    num_blocks = -(-weight.shape[1] // config["BLOCK_K"])
    config = config | {
        "SLICES": -(-num_blocks // -(-num_blocks // config["SLICES"])),
        "WHOLE_K": weight.shape[1] % config["BLOCK_K"] == 0,
    }
    if body == "gemv":
        linear_gemv_triton.launch_gemv(x, weight, bias, out, gated, config)
    else:
        linear_triton.launch_tile(x, weight, bias, out, gated, config)


def poisoned(values: Tensor, device: str) -> Tensor:
    """The same values inside a larger tensor of NaN."""
    space = torch.full([size + 8 for size in values.shape], float("nan"), dtype=values.dtype)
    inside = tuple(slice(3, 3 + size) for size in values.shape)
    space[inside] = values
    return space.to(device)[inside]


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_each_body_among_poison(
    device: str,
    name: str,
    dtype: torch.dtype,
    gated: bool,
    in_features: int,
    out_features: int,
    workspaces: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        linear_triton, "MIN_PROGRAMS_PER_MULTIPROCESSOR", 0 if "unsliced" in name else 2
    )
    num_rows = 3 if "gemv" in name else 19
    x = draw(num_rows, in_features).to(dtype)
    weight = (draw(out_features, in_features, seed=1) * in_features**-0.5).to(dtype)
    bias = draw(out_features, seed=2).to(dtype)
    canary = torch.full((num_rows + 16, out_features // (1 + gated)), 7.0, dtype=dtype)
    canary = canary.to(device)
    moved = [poisoned(tensor, device) for tensor in (x, weight, bias)]
    launch(name, *moved, canary[:num_rows], gated)
    actual = canary[:num_rows]
    product = x.double() @ weight.double().T + bias.double()
    oracle = oracle_gated(x, weight, bias) if gated else product
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)
    assert bool((canary[num_rows:] == 7.0).all())
    is_sliced = name.endswith(" sliced") and in_features > GEMV["BLOCK_K"]
    assert len(workspaces) == is_sliced
    assert all(bool(space[-1].isnan().all()) for space in workspaces)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("name", ["gemv", "gemv sliced", "tile", "tile sliced"])
def test_rows_widen_to_an_fp32_weight_and_sums_stay_fp32(device: str, name: str) -> None:
    x, weight = draw(3, 200).to(HALF), draw(30, 200, seed=1)
    for matrix in (weight, weight.to(HALF)):
        out = torch.empty((3, 30), device=device)
        launch(name, x.to(device), matrix.to(device), None, out, False)
        assert_matches(out, x.double() @ matrix.double().T)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_gated_roundings_are_those_of_the_two_steps(device: str, name: str) -> None:
    """Small integers have exact sums in any order, so nothing but the roundings is left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (4, 128), generator=generator).to(device, HALF)
    gate_up = (torch.randint(-3, 4, (60, 128), generator=generator) / 16).to(device, HALF)
    bias = (draw(60, seed=1) / 8).to(device, HALF)
    fused = torch.empty((4, 30), dtype=HALF, device=device)
    product = torch.empty((4, 60), dtype=HALF, device=device)
    launch(name, x, gate_up, bias, fused, True)
    launch(name, x, gate_up, bias, product, False)
    assert torch.equal(fused, silu_and_mul(product))


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_bias_is_added_before_rounding(device: str, name: str) -> None:
    """1 + 2^-9 rounds to 1 in bf16, and 1 + 2^-12 in fp16; the bias that cancels it comes first."""
    small = 2.0**-12 if INTERPRETED else 2.0**-9
    x = torch.zeros((4, 160), dtype=HALF, device=device)
    x[:, 0], x[:, 159] = 1.0, 2.0**-6
    weight = torch.zeros((16, 160), dtype=HALF, device=device)
    weight[:, 0], weight[:, 159] = 1.0, small * 64
    bias = torch.full((16,), -1.0, dtype=HALF, device=device)
    out = torch.empty((4, 16), dtype=HALF, device=device)
    launch(name, x, weight, bias, out, False)
    assert out.tolist() == [[small] * 16] * 4


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_in_one_program_or_in_several_give_the_same_bits(
    device: str, dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = draw(33, 584).to(device, dtype), draw(48, 584, seed=1).to(device, dtype)
    bias = draw(48, seed=2).to(device, dtype)
    sliced = torch.empty((33, 48 // (1 + gated)), dtype=dtype, device=device)
    unsliced = torch.empty_like(sliced)
    launch("tile sliced", x, weight, bias, sliced, gated)
    monkeypatch.setattr(linear_triton, "MIN_PROGRAMS_PER_MULTIPROCESSOR", 0)
    launch("tile sliced", x, weight, bias, unsliced, gated)
    assert torch.equal(sliced, unsliced)
    whole = torch.empty_like(sliced)
    launch("tile", x, weight, bias, whole, gated)
    if dtype == torch.float32:  # so the order of sums shows in the bits
        assert not torch.equal(sliced, whole)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("name", ["gemv", "gemv sliced"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_to_four_rows_have_the_same_bits(
    device: str, name: str, dtype: torch.dtype, gated: bool
) -> None:
    x, weight = draw(4, 200).to(device, dtype), draw(48, 200, seed=1).to(device, dtype)

    def multiply(rows: Tensor) -> Tensor:
        out = torch.empty((len(rows), 48 // (1 + gated)), dtype=dtype, device=device)
        launch(name, rows, weight, None, out, gated)
        return out

    whole = multiply(x)
    assert torch.equal(multiply(x.flip(0)), whole.flip(0))
    for num_rows in (1, 2, 3):
        assert torch.equal(multiply(x[-num_rows:]), whole[-num_rows:])


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_invariant_row_has_the_same_bits_in_any_batch(
    device: str, dtype: torch.dtype, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_triton, "MIN_PROGRAMS_PER_MULTIPROCESSOR", 2 if sliced else 0)
    x = draw(NUM_ROWS[-1], 520).to(device, dtype)
    weight = draw(40, 520, seed=1).to(device, dtype)
    router = draw(20, 520, seed=2).to(device)
    ops: dict[str, Any] = {"linear": lambda rows: linear(rows, weight, batch_invariant=True)}
    if dtype != torch.float32:
        ops |= {
            "logits": lambda rows: linear(
                rows, weight, out_dtype=torch.float32, batch_invariant=True
            ),
            "router": lambda rows: linear(rows, router, batch_invariant=True),
            "gated": lambda rows: linear_silu_and_mul(rows, weight, batch_invariant=True),
        }
    for name, op in ops.items():
        assert_same_bits_in_any_batch(name, op, x)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("in_features_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_heads_have_the_same_bits_in_any_batch(
    device: str, dtype: torch.dtype, in_features_first: bool
) -> None:
    x = draw(NUM_ROWS[-1], 2, 100).to(device, dtype)
    weight = draw(2, 70, 100, seed=1).to(device, dtype)
    weight = weight.mT.contiguous().mT if in_features_first else weight
    assert_same_bits_in_any_batch(
        "heads", lambda rows: heads_linear(rows, weight, batch_invariant=True), x
    )


def assert_same_bits_in_any_batch(name: str, op: Any, x: Tensor) -> None:
    whole = op(x)
    for num_rows in NUM_ROWS[:-1]:
        assert torch.equal(op(x[:num_rows]), whole[:num_rows]), (name, num_rows)
    for row in (40, 64):
        assert torch.equal(op(x[row : row + 1]), whole[row : row + 1]), (name, row)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("in_features_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_among_poison(device: str, dtype: torch.dtype, in_features_first: bool) -> None:
    x, weight = draw(19, 2, 72).to(dtype), draw(2, 34, 72, seed=1).to(dtype)
    stored = weight.mT if in_features_first else weight
    moved = poisoned(stored, device)
    canary = torch.full((35, 2, 40), 7.0, dtype=dtype, device=device)
    out = canary[:19, :, 3:37]
    linear_triton.launch_heads(
        poisoned(x, device),
        moved.mT if in_features_first else moved,
        out,
        TILE | {"WHOLE_K": False},
    )
    oracle = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    assert_matches(out, oracle)
    assert_test_has_power(out, oracle)
    out.fill_(7.0)
    assert bool((canary == 7.0).all())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 13), (2048, 1536), (152064, 3584), (3584, 18944)])
def test_launches_that_promise_equal_bits_do_not_follow_the_rows(
    shape: tuple[int, int], dtype: torch.dtype, capability: int
) -> None:
    """And no slice of any launch is empty."""

    def configs(batch_invariant: bool, rows: list[int]) -> list[tuple[str, dict[str, Any]]]:
        return [
            linear_triton.linear_config(dtype, num_rows, *shape, capability, batch_invariant)
            for num_rows in rows
        ]

    invariant = configs(True, [1, 5, 64, 4096])
    assert all(config == invariant[0] for config in invariant)
    few = configs(False, [1, 2, 3, 4])
    assert all(config == few[0] for config in few if config[0] == few[0][0] == "gemv")
    for body, config in invariant + few + configs(False, [5, 16, 17, 32]):
        if body != "cublas":
            num_blocks = -(-shape[1] // config["BLOCK_K"])
            length = -(-num_blocks // config["SLICES"])
            assert (config["SLICES"] - 1) * length < num_blocks
