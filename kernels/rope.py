"""Rotary position embedding: frequencies, the table of cosines and sines, and its application.

    inv_freq [dim / 2]    theta^(-2i / dim), i = 0 .. dim/2 - 1, then scaled     (arXiv:2104.09864)
    cos_sin  [num_positions, dim] fp32: cos(p * inv_freq) * a, then sin(p * inv_freq) * a
    a pair (x, y) at position p becomes (x cos - y sin, y cos + x sin)

Two layouts of the pairs: half-split (i, i + dim/2), that of Llama and Qwen, and interleaved
(2i, 2i + 1), that of DeepSeek's MLA. Angles are rounded in float32 as transformers does, so that
long contexts agree with it. On the GPU rotation is part of the kernels in ``kernels.cache``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def default_inv_freq(dim: int, theta: float) -> Tensor:
    """Unscaled frequencies: [dim / 2] fp32, radians per position."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def linear_inv_freq(dim: int, theta: float, factor: float) -> Tensor:
    """Frequencies of positions divided by ``factor``: [dim / 2] fp32 (arXiv:2306.15595)."""
    return default_inv_freq(dim, theta) / factor


def llama3_inv_freq(
    dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position: int,
) -> Tensor:
    """Llama 3.1's scaling: [dim / 2] fp32.

    Wavelengths over ``original_max_position / low_freq_factor`` are stretched by ``factor``, those
    under ``original_max_position / high_freq_factor`` kept, and those between interpolated.
    """
    inv_freq = default_inv_freq(dim, theta)
    wavelength = 2 * math.pi / inv_freq
    kept = (original_max_position / wavelength - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def yarn_inv_freq(
    dim: int,
    theta: float,
    factor: float,
    original_max_position: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> Tensor:
    """YaRN's "NTK by parts": [dim / 2] fp32 (arXiv:2309.00071, section 3.2).

    Dimensions that turn more than ``beta_fast`` times within ``original_max_position`` are kept,
    those under ``beta_slow`` turns are slowed down by ``factor``, and a ramp joins them.
    """

    def dimension_of(num_turns: float) -> float:
        turns = math.log(original_max_position / (num_turns * 2 * math.pi))
        return dim * turns / (2 * math.log(theta))

    low = max(math.floor(dimension_of(beta_fast)), 0)
    high = min(math.ceil(dimension_of(beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    inv_freq = default_inv_freq(dim, theta)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1, and 1 without stretching."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_table(
    inv_freq: Tensor,
    num_positions: int,
    attention_factor: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Cosines and sines of every position.

    Args:
        inv_freq: [dim / 2], radians per position.
        num_positions: rows of the table, positions 0 .. num_positions - 1.
        attention_factor: multiplies cosines and sines.
        device: where the table will live; it is computed on the CPU, so all devices agree.

    Returns:
        [num_positions, dim] fp32, the cosines in the first half of a row, the sines in the second.
    """
    if torch.device(device).type == "meta":
        return torch.empty((num_positions, 2 * inv_freq.shape[0]), device=device)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inv_freq.to("cpu", torch.float32)  # [num_positions, dim / 2]
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor).to(device)


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate every head of every token by its position; rounds once, from fp32.

    Args:
        x: [num_tokens, num_heads, dim], any float dtype.
        positions: [num_tokens] int64, rows of the table.
        cos_sin: [num_positions, dim] fp32, from ``rotary_table``.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + dim / 2), in and out.

    Returns:
        The shape and dtype of ``x``, contiguous if that is.
    """
    return rotate(x, cos_sin[positions].unsqueeze(1), interleaved)


def rotate(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """``apply_rope`` on rows of the table already gathered: [num_tokens, 1, dim]."""
    if not interleaved:
        return rotate_halves(x, *for_halves(cos_sin))
    cos, sin = cos_sin.chunk(2, dim=-1)  # [num_tokens, 1, dim / 2]
    x32 = x.float()
    first, second = x32[..., 0::2], x32[..., 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def for_halves(cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """``(cos | cos, -sin | sin)`` of rows [num_tokens, 1, dim], each like them."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """``apply_rope`` to pairs (i, i + dim / 2), by what `for_halves` makes; in few calls.

    Adding a product with -sin gives the same bits as subtracting one with sin.
    """
    x32 = x.float()
    half = x.shape[-1] // 2
    swapped = torch.cat((x32[..., half:], x32[..., :half]), dim=-1)
    return (x32 * cos).add_(swapped.mul_(signed_sin)).to(x.dtype)
