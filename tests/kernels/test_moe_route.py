"""The routers against a plain Python rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.moe import route_noaux_tc, route_softmax
from tests.kernels.passes import DEVICES, INTERPRETED, assert_matches, assert_test_has_power

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
