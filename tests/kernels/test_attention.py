"""paged_attention against float64 on ragged steps, and the promises about batches and pages.

The last part holds decodes of every kind, latent and sparse ones too, to what a CUDA graph needs:
launches follow from limits, and neither limits nor padding rows change a bit.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention
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
from tests.kernels.test_mla import SCALE, oracle_mla
from tests.kernels.test_mla import make as make_latents
from tests.kernels.test_sparse_mla import TOP_K, draw_selection

pytestmark = pytest.mark.usefixtures("cpu_body")

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
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_queries_may_be_rows_of_a_wider_tensor(dtype: torch.dtype, device: str) -> None:
    q, k, v = make(MIXED, HEADS[0], dtype)
    pages = make_pages(MIXED, 8, device)
    caches = [pages.scatter(tokens, q.dtype, device) for tokens in (k, v)]
    beside = torch.full((q.shape[0], 16), float("nan"), dtype=dtype)
    wider = torch.cat((q.flatten(1), beside), dim=1).to(device)
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
@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 16), (HALF, 64)], ids=str)
def test_chunks_that_begin_where_a_block_of_keys_ends(
    dtype: torch.dtype, block: int, device: str
) -> None:
    """Blocks of keys before a tile's first token are not masked; the next one must be."""
    lengths = [(4, block + first) for first in (1, 2, 3, 4, 5)]
    q, k, v = make(lengths, (4, 2, 32, 16), dtype)
    oracle = oracle_attention(q, k, v, make_pages(lengths, 8, "cpu").batch, 32**-0.5)
    assert_matches(attend(make_pages(lengths, 8, device), q, k, v, device), oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [1, 5, 16, 40])
def test_groups_of_any_size(group_size: int, device: str) -> None:
    """40 heads on one KV head take several tiles, of which the last is not full."""
    lengths = [(1, 20), (3, 27)]
    q, k, v = make(lengths, (2 * group_size, 2, 32, 32), torch.float32)
    oracle = oracle_attention(q, k, v, make_pages(lengths, 16, "cpu").batch, 32**-0.5)
    assert_matches(attend(make_pages(lengths, 16, device), q, k, v, device), oracle)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tensor_outlives_the_call(device: str) -> None:
    q, k, v = (tensor.to(device) for tensor in make([(1, 5)], (2, 1, 24, 16), torch.float32))
    pages = make_pages([(1, 5)], 8, device)
    caches = [pages.scatter(tokens.cpu(), q.dtype, device) for tokens in (k, v)]
    paged_attention(q, *caches, pages.batch, 0.1)
    queries = weakref.ref(q)
    del q
    gc.collect()
    assert queries() is None


# ops that decode; of those over heads: query heads, KV heads, head_dim, v_head_dim
DECODE_HEADS = {"gqa": (6, 2, 32, 32), "mha": (3, 3, 16, 16), "mqa": (5, 1, 48, 24)}
DECODE_OPS = [*DECODE_HEADS, "mla", "sparse"]
LATENT_SHAPE = (3, 24, 8, 40, 48)
TRITON_DEVICES = DEVICES if INTERPRETED else DEVICES[1:]
Decodes = Callable[[Pages, PagedBatch, list[int]], Tensor]


def make_decodes(op: str, contexts: list[int], dtype: torch.dtype, device: str) -> Decodes:
    """A function of pages, a step of some of these decodes, and which they are."""
    lengths = [(1, context) for context in contexts]
    if op in DECODE_HEADS:
        q, *tokens = make(lengths, DECODE_HEADS[op], dtype)
    else:
        q_nope, q_pe, latents, weight = make_latents(lengths, LATENT_SHAPE, dtype)
        q, tokens, weight = torch.cat((q_nope, q_pe), dim=-1), [latents], weight.to(device)
    q[torch.tensor(contexts) == 0] = float("nan")  # of padding rows; must not matter

    def run(pages: Pages, batch: PagedBatch, seqs: list[int]) -> Tensor:
        caches = [pages.scatter(of_seq, dtype, device) for of_seq in tokens]
        rows = q[seqs].to(device)
        if op in DECODE_HEADS:
            return paged_attention(rows, *caches, batch, SCALE).cpu()
        parts = rows[..., : LATENT_SHAPE[1]], rows[..., LATENT_SHAPE[1] :]
        if op == "mla":
            return mla_attention(*parts, *caches, weight, batch, SCALE).cpu()
        selected = draw_selection(replace(pages, batch=batch)).to(device)
        return sparse_mla_attention(*parts, *caches, weight, batch, SCALE, selected).cpu()

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", DECODE_OPS)
@pytest.mark.parametrize(
    ("contexts", "dtype"), [([1, 200, 30], HALF), ([7, 257, 300], torch.float32)], ids=str
)
def test_limits_above_every_context_change_no_bit(
    contexts: list[int], op: str, dtype: torch.dtype, device: str
) -> None:
    """A graph is captured for a limit: with one split, with several, with a wider block table."""
    run = make_decodes(op, contexts, dtype, device)
    pages = make_pages([(1, context) for context in contexts], 8, device)
    every = list(range(len(contexts)))
    expected = run(pages, pages.batch, every)
    for factor, columns in ((2, 0), (8, 27)):
        nowhere = pages.batch.block_table[:, -1:].repeat(1, columns)  # past the contexts
        limited = replace(
            pages.batch,
            max_context_len=factor * max(contexts),
            block_table=torch.cat((pages.batch.block_table, nowhere), dim=1),
        )
        assert torch.equal(run(pages, limited, every), expected), factor


