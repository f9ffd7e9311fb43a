"""How decodes are cut into splits, at contexts around every edge of the cut.

The launches here have a few short splits, so that short contexts meet all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kernels import attention_triton, combine_splits_triton, sparse_mla_triton
from kernels.combine_splits_triton import keys_per_split, max_splits_of
from kernels.configs import launch_config
from tests.kernels.paged import make_pages, oracle_attention, select
from tests.kernels.passes import DEVICES, assert_matches, assert_test_has_power
from tests.kernels.test_attention import (
    DECODE_HEADS,
    LATENT_SHAPE,
    TRITON_DEVICES,
    make,
    make_decodes,
)
from tests.kernels.test_mla import SCALE, oracle_mla
from tests.kernels.test_mla import make as make_latents
from tests.kernels.test_sparse_mla import TOP_K, draw_selection, oracle_sparse

SPLIT, MAX_SPLITS, BLOCK_N = 32, 3, 16
EDGE = SPLIT * MAX_SPLITS  # the longest context whose splits have SPLIT keys
# one key less, as many, one more: than a split, than the edge, than the next length of splits
CONTEXTS = [1, 31, 32, 33, EDGE - 1, EDGE, EDGE + 1, EDGE + 48, EDGE + 49, 2 * EDGE, 2 * EDGE + 1]
OPS = ["mqa", "mla"]


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes with few short splits, combined two at a time and 16 columns at a time."""

    def overriding(settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        return lambda op, **facts: launch_config(op, **facts) | settings

    few = {"SPLIT": SPLIT, "MAX_SPLITS": MAX_SPLITS, "BLOCK_N": BLOCK_N}
    monkeypatch.setattr(attention_triton, "launch_config", overriding(few))
    monkeypatch.setattr(
        sparse_mla_triton, "launch_config", overriding(few | {"SPLIT": 1, "BLOCK_N": 16})
    )
    narrow = {"BLOCK_SPLITS": 2, "BLOCK_V": 16}
    monkeypatch.setattr(combine_splits_triton, "launch_config", overriding(narrow))


@triton.jit
def splits_kernel(contexts_ptr, keys_ptr, min_split, split_limit, block_n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    context_lens = tl.load(contexts_ptr + at)
    tl.store(keys_ptr + at, keys_per_split(context_lens, min_split, split_limit, block_n))


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_a_launch_has_room_for_the_splits_of_every_context_up_to_its_limit(device: str) -> None:
    contexts = torch.arange(4096, dtype=torch.int32, device=device)
    keys = torch.empty_like(contexts)
    for split, max_splits, block_n in product((32, 64, 1024), (1, 3, 16), (16, 32, 128)):
        splits_kernel[(4,)](contexts, keys, split, max_splits, block_n, BLOCK=1024)
        lens, of_split = contexts.cpu().long(), keys.cpu().long()
        counts = -(-lens // of_split)
        config = {"SPLIT": split, "MAX_SPLITS": max_splits}
        room = torch.tensor([max_splits_of(config, limit) for limit in range(4096)])
        assert bool((counts.cummax(0).values <= room).all())
        assert int(room.max()) <= max_splits
        # short contexts have the splits of the table, long ones the shortest that are enough
        is_short = lens <= split * max_splits
        if split % block_n == 0:
            assert bool((of_split[is_short] == split).all())
        longer = of_split > split
        assert bool((of_split % block_n == 0)[longer].all())
        assert bool(((of_split - block_n) * max_splits < lens)[longer].all())


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_contexts_around_every_edge_agree_with_float64(op: str, device: str) -> None:
    lengths = [(1, context) for context in CONTEXTS]
    pages, judge = make_pages(lengths, 8, device), make_pages(lengths, 8, "cpu")
    run = make_decodes(op, CONTEXTS, torch.float32, device)
    actual = run(pages, pages.batch, list(range(len(CONTEXTS))))
    if op == "mla":
        oracle = oracle_mla(*make_latents(lengths, LATENT_SHAPE, torch.float32), judge)
    else:
        case = make(lengths, DECODE_HEADS[op], torch.float32)
        oracle = oracle_attention(*case, judge.batch, SCALE)
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_neither_company_nor_limit_nor_number_of_launches_changes_a_bit(
    op: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [5, SPLIT, SPLIT + 1, 0, EDGE, EDGE + 1, 2 * EDGE + 1]
    every = list(range(len(contexts)))
    run = make_decodes(op, contexts, torch.float32, device)
    pages = make_pages([(1, context) for context in contexts], 8, device)
    positions = pages.batch.positions.clamp(min=0)
    batch = replace(pages.batch, positions=positions)
    whole = run(pages, batch, every)
    assert bool((whole[3] == 0).all())
    far = replace(batch, max_context_len=100 * EDGE)
    assert torch.equal(run(pages, far, every), whole)
    for seq in (1, 2, 5, 6):  # the first one in one split, so written without combining
        alone, _ = select(batch, [seq])
        assert torch.equal(run(pages, alone, [seq]), whole[seq : seq + 1]), contexts[seq]
    short, _ = select(batch, [0, 1, 3])
    assert torch.equal(run(pages, short, [0, 1, 3]), whole[[0, 1, 3]])
    monkeypatch.setattr(attention_triton, "MAX_PARTIAL_VALUES", 1)  # a launch for each decode
    assert torch.equal(run(pages, batch, every), whole)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_a_launch_may_have_room_for_more_splits_than_chosen_keys_fill(device: str) -> None:
    """24 keys in blocks of 16 are two splits where three fit; rows with few keys stay dense."""
    contexts = [TOP_K + 1, 3 * TOP_K, TOP_K]
    lengths = [(1, context) for context in contexts]
    pages, judge = make_pages(lengths, 8, device), make_pages(lengths, 8, "cpu")
    actual = make_decodes("sparse", contexts, torch.float32, device)(pages, pages.batch, [0, 1, 2])
    case = make_latents(lengths, LATENT_SHAPE, torch.float32)
    assert_matches(actual, oracle_sparse(*case, judge, draw_selection(judge)))
