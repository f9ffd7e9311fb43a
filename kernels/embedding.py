# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows of the embedding matrix by token id.

    out[t] = weight[token_ids[t]]

In Triton a program copies a block of one row. Ids are trusted: requests with ids outside of the
vocabulary are refused at admission. Graph-safe: the grid follows from shapes, ids are read on the
device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.configs import launch_config
from kernels.dispatch import capability_of, native, use_native, use_triton


@triton.jit
def embedding_kernel(
    token_ids_ptr,  # [num_tokens] int64
    weight_ptr,  # [vocab_size, hidden_size]
    out_ptr,  # [num_tokens, hidden_size]
    hidden_size,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    row = tl.load(token_ids_ptr + token).to(tl.int64)  # large vocabularies pass 2**31 values
    values = tl.load(weight_ptr + row * hidden_size + columns, mask=inside)
    tl.store(out_ptr + token * hidden_size + columns, values, mask=inside)


def embedding_config(hidden_size: int, capability: int) -> dict[str, int]:
    """Block and warps of a launch. ``capability`` is 90 for sm_90."""
    return launch_config("embedding", arch=capability, hidden_size=hidden_size)


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Look up the rows of ``token_ids``.

    Args:
        token_ids: [num_tokens] int64, each in [0, vocab_size); not checked on the GPU. On a CPU
            others give NaN, or without a compiled loop raise `IndexError`.
        weight: [vocab_size, hidden_size], contiguous, any float dtype.

    Returns:
        [num_tokens, hidden_size], dtype of ``weight``, contiguous.
    """
    num_tokens, hidden_size = token_ids.shape[0], weight.shape[1]
    if num_tokens > 0 and use_native(weight):
        rows: Tensor = native("rows").embedding(token_ids, weight)
        return rows
    if num_tokens == 0 or not use_triton(weight):
        return functional.embedding(token_ids, weight)
    config = embedding_config(hidden_size, capability_of(weight.device))
    out = torch.empty((num_tokens, hidden_size), dtype=weight.dtype, device=weight.device)
    embedding_kernel[(num_tokens, triton.cdiv(hidden_size, config["BLOCK"]))](
        token_ids, weight, out, hidden_size, **config
    )
    return out
