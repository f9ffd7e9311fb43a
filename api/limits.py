"""Every limit of the wire and of the queue, and how ``--limit NAME=VALUE`` sets it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any

from runtime import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BYTES = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB}
SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600}
COUNT = {"": 1}
DRAINED_BODIES = 4
"""A refused body of up to this many limits, counting chunk framing, is read to its end: a client
that is still sending would see a broken connection instead of the answer."""


def _bytes(default: int, low: int, high: int, meaning: str) -> Any:
    return field(default=default, metadata={"units": BYTES, "range": (low, high), "help": meaning})


def _seconds(default: float, low: float, high: float, meaning: str) -> Any:
    return field(
        default=default, metadata={"units": SECONDS, "range": (low, high), "help": meaning}
    )


def _count(default: int, low: int, high: int, meaning: str) -> Any:
    return field(default=default, metadata={"units": COUNT, "range": (low, high), "help": meaning})


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes are bytes, times are seconds. A flag's name is the field's with hyphens."""

    body: int = _bytes(8 * MIB, KIB, GIB, "body of a request")
    bodies: int = _bytes(
        256 * MIB, KIB, 1024 * GIB, "bodies that wait for their encoding, all requests together"
    )
    body_seconds: float = _seconds(30, 1, 3600, "window in which a body must keep its rate")
    body_rate: int = _bytes(KIB, 1, GIB, "bytes of a body per second, at least")
    request_line: int = _bytes(4 * KIB, 64, 64 * KIB, "method, path and query of a request")
    header: int = _bytes(16 * KIB, KIB, MIB, "all header lines of a request together")
    headers: int = _count(100, 10, 10_000, "header lines of a request")
    header_seconds: float = _seconds(10, 1, 600, "from a request's first byte to its last header")
    json_depth: int = _count(64, 8, 500, "arrays and objects inside each other in a body")
    json_containers: int = _count(50_000, 100, 10_000_000, "arrays and objects in a body")
    json_values: int = _count(200_000, 100, 100_000_000, "values in a body, counted by commas")
    connections: int = _count(1024, 1, 100_000, "open connections")
    connections_per_address: int = _count(
        256, 1, 100_000, "open connections of one address; this machine's own only if set"
    )
    keep_alive: float = _seconds(75, 1, 3600, "an idle connection stays open")
    ping: float = _seconds(10, 1, 300, "silence after which a stream gets a comment")
    stall: float = _seconds(30, 1, 3600, "a client that reads nothing of its answer is kept")
    queue: int = _count(256, 1, 100_000, "requests that wait for the engine")
    queue_seconds: float = _seconds(120, 1, 86_400, "a request waits for the engine")
    request_seconds: float = _seconds(1800, 1, 86_400, "a request takes, all in all")
    failed_keys: int = _count(20, 1, 100_000, "wrong keys of one address per minute")
    counts_loopback: bool = False
    """Whether `connections_per_address` holds for loopback: a proxy, or the user."""

    @classmethod
    def parse(cls, settings: Iterable[str]) -> Limits:
        """Limits from ``name=value`` texts such as ``body=16MiB`` or ``keep-alive=2min``.

        Raises `ConfigError` with the name, the value and the range.
        """
        known = {_flag(entry): entry for entry in fields(cls) if entry.metadata}
        values: dict[str, Any] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise ConfigError(f"--limit {setting!r} is not NAME=VALUE, such as body=16MiB")
            if name not in known:
                raise ConfigError(f"--limit knows no {name!r}; it knows {', '.join(known)}")
            entry = known[name]
            if entry.name in values:
                raise ConfigError(f"--limit {name} is given twice")
            values[entry.name] = _parse(entry, text)
        if "connections_per_address" in values:
            values["counts_loopback"] = True
        return cls(**values)

    @classmethod
    def describe(cls) -> list[tuple[str, str, str]]:
        """``(name, default, meaning)`` of every limit, for a help text."""
        return [
            (_flag(entry), _show(entry, getattr(cls(), entry.name)), entry.metadata["help"])
            for entry in fields(cls)
            if entry.metadata
        ]


def _flag(entry: Field[Any]) -> str:
    return entry.name.replace("_", "-")


def _parse(entry: Field[Any], text: str) -> float:
    units: dict[str, int] = entry.metadata["units"]
    low, high = entry.metadata["range"]
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", text.strip())
    unit = units.get(match[2].lower()) if match else None
    value = float(match[1]) * unit if match and unit else math.nan
    whole = entry.metadata["units"] is not SECONDS
    if not low <= value <= high or (whole and value != int(value)):
        raise ConfigError(
            f"--limit {_flag(entry)} must be from {_show(entry, low)} to {_show(entry, high)}, "
            f"got {text!r}"
        )
    return int(value) if whole else value


def _show(entry: Field[Any], value: float) -> str:
    """The value in the largest unit that leaves it whole."""
    units: dict[str, int] = entry.metadata["units"]
    best = max((u for u in units.items() if value % u[1] == 0), key=lambda u: u[1], default=("", 1))
    unit = {"kib": "KiB", "mib": "MiB", "gib": "GiB"}.get(best[0], best[0])
    if units is SECONDS and best[1] == 1:
        unit = "s"
    return f"{value / best[1]:g}{unit}"
