"""A step's inputs as one block of memory, so that they reach the device in one copy.

Arrays lie one behind another at multiples of 16 bytes: kernels are compiled for such pointers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
MIN_BYTES = 1 << 16
DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Field:
    """Where one array lies in a block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Staging:
    """Memory of the host that a device can read while the host goes on; it grows as needed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resize(MIN_BYTES)

    def _resize(self, num_bytes: int) -> None:
        self.memory = torch.empty(
            num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        self._bytes = self.memory.numpy()

    def pack(self, arrays: Mapping[str, Array]) -> list[Field]:
        """Copy arrays in, over what was there; call it once the last copy to a device is over."""
        fields: list[Field] = []
        offset = 0
        for name, array in arrays.items():
            fields.append(Field(name, DTYPES[array.dtype], array.shape, offset))
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if offset > self.memory.numel():
            self._resize(1 << (offset - 1).bit_length())
        for field, array in zip(fields, arrays.values(), strict=True):
            place = self._bytes[field.offset : field.offset + array.nbytes]
            place.view(array.dtype)[:] = array.reshape(-1)
        return fields

    def upload(self, fields: list[Field]) -> dict[str, Tensor]:
        """Start the copy to fresh memory of the device; the arrays there by name."""
        used = self.memory[: end_of(fields)]
        return views(used.to(self.device, non_blocking=True), fields)

    def upload_into(self, block: Tensor, fields: list[Field]) -> None:
        """Start the copy into ``block`` [at least as many bytes] uint8 on the device."""
        num_bytes = end_of(fields)
        block[:num_bytes].copy_(self.memory[:num_bytes], non_blocking=True)


def end_of(fields: list[Field]) -> int:
    return fields[-1].offset + fields[-1].num_bytes if fields else 0


def views(block: Tensor, fields: list[Field]) -> dict[str, Tensor]:
    """The arrays that lie in ``block`` [num_bytes] uint8, by name."""
    return {
        field.name: block[field.offset : field.offset + field.num_bytes]
        .view(field.dtype)
        .view(field.shape)
        for field in fields
    }
