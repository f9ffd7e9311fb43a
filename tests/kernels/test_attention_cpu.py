"""A CPU's bodies of paged_attention: where pages lie, what is worked out once, what bits follow.

Contexts here are long enough for every way in which keys are viewed, copied, cut and merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention
from tests.kernels.paged import Pages, make_pages, oracle_attention, select
from tests.kernels.passes import INTERPRETED, assert_matches, assert_test_has_power
from tests.kernels.test_attention import make

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="these are the bodies of CPUs"),
    pytest.mark.usefixtures("cpu_body"),
]

LOW = [torch.bfloat16, torch.float16]
PAGE_SIZE = 16
# a key of 8 heads takes 2 KiB in bf16: decodes in groups, alone, in several copies; long chunks
WIDE = (16, 8, 128, 128)
STEPS = {
    "short": [(1, 40), (1, 3), (1, 33), (1, 64), (1, 31)],
    "long": [(1, 1200), (1, 30), (1, 65), (1, 1104)],
    "chunks": [(1, 70), (37, 37), (2, 1111), (40, 1130), (64, 128)],
}


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def lay(lengths: list[tuple[int, int]], layout: str) -> Pages:
    """Pages of the sequences one behind another to the end of the pool, or broken runs of them."""
    pages = make_pages(lengths, PAGE_SIZE, "cpu")
    if layout == "scattered":
        return pages
    table = pages.batch.block_table.clone()
    counts = [-(-context // PAGE_SIZE) for _, context in lengths]
    num_pages, first = sum(counts), 0
    for row, count in zip(table, counts, strict=True):
        ids = torch.arange(first, first + count, dtype=torch.int32)
        if layout == "broken":  # a run, a page on its own, a run
            middle = count // 2
            ids[[middle, -1]] = ids[[-1, middle]]
        row[:count], row[count:] = ids, 0
        first += count
    return Pages(replace(pages.batch, block_table=table), num_pages, PAGE_SIZE)


def attend(pages: Pages, q: Tensor, k: Tensor, v: Tensor, batch_invariant: bool = False) -> Tensor:
    caches = [pages.scatter(tokens, q.dtype, "cpu") for tokens in (k, v)]
    scale = q.shape[2] ** -0.5
    return paged_attention(q, *caches, pages.batch, scale, batch_invariant=batch_invariant)


@pytest.mark.parametrize("layout", ["in a row", "broken", "scattered"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_keys_are_found_wherever_pages_lie(dtype: torch.dtype, name: str, layout: str) -> None:
    q, k, v = make(STEPS[name], WIDE, dtype)
    pages = lay(STEPS[name], layout)
    actual = attend(pages, q, k, v)
    oracle = oracle_attention(q, k, v, pages.batch, WIDE[2] ** -0.5)
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("layout", ["in a row", "broken", "scattered"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_keys_of_one_head(dtype: torch.dtype, layout: str) -> None:
    lengths = [(1, 1700), (1, 1535), (2, 1603)]
    q, k, v = make(lengths, (4, 1, 128, 128), dtype)
    pages = lay(lengths, layout)
    oracle = oracle_attention(q, k, v, pages.batch, 128**-0.5)
    assert_matches(attend(pages, q, k, v), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(("num_heads", "context"), [((8, 8), 200), ((6, 2), 700), ((2, 1), 4200)])
def test_bits_follow_from_the_position_alone(
    num_heads: tuple[int, int], context: int, dtype: torch.dtype
) -> None:
    """Decoded alone or in company or as the end of a chunk, in one piece or in many."""
    heads = (*num_heads, 64, 64)
    q, k, v = make([(70, context)], heads, dtype)
    whole = attend(lay([(70, context)], "in a row"), q, k, v, True)
    for layout in ("in a row", "broken", "scattered"):
        for size in (1, 9, 70):
            pages = lay([(size, context)], layout)
            assert torch.equal(attend(pages, q[-size:], k, v, True), whole[-size:]), (layout, size)
        company = [(1, context), *[(1, context - 1 - seq) for seq in range(9)], (5, context)]
        pages = lay(company, layout)
        rows = torch.cat((q[-1:], q[:9], q[-5:]))
        tokens = [x.expand(len(company), -1, -1, -1) for x in (k, v)]
        out = attend(pages, rows, *tokens, True)
        assert torch.equal(out[[0]], whole[-1:]), layout
        assert torch.equal(out[-5:], whole[-5:]), layout


def test_a_step_knows_nothing_of_the_one_before() -> None:
    """Same tensors, other sequences: what was worked out for one batch must not serve another."""
    lengths = [(1, 300), (1, 20), (1, 21), (4, 90)]
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make(lengths, WIDE, dtype)
        pages = lay(lengths, "scattered")
        caches = [pages.scatter(tokens, dtype, "cpu") for tokens in (k, v)]
        before = paged_attention(q, *caches, pages.batch, 0.1)
        batch, rows = select(pages.batch, [2, 0, 3])
        after = paged_attention(q[rows], *caches, batch, 0.1)
        assert_matches(after, before[rows].double())
        shorter = replace(pages.batch, context_lens=pages.batch.context_lens - 1)
        others = paged_attention(q, *caches, shorter, 0.1)
        assert (others - before).flatten(1).norm(dim=1).min() > 0.01


def test_layers_of_a_step_may_have_other_heads() -> None:
    """One batch serves caches of any shape and dtype."""
    lengths = [(1, 130), (1, 140), (1, 4), (6, 70)]
    pages = lay(lengths, "broken")
    for heads in (WIDE, (7, 1, 80, 80), (6, 3, 192, 128)):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            q, k, v = make(lengths, heads, dtype)
            oracle = oracle_attention(q, k, v, pages.batch, heads[2] ** -0.5)
            assert_matches(attend(pages, q, k, v), oracle)
