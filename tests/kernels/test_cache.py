"""Rotation and page writes against float64, and what must stay untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cache import rope_and_write_kv, rope_and_write_latent
from kernels.norm import rms_norm
from kernels.rope import default_inv_freq, rotary_table
from tests.kernels.paged import make_pages
from tests.kernels.passes import (
    DEVICES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

pytestmark = pytest.mark.usefixtures("cpu_body")

LENGTHS = [(1, 9), (1, 1), (5, 12), (13, 13)]
NUM_TOKENS = 20
CANARY = 7.0
EPS = 1e-5
PAGE_SIZES = [8] if INTERPRETED else [1, 8, 16]


def turn(x: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers in float64."""
    half = x.shape[-1] // 2
    axis = -1 if interleaved else -2
    pairs = x.double().unflatten(-1, (half, 2) if interleaved else (2, half))
    cos, sin = table[positions].double()[:, None].chunk(2, dim=-1)
    turned = torch.complex(*pairs.unbind(axis)) * torch.complex(cos, sin)
    return torch.stack((turned.real, turned.imag), dim=axis).flatten(-2)


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_pages(cache: Tensor, slots: Tensor, expected: Tensor) -> None:
    """``expected`` lies in ``slots``, the canary everywhere else."""
    rows = cache.cpu().flatten(0, 1)
    written = slots >= 0
    assert_matches(rows[slots[written]], expected[written])
    untouched = torch.ones(rows.shape[0], dtype=torch.bool)
    untouched[slots[written]] = False
    assert bool((rows[untouched] == CANARY).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (7, 1, 24, 40), (12, 9, 64, 64)], ids=str)
