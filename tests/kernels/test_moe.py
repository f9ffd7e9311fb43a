"""The router against a plain Python rule, the experts against float64, and batch invariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import moe
from kernels.moe import moe_experts, route_noaux_tc, route_softmax
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

# num_experts, top_k, num_groups, top_groups: one group, V3, V2's odd groups, groups of one
ROUTERS = [
    (8, 2, 1, 1),
    (256, 8, 8, 4),
    (160, 6, 8, 3),
    (20, 3, 4, 2),
    (7, 3, 7, 4),
    (512, 9, 1, 1),
]
# V1 and V2-Lite, V2, odd groups, groups of one
SOFTMAX_ROUTERS = [(64, 6, 1, 1), (160, 6, 8, 3), (20, 3, 4, 2), (7, 3, 7, 4)]
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


def oracle_route(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, factor: float
) -> tuple[list[list[int]], list[list[float]]]:
    """DeepSeek-V3's rule, token by token, in plain Python floats; ties go to the lowest id."""
    all_ids, all_weights = [], []
    size = logits.shape[1] // num_groups
    for row in logits.double().tolist():
        scores = [1 / (1 + math.exp(-logit)) for logit in row]
        choice = [score + b for score, b in zip(scores, bias.double().tolist(), strict=True)]
        groups = [choice[g * size : (g + 1) * size] for g in range(num_groups)]
        group_scores = [sum(sorted(group, reverse=True)[:2]) for group in groups]
        kept = sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_groups]
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        total = sum(scores[e] for e in chosen) + 1e-20
        all_ids.append(chosen)
        all_weights.append([factor * scores[e] / total for e in chosen])
    return all_ids, all_weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), ROUTERS)
def test_route(
    device: str, shift: float, num_experts: int, top_k: int, num_groups: int, top_groups: int
) -> None:
    """With a bias of about -3 every choice is negative, and dropped groups still stay out."""
    generator = torch.Generator().manual_seed(num_experts)
    num_tokens = 3 if INTERPRETED else 29
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    bias = shift + 0.3 * torch.randn(num_experts, generator=generator)
    ids, weights = route_noaux_tc(
        logits.to(device), bias.to(device), top_k, num_groups, top_groups, True, 2.5
    )
    oracle_ids, oracle_weights = oracle_route(logits, bias, top_k, num_groups, top_groups, 2.5)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.tolist() == oracle_ids
    assert_matches(weights, torch.tensor(oracle_weights, dtype=torch.float64))
    assert_test_has_power(weights, torch.tensor(oracle_weights, dtype=torch.float64))


def oracle_softmax(
    logits: Tensor, top_k: int, num_groups: int, top_groups: int, factor: float
) -> tuple[list[list[int]], list[list[float]]]:
    """DeepSeek-V2's rule, token by token, in plain Python floats; ties go to the lowest id."""
    all_ids, all_weights = [], []
    size = logits.shape[1] // num_groups
    for row in logits.double().tolist():
        powers = [math.exp(logit) for logit in row]
        scores = [power / math.fsum(powers) for power in powers]
        best = [max(scores[g * size : (g + 1) * size]) for g in range(num_groups)]
        kept = sorted(range(num_groups), key=lambda g: (-best[g], g))[:top_groups]
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: (-scores[e], e))[:top_k]
        all_ids.append(chosen)
        all_weights.append([factor * scores[e] for e in chosen])
    return all_ids, all_weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), SOFTMAX_ROUTERS)
def test_route_softmax(
    device: str, num_experts: int, top_k: int, num_groups: int, top_groups: int
) -> None:
    num_tokens = 4 if INTERPRETED else 29
    generator = torch.Generator().manual_seed(num_experts)
    logits = 3 * torch.randn(num_tokens, num_experts, generator=generator)
    logits[0] = logits[0].round()  # ties, of experts and of groups
    logits[1] += 200.0  # exp overflows
    ids, weights = route_softmax(logits.to(device), top_k, num_groups, top_groups, 16.0)
    oracle_ids, oracle_weights = oracle_softmax(logits, top_k, num_groups, top_groups, 16.0)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.tolist() == oracle_ids
    assert_matches(weights, torch.tensor(oracle_weights, dtype=torch.float64))
    assert_test_has_power(weights, torch.tensor(oracle_weights, dtype=torch.float64))
    first, last = (
        route_softmax(logits[rows].to(device), top_k, num_groups, top_groups, 16.0)[1]
        for rows in (slice(0, 1), slice(-1, None))
    )
    assert torch.equal(torch.cat([first, last]), weights[[0, -1]])


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_experts_of_dropped_groups_are_not_taken(device: str) -> None:
    """The best three experts lie in three groups, of which the best two stay."""
    logits = torch.full((2, 9), -1.0)
    logits[0, [8, 3, 1]] = torch.tensor([3.0, 2.5, 2.0])
    ids, weights = route_softmax(logits.to(device), 4, 3, 2, 1.0)
    assert ids.tolist() == [[8, 3, 4, 5], [0, 1, 2, 3]]  # the lowest ids of equals
    total = math.exp(3.0) + math.exp(2.5) + math.exp(2.0) + 6 * math.exp(-1.0)
    expected = [math.exp(logit) / total for logit in (3.0, 2.5, -1.0, -1.0)]  # not renormalised
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert weights[1].tolist() == pytest.approx([1 / 9] * 4, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_choices_go_to_the_lowest_ids(device: str) -> None:
    logits = torch.zeros(2, 12)
    logits[1, [3, 7, 11]] = 1.0
    bias = torch.zeros(12, device=device)
    ids, _ = route_noaux_tc(logits.to(device), bias, 4, 3, 2, True, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 7, 0, 1]]  # groups {0, 1} both times


@pytest.mark.parametrize("device", DEVICES)
def test_the_bias_chooses_and_the_score_weighs(device: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0], device=device)
    ids, weights = route_noaux_tc(logits, bias, 2, 1, 1, False, 3.0)
    assert ids.tolist() == [[3, 0]]
    expected = [3 / (1 + math.exp(1.0)), 3 / (1 + math.exp(-2.0))]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_with_negative_choices_beats_none(device: str) -> None:
    """Dropped groups are out even where every kept choice is below zero."""
    logits = torch.tensor([[4.0, 4.0, -4.0, -4.0]], device=device)
    bias = torch.tensor([-3.0, -3.0, -5.0, -5.0], device=device)
    ids, _ = route_noaux_tc(logits, bias, 2, 2, 1, True, 1.0)
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_groups", [2, 4])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which interprets
def test_a_row_of_nan_still_names_experts(device: str, top_groups: int) -> None:
    logits = torch.full((1, 20), float("nan"), device=device)
    ids, _ = route_noaux_tc(logits, torch.zeros(20, device=device), 3, 4, top_groups, True, 1.0)
    assert bool(((ids >= 0) & (ids < 20)).all())
    ids, _ = route_softmax(logits, 3, 4, top_groups, 1.0)
    assert bool(((ids >= 0) & (ids < 20)).all())


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
