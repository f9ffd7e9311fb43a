# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""RMSNorm, alone and fused with the residual addition before it.

    x, residual [..., hidden_size]   weight [hidden_size]
    y = weight * (x / sqrt(mean(x^2) + eps))          (arXiv:1910.07467)

The mean and the division are in fp32; the quotient is rounded to the dtype of x BEFORE the product
with the weight, as transformers does, so that bf16 models agree with it.
In Triton one program holds one row in registers. Graph-safe: the grid is the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import launch_config
from kernels.dispatch import native, use_native, use_triton


@triton.jit
def scale_normed(x, mean_square, eps, weight, dtype: tl.constexpr):
    # weight * (x / sqrt(mean_square + eps)) of fp32 x: the quotient is rounded, then the product,
    # which is exact in fp32 before, being one of two rounded numbers
    normed = (x * tl.rsqrt(mean_square + eps)).to(dtype)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_rows, hidden_size], rows x_stride apart
    residual_ptr,  # [num_rows, hidden_size] or None
    weight_ptr,  # [hidden_size]
    out_ptr,  # [num_rows, hidden_size]
    total_ptr,  # [num_rows, hidden_size] or None, x + residual
    x_stride,
    hidden_size,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that holds a row
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * hidden_size + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * hidden_size + columns, x, mask=inside)
    x32 = x.to(tl.float32)
    mean_square = tl.sum(x32 * x32, axis=0) / hidden_size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    scaled = scale_normed(x32, mean_square, eps, weight, x.dtype)
    tl.store(out_ptr + row * hidden_size + columns, scaled, mask=inside)


def rms_norm_config(hidden_size: int) -> dict[str, int]:
    """Block and warps for a row."""
    config = launch_config("rms_norm", hidden_size=hidden_size)
    return {"BLOCK": triton.next_power_of_2(hidden_size), **config}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of ``x``.

    Args:
        x: [..., hidden_size], any float dtype, last dimension contiguous.
        weight: [hidden_size], dtype of ``x``.
        eps: added to the mean square.

    Returns:
        The shape and dtype of ``x``, contiguous if that is.
    """
    if x.numel() == 0:
        return x.new_empty(x.shape)
    if use_triton(x):
        return _launch(x, None, weight, eps)[0]
    if use_native(x):
        normed: Tensor = native("rows").rms_norm(x, None, weight, eps)[0]
        return normed
    x32 = x.float()
    inverse = x32.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * inverse).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream, then normalise the sum.

    Args:
        x: [..., hidden_size], the output of a sublayer; last dimension contiguous.
        residual: the shape and dtype of ``x``, contiguous; not modified.
        weight: [hidden_size], dtype of ``x``.
        eps: added to the mean square.

    Returns:
        ``(rms_norm(x + residual), x + residual)``, both in the shape and dtype of ``x``. The sum is
        rounded to that dtype before it is normalised.
    """
    if use_triton(x) and x.numel() > 0:
        return _launch(x, residual, weight, eps)
    if use_native(x) and x.numel() > 0:
        pair: tuple[Tensor, Tensor] = native("rows").rms_norm(x, residual, weight, eps)
        return pair
    total = x + residual
    return rms_norm(total, weight, eps), total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)  # [num_rows, hidden_size]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        residual,
        weight,
        out,
        None if residual is None else total,
        rows.stride(0),
        hidden_size,
        eps,
        ADD=residual is not None,
        **rms_norm_config(hidden_size),
    )
    return out, total
