# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Loops compiled for this machine's CPU by numba, run on the threads that torch computes with.

A step of few tokens is hundreds of short operations between its products; torch takes 20 to 60 us
for one whose code and data have left the processor's cache, a compiled loop 2 to 10.

    entry     a function of one address, that of `MAX_ARGS` int64 and a float64
    launch    runs an entry on the threads of torch's OpenMP pool
    share     which of so many items are the running thread's

The pool is reached by libgomp's GOMP_parallel, so that no second set of threads competes with it.
Tensors arrive as addresses: numba knows no bf16, whose values are the upper halves of fp32's here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, overload
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

MAX_ARGS = 20
# sums in any fixed order, products fused with sums; NaN and infinity keep their meaning
FASTMATH = {"reassoc", "contract", "nsz"}
# a second thread takes a few us to begin and to end
_VALUES_PER_THREAD = 1 << 14
_SYMBOLS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


def _find_symbols() -> None:
    """Tell LLVM the addresses in the libgomp that torch loaded. Raises `ImportError` without it."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(library))
        for name in _SYMBOLS:
            address = ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value
            binding.add_symbol(name, address)
    except (OSError, AttributeError) as error:
        raise ImportError(f"torch's threads can't be reached: {error}") from error


def _cache_folder() -> Path:
    # numba itself would take what it kept of one file's loops although another file has changed
    sources = sorted(Path(__file__).parent.glob("native*.py"))
    versions = f"{numba.__version__} {llvmlite.__version__}".encode()
    digest = hashlib.sha256(versions + b"".join(file.read_bytes() for file in sources))
    folder = Path(numba.config.CACHE_DIR or Path(__file__).parent / "__pycache__")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        folder = Path(home) / "fathom"
    return folder / f"native-{digest.hexdigest()[:12]}"


if numba.config.DISABLE_JIT:
    raise ImportError("numba is told not to compile")
with contextlib.suppress(RuntimeError):  # a user without a home
    numba.config.CACHE_DIR = str(_cache_folder())
_find_symbols()
_gomp_parallel = types.ExternalFunction(
    "GOMP_parallel", types.void(types.voidptr, types.voidptr, types.uint32, types.uint32)
)
_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())

loop = numba.njit(error_model="numpy", fastmath=FASTMATH)
"""Decorates what entries call."""


def _kept(decorate: Callable[..., Any], signature: Any, function: Callable[..., Any]) -> Any:
    """Compile a function, or find it in the cache."""
    options = {"error_model": "numpy", "fastmath": FASTMATH}
    try:
        return decorate(signature, cache=True, **options)(function)
    except Exception:  # no folder to write to, a damaged file: whatever it is, do without
        return decorate(signature, **options)(function)


@functools.cache
def entry(function: Callable[[int], None]) -> int:
    """The address of ``function`` as an entry."""
    callback = _kept(numba.cfunc, types.void(types.voidptr), function)
    _callbacks.append(callback)
    address: int = callback.address
    return address


_callbacks: list[Any] = []  # the code goes when they go


def has_features(*names: str) -> bool:
    """Whether loops may use these features of the CPU, in LLVM's names."""
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None:
        return False  # numba compiles for another CPU
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in names)


