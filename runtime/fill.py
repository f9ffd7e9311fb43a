"""Reads stored tensors into parameters, chunk by chunk, checking every value on its way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kernels.quant import (
    BLOCK,
    Fp8Weight,
    dequantize_weight,
    num_blocks,
    quantize_weight,
)
from runtime.errors import CheckpointError
from runtime.models.layers import SCALE_SUFFIX, Targets
from runtime.shards import StoredTensor

STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8 = "F8_E4M3"
MAX_SCALE = torch.finfo(torch.float32).max / 448  # above it the largest FP8 value overflows


def least_read(target: Tensor | None, tensor: StoredTensor) -> int:
    """The fewest bytes `fill_from_file` can read at a time: of what it converts a row of blocks."""
    converts = target is not None and (target.dtype == torch.float8_e4m3fn) != (tensor.dtype == FP8)
    if not converts or not tensor.num_bytes:
        return 8
    return tensor.num_bytes // tensor.shape[0] * min(tensor.shape[0], BLOCK)


def fill_from_file(
    targets: Targets,
    stored: Mapping[str, StoredTensor],
    name: str,
    file: BinaryIO,
    buffer: Tensor,
) -> Iterator[int]:
    """Fill what the model makes of one stored tensor; yields the bytes of each chunk.

    Args:
        targets: the model's parameters by name.
        stored: every tensor to load; a matrix's scales are looked up there.
        name: the tensor, which lies in ``file``.
        buffer: [at least `least_read`] uint8 on the CPU, overwritten.

    Raises `CheckpointError` for what cannot be read, is not finite, or is no scale.
    """
    tensor, target = stored[name], targets.get(name)
    if target is None:  # the scales of a matrix that the model keeps decoded: read with the matrix
        yield tensor.num_bytes
    elif target.dtype == torch.float8_e4m3fn and tensor.dtype != FP8:
        yield from _fill_quantized(target, targets[name + SCALE_SUFFIX], name, tensor, file, buffer)
    elif tensor.dtype == FP8 and target.dtype != torch.float8_e4m3fn:
        scales = _read_scales(name + SCALE_SUFFIX, stored[name + SCALE_SUFFIX])
        yield from _fill_decoded(target, scales, name, tensor, file, buffer)
    else:
        yield from _fill(target, name, tensor, file, buffer)


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _fill(
    target: Tensor, name: str, tensor: StoredTensor, file: BinaryIO, buffer: Tensor
) -> Iterator[int]:
    """Read a tensor chunk by chunk into ``target``; yields the bytes of each chunk."""
    dtype = torch.float8_e4m3fn if tensor.dtype == FP8 else STORED_DTYPES[tensor.dtype]
    flat = target.view(-1)
    begin = 0  # first element of the chunk
    while begin < flat.numel():
        num_elements = min(flat.numel() - begin, buffer.numel() // dtype.itemsize)
        stored = _read(file, name, tensor, begin * dtype.itemsize, num_elements, dtype, buffer)
        chunk = flat[begin : begin + num_elements]
        chunk.copy_(stored)
        _require_finite(chunk, stored, f"{tensor.path}: {name}")
        if name.endswith(SCALE_SUFFIX):
            _require_scales(chunk, f"{tensor.path}: {name}")
        begin += num_elements
        yield num_elements * dtype.itemsize


def _fill_quantized(
    values: Tensor,
    scale_inv: Tensor,
    name: str,
    tensor: StoredTensor,
    file: BinaryIO,
    buffer: Tensor,
) -> Iterator[int]:
    """Quantize a matrix to FP8, some rows of blocks at a time."""
    dtype = STORED_DTYPES[tensor.dtype]
    for rows, begin in _block_rows(tensor, dtype, buffer):
        shape = (rows.stop - rows.start, tensor.shape[1])
        stored = _read(file, name, tensor, begin, math.prod(shape), dtype, buffer)
        slab = stored.view(shape).to(values.device)
        _require_finite(slab, stored, f"{tensor.path}: {name}")
        blocks = slice(rows.start // BLOCK, num_blocks(rows.stop))
        values[rows.start : rows.stop], scale_inv[blocks] = quantize_weight(slab)
        yield stored.nbytes


def _fill_decoded(
    target: Tensor,
    scale_inv: Tensor,
    name: str,
    tensor: StoredTensor,
    file: BinaryIO,
    buffer: Tensor,
) -> Iterator[int]:
    """Decode an FP8 matrix, some rows of blocks at a time."""
    for rows, begin in _block_rows(tensor, torch.float8_e4m3fn, buffer):
        shape = (rows.stop - rows.start, tensor.shape[1])
        stored = _read(
            file, name, tensor, begin, math.prod(shape), torch.float8_e4m3fn, buffer
        ).view(shape)
        _require_finite(stored, stored, f"{tensor.path}: {name}")
        scale_rows = (torch.arange(rows.start, rows.stop) // BLOCK).int()
        decoded = dequantize_weight(Fp8Weight(stored, scale_inv, scale_rows), target.dtype)
        if not bool(decoded.isfinite().all()):
            raise _does_not_fit(f"{tensor.path}: {name}", "an FP8 value times its scale", decoded)
        target[rows.start : rows.stop] = decoded
        yield stored.nbytes


def _block_rows(
    tensor: StoredTensor, dtype: torch.dtype, buffer: Tensor
) -> Iterator[tuple[range, int]]:
    """Rows of whole blocks that fit the buffer, and the offset of their first byte."""
    num_rows, row_bytes = tensor.shape[0], tensor.shape[1] * dtype.itemsize
    at_once = buffer.numel() // (row_bytes * BLOCK) * BLOCK or num_rows
    for first in range(0, num_rows, at_once):
        yield range(first, min(first + at_once, num_rows)), first * row_bytes


def _read_scales(name: str, tensor: StoredTensor) -> Tensor:
    """All scales of a matrix in fp32; it may lie in another file than they do."""
    dtype = STORED_DTYPES[tensor.dtype]
    scales = torch.empty(tensor.shape, dtype=torch.float32)
    buffer = torch.empty(max(tensor.num_bytes, dtype.itemsize), dtype=torch.uint8)
    with open_file(tensor.path) as file:
        for _ in _fill(scales, name, tensor, file, buffer):
            pass
    return scales


def _read(
    file: BinaryIO,
    name: str,
    tensor: StoredTensor,
    begin: int,
    num_elements: int,
    dtype: torch.dtype,
    buffer: Tensor,
) -> Tensor:
    """Elements from byte ``begin`` of a tensor on, in the buffer; gone with the next read."""
    part = buffer[: num_elements * dtype.itemsize]
    try:
        _read_exactly(file, tensor.offset + begin, part)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: {name}: {error.strerror or error}") from None
    return part.view(dtype)


def _read_exactly(file: BinaryIO, offset: int, buffer: Tensor) -> None:
    """Fill ``buffer``. Plain reads: on a mapped file an I/O error would kill the process."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    file.seek(offset)
    while view:
        num_read = file.readinto(view)  # type: ignore[attr-defined]
        if not num_read:
            raise OSError(
                0, "the file ends inside the tensor; it changed since the headers were read"
            )
        view = view[num_read:]


