"""Rotation and page writes against float64, and what must stay untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cache import rope_and_write_kv, rope_and_write_latent
from kernels.rope import default_inv_freq, rotary_table
from tests.kernels.paged import make_pages
from tests.kernels.passes import (
    DEVICES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

LENGTHS = [(1, 9), (1, 1), (5, 12), (13, 13)]
NUM_TOKENS = 20
CANARY = 7.0
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
    assert actual.dtype == dtype and actual.is_contiguous()
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
