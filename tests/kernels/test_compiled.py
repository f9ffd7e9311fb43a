"""Every launch of the engine compiles for every chip, with no GPU, and takes what the chip has.

Modules of launches have two functions of a capability: ``tight``, those that take the most
registers or shared memory, and ``every``.
"""

from __future__ import annotations

from types import ModuleType

import pytest

from kernels.compile import SHARED_MEMORY
from tests.kernels import (
    test_compile,
    test_compile_fp8,
    test_compile_indexer,
    test_compile_linear,
    test_compile_moe,
)
from tests.kernels.compiled import check, check_tensor_cores
from tests.kernels.passes import INTERPRETED

LAUNCHES: list[ModuleType] = [
    test_compile,
    test_compile_fp8,
    test_compile_indexer,
    test_compile_linear,
    test_compile_moe,
]
NAMES = [module.__name__.split(".")[-1] for module in LAUNCHES]
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile"),
    pytest.mark.parametrize("launches", LAUNCHES, ids=NAMES),
]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_tightest_launches_do_not_spill(launches: ModuleType, capability: int) -> None:
    check(launches.tight(capability), capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_products_use_the_tensor_cores(launches: ModuleType, capability: int) -> None:
    check_tensor_cores(launches.tight(capability), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_launch_spills(launches: ModuleType, capability: int) -> None:
    variants = launches.every(capability)
    check(variants, capability)
    check_tensor_cores(variants, capability)
