"""Damaged folders: files missing, unreadable, or at odds with their index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

from safetensors.torch import save_file
from torch import Tensor

import runtime.fill
from tests.runtime.checkpoints import make_tensors, write_checkpoint
from tests.runtime.corpus.case import (
    CONFIG,
    DOWN,
    NUM_TOKENS,
    SERVED,
    TOKENIZER,
    WEIGHTS,
    Case,
    Damage,
    Edit,
    Reading,
    edit_json,
    in_sequence,
    link_to,
    link_to_itself,
    nothing,
    remove,
    replaced_by,
    valid_tensors,
    write,
)

INDEX = "model.safetensors.index.json"
SHARD_1, SHARD_2 = (f"model-0000{i}-of-000002.safetensors" for i in (1, 2))
NOBODY = 65534
UNREADABLE = "/proc/self/mem"  # a regular file whose first page gives EIO


def sharded(folder: Path) -> None:
    """Two shards and an index; the tensors take turns, `DOWN` is in one of them."""
    (folder / WEIGHTS).unlink()
    write_checkpoint(folder, SERVED, num_shards=2)


def edit_index(edit: Edit) -> Damage:
    return in_sequence(sharded, edit_json(INDEX, lambda index: edit(index["weight_map"])))


def duplicate_tensor(folder: Path) -> None:
    save_file({DOWN: valid_tensors(SERVED)[DOWN]}, folder / "more.safetensors")


def shard_of_another_model(folder: Path) -> None:
    sharded(folder)
    tensors = make_tensors(SERVED | {"intermediate_size": 81})
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    names = [name for name in tensors if index[name] == index[DOWN]]
    save_file({name: tensors[name] for name in names}, folder / index[DOWN])


@contextmanager
def as_nobody(folder: Path) -> Iterator[Path]:
    """Root may read everything, so root reads as somebody else."""
    if os.geteuid() != 0:
        yield folder
        return
    before, mode = Path.cwd(), folder.parent.stat().st_mode
    folder.parent.chmod(0o755)
    os.chdir(folder.parent)  # the folders above are closed to nobody
    os.seteuid(NOBODY)
    try:
        yield Path(folder.name)
    finally:
        os.seteuid(0)
        os.chdir(before)
        folder.parent.chmod(mode)


@contextmanager
def failing_disk(folder: Path) -> Iterator[Path]:
    """Only the head and the embeddings can be read."""
    read, limit = runtime.fill._read_exactly, 2 * 4 * NUM_TOKENS * SERVED["hidden_size"]

    def read_or_fail(file: BinaryIO, offset: int, buffer: Tensor) -> None:
        if offset > limit:
            raise OSError(5, "Input/output error")
        read(file, offset, buffer)

    with patch.object(runtime.fill, "_read_exactly", read_or_fail):
        yield folder


def locked(name: str) -> Damage:
    """Only this one is closed to nobody: safetensors writes files that are its owner's alone."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            path.chmod(0o644)
        (folder / name).chmod(0)

    return damage


def _layout(damage: Damage, file: str, *says: str) -> Case:
    return Case(damage, file, says)


def _read(reading: Reading, damage: Damage, file: str, *says: str) -> Case:
    return Case(damage, file, says, reading=reading)


