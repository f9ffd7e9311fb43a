"""paged_attention against float64 on ragged steps, and the promises about batches and pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention
from tests.kernels.paged import LENGTHS, Pages, make_pages, oracle_attention, select
from tests.kernels.passes import (
    DEVICES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

# query heads, KV heads, head_dim, v_head_dim
HEADS = [(4, 4, 64, 64), (7, 1, 80, 80), (8, 2, 128, 128), (6, 3, 192, 128), (5, 1, 24, 40)]
if INTERPRETED:
    HEADS = [(6, 2, 32, 32), (7, 1, 80, 24)]
MIXED = LENGTHS["mixed"]


def make(
    lengths: list[tuple[int, int]], heads: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys wide enough for peaked softmaxes: errors of scores must show."""
    num_heads, num_kv_heads, dim, v_dim = heads
    generator = torch.Generator().manual_seed(dim + num_heads)
    num_tokens, max_context = sum(n for n, _ in lengths), max(context for _, context in lengths)
    q = 1.5 * torch.randn(num_tokens, num_heads, dim, generator=generator)
    k = torch.randn(len(lengths), max_context, num_kv_heads, dim, generator=generator)
    v = torch.randn(len(lengths), max_context, num_kv_heads, v_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend(pages: Pages, q: Tensor, k: Tensor, v: Tensor, device: str) -> Tensor:
    caches = [pages.scatter(tokens, q.dtype, device) for tokens in (k, v)]
    return paged_attention(q.to(device), *caches, pages.batch, q.shape[2] ** -0.5).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_agrees_with_float64(
    name: str, heads: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    q, k, v = make(LENGTHS[name], heads, dtype)
    actual = attend(make_pages(LENGTHS[name], 8, device), q, k, v, device)
    assert actual.dtype == dtype
    batch = make_pages(LENGTHS[name], 8, "cpu").batch
    oracle = oracle_attention(q, k, v, batch, heads[2] ** -0.5)
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_of_any_size_and_order_give_the_same_bits(device: str) -> None:
    q, k, v = make(MIXED, HEADS[0], torch.float32)
    expected = attend(make_pages(MIXED, 8, device), q, k, v, device)
    for page_size in (1, 16, 32):
        pages = make_pages(MIXED, page_size, device, seed=page_size)
        assert torch.equal(attend(pages, q, k, v, device), expected), page_size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", HEADS[:1] if INTERPRETED else HEADS[:3], ids=str)
def test_a_sequence_has_the_same_bits_in_any_batch(
    heads: tuple[int, int, int, int], device: str
) -> None:
    q, k, v = make(MIXED, heads, torch.float32)
    pages = make_pages(MIXED, 8, device)
    caches = [pages.scatter(tokens, q.dtype, device) for tokens in (k, v)]
    whole = paged_attention(q.to(device), *caches, pages.batch, 0.1)
    for seqs in ([0], [2], [1, 3], [0, 1, 2]):
        batch, rows = select(pages.batch, seqs)
        assert torch.equal(paged_attention(q.to(device)[rows], *caches, batch, 0.1), whole[rows])


@pytest.mark.skipif(INTERPRETED, reason="64 sequences take the interpreter minutes")
@pytest.mark.parametrize("num_seqs", [2, 3, 7, 64])
def test_a_decode_has_the_same_bits_among_many(num_seqs: int) -> None:
    lengths = [(1, 1 + 37 * seq % 300) for seq in range(num_seqs)]
    q, k, v = make(lengths, (7, 1, 64, 64), torch.float32)
    pages = make_pages(lengths, 16, "cpu")
    caches = [pages.scatter(tokens, q.dtype, "cpu") for tokens in (k, v)]
    whole = paged_attention(q, *caches, pages.batch, 0.1)
    for seq in range(num_seqs):
        batch, rows = select(pages.batch, [seq])
        assert torch.equal(paged_attention(q[rows], *caches, batch, 0.1), whole[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", HEADS[:1] if INTERPRETED else HEADS[:3], ids=str)
def test_a_prompt_in_chunks_or_token_by_token_equals_the_whole(
    heads: tuple[int, int, int, int], device: str
) -> None:
    """Bit by bit on the CPU: the same request must give the same tokens however it was cut."""
    length = 21 if INTERPRETED else 137
    q, k, v = make([(length, length)], heads, torch.float32)
    whole = attend(make_pages([(length, length)], 8, device), q, k, v, device)
    for size in (5, 64) if INTERPRETED else (1, 10, 64):
        pieces = []
        for start in range(0, length, size):
            end = min(start + size, length)
            pages = make_pages([(end - start, end)], 8, device)
            pieces.append(attend(pages, q[start:end], k, v, device))
        if device == "cpu" and not INTERPRETED:
            assert torch.equal(torch.cat(pieces), whole), size
        assert_matches(torch.cat(pieces), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_may_be_rows_of_a_wider_tensor(device: str) -> None:
    q, k, v = make(MIXED, HEADS[0], torch.float32)
    pages = make_pages(MIXED, 8, device)
    caches = [pages.scatter(tokens, q.dtype, device) for tokens in (k, v)]
    wider = torch.cat((q.flatten(1), torch.full((q.shape[0], 16), float("nan"))), dim=1).to(device)
    view = wider[:, : q[0].numel()].view(q.shape)
    expected = paged_attention(q.to(device), *caches, pages.batch, 0.1)
    assert torch.equal(paged_attention(view, *caches, pages.batch, 0.1), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    pages = make_pages([(1, 1)], 8, device)
    batch, _ = select(pages.batch, [0])
    cache = torch.zeros(1, 8, 2, 16, device=device)
    assert paged_attention(
        torch.empty(0, 4, 16, device=device), cache, cache, batch, 1.0
    ).shape == (
        0,
        4,
        16,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_context_of_many_splits(device: str) -> None:
    """More splits than the combining kernel takes at a time; the best key lies in the first."""
    lengths = [(1, 2570), (1, 300)]
    q, k, v = make(lengths, (2, 1, 16, 16), torch.float32)
    k[:, 5] = 2 * q[:, 0, None]
    oracle = oracle_attention(q, k, v, make_pages(lengths, 16, "cpu").batch, 16**-0.5)
    assert_matches(attend(make_pages(lengths, 16, device), q, k, v, device), oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [1, 5, 16, 40])
def test_groups_of_any_size(group_size: int, device: str) -> None:
    """40 heads on one KV head take several tiles, of which the last is not full."""
    lengths = [(1, 20), (3, 27)]
    q, k, v = make(lengths, (2 * group_size, 2, 32, 32), torch.float32)
    oracle = oracle_attention(q, k, v, make_pages(lengths, 16, "cpu").batch, 32**-0.5)
    assert_matches(attend(make_pages(lengths, 16, device), q, k, v, device), oracle)
