"""What compiled variants take from a chip, checked and printed.

``python -m tests.kernels.compiled [capability ...]`` compiles everything the engine launches and
prints registers, spills, shared memory and matrix instructions; it fails if something does not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from kernels.compile import (
    SHARED_MEMORY,
    KernelVariant,
    compile_variant,
    tensor_core_instructions,
)


def check(variants: Iterable[KernelVariant], capability: int) -> None:
    """Nothing spills, and shared memory fits the chip."""
    for variant in variants:
        resources = compile_variant(variant, capability)
        assert resources.stack_bytes == resources.local_bytes == 0, variant.name
        assert resources.shared_bytes <= SHARED_MEMORY[capability], variant.name


def check_tensor_cores(variants: Iterable[KernelVariant], capability: int) -> None:
    """Every product of halves or of fp8 is done by matrix instructions.

    sm_90 and sm_100 take fp8 in blocks of 64 rows or more; smaller ones become products of halves.
    """
    for variant in variants:
        counts = tensor_core_instructions(variant, capability)
        if counts is not None and torch.float32 not in operand_dtypes(variant):
            assert counts, variant.name
            takes_fp8 = variant.config.get("FP8_DOT") and variant.config["BLOCK_M"] >= 64
            assert not takes_fp8 or any("Q" in name for name in counts), variant.name


def operand_dtypes(variant: KernelVariant) -> set[object]:
    """Of the pointers that a product reads."""
    names = ("q_ptr", "k_ptr", "rows_ptr", "weights_ptr", "weight_ptr", "index_cache_ptr")
    skipped = "weights_ptr" if "index_cache_ptr" in variant.arguments else None
    return {variant.arguments.get(name) for name in names if name != skipped}


def main() -> None:
    from tests.kernels import test_compile_mlp_sampling
    from tests.kernels.test_compiled import LAUNCHES

    fits = True
    for capability in [int(argument) for argument in sys.argv[1:]] or list(SHARED_MEMORY):
        variants = [variant for module in LAUNCHES for variant in module.every(capability)]
        variants += test_compile_mlp_sampling.VARIANTS
        print(f"sm_{capability}: {SHARED_MEMORY[capability]:,} bytes of shared memory")
        print(f"{'variant':<44}{'registers':>10}{'spilled':>9}{'shared':>9}  matrix instructions")
        for variant in variants:
            resources = compile_variant(variant, capability)
            counts = tensor_core_instructions(variant, capability)
            shown = ", ".join(f"{count} {name}" for name, count in (counts or {}).items())
            spilled = resources.stack_bytes + resources.local_bytes
            fits &= spilled == 0 and resources.shared_bytes <= SHARED_MEMORY[capability]
            print(
                f"{variant.name:<44}{resources.registers:>10}{spilled:>9}"
                f"{resources.shared_bytes:>9,}  {shown or ('-' if counts is None else 'none')}"
            )
        print()
    sys.exit(not fits)


if __name__ == "__main__":
    main()
