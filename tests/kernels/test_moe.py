"""Sorting by expert against Python's, the experts against float64, and batch invariance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import moe, moe_triton
from kernels.activation import silu_and_mul
from kernels.configs import launch_config
from kernels.moe import moe_experts, route_noaux_tc
from kernels.moe_align_triton import align, align_kernel
from kernels.quant import ActivationScale, Fp8Weight
from tests.kernels.allocations import LargestTensor
from tests.kernels.fp8_oracle import assert_product_matches, make_weight, on_device, quantized
from tests.kernels.passes import (
    DEVICES,
    DTYPES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

# num_experts, top_k, hidden, intermediate; the second and third start rows off 16 bytes
EXPERTS = [(8, 2, 48, 24), (5, 3, 13, 7), (6, 6, 33, 20), (3, 1, 16, 40)]
# the formats of gate_up and down; a rounded activation needs fp32 around it to have one oracle
Formats = tuple[ActivationScale | None, ActivationScale | None]
FORMATS: list[tuple[torch.dtype, Formats]] = [
    (torch.float32, (None, None)),
    (torch.float32, ("ue8m0", "float32")),
    (HALF, (None, None)),
    (HALF, ("float32", None)),
]
Experts = tuple[Tensor, Tensor, Tensor, Fp8Weight, Fp8Weight]
TRITON_DEVICES = DEVICES[-1:]  # where Triton bodies run
Config = dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """How the grouped products are launched from now on, one after the other."""
    seen: list[Config] = []

    def spy(op: str, **facts: Any) -> Config:
        config = launch_config(op, **facts)
        if op.startswith("grouped"):
            seen.append(config)
        return config

    monkeypatch.setattr(moe_triton, "launch_config", spy)
    return seen


# num_tokens, num_experts, top_k: one slot; slots and experts across blocks; at and above the limit
ALIGNED = [(1, 1, 1), (5, 3, 1), (43, 33, 6), (129, 40, 2), (128, 16, 8), (205, 7, 5)]


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), ALIGNED)
@pytest.mark.parametrize("spread", [True, False])
def test_slots_are_sorted_by_expert(
    device: str, num_tokens: int, num_experts: int, top_k: int, spread: bool
) -> None:
    """As Python sorts them; not spread, all choose the last expert or the first."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    if not spread:
        ids = torch.where(ids % 2 == 0, 0, num_experts - 1)
    order, expert_starts = align(ids.to(device), num_experts)
    slot_experts = ids.flatten().tolist()
    assert order.dtype == expert_starts.dtype == torch.int64
    assert order.tolist() == sorted(range(len(slot_experts)), key=lambda s: slot_experts[s])
    starts = [sum(e < expert for e in slot_experts) for expert in range(num_experts + 1)]
    assert expert_starts.tolist() == starts


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_sorting_reads_and_writes_no_more_than_there_is(device: str) -> None:
    num_slots, num_experts = 21, 5
    slot_experts = torch.full((64,), -1000, device=device)
    slot_experts[:num_slots] = torch.arange(num_slots, device=device) * 3 % num_experts
    order, starts = (torch.full((64,), -7, device=device) for _ in range(2))
    align_kernel[(4,)](  # one program more than is needed
        slot_experts, order, starts, num_slots, num_experts, COUNTED=16, KEYS=32
    )
    assert sorted(order[:num_slots].tolist()) == list(range(num_slots))
    assert starts[: num_experts + 1].tolist() == [0, 5, 9, 13, 17, 21]
    assert order[num_slots:].tolist() == [-7] * (64 - num_slots)
    assert starts[num_experts + 1 :].tolist() == [-7] * (64 - num_experts - 1)


def make_experts(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, inter: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    weights = 0.2 + torch.rand(num_tokens, top_k, generator=generator)
    gate_up = torch.randn(num_experts, 2 * inter, hidden, generator=generator) / hidden**0.5
    down = torch.randn(num_experts, hidden, inter, generator=generator) / inter**0.5
    return x, ids, weights, gate_up.to(dtype), down.to(dtype)


def oracle_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    formats: Formats = (None, None),
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    rows = quantized(x, formats[0])
    for token in range(x.shape[0]):
        for expert_id, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate, up = (gate_up[expert_id].double() @ rows[token]).chunk(2)
            hidden = quantized((torch.nn.functional.silu(gate) * up)[None], formats[1])[0]
            out[token] += weight * (down[expert_id].double() @ hidden)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 21])
