"""mla_attention against naive per-head attention in float64, and its promises about batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import mla
from kernels.batch import PagedBatch
from kernels.mla import mla_attention, sparse_mla_attention
from tests.kernels.paged import LENGTHS, Pages, make_pages, oracle_attention, select
from tests.kernels.passes import (
    DEVICES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

# heads, nope, rope, v_head_dim, rank
# the last is so small that torch would not multiply it by MKL
SHAPES = [(4, 32, 16, 32, 64), (16, 24, 8, 40, 48), (3, 128, 64, 128, 512), (2, 5, 4, 3, 7)]
if INTERPRETED:
    SHAPES = [(4, 32, 16, 32, 64), (3, 24, 8, 40, 48)]
MIXED = LENGTHS["mixed"]
Shape = tuple[int, int, int, int, int]
SCALE = 0.25


def make(
    lengths: list[tuple[int, int]], shape: Shape, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q_nope, q_pe, latents [num_seqs, max_context, rank + rope], kv_b_weight."""
    num_heads, nope, rope, v_dim, rank = shape
    generator = torch.Generator().manual_seed(rank + num_heads)
    num_tokens, max_context = sum(n for n, _ in lengths), max(context for _, context in lengths)
    q = torch.randn(num_tokens, num_heads, nope + rope, generator=generator)
    latents = torch.randn(len(lengths), max_context, rank + rope, generator=generator)
    weight = torch.randn(num_heads, nope + v_dim, rank, generator=generator) * rank**-0.5
    q, latents, weight = q.to(dtype), latents.to(dtype), weight.to(dtype)
    return q[..., :nope], q[..., nope:], latents, weight


def oracle_mla(
    q_nope: Tensor, q_pe: Tensor, latents: Tensor, weight: Tensor, pages: Pages
) -> Tensor:
    """Keys and values of every head from the latents, then plain attention, all in float64."""
    num_heads, nope, rank = weight.shape[0], q_nope.shape[2], weight.shape[2]
    keys_values = torch.einsum("skr,hwr->skhw", latents[..., :rank].double(), weight.double())
    k_pe = latents[..., None, rank:].double().expand(-1, -1, num_heads, -1)
    keys = torch.cat((keys_values[..., :nope], k_pe), dim=-1)
    q = torch.cat((q_nope, q_pe), dim=-1)
    return oracle_attention(q, keys, keys_values[..., nope:], pages.batch, SCALE)


