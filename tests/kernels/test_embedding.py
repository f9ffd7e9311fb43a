"""embedding: rows copied bit by bit, whatever else lies in the matrix."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import compiles_loops
from kernels.embedding import embedding
from tests.kernels.passes import DEVICES, DTYPES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 37, 192, 1500])
def test_rows_are_copied(hidden_size: int, dtype: torch.dtype, device: str) -> None:
    """In any order, some twice; rows of other ids hold NaN and are not touched."""
    token_ids = torch.tensor([3, 0, 10, 3, 7])
    weight = torch.randn(11, hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    unused = torch.ones(11, dtype=torch.bool)
    unused[token_ids] = False
    weight[unused] = float("nan")
    before = weight.to(device, copy=True)
    given = before.clone()
    actual = embedding(token_ids.to(device), given)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert torch.equal(actual.cpu(), weight[token_ids])
    assert torch.equal(given.isnan(), before.isnan())
    assert torch.equal(given[token_ids], before[token_ids])


@pytest.mark.parametrize("device", DEVICES)
def test_ids_may_be_rows_of_a_longer_tensor(device: str) -> None:
    """As a step takes the first tokens of a buffer made for a larger one."""
    ids = torch.tensor([1, 4, 2, 9, 9], device=device)
    weight = torch.randn(5, 40, device=device)
    assert torch.equal(embedding(ids[:3], weight), weight[ids[:3]])


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    weight = torch.ones(5, 16, device=device)
    ids = torch.empty(0, dtype=torch.int64, device=device)
    assert embedding(ids, weight).shape == (0, 16)


@pytest.mark.gpu
def test_rows_past_two_to_the_31_values() -> None:
    """Vocabulary times hidden size of released models passes what int32 offsets reach."""
    weight = torch.zeros(140_000, 16_384, dtype=torch.float16, device="cuda")
    weight[-1] = torch.arange(16_384, device="cuda") % 100
    ids = torch.tensor([139_999, 0], device="cuda")
    assert torch.equal(embedding(ids, weight), weight[ids])


@pytest.mark.skipif(not compiles_loops(), reason="torch raises IndexError")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_id_that_is_no_row_gives_nan(dtype: torch.dtype) -> None:
    """Where a compiled loop copies rows: it reads nothing that is not there."""
    weight = torch.ones(5, 40, dtype=dtype)
    rows = embedding(torch.tensor([4, -1, 5, 1 << 60, 0]), weight)
    assert rows.isnan().all(dim=1).tolist() == [False, True, True, True, False]
    assert torch.equal(rows[[0, 4]], weight[:2])
