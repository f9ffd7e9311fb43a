"""Damaged tensors: their names, shapes, dtypes and values, in a sound file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.runtime.corpus.case import (
    CONFIG,
    DOWN,
    SERVED,
    WEIGHTS,
    Case,
    Edit,
    edit_tensors,
    in_sequence,
    set_config,
    set_tensor,
    with_value,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NORM = "model.norm.weight"
INF = float("inf")


def _tensor(make: Callable[[Tensor], Tensor], *says: str) -> Case:
    return Case(set_tensor(DOWN, make), WEIGHTS, (DOWN, *says))


def _missing(*names: str, says: str) -> Case:
    return Case(edit_tensors(lambda t: [t.pop(name) for name in names]), "", (*names, says))


def _extra(name: str, *says: str) -> Case:
    return Case(edit_tensors(lambda t: t.update({name: torch.ones(1)})), WEIGHTS, says)


def many(names: list[str]) -> Edit:
    return lambda tensors: tensors.update({name: torch.ones(1) for name in names})


def hundred_thousand_tensors(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"x{i}": entry for i in range(100_000)}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def relabelled(old: bytes, new: bytes) -> Callable[[Path], object]:
    """One tensor's dtype in the header, the file otherwise as it was."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        start = data.index(f'"{DOWN}"'.encode())
        (folder / WEIGHTS).write_bytes(data[:start] + data[start:].replace(old, new, 1))

    return damage


def signalling_nan(weight: Tensor) -> Tensor:
    weight.view(torch.int32)[0, 0] = 0x7F800001
    return weight


TENSORS: dict[str, Case] = {
    "missing tensor": _missing(DOWN, says="1 of 21 tensors missing"),
    "no tensors": Case(edit_tensors(lambda tensors: tensors.clear()), CONFIG, ("0 tensors",)),
    "tied head declared untied": _missing("lm_head.weight", says="1 of 21 tensors missing"),
    "tied embeddings missing": Case(
        in_sequence(
            set_config(tie_word_embeddings=True),
            edit_tensors(lambda tensors: tensors.pop("model.embed_tokens.weight")),
        ),
        "",
        ("model.embed_tokens.weight", "1 of 20 tensors missing"),
    ),
    "extra tensors": Case(
        edit_tensors(many([f"x{i}" for i in range(9)])),
        WEIGHTS,
        ("x0, x1, x2, …", "9 tensors this model does not have"),
    ),
    "extra tensor without elements": Case(
        edit_tensors(lambda t: t.update(x=torch.ones(0))), WEIGHTS, ("x: 1 tensors", "not have")
    ),
    "name that leaves the folder": _extra("../../x", "../../x", "does not have"),
    "name that is empty": _extra("", "'': ", "does not have"),
    "name that steers the terminal": _extra("\x1b[2J\n", r"\x1b[2J\n", "does not have"),
    "name that turns the text around": _extra("a\u202eb", r"a\u202eb", "does not have"),
    "nine long names that steer the terminal": Case(
        edit_tensors(many([f"{i}" + "\x1b" * 200 for i in range(9)])), WEIGHTS, (r"0\x1b", "…")
    ),
    "name of a megabyte": _extra("n" * 2**20, "nnn…: name longer than 256"),
    "100,000 tensors": Case(
        hundred_thousand_tensors, WEIGHTS, ("100000 tensors", "at most 20000 are allowed")
    ),
    "wrong shape": _tensor(lambda w: w[:, :-1].contiguous(), "[48, 79]", "[48, 80]"),
    "transposed": _tensor(lambda w: w.T.contiguous(), "[80, 48]", "[48, 80]"),
    "flattened": _tensor(lambda w: w.flatten(), "[3840]", "[48, 80]"),
    "one dimension more": _tensor(lambda w: w[None], "[1, 48, 80]", "[48, 80]"),
    "scalar": _tensor(lambda w: w[0, 0].clone(), "[]", "[48, 80]"),
    "zero-size": _tensor(lambda w: w[:0], "[0, 80]", "[48, 80]"),
    "F32 relabelled I32": Case(
        relabelled(b'"F32"', b'"I32"'), WEIGHTS, (DOWN, "dtype I32", "BF16, F16, F32")
    ),
    "booleans": _tensor(lambda w: w > 0, "dtype BOOL"),
    "doubles": _tensor(lambda w: w.double(), "dtype F64"),
    "complex": _tensor(lambda w: w.to(torch.complex64), "dtype C64"),
    "FP8 without scales": _tensor(lambda w: w.to(torch.float8_e4m3fn), "no quantization_config"),
    **{
        f"{value} in {name}": _tensor(with_value(float(value), dtype), says)
        for name, dtype in DTYPES.items()
        for value, says in (("NaN", "holds NaN"), ("Inf", "an infinity"), ("-Inf", "an infinity"))
    },
    "Inf and -Inf": _tensor(lambda w: with_value(INF)(w.fill_(-INF)), "holds an infinity"),
    "Inf among weights whose sum overflows": _tensor(
        lambda w: with_value(INF)(w.fill_(3e38)), "holds an infinity"
    ),
    "signalling NaN in the first element": _tensor(signalling_nan, "holds NaN"),
    "NaN in a norm": Case(set_tensor(NORM, with_value(float("nan"))), WEIGHTS, (NORM, "NaN")),
    "value too large for float16": Case(
        set_tensor(DOWN, with_value(1e6)),
        WEIGHTS,
        (DOWN, "does not fit torch.float16", "--dtype bfloat16 or float32"),
        dtype="float16",
    ),
    "BF16 value too large for float16": Case(
        set_tensor(DOWN, with_value(1e38, torch.bfloat16)),
        WEIGHTS,
        (DOWN, "does not fit torch.float16"),
        SERVED | {"torch_dtype": "float16"},
        dtype="float16",
    ),
}