def check_rows(x: Tensor, bias: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Raise `ValueError` where a product with such a matrix would read what is not there."""
    if x.dtype != dtype or x.shape[1] != shape[1] or x.stride(1) != 1:
        raise ValueError(f"rows of {list(x.shape)} {x.dtype} for a matrix of {list(shape)} {dtype}")
    if bias is not None and (bias.dtype != dtype or bias.shape[0] != shape[0]):
        raise ValueError(f"bias of {list(bias.shape)} {bias.dtype} for {list(shape)} {dtype}")


def launch(entry: int, num_values: int, scalar: float, *args: int) -> None:
    """Run an entry on torch's threads: one where ``num_values`` it works on are few, or else all.

    ``args`` are up to `MAX_ARGS` integers; ``scalar`` comes after the last of them.
    """
    num_threads = 1 if num_values < _VALUES_PER_THREAD else torch.get_num_threads()
    padded = args + _PADDING[len(args)]
    _launch(entry, num_threads, scalar, padded)
    if (note := recorder.note) is not None:
        note(entry, scalar, padded)


class _Recorder(threading.local):
    note: Callable[[int, float, tuple[int, ...]], None] | None = None


recorder = _Recorder()
"""Its ``note`` is told of every launch of the calling thread: the entry, scalar and arguments."""
_PADDING = [(0,) * (MAX_ARGS - num_args) for num_args in range(MAX_ARGS + 1)]


def _pointer_to(value_type: types.Type | None) -> Any:
    @intrinsic
    def pointer(_context, address):
        kind = types.voidptr if value_type is None else types.CPointer(value_type)

        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return kind(types.int64), generate

    return pointer


_pointer = _pointer_to(None)
_POINTERS = {
    value_type: _pointer_to(value_type)
    for value_type in (types.uint16, types.float32, types.uint8, types.int32, types.int64)
}
BF16, FP32 = np.uint16(0), np.float32(0)
UINT8, INT32, INT64 = np.uint8(0), np.int32(0), np.int64(0)
"""What `array` takes for a dtype; `widen`, `store` and `rounded` know what uint16 means."""


@intrinsic
def call(_context, entry, data):
    """Run an entry on the calling thread."""

    def generate(context, builder, _signature, args):
        pointer = context.get_value_type(types.voidptr)
        function = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _run(entry, num_threads, scalar, args):
    given = np.empty(MAX_ARGS + 1, np.int64)
    for i in range(MAX_ARGS):
        given[i] = args[i]
    given[MAX_ARGS] = np.float64(scalar).view(np.int64)
    data = given.ctypes.data
    if num_threads > 1:
        _gomp_parallel(_pointer(entry), _pointer(data), np.uint32(num_threads), np.uint32(0))
    else:
        call(entry, data)


_RUN = types.void(types.int64, types.int64, types.float64, types.UniTuple(types.int64, MAX_ARGS))
_launch = _kept(functools.partial(numba.njit, nogil=True), _RUN, _run)


def array(address, first, shape, dtype):
    """Values at an address, from the ``first`` on. ``dtype`` is `BF16` or its like."""


@overload(array, inline="always")
def _array(address, first, shape, dtype):
    pointer = _POINTERS[dtype]
    size = np.int64(dtype.bitwidth // 8)
    return lambda address, first, shape, dtype: numba.carray(pointer(address + first * size), shape)


@loop
def arguments(data):
    """What an entry was given: the integers, and the scalar."""
    given = numba.carray(data, MAX_ARGS + 1, np.int64)
    return to_fixed_tuple(given[:MAX_ARGS], MAX_ARGS), np.int64(given[MAX_ARGS]).view(np.float64)


@loop
def share(num_items):
    """The running thread's items [first, last)."""
    thread, num_threads = _thread_num(), _num_threads()
    return num_items * thread // num_threads, num_items * (thread + 1) // num_threads


@intrinsic
def fma(_context, a, b, c):
    """Of fp32, a * b + c, rounded once."""

    def generate(_context, builder, _signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@loop
def _round_to_bf16(value):
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    upper = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return np.uint16(upper if value == value else np.uint32(0x7FC0))


def widen(value):
    """A stored value as fp32."""


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def store(array, index, value):
    """Round an fp32 value to the dtype of an array, to the nearest and even, and keep it there."""


@overload(store, inline="always")
def _store(array, index, value):
    if array.dtype == types.uint16:

        def implementation(array, index, value):
            array[index] = _round_to_bf16(value)
    else:

        def implementation(array, index, value):
            array[index] = value

    return implementation


def rounded(array, value):
    """An fp32 value as it is after rounding to the dtype of an array."""


@overload(rounded, inline="always")
def _rounded(array, value):
    if array.dtype == types.uint16:
        return lambda array, value: widen(_round_to_bf16(value))
    return lambda array, value: value


@loop
def store_block(sums, block, bias, out):
    """Put a block of outputs, fp32 sums plus bias, where it belongs; a bias of size 0 is none."""
    start = block * sums.size
    for i in range(sums.size):
        total = sums[i]
        if bias.size > 0:
            total += widen(bias[start + i])
        store(out, start + i, total)


@loop
def max_or_nan(row, least):
    """The largest magnitude of a row, or ``least`` if that is more; NaN with NaN or infinity."""
    largest, poison = np.float32(least), np.float32(0)
    for i in range(row.size):
        value = widen(row[i])
        largest = max(largest, abs(value))
        poison += value * np.float32(0)  # `max` may lose a NaN
    return largest + poison


@loop
def exp_of_negative(x):
    """exp(x) for x <= 0, within 2e-7 of it; 0 below -87, where it is 1e-38.

    Cephes' expf, in arithmetic that vector units have, which a call of libm's has not.
    """
    limited = np.float32(-87.0) if x < np.float32(-87.0) else np.float32(x)
    power = np.floor(limited * np.float32(1.4426950408889634) + np.float32(0.5))
    rest = (limited - power * np.float32(0.693359375)) - power * np.float32(-2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    exp_of_rest = series * rest * rest + rest + np.float32(1)
    exponent = np.uint32(np.uint32(np.int32(power) + np.int32(127)) << np.uint32(23))
    result = exp_of_rest * exponent.view(np.float32)
    return np.float32(0) if x < np.float32(-87.0) else result