@pytest.mark.parametrize(("num_experts", "top_k", "hidden", "inter"), EXPERTS)
def test_moe_experts(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    inter: int,
) -> None:
    tensors = make_experts(num_tokens, num_experts, top_k, hidden, inter, dtype)
    actual = moe_experts(*(tensor.to(device) for tensor in tensors))
    assert actual.dtype == dtype
    assert_matches(actual, oracle_experts(*tensors))
    assert_test_has_power(actual, oracle_experts(*tensors))


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("activations", [None, "float32"])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("rows_per_expert", [0, 96])
def test_gating_in_the_product_rounds_as_silu_and_mul_does(
    device: str,
    dtype: torch.dtype,
    is_fp8: bool,
    activations: ActivationScale | None,
    rows_per_expert: int,
) -> None:
    """Two experts with 9 and 4 slots; gate and up of 72 rows end within a block."""
    x = make_experts(13, 2, 1, 160, 72, dtype)[0].to(device)
    fp8_weight, decoded = make_weight([72, 72], 160, activations, num_experts=2)
    weight = on_device(fp8_weight, device) if is_fp8 else decoded.to(device, dtype)
    order = torch.arange(13, device=device)
    starts = torch.tensor([0, 9, 13], device=device)
    facts = moe_triton.grouped_facts(1, 1, (2, 144, 160))
    facts |= {"rows": 65 if rows_per_expert else 1, "rows_per_expert": rows_per_expert}
    parts = (x, weight, order, starts, 1)
    gated = moe_triton._grouped_linear(*parts, gated=True, facts=facts)
    assert torch.equal(
        gated, silu_and_mul(moe_triton._grouped_linear(*parts, gated=False, facts=facts))
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_shared_experts_are_added_to_the_rounded_sum(
    device: str, dtype: torch.dtype, num_tokens: int
) -> None:
    tensors = make_experts(num_tokens, 8, 2, 48, 24, dtype)
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(num_tokens, 60, generator=generator).to(device, dtype)[:, 5:53]
    routed = moe_experts(*(tensor.to(device) for tensor in tensors))
    actual = moe_experts(*(tensor.to(device) for tensor in tensors), shared)
    assert actual.dtype == dtype
    assert torch.equal(actual, routed + shared)
    oracle = oracle_experts(*tensors) + shared.cpu().double()
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("is_fp8", "activations"), [(False, None), (True, None), (True, "ue8m0")])
def test_prompts_take_larger_blocks(
    device: str,
    top_k: int,
    is_fp8: bool,
    activations: ActivationScale | None,
    launches: list[Config],
) -> None:
    """35 rows per expert, or 99; experts with more rows than a block and with fewer."""
    x, ids, weights, _, _ = make_experts(70 if top_k == 1 else 99, 2, top_k, 144, 32, HALF)
    if top_k == 1:
        ids = (torch.arange(70) >= 66).long().view(70, 1)
    gate_up, gate_up_oracle = make_weight([32, 32], 144, activations, num_experts=2, seed=1)
    down, down_oracle = make_weight([144], 32, None, num_experts=2, seed=2)
    matrices = (on_device(gate_up, device), on_device(down, device))
    decoded = (gate_up_oracle, down_oracle)
    if not is_fp8:
        halves = [matrix.to(HALF) for matrix in decoded]
        decoded = tuple(half.double() for half in halves)
        matrices = tuple(half.to(device) for half in halves)
    actual = moe_experts(x.to(device), ids.to(device), weights.to(device), *matrices)
    assert all(launch["BLOCK_M"] >= 64 for launch in launches) and len(launches) == 2
    oracle = oracle_experts(x, ids, weights, *decoded, (activations, None))
    assert_product_matches(actual, oracle, activations is not None)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("is_fp8", "activations"), [(False, None), (True, None), (True, "float32")]
)
def test_a_batch_invariant_token_has_the_same_bits_in_any_batch(
    device: str, is_fp8: bool, activations: ActivationScale | None, launches: list[Config]
) -> None:
    """On a GPU there are 100 rows per expert in the largest batch, and fewer than one alone."""
    x, ids, weights, *matrices = (
        tensor.to(device) for tensor in make_experts(200, 2, 1, 48, 32, HALF)
    )
    if is_fp8:
        matrices = [
            on_device(make_weight([32, 32], 48, activations, num_experts=2)[0], device),
            on_device(make_weight([48], 32, activations, num_experts=2)[0], device),
        ]
    shared = x.flip(0)
    whole = moe_experts(x, ids, weights, *matrices, shared, batch_invariant=True)
    for num_tokens in (1, 2, 16, 64, 65):
        last = slice(-num_tokens, None)
        part = moe_experts(
            x[last], ids[last], weights[last], *matrices, shared[last], batch_invariant=True
        )
        assert torch.equal(part, whole[last])
    assert all(launch == launches[0] for launch in launches)
    at_most_64 = slice(-64, None)
    decodes = moe_experts(x[at_most_64], ids[at_most_64], weights[at_most_64], *matrices)
    for num_tokens in (1, 33):
        last = slice(-num_tokens, None)
        part = moe_experts(x[last], ids[last], weights[last], *matrices)
        assert torch.equal(part, decodes[last])


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_no_row_is_read_before_it_is_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, and the rows have NaN around them."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-1)

    tensors = make_experts(5, 6, 3, 45, 21, HALF)
    moved = [tensor.to(device) for tensor in tensors]
    around = torch.full((9, 60), float("nan"), dtype=HALF, device=device)
    around[2:7, 4:49] = moved[0]
    monkeypatch.setattr(moe_triton.torch, "empty", poisoned)
    actual = moe_experts(around[2:7, 4:49], *moved[1:])
    assert_matches(actual, oracle_experts(*tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("num_experts", "top_k", "hidden", "inter"), EXPERTS[:2])
def test_a_token_has_the_same_bits_in_any_batch(
    device: str, dtype: torch.dtype, num_experts: int, top_k: int, hidden: int, inter: int
) -> None:
    tensors = make_experts(23, num_experts, top_k, hidden, inter, dtype)
    x, ids, weights, gate_up, down = (tensor.to(device) for tensor in tensors)
    whole = moe_experts(x, ids, weights, gate_up, down)
    for start, end in [(0, 1), (22, 23), (3, 5), (4, 7), (9, 22), (1, 23)]:
        rows = slice(start, end)
        part = moe_experts(x[rows], ids[rows], weights[rows], gate_up, down)
        assert torch.equal(part, whole[rows])
    backwards = moe_experts(x.flip(0), ids.flip(0), weights.flip(0), gate_up, down)
    assert torch.equal(backwards, whole.flip(0))


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_may_choose_one_expert(device: str) -> None:
    x, _, _, gate_up, down = make_experts(18, 6, 1, 16, 8, torch.float32)
    ids = torch.full((18, 1), 4)
    weights = torch.ones(18, 1)
    actual = moe_experts(*(tensor.to(device) for tensor in (x, ids, weights, gate_up, down)))
    assert_matches(actual, oracle_experts(x, ids, weights, gate_up, down))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    _, _, _, gate_up, down = make_experts(1, 4, 2, 16, 8, torch.float32)
    ids, weights = route_noaux_tc(
        torch.empty((0, 4), device=device), torch.zeros(4, device=device), 2, 1, 1, True, 1.0
    )
    empty = torch.empty((0, 16), device=device)
    assert ids.shape == weights.shape == (0, 2)
    assert moe_experts(empty, ids, weights, gate_up.to(device), down.to(device)).shape == (0, 16)


def make_fp8_experts(
    num_tokens: int, dtype: torch.dtype, formats: Formats
) -> tuple[Experts, tuple[Tensor, Tensor]]:
    """Five experts, two per token; no matrix is a multiple of 128 either way. In float64 too."""
    hidden, inter = 160, 136
    x, ids, weights, _, _ = make_experts(num_tokens, 5, 2, hidden, inter, dtype)
    gate_up, gate_up_oracle = make_weight([inter, inter], hidden, formats[0], num_experts=5, seed=1)
    down, down_oracle = make_weight([hidden], inter, formats[1], num_experts=5, seed=2)
    return (x, ids, weights, gate_up, down), (gate_up_oracle, down_oracle)


def apply(experts: Experts, device: str) -> Tensor:
    x, ids, weights, gate_up, down = experts
    return moe_experts(
        x.to(device),
        ids.to(device),
        weights.to(device),
        on_device(gate_up, device),
        on_device(down, device),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 21])