def attend(
    pages: Pages,
    q_nope: Tensor,
    q_pe: Tensor,
    latents: Tensor,
    weight: Tensor,
    device: str,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    cache = pages.scatter(latents, q_nope.dtype, device)
    moved = [tensor.to(device) for tensor in (q_nope, q_pe)]
    out = mla_attention(
        *moved, cache, weight.to(device), pages.batch, SCALE, batch_invariant=batch_invariant
    )
    return out.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_agrees_with_float64(name: str, shape: Shape, dtype: torch.dtype, device: str) -> None:
    case = make(LENGTHS[name], shape, dtype)
    actual = attend(make_pages(LENGTHS[name], 8, device), *case, device)
    assert actual.dtype == dtype
    oracle = oracle_mla(*case, make_pages(LENGTHS[name], 8, "cpu"))
    if dtype == torch.float32:
        assert_matches(actual, oracle)
        assert_test_has_power(actual, oracle)
    else:  # the absorbed query is rounded too
        error = (actual.double() - oracle).norm() / oracle.norm()
        assert error < (2e-3 if dtype == torch.float16 else 1.2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", [16, 40])
def test_contexts_over_the_bound_are_absorbed(
    bound: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short chunks of one step take different paths to the same numbers."""
    shape = SHAPES[0]
    values = shape[0] * sum(shape[1:4])
    monkeypatch.setattr(mla, "MAX_EXPANDED_VALUES", bound * values + 1)
    case = make(MIXED, shape, torch.float32)
    actual = attend(make_pages(MIXED, 8, device), *case, device)
    assert_matches(actual, oracle_mla(*case, make_pages(MIXED, 8, "cpu")))


@pytest.mark.parametrize("device", DEVICES)
def test_pages_of_any_size_and_order_give_the_same_bits(device: str) -> None:
    case = make(MIXED, SHAPES[0], torch.float32)
    expected = attend(make_pages(MIXED, 8, device), *case, device)
    for page_size in (1, 16, 32):
        pages = make_pages(MIXED, page_size, device, seed=page_size)
        assert torch.equal(attend(pages, *case, device), expected), page_size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_has_the_same_bits_in_any_batch(shape: Shape, device: str) -> None:
    q_nope, q_pe, latents, weight = (
        tensor.to(device) for tensor in make(MIXED, shape, torch.float32)
    )
    pages = make_pages(MIXED, 8, device)
    cache = pages.scatter(latents.cpu(), q_nope.dtype, device)

    def attend_to(batch: PagedBatch, rows: Tensor | slice) -> Tensor:
        return mla_attention(
            q_nope[rows], q_pe[rows], cache, weight, batch, SCALE, batch_invariant=True
        )

    whole = attend_to(pages.batch, slice(None))
    for seqs in ([0], [2], [1, 3], [0, 1, 2]):
        batch, rows = select(pages.batch, seqs)
        assert torch.equal(attend_to(batch, rows), whole[rows]), seqs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_product_hears_of_batch_invariance(
    sparse: bool, batch_invariant: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch's products happen to have the same bits, nothing else would show it."""
    heard: list[tuple[str, bool]] = []

    def listening(name: str) -> Any:
        op = getattr(mla, name)

        def listen(*tensors: Tensor, batch_invariant: bool) -> Tensor:
            heard.append((name, batch_invariant))
            return op(*tensors, batch_invariant=batch_invariant)

        return listen

    for name in ("heads_linear", "linear"):
        monkeypatch.setattr(mla, name, listening(name))
    q_nope, q_pe, latents, weight = make(MIXED, SHAPES[0], torch.float32)
    pages = make_pages(MIXED, 8, device)
    cache = pages.scatter(latents, torch.float32, device)
    moved = [tensor.to(device) for tensor in (q_nope, q_pe)]
    operands = (*moved, cache, weight.to(device), pages.batch, SCALE)
    if sparse:
        first = torch.arange(24, device=device)
        selected = torch.where(first <= pages.batch.positions[:, None], first, -1).int()
        sparse_mla_attention(*operands, selected, batch_invariant=batch_invariant)
    else:
        mla_attention(*operands, batch_invariant=batch_invariant)
    # the torch body never expands, nor does a sparse step without a chunk of at most 24 keys
    expands = batch_invariant and (device != "cpu" or INTERPRETED)
    expands &= not sparse or pages.batch.min_chunk_context_len <= 24
    expanded = [("linear", True)] if expands else []
    assert sorted(heard) == [("heads_linear", batch_invariant)] * 2 + expanded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LENGTHS)
def test_batch_invariant_products_are_the_same_up_to_rounding(name: str, device: str) -> None:
    case = make(LENGTHS[name], SHAPES[0], torch.float32)
    actual = attend(make_pages(LENGTHS[name], 8, device), *case, device, batch_invariant=True)
    assert_matches(actual, oracle_mla(*case, make_pages(LENGTHS[name], 8, "cpu")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_in_chunks_or_token_by_token_equals_the_whole(shape: Shape, device: str) -> None:
    """Bit by bit on the CPU; on the GPU decodes are absorbed and chunks are not."""
    length = 21 if INTERPRETED else 97
    q_nope, q_pe, latents, weight = make([(length, length)], shape, torch.float32)
    whole = attend(make_pages([(length, length)], 8, device), q_nope, q_pe, latents, weight, device)
    for size in (5, 64) if INTERPRETED else (1, 10, 64):
        pieces = []
        for start in range(0, length, size):
            rows = slice(start, min(start + size, length))
            pages = make_pages([(rows.stop - start, rows.stop)], 8, device)
            pieces.append(attend(pages, q_nope[rows], q_pe[rows], latents, weight, device))
        if device == "cpu" and not INTERPRETED:
            assert torch.equal(torch.cat(pieces), whole), size
        assert_matches(torch.cat(pieces), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    batch = make_pages([(1, 1)], 8, device).batch
    q_nope, q_pe, latents, weight = make([(1, 1)], SHAPES[0], torch.float32)
    moved = [tensor[:0].to(device) for tensor in (q_nope, q_pe)]
    cache = torch.zeros(1, 8, latents.shape[2], device=device)
    assert mla_attention(*moved, cache, weight.to(device), batch, 1.0).shape == (0, 4, 32)
