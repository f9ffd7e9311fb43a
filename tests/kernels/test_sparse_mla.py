"""sparse_mla_attention against float64 over the chosen keys, and against the dense function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import attention_triton, mla, sparse_mla_triton
from kernels.attention_triton import PagedHeads
from kernels.batch import PagedBatch
from kernels.configs import launch_config
from kernels.mla import latent_shape, mla_attention, sparse_mla_attention
from tests.kernels.paged import Pages, make_pages, select
from tests.kernels.passes import (
    DEVICES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)
from tests.kernels.test_mla import SCALE, SHAPES, Shape, make

# (new tokens, context): below, at and above top_k
LENGTHS = {
    "decodes": [(1, 1), (1, 23), (1, 24), (1, 25), (1, 64), (1, 65), (1, 131), (1, 300)],
    "chunks": [(3, 3), (24, 24), (25, 25), (9, 28), (70, 135), (100, 100)],
    "mixed": [(1, 300), (1, 7), (1, 26), (5, 24), (2, 90), (40, 40)],
    "long": [(1, 30), (6, 40)],
    "short": [(1, 7), (1, 24), (5, 24), (7, 9)],
    "alone": [(30, 60)],
}
if INTERPRETED:
    LENGTHS = {
        "decodes": [(1, 24), (1, 25), (1, 70)],
        "mixed": [(1, 70), (1, 7), (3, 24), (9, 30)],
        "alone": [(3, 40)],
    }
MIXED = LENGTHS["mixed"]
TOP_K = 24


def draw_selection(pages: Pages, top_k: int = TOP_K) -> Tensor:
    """Any top_k positions of each token's past, ascending; all of them, then -1, if fewer."""
    rows = []
    for position in pages.batch.positions.tolist():
        generator = torch.Generator().manual_seed(position)  # in any step it draws the same
        ids = torch.randperm(position + 1, generator=generator)[:top_k].sort().values
        rows.append(torch.nn.functional.pad(ids, (0, top_k - len(ids)), value=-1))
    return torch.stack(rows).to(torch.int32)


def oracle_sparse(
    q_nope: Tensor, q_pe: Tensor, latents: Tensor, weight: Tensor, pages: Pages, selected: Tensor
) -> Tensor:
    """Token by token: keys and values of every head from the chosen latents, in float64."""
    nope, rank = q_nope.shape[2], weight.shape[2]
    starts = pages.batch.cu_seqlens_q.tolist()
    out = []
    for seq in range(pages.batch.num_seqs):
        for row in range(starts[seq], starts[seq + 1]):
            seen = latents[seq, selected[row][selected[row] >= 0].long()].double()
            keys_values = torch.einsum("kr,hwr->hkw", seen[:, :rank], weight.double())
            scores = torch.einsum("hd,hkd->hk", q_nope[row].double(), keys_values[..., :nope])
            scores = (scores + q_pe[row].double() @ seen[:, rank:].T) * SCALE
            out.append(torch.einsum("hk,hkv->hv", scores.softmax(-1), keys_values[..., nope:]))
    return torch.stack(out)


def attend(
    pages: Pages,
    q_nope: Tensor,
    q_pe: Tensor,
    latents: Tensor,
    weight: Tensor,
    selected: Tensor,
    device: str,
) -> Tensor:
    cache = pages.scatter(latents, q_nope.dtype, device)
    moved = [tensor.to(device) for tensor in (q_nope, q_pe)]
    selected = selected.to(device)
    return sparse_mla_attention(
        *moved, cache, weight.to(device), pages.batch, SCALE, selected
    ).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_agrees_with_float64(name: str, shape: Shape, dtype: torch.dtype, device: str) -> None:
    q_nope, q_pe, latents, weight = make(LENGTHS[name], shape, dtype)
    case = q_nope / 2, q_pe / 2, latents, weight  # few keys make rounding in sharp scores show
    pages = make_pages(LENGTHS[name], 8, "cpu")
    selected = draw_selection(pages)
    actual = attend(make_pages(LENGTHS[name], 8, device), *case, selected, device)
    assert actual.dtype == dtype
    oracle = oracle_sparse(*case, pages, selected)
    if dtype == torch.float32:
        assert_matches(actual, oracle)
        assert_test_has_power(actual, oracle)
    else:  # the absorbed query is rounded too
        error = (actual.double() - oracle).norm() / oracle.norm()
        assert error < (2e-3 if dtype == torch.float16 else 1.2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("top_k", "page_size"), [(1, 8), (20, 1), (65, 16)])
