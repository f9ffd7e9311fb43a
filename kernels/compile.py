"""Ahead-of-time compilation of Triton kernels, for any NVIDIA chip and without a GPU.

A variant is one kernel with the arguments of one launch. It is compiled as the launch would be: an
int divisible by 16 is declared so, an int equal to 1 and None become constants (unless the kernel
lists the parameter in ``do_not_specialize``), pointers are taken as 16-byte aligned. The
``cuobjdump`` that ships with triton then reports what the machine code needs, so registers that
spill and shared memory that no chip has are found before any chip is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# shared memory one program may use, in bytes, by compute capability
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")
POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """One launch of a kernel: what it is called with, without the data.

    Attributes:
        name: says which model or shape launches it; the id of its test.
        kernel: the ``@triton.jit`` function.
        arguments: by parameter name: a torch dtype for a tensor, an example value for an int or a
            float, None where the launch passes None.
        config: constexprs, num_warps and num_stages, as the launch passes them.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, torch.dtype | int | float | None]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled variant takes from the chip."""

    registers: int  # per thread
    stack_bytes: int  # per thread; registers that spill live here
    local_bytes: int  # per thread
    shared_bytes: int  # per program


def compile_variant(variant: KernelVariant, capability: int) -> Resources:
    """Compile for ``sm_<capability>``; takes about 0.3 s the first time, then triton's cache.

    Raises:
        triton.CompilationError: the kernel does not compile for this chip.
        ValueError: arguments and config do not name every parameter of the kernel.
    """
    compiled = _compile(variant, capability)
    report = _dump(compiled, "--dump-resource-usage")
    # "Function kernel: REG:40 STACK:0 SHARED:0 LOCAL:0 ..."; dynamic shared memory is not in it
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def tensor_core_instructions(variant: KernelVariant, capability: int) -> Counter[str] | None:
    """How often each matrix instruction stands in the machine code; None if nothing is multiplied.

    HMMA, HGMMA (sm_90) and UTCHMMA (sm_100) take fp16 and bf16, the same with a Q take fp8.
    Products of fp32 by ``input_precision="ieee"`` have none.
    """
    compiled = _compile(variant, capability)
    if "tt.dot" not in compiled.asm["ttir"]:
        return None
    return Counter(re.findall(r"\b((?:UTC)?[HQ]G?MMA)\b", _dump(compiled, "--dump-sass")))


def _compile(variant: KernelVariant, capability: int) -> Any:
    signature, constants, attributes = _specialise(variant)
    options = {key: value for key, value in variant.config.items() if key in LAUNCH_OPTIONS}
    source = ASTSource(variant.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _dump(compiled: Any, what: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _specialise(
    variant: KernelVariant,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    names = variant.kernel.arg_names
    constants = {key: value for key, value in variant.config.items() if key not in LAUNCH_OPTIONS}
    given = set(variant.arguments) | set(constants)
    if given != set(names):
        raise ValueError(f"{variant.name}: {sorted(given ^ set(names))} missing or unknown")
    aligned = [["tt.divisibility", 16]]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = None if name in constants else variant.arguments[name]
        varies = variant.kernel.params[index].do_not_specialize
        if isinstance(value, torch.dtype):
            signature[name] = POINTER_TYPES[value]
            attributes[(index,)] = aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and not varies):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not varies:
                attributes[(index,)] = aligned
    return signature, constants, attributes
