"""The safetensors files of a folder: index and headers, before any weight is read.

Index, files and headers must tell the same story; what they tell is a `StoredTensor` per name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runtime.config import Fields, file_size, is_there, one_line, read_json, show
from runtime.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 8 << 20  # parsed, a header takes many times its size in memory
MAX_TENSORS_PER_FILE = 20_000
MAX_NAME_LENGTH = 256
MAX_NAMES_SHOWN = 3
MAX_SHOWN_LENGTH = 100
MISTAKEN_FILES = {
    b"version ": "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"PK\x03\x04": "a zip as torch.save writes; only safetensors are read",
    b"\x80": "a pickle, which is never read; only safetensors are",
    b"<": "a web page, not the weights; download the file again",
}
"""What is found under the name of a safetensors file, by its first bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, from its header."""

    path: Path
    dtype: str  # as the file spells it: BF16, F32, F8_E4M3, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of every shard. The index, the files and their headers must agree."""
    index_path = folder / INDEX_NAME
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if odd := [name for name in present if not name.isprintable()]:
        raise CheckpointError(f"{folder}: {_show_name(odd[0])}: not a plain file name")
    weight_map: dict[str, str] | None = None
    if is_there(index_path):
        weight_map = read_weight_map(index_path)
        named = set(weight_map.values())
        if missing := sorted(named.difference(present)):
            raise CheckpointError(
                f"{index_path}: {some_names(missing)}: named here but not in the folder"
            )
        if extra := sorted(set(present) - named):
            raise CheckpointError(f"{folder / extra[0]}: not named in {INDEX_NAME}")
    if not present:
        raise CheckpointError(
            f"{folder}: no *.safetensors file (.bin and .pt files are never read: they run code)"
        )
    stored: dict[str, StoredTensor] = {}
    for file_name in present:
        for name, tensor in _read_header(folder / file_name).items():
            shown = _show_name(name)
            if name in stored:
                other = stored[name].path.name
                raise CheckpointError(f"{tensor.path}: {shown}: is in {other} as well")
            if weight_map is not None and weight_map.get(name) != file_name:
                raise CheckpointError(
                    f"{tensor.path}: {shown}: {INDEX_NAME} does not place it here"
                )
            stored[name] = tensor
    if weight_map is not None and (lost := [name for name in weight_map if name not in stored]):
        raise CheckpointError(f"{index_path}: {some_names(lost)}: not in the file named for it")
    return stored


def read_weight_map(index_path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file. Raises `CheckpointError`."""
    fields = Fields(read_json(index_path), str(index_path))
    weight_map = fields.raw("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fields.error("weight_map", "not an object that maps tensors to files")
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and re.fullmatch(r"[\w.-]+\.safetensors", file_name)
        if not plain:
            raise fields.error(
                "weight_map",
                f"{_show_name(name)}: {show(file_name)} is not the name of a safetensors file",
            )
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The header, after safetensors itself accepted it: sizes, order and gaps of the data fit."""
    num_file_bytes = file_size(path)
    try:
        with path.open("rb") as file:
            first_bytes = file.read(8)
            num_header_bytes = int.from_bytes(first_bytes, "little")
            mistaken = [MISTAKEN_FILES[b] for b in MISTAKEN_FILES if first_bytes.startswith(b)]
            if mistaken and num_header_bytes > num_file_bytes:
                raise CheckpointError(f"{path}: {mistaken[0]}")
            if MAX_HEADER_BYTES < num_header_bytes <= num_file_bytes:
                raise CheckpointError(
                    f"{path}: header of {num_header_bytes} bytes; at most {MAX_HEADER_BYTES} are "
                    "allowed"
                )
            with safe_open(path, framework="pt"):
                header = json.loads(file.read(num_header_bytes), object_pairs_hook=_unique_keys)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error) or "not enough memory to read it"
        raise CheckpointError(f"{path}: {one_line(str(why))}") from None
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS_PER_FILE:
        raise CheckpointError(
            f"{path}: {len(header)} tensors; at most {MAX_TENSORS_PER_FILE} are allowed in one file"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if len(name) > MAX_NAME_LENGTH:
            raise CheckpointError(f"{path}: {_show_name(name)}: name longer than {MAX_NAME_LENGTH}")
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + num_header_bytes + begin, end - begin
        )
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key of the header comes twice")
    return unique


def some_names(names: Iterable[str]) -> str:
    """The first few, for a message of one line."""
    names = list(names)
    more = ", …" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(_show_name, names[:MAX_NAMES_SHOWN])) + more


def _show_name(name: str) -> str:
    """A stranger's name, fit for a terminal."""
    plain = name[: MAX_SHOWN_LENGTH + 1]
    shown = plain if plain and plain.isprintable() else repr(plain)
    return shown if len(shown) <= MAX_SHOWN_LENGTH else f"{shown[:MAX_SHOWN_LENGTH]}…"
