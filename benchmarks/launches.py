"""Launches of ops with other settings than the table's, and whether their kernels spill."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction

from kernels import configs

Config = dict[str, Any]
Facts = tuple[tuple[str, configs.Fact], ...]


@dataclass(slots=True)
class Launches:
    """What was asked of the table while `launching_with` held."""

    asked: list[tuple[str, Facts, Config]] = field(default_factory=list)

    def of(self, op: str) -> dict[Facts, Config]:
        return {facts: config for name, facts, config in self.asked if name == op}


@contextmanager
def launching_with(
    forced: Mapping[str, Config], candidate: tuple[str, Facts, Config] | None = None
) -> Iterator[Launches]:
    """While it lasts, the ops of ``forced`` and the launch of ``candidate`` take these settings."""
    original = configs._lookup
    launches = Launches()

    def lookup(op: str, facts: Facts) -> Config:
        if candidate is not None and (op, facts) == candidate[:2]:
            config = candidate[2]
        else:
            config = forced[op] if op in forced else original(op, facts)
        launches.asked.append((op, facts, dict(config)))
        return dict(config)

    _forget_launches()
    configs._lookup = lookup
    try:
        yield launches
    finally:
        configs._lookup = original
        _forget_launches()


def _kernel_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("kernels.")]


def _forget_launches() -> None:
    """Empty what the ops remember of the table."""
    for module in _kernel_modules():
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def new_spills(seen: set[int]) -> bool:
    """Whether a kernel that was loaded since the last call spills registers; adds to ``seen``."""
    spills = False
    for module in _kernel_modules():
        for function in [v for v in vars(module).values() if isinstance(v, JITFunction)]:
            for cache in list(function.device_caches.values()):
                for kernel in cache[0].values():
                    if id(kernel) not in seen:
                        seen.add(id(kernel))
                        spills |= bool(getattr(kernel, "n_spills", 0))
    return spills
