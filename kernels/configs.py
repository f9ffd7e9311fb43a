"""Launch configurations of the Triton kernels: block sizes, warps, stages, splits.

All of them stand in ``configs.toml``, in one table per op. A row holds conditions (``when``) on the
facts of a launch and what to launch with (``use``); the first row whose conditions all hold wins,
and the last row of an op has none, so every launch finds one. Rows that name shapes were measured
by ``python -m benchmarks.tune`` on a GPU; the others are safe defaults: they fit every chip.

    when = { arch = [90, 100], max_rows = 4 }     a fact equal to a value, or one of a list;
                                                  min_x and max_x bound the fact x, inclusive

Nothing is ever timed while serving.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

import torch

Fact = int | str | bool
PATH = Path(__file__).with_name("configs.toml")


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """Op -> its rows, in order."""
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def launch_config(op: str, **facts: Fact | torch.dtype) -> dict[str, Any]:
    """What ``op`` launches with, given the facts of the launch.

    Args:
        op: a table of ``configs.toml``.
        facts: whatever the op's rows may ask for, such as ``arch=90`` for sm_90 or ``rows=8``; a
            torch dtype goes by its name there.

    Returns:
        A new dict: constexprs of the kernel, num_warps, num_stages, and what the op reads itself.

    Raises:
        KeyError: the op has no table, no row holds, or a row asks for a fact that was not given.
    """
    named = {
        key: str(fact).removeprefix("torch.") if isinstance(fact, torch.dtype) else fact
        for key, fact in facts.items()
    }
    return dict(_lookup(op, tuple(sorted(named.items()))))


@functools.cache
def _lookup(op: str, items: tuple[tuple[str, Fact], ...]) -> dict[str, Any]:
    facts = dict(items)
    for row in table()[op]:
        if all(_holds(key, wanted, facts) for key, wanted in row.get("when", {}).items()):
            return dict(row["use"])
    raise KeyError(f"no row of {op} in {PATH.name} holds for {facts}")


def _holds(key: str, wanted: Any, facts: dict[str, Fact]) -> bool:
    if key.startswith("min_"):
        return bool(facts[key.removeprefix("min_")] >= wanted)
    if key.startswith("max_"):
        return bool(facts[key.removeprefix("max_")] <= wanted)
    return facts[key] in wanted if isinstance(wanted, list) else facts[key] == wanted
