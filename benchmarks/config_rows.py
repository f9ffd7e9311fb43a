"""Puts a measured row into the text of kernels/configs.toml and leaves the rest byte for byte."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

HEADER = re.compile(r"^\[\[(?P<op>\w+)\]\]\s*(#.*)?$")


def insert_row(
    text: str, op: str, when: Mapping[str, Any], use: Mapping[str, Any], measured: str
) -> str:
    """``text`` with a row on top of those of ``op``; one with the same ``when`` gives way.

    Args:
        text: of a table as `kernels.configs` reads it.
        op: an op that has rows.
        when: the facts the row is for, at least one.
        use: what to launch with.
        measured: what was measured, when and on what.

    Raises:
        KeyError: the op has no row.
        ValueError: ``when`` is empty: such a row would hide all others.
    """
    if not when:
        raise ValueError(f"a row of {op} on top of the others needs a condition")
    lines = _without(text.splitlines(keepends=True), op, when)
    starts = [at for at, line in enumerate(lines) if _op_of(line) == op]
    if not starts:
        raise KeyError(f"no row of {op}")
    row = f"[[{op}]]\nwhen = {inline(when)}\nuse = {inline(use)}\nmeasured = {inline(measured)}\n\n"
    return "".join([*lines[: starts[0]], row, *lines[starts[0] :]])


def interval(rows: int, points: Sequence[int]) -> dict[str, int]:
    """Conditions for the numbers of rows that are launched as the measured number ``rows``.

    Those are the ones above the next smaller of ``points``, the measured numbers, up to ``rows``.
    """
    below = [point for point in points if point < rows]
    return ({"min_rows": max(below) + 1} if below else {}) | {"max_rows": rows}


def inline(value: Any) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    return repr(value)


def _op_of(line: str) -> str | None:
    found = HEADER.match(line.rstrip())
    return found["op"] if found else None


def _without(lines: list[str], op: str, when: Mapping[str, Any]) -> list[str]:
    """The lines without the row of ``op`` whose condition is ``when``, and the blank behind it."""
    for start, line in enumerate(lines):
        if _op_of(line) != op:
            continue
        end = start + 1
        while end < len(lines) and lines[end].strip() and not lines[end].startswith(("[", "#")):
            end += 1
        [row] = tomllib.loads("".join(lines[start:end]))[op]
        if row.get("when") == dict(when):
            blank = end < len(lines) and not lines[end].strip()
            return lines[:start] + lines[end + blank :]
    return lines
