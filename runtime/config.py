"""Reads a checkpoint's JSON files; everything in them is checked here, once.

Both spellings of the field are understood: the released one (``torch_dtype``, ``rope_scaling`` with
``type``, ``rope_theta`` beside it) and the one transformers 5 writes (``dtype``,
``rope_parameters`` with ``rope_type`` and ``rope_theta`` inside).
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.quant import ActivationScale
from kernels.rope import yarn_mscale
from runtime.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
MAX_POSITION = 1 << 22  # four times the longest released context
MAX_WIDTH = 1 << 20  # hidden sizes, vocabularies, ranks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MISSING = object()


def is_there(path: Path) -> bool:
    """Whether the folder has an entry of this name; a link to nothing is one, and not absent."""
    return path.is_symlink() or path.exists()


def file_size(path: Path) -> int:
    """Bytes of a file. Raises `CheckpointError`, also for a pipe or device, which never ends."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path}: is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def read_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a file. Raises `CheckpointError` if it is no file, unreadable or too large."""
    if file_size(path) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises `CheckpointError` naming the file if it is missing, unreadable, empty, too large, not
    JSON (NaN and Infinity are not), or not an object.
    """
    data = read_file(path)
    if not data.strip():
        raise CheckpointError(f"{path}: the file is empty")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {one_line(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def one_line(text: str, limit: int = 200) -> str:
    """A stranger's text, fit for a message: one line, and nothing in it steers a terminal."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = f"{line[:limit]}…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class Fields:
    """Typed access to one JSON object; each complaint names the file, the key and the value.

    A key that is absent or null takes the default; without a default it is an error.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def error(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key}: {why}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(key, "missing")
        return default

    def integer(self, key: str, default: Any = _MISSING, *, low: int = 1, high: int) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"{show(value)} is not an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _MISSING, *, low: float, high: float) -> float:
        value = self.raw(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise self.error(key, f"{show(value)} is not a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: Any = _MISSING) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"{show(value)} is not true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = _MISSING) -> str:
        value = self.raw(key, default)
        if value not in allowed:
            raise self.error(key, f"{show(value)} is not supported (only {', '.join(allowed)})")
        return str(value)

    def object(self, key: str) -> Fields:
        """The nested object under ``key``, empty if absent."""
        value = self.raw(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"{show(value)} is not an object")
        return Fields(value, f"{self.where}: {key}")

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of ids, each below ``vocab_size``; empty if absent."""
        value = self.raw(key, ())
        ids = list(value) if isinstance(value, list | tuple) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise self.error(key, f"{show(token_id)} is not a token id")
            if not 0 <= token_id < vocab_size:
                raise self.error(key, f"{show(token_id)} is outside the vocabulary of {vocab_size}")
        return tuple(ids)