@pytest.mark.parametrize(("dtype", "formats"), FORMATS)
def test_fp8_experts(device: str, num_tokens: int, dtype: torch.dtype, formats: Formats) -> None:
    experts, decoded = make_fp8_experts(num_tokens, dtype, formats)
    oracle = oracle_experts(*experts[:3], *decoded, formats)
    actual = apply(experts, device)
    assert actual.dtype == dtype
    assert_product_matches(actual, oracle, any(formats))
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formats", [(None, None), ("float32", "float32")])
def test_fp8_experts_are_hit_unevenly(device: str, formats: Formats) -> None:
    """Expert 4 by every token, 1 by one token, the others by none."""
    (x, _, weights, *matrices), decoded = make_fp8_experts(17, torch.float32, formats)
    for ids in (torch.full((17, 1), 4), torch.tensor([[4, 1]] + [[4, 4]] * 16)):
        some = weights[:, : ids.shape[1]]
        actual = apply((x, ids, some, *matrices), device)
        assert_product_matches(
            actual, oracle_experts(x, ids, some, *decoded, formats), any(formats)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "limit", [moe.MAX_DECODED_BYTES] + ([] if INTERPRETED else [4 * 160 * 300])
)
@pytest.mark.parametrize(("dtype", "formats"), FORMATS[1:3])
def test_fp8_tokens_have_the_same_bits_in_any_batch(
    device: str, limit: int, dtype: torch.dtype, formats: Formats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all experts are decoded at once or one by one."""
    monkeypatch.setattr(moe, "MAX_DECODED_BYTES", limit)
    num_tokens = 5 if INTERPRETED else 23
    (x, ids, weights, *matrices), _ = make_fp8_experts(num_tokens, dtype, formats)
    whole = apply((x, ids, weights, *matrices), device)
    for start, end in [(0, 1), (2, num_tokens)]:
        rows = slice(start, end)
        part = apply((x[rows], ids[rows], weights[rows], *matrices), device)
        assert torch.equal(part, whole[rows])
    backwards = apply((x.flip(0), ids.flip(0), weights.flip(0), *matrices), device)
    assert torch.equal(backwards, whole.flip(0))


@pytest.mark.skipif(INTERPRETED, reason="the torch body's")
@pytest.mark.parametrize("num_features", [2 * 272, 272, 50])
@pytest.mark.parametrize(("dtype", "formats"), FORMATS)
def test_the_torch_body_decodes_a_few_experts_at_a_time(
    num_features: int, dtype: torch.dtype, formats: Formats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experts, one, or 50 rows of one."""
    monkeypatch.setattr(moe, "MAX_DECODED_BYTES", 4 * 160 * num_features)
    experts, decoded = make_fp8_experts(3, dtype, formats)
    with LargestTensor() as largest:
        actual = apply(experts, "cpu")
    assert_matches(actual, oracle_experts(*experts[:3], *decoded, formats))
    assert largest.num_elements <= 160 * num_features


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_nothing_as_large_as_tokens_times_experts_is_made(device: str, is_fp8: bool) -> None:
    num_tokens, num_experts, hidden, inter = 60, 8, 24, 16
    tensors = make_experts(num_tokens, num_experts, 2, hidden, inter, torch.float32)
    x, ids, weights, gate_up, down = (tensor.to(device) for tensor in tensors)
    with LargestTensor() as dense:
        torch.einsum("th,eih->tei", x, down.transpose(1, 2))
    assert dense.num_elements >= num_tokens * num_experts * inter
    matrices: tuple[Tensor | Fp8Weight, Tensor | Fp8Weight] = (gate_up, down)
    if is_fp8:
        matrices = (
            on_device(make_weight([inter, inter], hidden, None, num_experts=8)[0], device),
            on_device(make_weight([hidden], inter, None, num_experts=8)[0], device),
        )
    with LargestTensor() as largest:
        moe_experts(x, ids, weights, *matrices)
    assert 0 < largest.num_elements < num_tokens * num_experts * inter
