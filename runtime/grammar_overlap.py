"""How much of a JSON schema may hold for one value at once, bounded from above.

What several expressions have in common takes the grammar compiler time that doubles with each of
them, and nothing stops it once it has begun.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

MAX_EXPRESSIONS = 8
"""Patterns and formats for one text; 20 took longer than anybody waited."""
MAX_DIGITS = 4.5
"""Of several ``multipleOf`` for one number, multiplied with each other: 31,000 states, 0.2 s."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """The most that may hold for one value anywhere in a part of a schema."""

    num_expressions: int = 0
    num_multiples: int = 0
    digits: float = 0.0  # of these multiples; negative for fractions

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.num_expressions + other.num_expressions,
            self.num_multiples + other.num_multiples,
            self.digits + other.digits,
        )


def most_of(overlaps: Iterable[Overlap]) -> Overlap:
    """No less than any of them."""
    listed = [Overlap(), *overlaps]
    return Overlap(
        max(one.num_expressions for one in listed),
        max(one.num_multiples for one in listed),
        max(one.digits for one in listed),
    )


def any_of(overlaps: Iterable[Overlap]) -> Overlap:
    """Of which one has to hold: numbers are told apart by all their multiples at once."""
    listed = list(overlaps)
    whole = sum(listed, Overlap())
    return Overlap(most_of(listed).num_expressions, whole.num_multiples, whole.digits)


Combine = Callable[[Iterable[Overlap]], Overlap]
Find = Callable[[Any, str], Any]


def why_too_much(schema: dict[str, Any], find: Find) -> str | None:
    """A reason to refuse the schema; None if there is none.

    ``find`` gives the part of a schema that a ``$ref`` means, None where that is not plain: such
    a reference is refused.
    """
    overlaps: dict[int, Overlap] = {}  # by a part's identity; one may be reached in many ways
    entered: set[int] = set()
    num_decimals = 0
    pending: list[tuple[Any, bool]] = [(schema, False)]
    while pending:
        part, is_last = pending.pop()
        if not is_last and id(part) in entered:
            continue
        groups = list(_groups(schema, part, find))
        if is_last:
            whole = _own(part)
            for combine, group in groups:
                # one that refers back to where it is adds nothing that is not there already
                whole += combine(overlaps.get(id(each), Overlap()) for each in group)
            overlaps[id(part)] = whole
            continue
        entered.add(id(part))
        if isinstance(part, dict):
            num_decimals = max(num_decimals, _num_decimals(_multiple(part)))
            reference = part.get("$ref")
            if isinstance(reference, str) and find(schema, reference) is None:
                return (
                    f"no part of the schema is at $ref {reference[:80]!r}; write it as #/$defs/name"
                )
            if part is not schema and isinstance(part.get("$id"), str):
                return "only the whole schema may have an $id; what a $ref means depends on it"
        pending.append((part, True))
        pending += [(each, False) for _, group in groups for each in group]
    most = overlaps[id(schema)]
    if most.num_expressions > MAX_EXPRESSIONS:
        return (
            f"one text may have to fit {MAX_EXPRESSIONS} patterns and formats at once, here up to "
            f"{most.num_expressions}"
        )
    if most.num_multiples > 1 and most.digits + num_decimals * most.num_multiples > MAX_DIGITS:
        return "multipleOf: one number would have to be a multiple of several large ones at once"
    return None


def _groups(schema: Any, part: Any, find: Find) -> Iterator[tuple[Combine, list[Any]]]:
    """What a part consists of: each group holds beside every other."""
    rest: list[Any] = []
    if isinstance(part, list):
        rest = part
    elif isinstance(part, dict):
        for name, inner in part.items():
            if name == "allOf" and isinstance(inner, list):
                yield from ((most_of, [each]) for each in inner if isinstance(each, dict | list))
            elif name in ("anyOf", "oneOf") and isinstance(inner, list):
                yield any_of, [each for each in inner if isinstance(each, dict | list)]
            elif name == "$ref" and isinstance(inner, str):
                yield most_of, [find(schema, inner)]
            else:
                rest.append(inner)
    yield most_of, [each for each in rest if isinstance(each, dict | list)]


def _own(part: Any) -> Overlap:
    if not isinstance(part, dict):
        return Overlap()
    num_expressions = sum(isinstance(part.get(name), str) for name in ("pattern", "format"))
    multiple = _multiple(part)
    return Overlap(num_expressions, multiple is not None, math.log10(multiple or 1))


def _num_decimals(multiple: float | None) -> int:
    exponent = Decimal(repr(multiple or 1)).normalize().as_tuple().exponent
    return max(-int(exponent), 0)


def _multiple(part: dict[str, Any]) -> float | None:
    value = part.get("multipleOf")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 < value < math.inf else None