def _require_finite(values: Tensor, stored: Tensor, where: str) -> None:
    """``values`` are what the model makes of ``stored``."""
    if values.dtype == torch.float8_e4m3fn:
        if bool(
            (values.view(torch.uint8) & 0x7F == 0x7F).any()
        ):  # its only NaN; it has no infinity
            raise CheckpointError(f"{where}: holds NaN")
        return
    # One pass: a NaN or an infinity always shows in the sum. Finite values may overflow it.
    if bool(values.sum().isfinite()) or bool(values.isfinite().all()):
        return
    if bool(stored.isfinite().all()):
        raise _does_not_fit(where, f"a {stored.dtype} value", values)
    why = "holds NaN" if bool(stored.isnan().any()) else "holds an infinity"
    raise CheckpointError(f"{where}: {why}")


def _does_not_fit(where: str, what: str, values: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{where}: {what} does not fit {values.dtype}; run it with --dtype bfloat16 or float32"
    )


def _require_scales(scales: Tensor, where: str) -> None:
    if not bool((scales > 0).all()):
        raise CheckpointError(f"{where}: holds a scale that is not above 0")
    if not bool((scales <= MAX_SCALE).all()):
        raise CheckpointError(f"{where}: holds a scale above {MAX_SCALE:.1e}: weights overflow")
