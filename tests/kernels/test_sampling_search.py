"""The threshold that top-k and top-p find without a sort, against a sort, where rows are unkind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sampling_triton
from kernels.sampling import sample
from kernels.sampling_search_triton import floor_of_row
from tests.kernels.passes import DEVICES, HALF, INTERPRETED
from tests.kernels.sampling_oracle import FloatArray, Row, make_batch

# numpy, of infinities in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VOCAB_SIZE = 180 if INTERPRETED else 20_000
ROUNDING = 1e-5  # fp32 weights, of the mass they add up to
INFINITY = float("inf")


@triton.jit
def floors_kernel(  # type: ignore[no-untyped-def]
    search_ptr,
    top_k_ptr,
    top_p_ptr,
    floors_ptr,
    vocab_size,
    ANY_TOP_K: tl.constexpr,
    ANY_TOP_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    floor = floor_of_row(search_ptr, row, top_k, top_p, vocab_size, ANY_TOP_K, ANY_TOP_P)
    tl.store(floors_ptr + row, floor.to(tl.int64))


Floors = Callable[[Tensor, list[Row], str], FloatArray]


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Floors]:
    """The lowest logit that each row keeps, as the draw finds it; memory is dirty before."""
    launches: list[tuple[Any, ...]] = []
    draw_kernel = sampling_triton.draw_kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **config: Any) -> None:
                launches.append(arguments)
                draw_kernel[grid](*arguments, **config)

            return launch

    monkeypatch.setattr(sampling_triton, "draw_kernel", Recorded())
    if INTERPRETED:
        configs = {"sample": {"BLOCK": 64}, "sample_search": {"SPAN": 2}}
        monkeypatch.setattr(sampling_triton, "launch_config", lambda op, **_: dict(configs[op]))

    def floors(logits: Tensor, rows: list[Row], device: str) -> FloatArray:
        batch = make_batch(rows, logits.shape[1], device=device)
        any_top_k = any(row.top_k > 0 for row in rows)
        any_top_p = any(row.top_p < 1 for row in rows)
        sample(logits.to(device), replace(batch, any_top_k=any_top_k, any_top_p=any_top_p))
        found = torch.zeros(len(rows), dtype=torch.int64, device=device)
        floors_kernel[(len(rows),)](
            launches[-1][2],
            batch.top_k,
            batch.top_p,
            found,
            logits.shape[1],
            ANY_TOP_K=any_top_k,
            ANY_TOP_P=any_top_p,
        )
        ordered = (found.cpu().numpy() - 2**31).astype(np.int32)
        bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
        return bits.view(np.float32).astype(np.float64)

    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield floors
    torch.use_deterministic_algorithms(False)


def check_floors(floors: Floors, logits: Tensor, rows: list[Row], device: str) -> None:
    """By count the floor is the k-th largest; by mass the largest whose tail holds the share."""
    found = floors(logits, rows, device)
    for index, row in enumerate(rows):
        values = logits[index].float().numpy().copy()
        for token_id, bias in row.bias.items():
            values[token_id] += np.float32(bias)
        exact = values.astype(np.float64)
        floor = found[index]
        assert floor in exact, (row, floor)
        if row.top_k > 0:
            kth = np.sort(exact)[::-1][min(row.top_k, exact.size) - 1]
            if row.top_p == 1:
                assert floor == kth, (row, floor, kth)
            exact = exact[exact >= kth]
        if row.top_p < 1:
            largest = exact.max()
            temperature = np.float64(np.float32(row.temperature))
            weights = np.where(exact == largest, 1.0, np.exp((exact - largest) / temperature))
            share = np.float64(np.float32(row.top_p)) * weights.sum()
            assert weights[exact >= floor].sum() >= share * (1 - ROUNDING), (row, floor)
            assert weights[exact > floor].sum() <= share * (1 + ROUNDING), (row, floor)


def unkind_logits(kind: str, num_rows: int) -> Tensor:
    shape = num_rows, VOCAB_SIZE
    generator = torch.Generator().manual_seed(len(kind))
    normal = torch.randn(shape, generator=generator)
    if kind == "equal":
        return torch.full(shape, 1.75)
    if kind == "ties":
        return (normal * 2).round() / 2
    if kind == "flat":
        return normal * 0.01
    if kind == "huge":
        return normal * 1e4
    if kind == "around zero":  # denormals of both signs, and both zeros
        signs = normal.sign()
        return signs * torch.randint(0, 40, shape, generator=generator) * 1e-44
    if kind == "one bit apart":
        bits = 0x40400000 + torch.randint(0, 290, shape, generator=generator)
        return bits.int().view(torch.float32) * torch.where(normal < 0, -1.0, 1.0)
    if kind == "steps":  # at the bounds of nearness, and one bit to either side of them
        steps = torch.randint(0, 290, shape, generator=generator) / 8
        bounds = 37.5 - steps
        bits = bounds.view(torch.int32) + torch.randint(-1, 2, shape, generator=generator)
        return bits.int().view(torch.float32).clamp(max=37.5)
    assert kind == "far"  # all but a few are further from the largest than nearness tells
    logits = normal * 20 - 500
    logits[:, 5:9] = torch.tensor([3.0, 2.0, -1.0, 2.0])
    return logits


KINDS = ["equal", "ties", "flat", "huge", "around zero", "one bit apart", "steps", "far"]
FILTERS = [
    Row(top_k=1),
    Row(top_k=4),
    Row(top_k=5, temperature=0.02),
    Row(top_k=VOCAB_SIZE // 3),
    Row(top_k=VOCAB_SIZE - 1),
    Row(top_k=VOCAB_SIZE),
    Row(top_k=2**31 - 1, temperature=100.0),
    Row(top_p=0.0),
    Row(top_p=1e-6),
    Row(top_p=0.5),
    Row(top_p=0.95, temperature=0.6),
    Row(top_p=0.9, temperature=1e-3),
    Row(top_p=0.7, temperature=100.0),
    Row(top_p=0.8, temperature=1e-45),
    Row(top_p=float(np.nextafter(np.float32(1), np.float32(0))), temperature=3.0),
    Row(top_k=20, top_p=0.6),
    Row(top_k=3, top_p=0.999, temperature=2.0),
    Row(top_k=VOCAB_SIZE + 7, top_p=0.4, min_p=0.2, temperature=5.0),
]


@pytest.mark.parametrize("device", DEVICES[-1:])  # the torch body sorts
@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_is_that_of_a_sort(device: str, kind: str, floors: Floors) -> None:
    filters = FILTERS
    if INTERPRETED:  # each kind meets a third of them
        filters = FILTERS[KINDS.index(kind) % 3 :: 3]
    check_floors(floors, unkind_logits(kind, len(filters)), filters, device)


@pytest.mark.parametrize("device", DEVICES[-1:])
def test_the_threshold_of_halves(device: str, floors: Floors) -> None:
    for dtype in {HALF, torch.float16}:
        rows = [Row(top_k=9), Row(top_p=0.95, temperature=0.6), Row(top_k=90, top_p=0.8)]
        logits = 3 * unkind_logits("ties", len(rows)) + unkind_logits("flat", len(rows))
        check_floors(floors, logits.to(dtype), rows, device)


@pytest.mark.parametrize("device", DEVICES[-1:])
@pytest.mark.parametrize("filters", [Row(top_k=3), Row(top_k=30), Row(top_p=0.9, temperature=0.5)])
def test_the_threshold_among_infinities(device: str, filters: Row, floors: Floors) -> None:
    """Biases take logits to either infinity; ties at the upper one share the row."""
    logits = unkind_logits("flat", 4)
    logits[:, 7:9] = 3e38
    logits[:, 70] = 3.0
    up, down = {7: 3e38}, {id_: -INFINITY for id_ in range(10, VOCAB_SIZE) if id_ != 70}
    biases = [up, up | {8: 3e38}, up | down, down]
    check_floors(floors, logits, [replace(filters, bias=bias) for bias in biases], device)
