"""A case of the corpus: how a valid folder is damaged, and what its user is then told."""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save_file
from torch import Tensor

from runtime.config import DTYPES, Fp8Checkpoint
from runtime.models.layers import Fp8Format, Placement
from runtime.tokenizer import Tokenizer
from runtime.weights import (
    Checkpoint,
    build_model,
    find_checkpoint,
    inspect_checkpoint,
    load_weights,
)
from tests.runtime.checkpoints import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_FP8,
    LLAMA,
    Config,
    Tensors,
    write_checkpoint,
)

NUM_TOKENS = 2048  # of the tokenizer that the test checkpoints borrow
SERVED: Config = LLAMA | {"vocab_size": NUM_TOKENS}
SERVED_V3: Config = DEEPSEEK_V3 | {"vocab_size": NUM_TOKENS}
SERVED_FP8: Config = DEEPSEEK_V3_FP8 | {"vocab_size": NUM_TOKENS}

FOLDER_NAME = "a model 模型"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
DOWN = "model.layers.0.mlp.down_proj.weight"
MAX_LINE_LENGTH = 500
MAX_ALLOCATED = 4 << 30  # bytes; well above what may be used, so that this can be measured

Damage = Callable[[Path], object]
Edit = Callable[[Any], object]
Reading = Callable[[Path], AbstractContextManager[Path]]


@dataclass(frozen=True, slots=True)
class Case:
    """``damage`` turns a valid checkpoint of ``config`` into the case.

    A bad one is refused with a line that begins with ``file``, a name in the folder (the folder
    itself if empty), and holds every text of ``says``. A valid oddity has no ``says``.
    ``reading`` surrounds the loading and gives the path to load.
    """

    damage: Damage
    file: str = WEIGHTS
    says: tuple[str, ...] = ()
    config: Config | None = None
    dtype: str = "float32"
    reading: Reading = nullcontext

    def write(self, parent: Path) -> Path:
        """The folder, in ``parent``."""
        folder = parent / FOLDER_NAME
        folder.mkdir()
        for name, content in valid_files(self.config or SERVED).items():
            (folder / name).write_bytes(content)
        self.damage(folder)
        return folder

    def faults_of(self, line: str, folder: Path) -> list[str]:
        """What is wrong with the line that refuses this case; nothing if it is as described."""
        start = f"{FOLDER_NAME}/{self.file}: " if self.file else f"{FOLDER_NAME}: "
        said = line.removeprefix(f"{folder.parent}/")
        faults = [f"does not say {part!r}" for part in self.says if part not in said]
        if not said.startswith(start):
            faults.append(f"does not begin with {start!r}")
        if not line.isprintable():
            faults.append("is not one line of printable text")
        if len(line) >= MAX_LINE_LENGTH:
            faults.append(f"has {len(line)} characters")
        return [f"{fault}: {line!r}" for fault in faults]


@contextmanager
def limited_memory() -> Iterator[None]:
    """Whoever asks for gigabytes gets a `MemoryError`, and not all memory of the machine."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_pages * resource.getpagesize() + MAX_ALLOCATED
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass(frozen=True, slots=True)
class Loaded:
    checkpoint: Checkpoint
    tensors: Tensors
    tokenizer: Tokenizer


def load(folder: Path, dtype: str = "float32") -> Loaded:
    """All that `fathom serve` does with a folder before it answers, in the same order."""
    checkpoint = inspect_checkpoint(find_checkpoint(str(folder)))
    tokenizer = Tokenizer.load(folder)
    # with scales of the other kind, matrices are decoded: both ways of reading them are tried
    fp8 = Fp8Format() if checkpoint.fp8 == Fp8Checkpoint("float32") else None
    model = build_model(checkpoint, Placement(torch.device("cpu"), DTYPES[dtype], fp8), 64)
    load_weights(checkpoint, model)
    return Loaded(checkpoint, model.weight_targets(), tokenizer)


def valid_files(config: Config) -> dict[str, bytes]:
    """The valid checkpoint's files by name."""
    return _valid_files(json.dumps(config))


@cache
def _valid_files(config: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), json.loads(config), with_tokenizer=True)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def valid_tensors(config: Config) -> Tensors:
    """Tensors of one's own, to change."""
    return read_tensors(valid_files(config)[WEIGHTS])


# -- damages -------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """Leave the folder as it is."""


def write(name: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edit_json(name: str, edit: Edit) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))

    return damage


def set_config(**values: Any) -> Damage:
    return edit_json(CONFIG, lambda config: config.update(values))


def edit_tensors(edit: Edit, config: Config = SERVED) -> Damage:
    def damage(folder: Path) -> None:
        tensors = valid_tensors(config)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def set_tensor(name: str, make: Callable[[Tensor], Tensor], config: Config = SERVED) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: make(tensors[name])}), config)


def with_value(value: float, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """The tensor with its last element set, in ``dtype`` if it is given."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.to(dtype or tensor.dtype, copy=True)
        changed.view(-1)[-1] = value
        return changed

    return change


def in_sequence(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def replaced_by(name: str, make: Callable[[Path], object]) -> Damage:
    """The file is removed and ``make`` gets its path."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def of_config(config: Config, cases: dict[str, Case]) -> dict[str, Case]:
    return {name: replace(case, config=config) for name, case in cases.items()}