LAYOUTS: dict[str, Case] = {
    "no weights": _layout(remove(WEIGHTS), "", "no *.safetensors file"),
    "only a pickle": _layout(
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "",
        "no *.safetensors file",
        "never read",
    ),
    "weights are a folder": _layout(replaced_by(WEIGHTS, Path.mkdir), WEIGHTS, "is a directory"),
    "weights are a pipe": _layout(replaced_by(WEIGHTS, os.mkfifo), WEIGHTS, "not a regular file"),
    "weights are a device": _layout(
        replaced_by(WEIGHTS, link_to("/dev/zero")), WEIGHTS, "not a regular file"
    ),
    "weights link to themselves": _layout(
        replaced_by(WEIGHTS, link_to_itself), WEIGHTS, "symbolic links"
    ),
    "weights link to nothing": _layout(
        replaced_by(WEIGHTS, link_to("../blobs/gone")), WEIGHTS, "No such file"
    ),
    "weights of a name with line breaks": _layout(
        lambda folder: (folder / WEIGHTS).rename(folder / "a\nb\x1b[2J.safetensors"),
        "",
        r"a\nb\x1b[2J.safetensors",
        "not a plain file name",
    ),
    "weights of a name that is not UTF-8": _layout(
        lambda folder: (folder / WEIGHTS).rename(folder / os.fsdecode(b"\xff.safetensors")),
        "",
        r"\udcff.safetensors",
        "not a plain file name",
    ),
    "weights may not be read": _read(as_nobody, locked(WEIGHTS), WEIGHTS, "Permission denied"),
    "config may not be read": _read(as_nobody, locked(CONFIG), CONFIG, "Permission denied"),
    "tokenizer may not be read": _read(
        as_nobody, locked(TOKENIZER), TOKENIZER, "Permission denied"
    ),
    "folder may not be entered": _read(as_nobody, locked("."), CONFIG, "Permission denied"),
    "disk fails under the header": _layout(
        replaced_by(WEIGHTS, link_to(UNREADABLE)), WEIGHTS, "Input/output error"
    ),
    "disk fails under config": _layout(
        replaced_by(CONFIG, link_to(UNREADABLE)), CONFIG, "Input/output error"
    ),
    "disk fails among the weights": _read(
        failing_disk, nothing, WEIGHTS, "model.layers.", ".weight: Input/output error"
    ),
    "missing shard": _layout(
        in_sequence(sharded, remove(SHARD_2)), INDEX, SHARD_2, "not in the folder"
    ),
    "missing shard, no index": _layout(
        in_sequence(sharded, remove(SHARD_2), remove(INDEX)), "", "10 of 21 tensors missing"
    ),
    "shard cut short": _layout(
        in_sequence(sharded, lambda folder: os.truncate(folder / SHARD_2, 5000)),
        SHARD_2,
        "file not fully covered",
    ),
    "shard of another model": _layout(
        shard_of_another_model, SHARD_2, "mlp.gate_proj.weight", "[81, 48]", "[80, 48]"
    ),
    "index names a file not there": _layout(
        edit_index(lambda m: m.update({DOWN: "model-00009-of-000009.safetensors"})),
        INDEX,
        "model-00009-of-000009.safetensors",
        "not in the folder",
    ),
    "index leaves the folder": _layout(
        edit_index(lambda m: m.update({DOWN: "../x.safetensors"})),
        INDEX,
        DOWN,
        '"../x.safetensors" is not the name of a safetensors file',
    ),
    "index of absolute paths": _layout(
        edit_index(lambda m: m.update({DOWN: "/etc/passwd"})), INDEX, DOWN, "is not the name"
    ),
    "index of pickles": _layout(
        edit_index(lambda m: m.update({DOWN: "pytorch_model.bin"})), INDEX, DOWN, "is not the name"
    ),
    "index of numbers": _layout(
        edit_index(lambda m: m.update({DOWN: 3})), INDEX, DOWN, "3 is not the name"
    ),
    "index names a tensor not there": _layout(
        edit_index(lambda m: m.update({"ghost": m[DOWN]})), INDEX, "ghost", "not in the file"
    ),
    "index names the wrong shard": _layout(
        edit_index(lambda m: m.update({DOWN: SHARD_1 if m[DOWN] == SHARD_2 else SHARD_2})),
        SHARD_2,
        DOWN,
        "does not place it here",
    ),
    "index leaves a tensor out": _layout(
        edit_index(lambda m: m.pop(DOWN)), SHARD_2, DOWN, "does not place it here"
    ),
    "index is empty": _layout(edit_index(lambda m: m.clear()), INDEX, "weight_map"),
    "index without a map": _layout(
        in_sequence(sharded, write(INDEX, "{}")), INDEX, "weight_map: missing"
    ),
    "index is not JSON": _layout(
        in_sequence(sharded, write(INDEX, "<html>")), INDEX, "not valid JSON"
    ),
    "index links to nothing": _layout(
        in_sequence(sharded, replaced_by(INDEX, link_to("../blobs/gone"))), INDEX, "No such file"
    ),
    "file not in the index": _layout(
        in_sequence(sharded, lambda folder: save_file({}, folder / "stray.safetensors")),
        "stray.safetensors",
        "not named in",
    ),
    "same tensor in two files": _layout(
        duplicate_tensor, "more.safetensors", DOWN, "is in model.safetensors as well"
    ),
    "same tensor in two shards": _layout(
        in_sequence(sharded, lambda f: save_file(valid_tensors(SERVED), f / SHARD_2)),
        SHARD_2,
        "lm_head.weight: is in",
    ),
}
