"""The lightning indexer against float64, ties and all, and its promises about batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import indexer, indexer_triton
from kernels.configs import launch_config
from kernels.indexer import norm_rope_and_write_index, select_keys
from kernels.rope import default_inv_freq, rotary_table
from tests.kernels.paged import Pages, make_pages, select
from tests.kernels.passes import (
    DEVICES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

# (new tokens, context): below, at and above top_k, on and across the edges of pages and key blocks
LENGTHS = {
    "decodes": [(1, 1), (1, 23), (1, 24), (1, 25), (1, 64), (1, 65), (1, 131), (1, 300)],
    "chunks": [(3, 3), (24, 24), (25, 25), (9, 28), (70, 135), (130, 130)],
    "mixed": [(1, 300), (1, 7), (1, 26), (5, 24), (2, 90), (40, 40)],
}
if INTERPRETED:
    LENGTHS = {
        "decodes": [(1, 24), (1, 25), (1, 70)],
        "mixed": [(1, 70), (1, 7), (3, 24), (9, 30)],
    }
TOP_K = 24
# heads, index_dim, rope_dim
SHAPES = [(16, 12, 8), (3, 40, 40)] + ([] if INTERPRETED else [(64, 128, 64)])
# numpy, which interprets, warns of products with infinity
NOT_FINITE = [float("nan")] + ([] if INTERPRETED else [float("inf"), float("-inf")])
EPS = 1e-6
CANARY = 7.0


def integers(
    lengths: list[tuple[int, int]], num_heads: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, weights, keys [num_seqs, max_context, dim], so small that scores are exact, and tie."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, max_context = sum(n for n, _ in lengths), max(context for _, context in lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    return (
        draw(num_tokens, num_heads, dim),
        draw(num_tokens, num_heads),
        draw(len(lengths), max_context, dim),
    )


def oracle_scores(q: Tensor, weights: Tensor, keys: Tensor, pages: Pages) -> list[Tensor]:
    """Of every token, the float64 scores of its past."""
    starts = pages.batch.cu_seqlens_q.tolist()
    scores = []
    for seq in range(pages.batch.num_seqs):
        for row in range(starts[seq], starts[seq + 1]):
            past = keys[seq, : int(pages.batch.positions[row]) + 1].double()
            dots = (q[row].double() @ past.T).relu()  # [num_heads, position + 1]
            scores.append(weights[row].double() @ dots)
    return scores


def oracle_selection(scores: list[Tensor], top_k: int) -> Tensor:
    rows = []
    for of_row in scores:
        ranked = sorted(range(len(of_row)), key=lambda at: (-float(of_row[at]), at))[:top_k]
        rows.append(sorted(ranked) + [-1] * (top_k - len(ranked)))
    return torch.tensor(rows, dtype=torch.int32)


def choose(
    pages: Pages, q: Tensor, weights: Tensor, keys: Tensor, device: str, top_k: int = TOP_K
) -> Tensor:
    cache = pages.scatter(keys, q.dtype, device)
    return select_keys(q.to(device), weights.to(device), cache, pages.batch, top_k).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_the_best_keys_are_chosen_the_lowest_of_equals(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    q, weights, keys = integers(LENGTHS[name], *shape[:2])
    chosen = choose(make_pages(LENGTHS[name], 8, device), q.to(dtype), weights, keys, device)
    assert chosen.dtype == torch.int32
    scores = oracle_scores(q, weights, keys, make_pages(LENGTHS[name], 8, "cpu"))
    expected = oracle_selection(scores, TOP_K)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 7, 64, 65, 299, 300] if not INTERPRETED else [1, 16, 69])
def test_any_number_of_keys(top_k: int, device: str) -> None:
    lengths = LENGTHS["mixed"]
    q, weights, keys = integers(lengths, 4, 8)
    for page_size in (1, 16):
        pages = make_pages(lengths, page_size, "cpu", seed=page_size)
        chosen = choose(
            make_pages(lengths, page_size, device, page_size), q, weights, keys, device, top_k
        )
        expected = oracle_selection(oracle_scores(q, weights, keys, pages), top_k)
        assert torch.equal(chosen, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_scores_are_ranked_up_to_rounding(shape: tuple[int, int, int], device: str) -> None:
    lengths = LENGTHS["mixed"]
    num_heads, dim, _ = shape
    generator = torch.Generator().manual_seed(dim)
    q, weights, keys = integers(lengths, num_heads, dim)
    q, weights, keys = (torch.randn(x.shape, generator=generator) for x in (q, weights, keys))
    chosen = choose(make_pages(lengths, 8, device), q, weights, keys, device)
    of_rows = oracle_scores(q, weights, keys, make_pages(lengths, 8, "cpu"))
    for row, scores in enumerate(of_rows):
        ids = chosen[row][chosen[row] >= 0].long()
        assert len(ids) == min(len(scores), TOP_K)
        assert bool((ids.diff() > 0).all())
        left_out = torch.ones(len(scores), dtype=torch.bool)
        left_out[ids] = False
        if bool(left_out.any()):
            slack = 1e-5 * float(scores.abs().max())
            assert float(scores[ids].min()) >= float(scores[left_out].max()) - slack


@pytest.mark.parametrize("device", DEVICES)
def test_where_no_key_fits_the_first_are_taken(device: str) -> None:
    """Relu leaves ties of 0, above what a negative weight makes of a key that fits."""
    lengths = [(1, 60), (2, 40)]
    q, keys = torch.ones(3, 2, 8), -torch.ones(2, 60, 8)
    keys[:, 5] = 1.0  # the only key that fits
    weights = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0]])
    chosen = choose(make_pages(lengths, 8, device), q, weights, keys, device, 8)
    assert chosen[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert chosen[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    later = keys.roll(20, dims=1)
    chosen = choose(make_pages(lengths, 8, device), q, weights, later, device, 8)
    assert chosen[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 25]


@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_every_kind_are_ranked(device: str) -> None:
    """Zeros of either sign are one value; subnormals, infinities and close neighbours differ."""
    kinds = [0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0000001, -1.0, -1.0000001, 3e38, -3e38]
    kinds += [float("inf"), float("-inf")]
    order = torch.randperm(5 * len(kinds), generator=torch.Generator().manual_seed(0))
    scores = torch.tensor(5 * kinds)[order]
    num_keys = len(scores)
    positions = torch.tensor([num_keys - 1])
    for top_k in range(1, num_keys):
        if device == "cpu" and not INTERPRETED:
            chosen = indexer._top_positions(scores[None], positions, top_k)
        else:
            chosen = torch.empty((1, top_k), dtype=torch.int32, device=device)
            indexer_triton.select_top_k_kernel[(1,)](
                scores.to(device), positions.to(device), chosen, 0, num_keys, top_k, 16
            )
        assert torch.equal(chosen.cpu(), oracle_selection([scores], top_k)), top_k


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_still_gives_keys_of_the_past(value: float, device: str) -> None:
    lengths = [(1, 60), (3, 40)]
    q, weights, keys = integers(lengths, 4, 8)
    q[:2] = value
    chosen = choose(make_pages(lengths, 8, device), q, weights, keys, device, 8).long()
    positions = make_pages(lengths, 8, "cpu").batch.positions
    assert bool((chosen.diff(dim=-1) > 0).all())
    assert bool((chosen >= 0).all()) and bool((chosen <= positions[:, None]).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_cut_into_slices_is_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = LENGTHS["mixed"]
    q, weights, keys = integers(lengths, 4, 8)
    expected = choose(make_pages(lengths, 8, device), q, weights, keys, device)
    monkeypatch.setattr(indexer, "KEY_SLICE", 64)
    monkeypatch.setattr(indexer, "MAX_RANKED", 1000)
    monkeypatch.setattr(indexer, "MAX_SCORES", 4 * 64 * 3)  # three tokens at a time
    monkeypatch.setattr(indexer_triton, "MAX_SCORES", 5 * max(c for _, c in lengths))
    # a score block is 128 keys or fewer; what is ranked crosses many blocks
    small = {"index_scores": {"KEYS": 32}, "select_top_k": {"BLOCK": 16, "num_warps": 1}}
    monkeypatch.setattr(
        indexer_triton,
        "launch_config",
        lambda op, **facts: launch_config(op, **facts) | small.get(op, {}),
    )
    assert torch.equal(choose(make_pages(lengths, 8, device), q, weights, keys, device), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_more_sequences_than_one_look_finds(device: str) -> None:
    """The row's sequence is found among 128 at a time."""
    lengths = [(1, 3 + seq % 4) for seq in range(135)]
    q, weights, keys = integers(lengths, 2, 8)
    scores = oracle_scores(q, weights, keys, make_pages(lengths, 4, "cpu"))
    chosen = choose(make_pages(lengths, 4, device), q, weights, keys, device, 4)
    assert torch.equal(chosen, oracle_selection(scores, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_heads_of_several_blocks(device: str) -> None:
    lengths = [(1, 30), (3, 26)]
    q, weights, keys = integers(lengths, 80, 8)
    scores = oracle_scores(q, weights, keys, make_pages(lengths, 8, "cpu"))
    chosen = choose(make_pages(lengths, 8, device), q, weights, keys, device, 8)
    assert torch.equal(chosen, oracle_selection(scores, 8))


def close_scores(
    lengths: list[tuple[int, int]], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys so alike that the last bits of the scores decide."""
    q, weights, keys = integers(lengths, *shape[:2])
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(q.shape, generator=generator)
    weights = torch.rand(weights.shape, generator=generator)
    keys = torch.randn(1, 1, keys.shape[2], generator=generator) * (
        1 + 1e-7 * torch.randint(-2, 3, keys.shape, generator=generator)
    )
    return q, weights, keys


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_company_changes_no_choice(shape: tuple[int, int, int], device: str) -> None:
    lengths = LENGTHS["mixed"]
    q, weights, keys = close_scores(lengths, shape)
    pages = make_pages(lengths, 8, device)
    cache = pages.scatter(keys, q.dtype, device)
    q, weights = q.to(device), weights.to(device)
    whole = select_keys(q, weights, cache, pages.batch, TOP_K)
    for seqs in ([0], [2], [1, 3], [0, len(lengths) - 1]):
        batch, rows = select(pages.batch, seqs)
        alone = select_keys(q[rows], weights[rows], cache, batch, TOP_K)
        assert torch.equal(alone, whole[rows]), seqs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_in_chunks_or_token_by_token_chooses_the_same(
    shape: tuple[int, int, int], device: str
) -> None:
    length = 40 if INTERPRETED else 150
    q, weights, keys = close_scores([(length, length)], shape)
    whole = choose(make_pages([(length, length)], 8, device), q, weights, keys, device)
    for size in (7,) if INTERPRETED else (1, 10, 64):
        pieces = []
        for start in range(0, length, size):
            rows = slice(start, min(start + size, length))
            pages = make_pages([(rows.stop - start, rows.stop)], 8, device)
            pieces.append(choose(pages, q[rows], weights[rows], keys, device))
        assert torch.equal(torch.cat(pieces), whole), size


@pytest.mark.skipif(INTERPRETED, reason="of the torch body")
def test_short_contexts_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(*_: object) -> Tensor:
        raise AssertionError("keys were read")

    monkeypatch.setattr(indexer, "gather_heads", gather)
    q, weights, keys = integers([(1, 24), (24, 24)], 4, 8)
    chosen = choose(make_pages([(1, 24), (24, 24)], 8, "cpu"), q, weights, keys, "cpu")
    assert chosen[3].tolist() == [0, 1, 2] + [-1] * 21


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_are_normed_rotated_and_written(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    num_heads, dim, rope_dim = shape
    lengths = [(1, 9), (1, 1), (5, 12), (13, 13)]
    generator = torch.Generator().manual_seed(dim)
    wide = (torch.randn(20, dim + 3, generator=generator) * 2 + 1).to(dtype)
    q = torch.randn(20, num_heads, dim, generator=generator).to(dtype)
    k = wide[:, 3:]  # rows of a wider tensor
    weight, bias = torch.randn(2, dim, generator=generator)
    table = rotary_table(default_inv_freq(rope_dim, 10000.0), 16)
    pages = make_pages(lengths, 8, "cpu")
    batch = pages.batch
    slots = batch.slot_mapping.clone()
    slots[::3] = -1
    moved = make_pages(lengths, 8, device).batch
    cache = torch.full((pages.num_pages, 8, dim), CANARY, dtype=dtype, device=device)
    q_out = norm_rope_and_write_index(
        q.to(device),
        wide.to(device)[:, 3:],
        weight.to(device),
        bias.to(device),
        EPS,
        table.to(device),
        replace(moved, slot_mapping=slots.to(device)),
        cache,
    ).cpu()

    def turned(x: Tensor) -> Tensor:
        """Pairs (i, i + rope_dim / 2) as complex numbers, the rest as it is."""
        cos, sin = table[batch.positions].double()[:, None].chunk(2, dim=-1)
        pairs = x[..., :rope_dim].double().unflatten(-1, (2, rope_dim // 2))
        numbers = torch.complex(pairs[..., 0, :], pairs[..., 1, :]) * torch.complex(cos, sin)
        return torch.cat((numbers.real, numbers.imag, x[..., rope_dim:].double()), dim=-1)

    assert q_out.dtype == dtype and q_out.is_contiguous()
    assert_matches(q_out, turned(q))
    normed = functional.layer_norm(k.double(), (dim,), weight.double(), bias.double(), EPS)
    expected = turned(normed[:, None])[:, 0]
    rows = cache.cpu().flatten(0, 1)
    assert_matches(rows[slots[slots >= 0]], expected[slots >= 0])
    assert_test_has_power(rows[slots[slots >= 0]], expected[slots >= 0])
    untouched = torch.ones(rows.shape[0], dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    assert bool((rows[untouched] == CANARY).all())


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    batch = make_pages([(1, 1)], 8, device).batch
    q, k = torch.zeros(0, 4, 12, device=device), torch.zeros(0, 12, device=device)
    ones = torch.ones(12, device=device)
    cache = torch.zeros(1, 8, 12, device=device)
    table = rotary_table(default_inv_freq(8, 10000.0), 4, device=device)
    assert norm_rope_and_write_index(q, k, ones, ones, EPS, table, batch, cache).shape == q.shape
    assert select_keys(q, q[..., 0], cache, batch, 5).shape == (0, 5)