def test_any_number_of_keys_and_any_page_size(top_k: int, page_size: int, device: str) -> None:
    case = make(MIXED, SHAPES[0], torch.float32)
    pages = make_pages(MIXED, page_size, "cpu", seed=top_k)
    selected = draw_selection(pages, top_k)
    actual = attend(make_pages(MIXED, page_size, device, top_k), *case, selected, device)
    assert_matches(actual, oracle_sparse(*case, pages, selected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", [16, 27])
def test_long_dense_chunks_are_absorbed(
    bound: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound of the expanded contexts below and above what is dense here."""
    shape = SHAPES[0]
    monkeypatch.setattr(mla, "MAX_EXPANDED_VALUES", bound * shape[0] * sum(shape[1:4]) + 1)
    case = make(MIXED, shape, torch.float32)
    pages = make_pages(MIXED, 8, "cpu")
    selected = draw_selection(pages)
    actual = attend(make_pages(MIXED, 8, device), *case, selected, device)
    assert_matches(actual, oracle_sparse(*case, pages, selected))


@pytest.mark.parametrize("device", DEVICES)
def test_several_splits_and_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    monkeypatch.setattr(
        sparse_mla_triton,
        "launch_config",
        lambda op, **facts: launch_config(op, **facts) | {"SPLIT": 16},
    )
    monkeypatch.setattr(attention_triton, "MAX_PARTIAL_VALUES", 2 * 2 * shape[0] * shape[4])
    monkeypatch.setattr(mla, "MAX_GATHERED_ROWS", 2 * TOP_K)
    lengths = LENGTHS["decodes"]
    case = make(lengths, shape, torch.float32)
    pages = make_pages(lengths, 8, "cpu")
    selected = draw_selection(pages)
    actual = attend(make_pages(lengths, 8, device), *case, selected, device)
    assert_matches(actual, oracle_sparse(*case, pages, selected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_sees_few_keys_equals_dense_attention(shape: Shape, device: str) -> None:
    """Bit by bit on the CPU, also beside sequences that do see more."""
    case = make(MIXED, shape, torch.float32)
    pages = make_pages(MIXED, 8, device)
    sparse = attend(pages, *case, draw_selection(make_pages(MIXED, 8, "cpu")), device)
    q_nope, q_pe, latents, weight = case
    cache = pages.scatter(latents, q_nope.dtype, device)
    weight = weight.to(device)
    moved = q_nope.to(device), q_pe.to(device)
    dense = mla_attention(*moved, cache, weight, pages.batch, SCALE).cpu()
    is_few = pages.batch.positions.cpu() < TOP_K
    assert_matches(sparse[is_few], dense[is_few])
    assert not torch.allclose(sparse[~is_few], dense[~is_few], rtol=0.01)
    if device == "cpu" and not INTERPRETED:
        assert torch.equal(sparse[is_few], dense[is_few])
        short = [seq for seq, (_, context) in enumerate(MIXED) if context <= TOP_K]
        batch, rows = select(pages.batch, short)
        alone = mla_attention(q_nope[rows], q_pe[rows], cache, weight, batch, SCALE)
        assert torch.equal(alone, sparse[rows])


@pytest.mark.skipif(INTERPRETED, reason="projections are torch's, whose bits follow the row count")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_has_the_same_bits_in_any_batch(shape: Shape) -> None:
    q_nope, q_pe, latents, weight = make(MIXED, shape, torch.float32)
    pages = make_pages(MIXED, 8, "cpu")
    selected = draw_selection(pages)
    cache = pages.scatter(latents, q_nope.dtype, "cpu")
    whole = sparse_mla_attention(q_nope, q_pe, cache, weight, pages.batch, SCALE, selected)
    for seqs in ([0], [2], [1, 3], [0, 1, 2], [5]):
        batch, rows = select(pages.batch, seqs)
        alone = sparse_mla_attention(
            q_nope[rows], q_pe[rows], cache, weight, batch, SCALE, selected[rows]
        )
        assert torch.equal(alone, whole[rows]), seqs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_in_chunks_or_token_by_token_equals_the_whole(shape: Shape, device: str) -> None:
    """Bit by bit on the CPU."""
    length = 40 if INTERPRETED else 97
    q_nope, q_pe, latents, weight = make([(length, length)], shape, torch.float32)
    pages = make_pages([(length, length)], 8, device)
    selected = draw_selection(pages)
    whole = attend(pages, q_nope, q_pe, latents, weight, selected, device)
    for size in (7,) if INTERPRETED else (1, 10, 64):
        pieces = []
        for start in range(0, length, size):
            rows = slice(start, min(start + size, length))
            pages = make_pages([(rows.stop - start, rows.stop)], 8, device)
            part = q_nope[rows], q_pe[rows], latents, weight, selected[rows]
            pieces.append(attend(pages, *part, device))
        if device == "cpu" and not INTERPRETED:
            assert torch.equal(torch.cat(pieces), whole), size
        assert_matches(torch.cat(pieces), whole)


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton kernels alone")
@pytest.mark.interpreter
def test_the_kernels_give_the_same_bits_in_any_company_and_keep_dense_rows() -> None:
    shape, canary = latent_shape(4, 64, 16), 7.0
    q, q_pe, latents, _ = make(MIXED, (4, 64, 16, 8, 64), torch.float32)
    pages = make_pages(MIXED, 8, "cpu")
    cache = pages.scatter(latents, torch.float32, "cpu").unsqueeze(2)
    selected = draw_selection(pages)

    def run(rows: Tensor, batch: PagedBatch) -> Tensor:
        heads = PagedHeads(q[rows], q_pe[rows], cache, cache[..., 64:], None, batch.block_table)
        out = torch.full((len(rows), 4, 64), canary)
        sparse_mla_triton.attend_selected(heads, shape, batch, SCALE, selected[rows], out)
        return out

    whole = run(torch.arange(len(q)), pages.batch)
    for seq, (_, context) in enumerate(MIXED):
        batch, rows = select(pages.batch, [seq])
        assert torch.equal(run(rows, batch), whole[rows])
        assert bool((whole[rows] == canary).all()) == (context <= TOP_K)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    batch = make_pages([(1, 1)], 8, device).batch
    q_nope, q_pe, latents, weight = make([(1, 1)], SHAPES[0], torch.float32)
    moved = [tensor[:0].to(device) for tensor in (q_nope, q_pe)]
    cache = torch.zeros(1, 8, latents.shape[2], device=device)
    selected = torch.zeros(0, 5, dtype=torch.int32, device=device)
    out = sparse_mla_attention(*moved, cache, weight.to(device), batch, 1.0, selected)
    assert out.shape == (0, 4, 32)
