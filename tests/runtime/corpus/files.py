"""Damaged safetensors files: what is wrong shows in the file alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.runtime.corpus.case import WEIGHTS, Case, Damage, write


def safetensors_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one_tensor(name: str = "x", **changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return safetensors_bytes(json.dumps({name: entry}).encode(), b"\0" * 8)


def two_tensors(first: list[int], second: list[int], size: int) -> bytes:
    entries = {
        "x": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
        "y": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
    }
    return safetensors_bytes(json.dumps(entries).encode(), b"\0" * size)


def cut(keep: float) -> Damage:
    """Keep this part of the file; all but the last byte if it is 1."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS
        data = path.read_bytes()
        path.write_bytes(data[: min(int(len(data) * keep), len(data) - 1)])

    return damage


def header_of(num_bytes: int) -> Damage:
    """A well-formed file, nearly all header; sparse, so that it costs no disk."""

    def damage(folder: Path) -> None:
        with (folder / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", num_bytes) + b'{"x":')
            file.truncate(8 + num_bytes)

    return damage


def _file(content: bytes, *says: str) -> Case:
    return Case(write(WEIGHTS, content), WEIGHTS, says)


_TOO_LARGE, _TOO_SMALL = "header too large", "header too small"
_JSON, _SIZE = "invalid JSON in header", "file not fully covered"

FILES: dict[str, Case] = {
    "empty": _file(b"", _TOO_SMALL),
    "seven bytes": _file(b"\0" * 7, _TOO_SMALL),
    "header of length 0": _file(safetensors_bytes(b""), _JSON),
    "header past the end": _file(safetensors_bytes(b"{}", length=50), "invalid header length"),
    "header of 2^63": _file(safetensors_bytes(b"{}", length=2**63), _TOO_LARGE),
    "header of 2^64-1": _file(safetensors_bytes(b"{}", length=2**64 - 1), _TOO_LARGE),
    "header above 100 MB": _file(safetensors_bytes(b"{}", length=100_000_001), _TOO_LARGE),
    "header of 90 MB that is there": Case(
        header_of(90_000_000), WEIGHTS, ("header of 90000000 bytes", "at most 8388608")
    ),
    "not JSON": _file(safetensors_bytes(b"{nope"), _JSON),
    "bad UTF-8": _file(safetensors_bytes(b'{"\xff": 1}'), "invalid UTF-8 in header"),
    "deep nesting": _file(safetensors_bytes(b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"), _JSON),
    "not an object": _file(safetensors_bytes(b"[]"), "invalid type: sequence"),
    "duplicate key": _file(
        safetensors_bytes(
            b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"\0",
        ),
        "a key of the header comes twice",
    ),
    "one byte short": Case(cut(1.0), WEIGHTS, (_SIZE,)),
    "half the file": Case(cut(0.5), WEIGHTS, (_SIZE,)),
    "trailing garbage": _file(one_tensor() + b"\0", _SIZE),
    "overlap": _file(two_tensors([0, 4], [2, 6], 6), "invalid offset for tensor `y`"),
    "hole": _file(two_tensors([0, 4], [6, 8], 8), "invalid offset for tensor `y`"),
    "end before begin": _file(one_tensor(data_offsets=[8, 0]), "invalid offset for tensor `x`"),
    "past the end": _file(one_tensor(data_offsets=[0, 16], shape=[4]), _SIZE),
    "negative offset": _file(one_tensor(data_offsets=[-8, 0]), "invalid value: integer `-8`"),
    "shape and size differ": _file(one_tensor(shape=[3]), "invalid shape, data type, or offset"),
    "shape overflows": _file(one_tensor(shape=[2**62, 2**62]), "overflow"),
    "negative dimension": _file(one_tensor(shape=[-2]), "invalid value: integer `-2`"),
    "fractional dimension": _file(one_tensor(shape=[2.0]), "floating point `2.0`"),
    "unknown dtype": _file(one_tensor(dtype="F31"), "F31"),
    "dtype that steers the terminal": _file(one_tensor(dtype="\x1b[2Jx"), r"\x1b[2Jx"),
    "missing key": _file(
        safetensors_bytes(b'{"x":{"dtype":"F32","shape":[0]}}'), "missing field `data_offsets`"
    ),
    "bad metadata": _file(safetensors_bytes(b'{"__metadata__":{"a":1}}'), "expected a string"),
    "pickle under this name": _file(b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", "a pickle"),
    "zip of a torch.save": _file(b"PK\x03\x04\0\0\x08\x08\0\0archive/data.pkl", "a zip"),
    "LFS pointer": _file(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer"
    ),
    "HTML page": _file(b"<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
}