def test_keys_and_values(
    heads: tuple[int, int, int, int], page_size: int, dtype: torch.dtype, device: str
) -> None:
    num_heads, num_kv_heads, dim, v_dim = heads
    widths = [num_heads * dim, num_kv_heads * dim, num_kv_heads * v_dim]
    qkv = randn(NUM_TOKENS, sum(widths), dtype=dtype, seed=dim)
    pages = make_pages(LENGTHS, page_size, device)
    slots = pages.batch.slot_mapping.cpu()
    slots[[1, 7]] = -1
    batch = replace(pages.batch, slot_mapping=slots.to(device))
    table = rotary_table(default_inv_freq(dim, 1e4), 32)
    shape = (pages.num_pages, page_size, num_kv_heads)
    k_cache = torch.full((*shape, dim), CANARY, dtype=dtype, device=device)
    v_cache = torch.full((*shape, v_dim), CANARY, dtype=dtype, device=device)

    # views of one fused projection, as the models pass them
    q, k, v = qkv.to(device).split(widths, dim=-1)
    q, k = q.view(NUM_TOKENS, num_heads, dim), k.view(NUM_TOKENS, num_kv_heads, dim)
    v = v.view(NUM_TOKENS, num_kv_heads, v_dim)
    actual = rope_and_write_kv(q, k, v, table.to(device), batch, k_cache, v_cache)

    positions = batch.positions.cpu()
    oracle = turn(q.cpu(), positions, table, interleaved=False)
    assert actual.dtype == dtype and actual[0].is_contiguous()
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)
    check_pages(k_cache, slots, turn(k.cpu(), positions, table, interleaved=False))
    check_pages(v_cache, slots, v.cpu().double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("shape", [(4, 16, 64, 32), (13, 8, 40, 24), (16, 64, 512, 128)], ids=str)
def test_latents(
    shape: tuple[int, int, int, int], page_size: int, dtype: torch.dtype, device: str
) -> None:
    num_heads, rope, rank, nope = shape
    q = randn(NUM_TOKENS, num_heads, nope + rope, dtype=dtype, seed=rank).to(device)
    latent = randn(NUM_TOKENS, rank, dtype=dtype, seed=rank + 1).to(device)
    k_pe = randn(NUM_TOKENS, rank + rope, dtype=dtype, seed=rank + 2).to(device)[:, rank:]
    pages = make_pages(LENGTHS, page_size, device)
    slots = pages.batch.slot_mapping.cpu()
    slots[[0, 19]] = -1
    batch = replace(pages.batch, slot_mapping=slots.to(device))
    table = rotary_table(default_inv_freq(rope, 1e4), 32)
    cache = torch.full(
        (pages.num_pages, page_size, rank + rope), CANARY, dtype=dtype, device=device
    )
    actual = rope_and_write_latent(q[..., nope:], latent, k_pe, table.to(device), batch, cache)
    positions = batch.positions.cpu()
    oracle = turn(q[..., nope:].cpu(), positions, table, interleaved=True)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)
    roped = turn(k_pe.cpu()[:, None], positions, table, interleaved=True)[:, 0]
    check_pages(cache, slots, torch.cat((latent.cpu().double(), roped), dim=-1))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of the last dimension in float64."""
    x64 = x.double()
    return weight.double() * x64 / (x64.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def assert_same_up_to_the_mean(actual: Tensor, expected: Tensor) -> None:
    """Equal bits but where the order of a sum of squares moved a rounding: one number in 200."""
    assert (actual.cpu() != expected.cpu()).double().mean() <= 0.005


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("is_normed", "heads"),
    [("qk", (12, 9, 64, 64)), ("qk", (7, 1, 24, 40)), ("q", (3, 2, 16, 8)), ("k", (3, 2, 16, 8))],
    ids=str,
)
def test_normed_heads(
    is_normed: str, heads: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    num_heads, num_kv_heads, dim, v_dim = heads
    widths = [num_heads * dim, num_kv_heads * dim, num_kv_heads * v_dim]
    # heads of very different sizes: a mean over two of them would show
    sizes = torch.logspace(-2, 1, NUM_TOKENS * sum(widths) // 8).repeat_interleave(8)
    qkv = randn(NUM_TOKENS, sum(widths), dtype=torch.float32, seed=dim) * sizes.view(NUM_TOKENS, -1)
    qkv = qkv.to(dtype).to(device)
    weights = (1 + randn(2, dim, dtype=torch.float32, seed=1).abs()).to(dtype).to(device)
    q_norm = weights[0] if "q" in is_normed else None
    k_norm = weights[1] if "k" in is_normed else None
    pages = make_pages(LENGTHS, 8, device)
    slots = pages.batch.slot_mapping.cpu()
    slots[[1, 7]] = -1
    batch = replace(pages.batch, slot_mapping=slots.to(device))
    table = rotary_table(default_inv_freq(dim, 1e4), 32)
    shape = (pages.num_pages, 8, num_kv_heads)
    caches = [
        torch.full((*shape, width), CANARY, dtype=dtype, device=device) for width in (dim, v_dim)
    ]
    q, k, v = qkv.split(widths, dim=-1)
    q, k = q.view(NUM_TOKENS, num_heads, dim), k.view(NUM_TOKENS, num_kv_heads, dim)
    v = v.view(NUM_TOKENS, num_kv_heads, v_dim)
    actual = rope_and_write_kv(
        q, k, v, table.to(device), batch, *caches, q_norm=q_norm, k_norm=k_norm, eps=EPS
    )

    positions = batch.positions.cpu()
    q64 = q.cpu() if q_norm is None else normed(q.cpu(), q_norm.cpu())
    k64 = k.cpu() if k_norm is None else normed(k.cpu(), k_norm.cpu())
    oracle = turn(q64, positions, table, interleaved=False)
    assert actual.dtype == dtype and actual[0].is_contiguous()
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)
    check_pages(caches[0], slots, turn(k64, positions, table, interleaved=False))
    check_pages(caches[1], slots, v.cpu().double())

    # the roundings are those of the norm alone, then the rotation alone
    apart = [torch.full_like(cache, CANARY) for cache in caches]
    q = q if q_norm is None else rms_norm(q.reshape(-1, dim), q_norm, EPS).view(q.shape)
    k = k if k_norm is None else rms_norm(k.reshape(-1, dim), k_norm, EPS).view(k.shape)
    expected = rope_and_write_kv(q, k, v, table.to(device), batch, *apart)
    if device == "cpu" and not INTERPRETED:
        assert torch.equal(actual, expected) and torch.equal(caches[0], apart[0])
    elif dtype != torch.float32:
        assert_same_up_to_the_mean(actual, expected)
        assert_same_up_to_the_mean(caches[0], apart[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(13, 8, 40), (16, 64, 512)], ids=str)
def test_normed_latents(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    num_heads, rope, rank = shape
    q_pe = randn(NUM_TOKENS, num_heads, rope, dtype=dtype, seed=rank).to(device)
    # raw latent and k_pe are parts of one product
    kv_a = randn(NUM_TOKENS, rank + rope, dtype=torch.float32, seed=rank + 1)
    kv_a = (kv_a * torch.logspace(-2, 1, NUM_TOKENS)[:, None]).to(dtype).to(device)
    latent, k_pe = kv_a.split([rank, rope], dim=-1)
    weight = (1 + randn(rank, dtype=torch.float32, seed=2).abs()).to(dtype).to(device)
    pages = make_pages(LENGTHS, 8, device)
    slots = pages.batch.slot_mapping.cpu()
    slots[[0, 19]] = -1
    batch = replace(pages.batch, slot_mapping=slots.to(device))
    table = rotary_table(default_inv_freq(rope, 1e4), 32)
    cache = torch.full((pages.num_pages, 8, rank + rope), CANARY, dtype=dtype, device=device)
    q_out = rope_and_write_latent(
        q_pe, latent, k_pe, table.to(device), batch, cache, latent_norm=weight, eps=EPS
    )

    positions = batch.positions.cpu()
    roped = turn(k_pe.cpu()[:, None], positions, table, interleaved=True)[:, 0]
    oracle = normed(latent.cpu(), weight.cpu())
    # apart: k_pe is as large as the latent only by chance
    check_pages(cache[..., :rank], slots, oracle)
    check_pages(cache[..., rank:], slots, roped)
    written = slots >= 0
    rows = cache.cpu().flatten(0, 1)[slots[written]]
    assert_test_has_power(rows[:, :rank], oracle[written])

    apart = torch.full_like(cache, CANARY)
    norm = rms_norm(latent, weight, EPS)
    expected = rope_and_write_latent(q_pe, norm, k_pe, table.to(device), batch, apart)
    assert torch.equal(q_out, expected)
    if device == "cpu" and not INTERPRETED:
        assert torch.equal(cache, apart)
    elif dtype != torch.float32:
        assert_same_up_to_the_mean(cache, apart)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_has_the_same_bits_in_any_batch(device: str) -> None:
    dim, rank = 16, 40
    table = rotary_table(default_inv_freq(dim, 1e4), 64).to(device)
    weight = (1 + randn(rank, dtype=torch.float32, seed=2).abs()).to(device)

    def run(num_tokens: int, first: int) -> list[Tensor]:
        """Tokens [first, first + num_tokens) of one draw; what they gave and wrote."""
        whole = randn(64, 9 * dim + rank, dtype=torch.float32, seed=5)
        rows = whole[first : first + num_tokens].to(device)
        heads = rows[:, : 8 * dim].view(num_tokens, 8, dim)
        latent, k_pe = rows[:, 8 * dim : 8 * dim + rank], rows[:, 8 * dim + rank :]
        batch = make_pages([(1, 1 + first + row) for row in range(num_tokens)], 1, device).batch
        slots = torch.arange(num_tokens, device=device)
        batch = replace(batch, slot_mapping=slots)
        kv = [torch.zeros(num_tokens, 1, 2, dim, device=device) for _ in range(2)]
        q = rope_and_write_kv(
            heads[:, :4],
            heads[:, 4:6],
            heads[:, 6:],
            table,
            batch,
            *kv,
            q_norm=weight[:dim],
            k_norm=weight[dim : 2 * dim],
            eps=EPS,
        )
        latents = torch.zeros(num_tokens, 1, rank + dim, device=device)
        q_pe = rope_and_write_latent(
            heads[:, :3], latent, k_pe, table, batch, latents, latent_norm=weight, eps=EPS
        )
        return [q, *kv, latents, q_pe]

    alone = run(1, 0)
    for num_tokens in (2, 3, 17, 64):
        for one, many in zip(alone, run(num_tokens, 0), strict=True):
            assert torch.equal(many[:1], one), num_tokens


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_write_nothing(device: str) -> None:
    batch = make_pages([(1, 1)], 8, device).batch
    batch = replace(
        batch, positions=batch.positions[:0], slot_mapping=batch.slot_mapping[:0], num_decodes=0
    )
    table = rotary_table(default_inv_freq(16, 1e4), 4).to(device)
    cache = torch.full((1, 8, 2, 16), CANARY, device=device)
    empty = torch.empty(0, 2, 16, device=device)
    assert rope_and_write_kv(empty, empty, empty, table, batch, cache, cache).shape == (0, 2, 16)
    flat = torch.full((1, 8, 32), CANARY, device=device)
    rows = torch.empty(0, 16, device=device)
    assert rope_and_write_latent(empty, rows, rows, table, batch, flat).shape == (0, 2, 16)
    assert bool((cache == CANARY).all()) and bool((flat == CANARY).all())