@pytest.mark.parametrize("device", DEVICES)
def test_a_limit_above_top_k_leaves_dense_decodes_as_they_are(device: str) -> None:
    """A step captured for long contexts attends sparsely; short ones must not notice."""
    contexts = [1, TOP_K - 4, TOP_K]
    pages = make_pages([(1, context) for context in contexts], 8, device)
    limited = replace(pages.batch, max_context_len=40 * TOP_K)
    dense = make_decodes("mla", contexts, torch.float32, device)(pages, pages.batch, [0, 1, 2])
    sparse = make_decodes("sparse", contexts, torch.float32, device)(pages, limited, [0, 1, 2])
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("op", DECODE_OPS)
@pytest.mark.parametrize("limit", [250, 1000])
def test_padding_rows_are_zero_and_disturb_nothing(limit: int, op: str, device: str) -> None:
    contexts = [9, 0, 240, 0, 0]
    run = make_decodes(op, contexts, torch.float32, device)
    pages = make_pages([(1, context) for context in contexts], 8, device)
    batch = replace(
        pages.batch, positions=pages.batch.positions.clamp(min=0), max_context_len=limit
    )
    out = run(pages, batch, [0, 1, 2, 3, 4])
    assert bool((out[[1, 3, 4]] == 0).all())
    real, _ = select(batch, [0, 2])
    assert torch.equal(run(pages, real, [0, 2]), out[[0, 2]])


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("op", ["gqa", "mla", "sparse"])
def test_a_decode_alone_has_the_bits_it_has_among_64(op: str, device: str) -> None:
    contexts = [300, 26, *(1 + 37 * seq % 40 for seq in range(2, 64))]
    run = make_decodes(op, contexts, torch.float32, device)
    pages = make_pages([(1, context) for context in contexts], 16, device)
    whole = run(pages, pages.batch, list(range(64)))
    for size in (2, 5):
        part, _ = select(pages.batch, list(range(size)))
        assert torch.equal(run(pages, part, list(range(size))), whole[:size]), size
    for seq in (0, 1, 63):
        alone, _ = select(pages.batch, [seq])
        assert torch.equal(run(pages, alone, [seq]), whole[seq : seq + 1]), seq


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", DECODE_OPS)
def test_scrambled_pages_change_no_bit_of_a_decode(op: str, device: str) -> None:
    contexts = [1, 40, 270]
    run = make_decodes(op, contexts, torch.float32, device)
    lengths = [(1, context) for context in contexts]
    pages = make_pages(lengths, 8, device)
    expected = run(pages, pages.batch, [0, 1, 2])
    for seed, page_size in ((1, 8), (2, 16), (3, 4)):
        pages = make_pages(lengths, page_size, device, seed=seed)
        assert torch.equal(run(pages, pages.batch, [0, 1, 2]), expected), seed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["gqa", "mla"])
def test_decodes_at_the_edges_of_pages_and_of_thousands(op: str, device: str) -> None:
    contexts = [1, 7, 8, 9, 2100]
    lengths = [(1, context) for context in contexts]
    pages, judge = make_pages(lengths, 8, device), make_pages(lengths, 8, "cpu")
    actual = make_decodes(op, contexts, torch.float32, device)(pages, pages.batch, [0, 1, 2, 3, 4])
    if op == "gqa":
        oracle = oracle_attention(
            *make(lengths, DECODE_HEADS[op], torch.float32), judge.batch, SCALE
        )
    else:
        case = make_latents(lengths, LATENT_SHAPE, torch.float32)
        oracle = oracle_mla(*case, judge)
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)