def show(value: object) -> str:
    """A value of a JSON file, fit for a message."""
    try:
        return one_line(json.dumps(value, ensure_ascii=False, default=repr), limit=60)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of a checkpoint: which frequencies, and how cos and sin are scaled."""

    kind: str = "default"  # default | linear | llama3 | yarn
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0  # llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale_all_dim: float = 0.0  # yarn, MLA: the softmax scale grows by mscale(factor, this)^2
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


def parse_rope(config: Fields, max_position: int) -> RopeConfig:
    """The rope settings of a config.json in either spelling."""
    key = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    rope = config.object(key)
    source = rope if rope.has("rope_theta") else config
    theta = source.number("rope_theta", 10000.0, low=2.0, high=1e12)
    kind_key = "rope_type" if rope.has("rope_type") else "type"
    if rope.has("type") and rope.raw("type") != rope.raw(kind_key):
        raise rope.error("type", f"{show(rope.raw('type'))}, but rope_type is another")
    kind = rope.choice(kind_key, ("default", "linear", "llama3", "yarn"), "default")
    if rope.raw("partial_rotary_factor", 1.0) != 1.0 or config.raw("partial_rotary_factor", 1) != 1:
        raise config.error("partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, rope.number("factor", low=1.0, high=1e6))
    original = rope.integer("original_max_position_embeddings", high=MAX_POSITION)
    if kind == "llama3":
        low = rope.number("low_freq_factor", low=1e-3, high=1e6)
        high = rope.number("high_freq_factor", low=1e-3, high=1e6)
        if low >= high:
            raise rope.error("low_freq_factor", f"{low:g} is not below high_freq_factor {high:g}")
        factor = rope.number("factor", low=1.0, high=1e6)
        return RopeConfig(kind, theta, factor, original, low, high)
    return _parse_yarn(rope, theta, original, max_position)


def _parse_yarn(rope: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    if not rope.boolean("truncate", True):
        raise rope.error("truncate", "false is not supported")
    factor = rope.number("factor", max(max_position / original, 1.0), low=1.0, high=1e6)
    mscale = rope.number("mscale", 0.0, low=0.0, high=100.0)
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, low=0.0, high=100.0)
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = yarn_mscale(factor, 1.0)
    attention_factor = rope.number("attention_factor", attention_factor, low=1e-3, high=1e3)
    # R1-0528-Qwen3-8B: the factor of its own cancels YaRN's exactly (0.8782 * 1.1386 = 1)
    attn_factor = rope.number("attn_factor", 1.0, low=1e-3, high=1e3)
    beta_fast = rope.number("beta_fast", 32.0, low=1e-3, high=1e6)
    beta_slow = rope.number("beta_slow", 1.0, low=1e-3, high=1e6)
    if beta_fast < beta_slow:
        raise rope.error("beta_fast", f"{beta_fast:g} is below beta_slow {beta_slow:g}")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale_all_dim=mscale_all_dim,
        attention_factor=attention_factor * attn_factor,
    )


def without_attn_factor(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's object without ``attn_factor``, a key of YaRN that transformers ignores."""

    def strip(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: entry for key, entry in value.items() if key != "attn_factor"}

    return {
        key: strip(value) if key in ("rope_scaling", "rope_parameters") else value
        for key, value in config.items()
    }


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """Matrices stored as e4m3 in blocks of 128 x 128, as DeepSeek-V3 to V3.2 are."""

    activation_scale: ActivationScale  # how scales of activations are meant to be rounded


def parse_quantization(config: Fields) -> Fp8Checkpoint | None:
    """The quantization config.json declares, None for none. Raises `CheckpointError`."""
    if not config.has("quantization_config"):
        return None
    quantization = config.object("quantization_config")
    quantization.choice("quant_method", ("fp8",))
    quantization.choice("fmt", ("e4m3",), "e4m3")
    quantization.choice("activation_scheme", ("dynamic",), "dynamic")
    block = quantization.raw("weight_block_size")
    if block != [128, 128]:
        raise quantization.error("weight_block_size", f"{show(block)} is not [128, 128]")
    ue8m0 = quantization.choice("scale_fmt", ("float32", "ue8m0"), "float32") == "ue8m0"
    return Fp8Checkpoint("ue8m0" if ue8m0 else "float32")


def parse_architecture(config: Fields, known: Collection[str]) -> str:
    """The first of ``architectures``. Raises `CheckpointError` unless it is a known one."""
    named = config.raw("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if not isinstance(name, str) or name not in known:
        raise config.error("architectures", f"{show(name)} is not one of {', '.join(known)}")
    return name


def parse_dtype(config: Fields) -> torch.dtype | None:
    """The dtype config.json names, None if it names none."""
    key = "torch_dtype" if config.has("torch_dtype") else "dtype"
    if not config.has(key):
        return None
    return DTYPES[config.choice(key, tuple(DTYPES))]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> GenerationDefaults:
        """From the folder's generation_config.json; all None if there is no such file."""
        path = folder / "generation_config.json"
        if not is_there(path):
            return cls()
        fields = Fields(read_json(path), str(path))

        def number(key: str, low: float, high: float) -> float | None:
            return fields.number(key, low=low, high=high) if fields.has(key) else None

        temperature = number("temperature", 0.0, 2.0)
        if not fields.boolean("do_sample", True):
            temperature = 0.0
        return cls(
            temperature=temperature,
            top_p=number("top_p", 0.0, 1.0),
            top_k=fields.integer("top_k", low=-1, high=2**31 - 1) if fields.has("top_k") else None,
            repetition_penalty=number("repetition_penalty", 1e-3, 10.0),
            eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        )
