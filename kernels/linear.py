"""Matrix products with the weights of linear layers.

    x [num_tokens, in_features]   weight [out_features, in_features]   bias [out_features]
    y = x @ weight.T + bias

On a GPU few rows go to the kernels of ``kernels.linear_triton``, which read the weights as fast as
the memory allows, and many to cuBLAS, whose last bits follow the number of rows; batch-invariant
products always take the same tile of our own.
On a CPU the products are torch's (MKL and oneDNN). There the number of rows decides which matrix
kernel runs, and a row's last bits with it. MKL, which does fp32, is therefore put into the mode
where it does not, and rows are padded where that helps, so that a token's result does not depend
on its neighbours. oneDNN, which does bf16 and fp16, has no such mode: batch-invariant products are
made in blocks of one fixed number of rows, so that the same kernel runs in steps of any size.
Graph-safe: shapes are host-known, nothing is read back.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional

from kernels import linear_triton
from kernels.activation import silu_and_mul
from kernels.attention import pad_rows
from kernels.dispatch import use_triton

# MKL reads it at its first product. A row of an fp32 product then has the same bits for any number
# of rows and threads (measured with AVX2 and AVX-512; without it, up to 16 rows differ from more).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Rows in multiples of this give a row the same bits in any batch (measured): in fp32 of any size,
# in the others mostly of up to 32 rows.
_ROW_GROUPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
# Of batch-invariant products in bf16 and fp16; a row has the same bits at any place of a block
# (measured). Smaller blocks would make decodes a little faster and prompts much slower.
_BLOCK_ROWS = 32


def in_blocks(dtype: torch.dtype, batch_invariant: bool) -> bool:
    """Whether a CPU makes products of this dtype in blocks of one fixed number of rows."""
    return batch_invariant and dtype in (torch.float16, torch.bfloat16)


def row_group(dtype: torch.dtype, batch_invariant: bool = False) -> int:
    """How many rows a CPU matrix product should have a multiple of, for bits that never vary."""
    return _BLOCK_ROWS if in_blocks(dtype, batch_invariant) else _ROW_GROUPS.get(dtype, 1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features], any float dtype; rows may be strided.
        weight: [out_features, in_features], contiguous; dtype of ``x``, or fp32, and then the
            product is computed in fp32.
        bias: [out_features], dtype of ``weight``, or None.
        out_dtype: that of ``x`` or fp32; None for that of ``weight``. On a GPU fp32 is the sum as
            it is; the torch body rounds it to the dtype of ``weight`` first.
        batch_invariant: on a GPU, always multiply by the same tile; on a CPU, in bf16 and fp16,
            always in blocks of 32 rows, which takes 2 to 3 times as long for many rows.

    Returns:
        [num_tokens, out_features] in ``out_dtype``, rounded after the bias is added. On a CPU a row
        has the same bits in any batch, for a fixed number of threads: in fp32 always, in bf16 and
        fp16 if ``batch_invariant``; else those mostly have them in any batch of up to 32 rows. On a
        GPU it has them in any batch if ``batch_invariant``, else only where the table of launches
        takes the same body.

    Raises:
        ValueError: the dtypes are none of those.
    """
    out_dtype = _result_dtype(x, weight, out_dtype)
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]), dtype=out_dtype)
    if use_triton(x):
        out = linear_triton.linear(
            x, weight, bias, out_dtype, gated=False, batch_invariant=batch_invariant
        )
        return _many_rows(x, weight, bias, out_dtype) if out is None else out
    return torch_linear(x.to(weight.dtype), weight, bias, batch_invariant).to(out_dtype)


def linear_silu_and_mul(
    x: Tensor, gate_up: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """Return ``silu(gate) * up`` for the halves of ``linear(x, gate_up, bias)``.

    Args:
        x: [num_tokens, in_features], any float dtype; rows may be strided.
        gate_up: [2 * intermediate_size, in_features], contiguous, gate first; dtype of ``x``.
        bias: [2 * intermediate_size], dtype of ``x``, or None.
        batch_invariant: as in `linear`.

    Returns:
        [num_tokens, intermediate_size] in the dtype of ``x``: gate, up and SiLU are rounded to it
        before the product is, as in `silu_and_mul`. Promises about batches are those of `linear`.

    Raises:
        ValueError: ``gate_up`` has another dtype than ``x``.
    """
    if gate_up.dtype != x.dtype:
        raise ValueError(f"gate_up is {gate_up.dtype}, x is {x.dtype}")
    if use_triton(x) and x.shape[0] > 0:
        out = linear_triton.linear(
            x, gate_up, bias, x.dtype, gated=True, batch_invariant=batch_invariant
        )
        if out is not None:
            return out
    return silu_and_mul(linear(x, gate_up, bias, batch_invariant=batch_invariant))


def heads_linear(x: Tensor, weight: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """Multiply each head by a matrix of its own: ``out[:, h] = x[:, h] @ weight[h].T``.

    Args:
        x: [num_tokens, num_heads, in_features], any float dtype; in_features contiguous.
        weight: [num_heads, out_features, in_features], dtype of ``x``, of any strides.
        batch_invariant: as in `linear`.

    Returns:
        [num_tokens, num_heads, out_features], contiguous, in the dtype of ``x``. Promises about
        batches are those of `linear`.
    """
    num_tokens, num_heads, in_features = x.shape
    out_features = weight.shape[1]
    if num_tokens == 0:
        return x.new_empty((0, num_heads, out_features))
    if use_triton(x):
        out = linear_triton.heads_linear(x, weight, batch_invariant)
        if out is not None:
            return out
        return torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1).contiguous()
    by_head = x.transpose(0, 1)  # [num_heads, num_tokens, in_features]
    if in_blocks(x.dtype, batch_invariant):
        out = torch.cat([torch.bmm(block, weight.mT) for block in _blocks(by_head)], dim=1)
    else:
        out = torch.bmm(pad_rows(by_head, in_features * out_features), weight.mT)
    return out[:, :num_tokens].transpose(0, 1).contiguous()


def torch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """The torch body of `linear`, with its promises; ``x`` has the dtype of ``weight``."""
    num_tokens = x.shape[0]
    if in_blocks(x.dtype, batch_invariant):
        blocks = [functional.linear(block, weight, bias) for block in _blocks(x)]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[:num_tokens]
    num_padding = -num_tokens % row_group(x.dtype)
    if num_padding == 0:
        return functional.linear(x, weight, bias)
    padded = functional.pad(x, (0, 0, 0, num_padding))
    return functional.linear(padded, weight, bias)[:num_tokens]


def _blocks(x: Tensor) -> list[Tensor]:
    """Rows of [..., num_rows, in_features] in contiguous blocks of one size, the last padded."""
    missing = -x.shape[-2] % _BLOCK_ROWS
    padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
    starts = range(0, padded.shape[-2], _BLOCK_ROWS)
    return [padded[..., start : start + _BLOCK_ROWS, :].contiguous() for start in starts]


def _result_dtype(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}")
    if out_dtype not in (None, weight.dtype, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}, weight is {weight.dtype}")
    return out_dtype or weight.dtype


def _many_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The product by cuBLAS, with the fp32 sum unrounded if ``out_dtype`` asks for it."""
    if out_dtype == weight.dtype:
        return functional.linear(x.to(weight.dtype), weight, bias)
    if not x.is_cuda:  # the interpreter's torch has no product that widens
        return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    out = torch.mm(x, weight.mT, out_dtype=out_dtype)
    return out if bias is None else out.add_(bias)
