# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Launches of compiled loops recorded once and run again without Python, as a GPU's graphs are.

A step of one token is some two hundred launches. Each is a few us of Python when its code is in the
processor's cache, and several times that when the weights of the launch before have pushed it out.
A tape keeps addresses and integers; it runs them in one parallel region, with a barrier between.

What is recorded must be launches and views alone, as torch's dispatcher tells; it does not tell of
`Tensor.tolist` or of numpy. Results lie in an `Arena`, where they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.native import INT64, MAX_ARGS, arguments, array, call, entry, launch, recorder

_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20
_ARGS_BYTES = 8 * (MAX_ARGS + 1)
_ALL_THREADS = 1 << 30  # values, for `launch`

_barrier = types.ExternalFunction("GOMP_barrier", types.void())
_aten = torch.ops.aten


def _replay(data):
    given, _ = arguments(data)
    num_launches, entries_at, args_at = given[:3]
    entries = array(entries_at, 0, num_launches, INT64)
    for i in range(num_launches):
        call(entries[i], args_at + i * _ARGS_BYTES)
        _barrier()


class Arena:
    """Memory for the results of recorded launches, which tapes share: one runs at a time."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self.start()

    def start(self) -> None:
        """Hand out the same memory once more."""
        self._chunk, self._used = 0, 0

    def take(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not filled."""
        shape = tuple(shape)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        while self._chunk == len(self._chunks) or (
            self._used + num_bytes > self._chunks[self._chunk].shape[0]
        ):
            if self._chunk == len(self._chunks):
                size = max(num_bytes, _CHUNK_BYTES)
                self._chunks.append(torch.empty(size, dtype=torch.uint8))
            else:
                self._chunk, self._used = self._chunk + 1, 0
        taken = self._chunks[self._chunk][self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken.view(dtype).view(shape)


class _OnlyLaunches(TorchDispatchMode):
    """Puts what torch allocates into an arena, and notes whether torch computes anything."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self.foreign: str | None = None

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.foreign is not None:
            return function(*args, **kwargs)
        if function is _aten.empty.memory_format:
            return self._arena.take(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if function is _aten.new_empty.default:
            return self._arena.take(args[1], kwargs.get("dtype") or args[0].dtype)
        if function is _aten.empty_like.default:
            return self._arena.take(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        result = function(*args, **kwargs)
        is_new = function is _aten.lift_fresh.default  # made from Python's numbers
        if is_new or function._schema.is_mutable or not _is_view(result, args):
            self.foreign = str(function)
        return result


def _is_view(result: Any, args: Any) -> bool:
    """Whether all that an op returned lies in memory it was given."""
    given = {t.untyped_storage().data_ptr() for t in _tensors(args) if t.layout == torch.strided}
    results = _tensors(result)  # none: a number, on which what follows may depend
    return bool(results) and all(
        t.layout == torch.strided and t.untyped_storage().data_ptr() in given for t in results
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape:
    """The launches of a function, to run again on whatever then lies at the same addresses."""

    def __init__(self, entries: list[int], args: np.ndarray[Any, Any], result: Tensor) -> None:
        self._entries = np.array(entries, np.int64)
        self._args = args
        self.result = result
        """Of the function; `replay` fills it, and so does that of any tape of the same arena."""

    def replay(self) -> None:
        pointers = self._entries.ctypes.data, self._args.ctypes.data
        launch(entry(_replay), _ALL_THREADS, 0.0, len(self._entries), *pointers)


def record(function: Callable[[], Tensor], arena: Arena) -> tuple[Tensor, Tape | None]:
    """Run a function; what it returns, and a tape of it, None if torch computed something in it.

    Every tensor it reads, other than those it allocates, must stay where it is, and what it does
    must follow from none of their values. The result may lie in the arena.
    """
    entries: list[int] = []
    args: list[tuple[int, ...]] = []
    scalars: list[float] = []

    def note(entry: int, scalar: float, given: tuple[int, ...]) -> None:
        entries.append(entry)
        scalars.append(scalar)
        args.append(given)

    arena.start()
    recorder.note = note
    try:
        with _OnlyLaunches(arena) as mode:
            result = function()
    finally:
        recorder.note = None
    if mode.foreign is not None or not entries:
        return result, None
    packed = np.zeros((len(args), MAX_ARGS + 1), np.int64)
    packed[:, :MAX_ARGS] = args
    packed[:, MAX_ARGS] = np.array(scalars, np.float64).view(np.int64)
    return result, Tape(entries, packed, result)


def prepare(_dtype: torch.dtype) -> None:
    entry(_replay)
