"""e4m3 from its definition and quantization in numpy, for tests of FP8 to be held against.

Nothing here is shared with ``kernels.quant``: numbers come from the bits (arXiv:2209.05433,
table 1), rounding is a search for the nearest of them, and a scale is found block by block.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.quant import ActivationScale, Fp8Weight
from tests.kernels.passes import assert_matches

BLOCK = 128
NAN_CODES = (0x7F, 0xFF)
Floats = NDArray[np.float64]


def decode(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


TABLE = np.array([np.nan if code in NAN_CODES else decode(code) for code in range(256)])
POSITIVE = TABLE[:127]  # ascending, by code


def encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of the nearest numbers, even codes on ties, for magnitudes up to about 448."""
    magnitudes = np.minimum(np.abs(values.astype(np.float64)), POSITIVE[-1])
    above = np.searchsorted(POSITIVE, magnitudes)
    below = np.maximum(above - 1, 0)
    up, down = POSITIVE[above] - magnitudes, magnitudes - POSITIVE[below]
    takes_above = (up < down) | ((up == down) & (above % 2 == 0))
    codes = np.where(takes_above, above, below) | (np.signbit(values) * 0x80)
    return codes.astype(np.uint8)


def round_scale(scale: np.float32, kind: ActivationScale) -> np.float32:
    if kind == "float32":
        return scale
    return np.float32(next(2.0**e for e in range(-60, 128) if 2.0**e >= scale))


def quantize_rows(
    x: Tensor, kind: ActivationScale
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and scales of each row's groups of 128, one group at a time."""
    rows = x.detach().cpu().float().numpy()
    starts = range(0, rows.shape[1], BLOCK)
    codes = np.zeros(rows.shape, dtype=np.uint8)
    scales = np.zeros((rows.shape[0], len(starts)), dtype=np.float32)
    for row in range(rows.shape[0]):
        for column, start in enumerate(starts):
            group = rows[row, start : start + BLOCK]
            highest = max(np.float32(1e-4), np.abs(group).max())
            scale = round_scale(highest / np.float32(448.0), kind)
            codes[row, start : start + BLOCK] = encode(group / scale)
            scales[row, column] = scale
    return codes, scales


def quantized(x: Tensor, kind: ActivationScale | None) -> Tensor:
    """What W8A8 makes of ``x``, in float64; ``x`` itself for W8A16."""
    if kind is None:
        return x.detach().cpu().double()
    codes, scales = quantize_rows(x, kind)
    spread = np.repeat(scales.astype(np.float64), BLOCK, axis=1)[:, : codes.shape[1]]
    return torch.from_numpy(TABLE[codes] * spread)


def make_weight(
    parts: list[int],
    in_features: int,
    activations: ActivationScale | None,
    *,
    num_experts: int | None = None,
    seed: int = 0,
) -> tuple[Fp8Weight, Tensor]:
    """Random stacked matrices whose blocks differ much in scale, and the same in float64."""
    rng = np.random.default_rng(seed)
    leading = () if num_experts is None else (num_experts,)
    out_features, num_scales = sum(parts), -(-in_features // BLOCK)
    blocks = [-(-rows // BLOCK) for rows in parts]
    codes = rng.integers(0, 0x7F, (*leading, out_features, in_features), dtype=np.uint8)
    codes |= (rng.integers(0, 2, codes.shape) * 0x80).astype(np.uint8)
    scale_inv = np.exp2(rng.uniform(-11, -7, (*leading, sum(blocks), num_scales)))
    scale_inv = (scale_inv / in_features**0.5).astype(np.float32)
    decoded = TABLE[codes]
    scale_rows = np.zeros(out_features, dtype=np.int32)
    row, block = 0, 0
    for rows, count in zip(parts, blocks, strict=True):
        for i in range(count):
            some = slice(row + i * BLOCK, row + min((i + 1) * BLOCK, rows))
            scale_rows[some] = block + i
            for j in range(num_scales):
                columns = slice(j * BLOCK, (j + 1) * BLOCK)
                scale = scale_inv[..., block + i, j].astype(np.float64)
                decoded[..., some, columns] *= scale[..., None, None]
        row, block = row + rows, block + count
    weight = Fp8Weight(
        values=torch.from_numpy(codes).view(torch.float8_e4m3fn),
        scale_inv=torch.from_numpy(scale_inv),
        scale_rows=torch.from_numpy(scale_rows),
        activations=activations,
    )
    return weight, torch.from_numpy(decoded)


def on_device(weight: Fp8Weight, device: str) -> Fp8Weight:
    return Fp8Weight(
        values=weight.values.to(device),
        scale_inv=weight.scale_inv.to(device),
        scale_rows=weight.scale_rows.to(device),
        activations=weight.activations,
    )


def assert_product_matches(actual: Tensor, oracle: Tensor, is_w8a8: bool) -> None:
    """As ``assert_matches``; fp8 matrix units keep about 13 bits of a sum, as fp16 does."""
    loses_bits = actual.is_cuda and is_w8a8 and actual.dtype == torch.float32
    assert_matches(actual.half() if loses_bits else actual, oracle)
