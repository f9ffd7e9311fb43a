# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The gate of a gated MLP: SiLU of one half times the other.

    gate_up [num_tokens, 2 * intermediate_size]   (gate | up)
    y = gate / (1 + exp(-gate)) * up

Elementwise, so a row depends on nothing else. Graph-safe: the grid comes from the shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.configs import launch_config
from kernels.dispatch import native, use_native, use_triton

# on a CPU: all rows of a prompt in fp32 would push everything else out of the processor's cache
_VALUES_AT_ONCE = 1 << 17


@triton.jit
def gated_product(gate, up, dtype: tl.constexpr):
    # silu(gate) * up; gate, up and SiLU are rounded to dtype, and the product is
    gate32 = gate.to(dtype).to(tl.float32)
    decay = tl.exp(-tl.abs(gate32))  # never overflows
    silu = (gate32 * tl.where(gate32 >= 0, 1.0, decay) / (1.0 + decay)).to(dtype)
    return (silu.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def silu_and_mul_kernel(
    gate_up_ptr,  # [num_tokens, 2 * size], rows row_stride apart
    out_ptr,  # [num_tokens, size]
    row_stride,
    size,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up_ptr + token * row_stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + token * row_stride + size + columns, mask=inside, other=0.0)
    gated = gated_product(gate, up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * size + columns, gated, mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for the two halves of the last dimension.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], gate first; any float dtype; last dimension
            contiguous.

    Returns:
        [num_tokens, intermediate_size] in the dtype of ``gate_up``. SiLU is computed in fp32 and
        rounded to that dtype before the product.
    """
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if use_triton(gate_up) and num_tokens > 0:
        out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
        config = launch_config("silu_and_mul")
        grid = (num_tokens, triton.cdiv(size, config["BLOCK"]))
        silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), size, **config)
        return out
    if use_native(gate_up) and num_tokens > 0:
        gated: Tensor = native("rows").silu_and_mul(gate_up)
        return gated
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype != torch.float32:  # rounded to half the bits, silu's vector and tail code agree
        return functional.silu(gate).mul_(up)
    if gate.numel() <= _VALUES_AT_ONCE:
        return _gated_product_torch(gate, up)
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype)
    at_once = max(_VALUES_AT_ONCE // size, 1)
    for first in range(0, num_tokens, at_once):
        rows = slice(first, first + at_once)
        out[rows] = _gated_product_torch(gate[rows], up[rows])
    return out


def _gated_product_torch(gate: Tensor, up: Tensor) -> Tensor:
    gate32 = gate.float()
    # exp gives an element the same bits anywhere in a tensor; silu's vector and tail code do not
    denominator = torch.exp(-gate32).add_(1.0)
    return torch.div(gate32, denominator, out=denominator).to(up.dtype).mul_(up)
