"""Finds a checkpoint, checks everything its headers tell, and streams its tensors into a model.

Only safetensors are read and nothing is ever unpickled. `inspect_checkpoint` opens headers only and
finishes before any long work; `load_weights` then reads every byte once, through one small buffer,
straight into the model's parameters.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from runtime.config import Fields, GenerationDefaults, parse_dtype, read_json
from runtime.errors import CheckpointError
from runtime.models import FAMILIES, CausalLM, Family, ModelConfig
from runtime.shards import INDEX_NAME, StoredTensor, read_headers, read_weight_map, some_names

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

PULL_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
CHUNK_BYTES = 32 << 20
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose headers were found in order."""

    folder: Path
    architecture: str
    family: Family
    config: ModelConfig
    dtype: torch.dtype  # the one config.json names, else that of the stored embeddings
    tensors: dict[str, StoredTensor]  # the ones to load
    num_parameters: int
    generation: GenerationDefaults
    eos_token_ids: tuple[int, ...]


# -- finding and downloading ---------------------------------------------------------------------


def find_checkpoint(model: str) -> Path:
    """The folder of ``model``: a local folder, or a hub id such as ``deepseek-ai/name``.

    A hub id is taken from the Hugging Face cache if it is complete there, else downloaded.
    Raises `CheckpointError` that says what to do.
    """
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"{model}: is a file; give the folder of the checkpoint")
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user of an unknown user
        raise CheckpointError(f"{model}: {getattr(error, 'strerror', None) or error}") from None
    if not is_hub_id(model):
        raise CheckpointError(f"{model}: no such folder, and not a hub id (organisation/name)")
    cached = _cached_snapshot(model)
    return cached if cached is not None and not _missing_files(cached) else pull(model)


def is_hub_id(model: str) -> bool:
    """Whether ``model`` is spelt like ``organisation/name``."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
    well_formed = re.fullmatch(f"{part}/{part}", model, re.ASCII) is not None
    return well_formed and "--" not in model and ".." not in model


def pull(hub_id: str) -> Path:
    """Download a checkpoint into the Hugging Face cache, resuming what is there; its folder.

    Raises `CheckpointError` if ``hub_id`` is not spelt like one or cannot be downloaded.
    """
    if not is_hub_id(hub_id):
        raise CheckpointError(f"{hub_id}: not a hub id; it is spelt organisation/name")
    from huggingface_hub import snapshot_download  # half a second that local folders need not pay

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=PULL_PATTERNS))
    except Exception as error:  # the library's own errors, and those of the HTTP client below it
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{hub_id}: not found in the Hugging Face cache and the download failed "
            f"({type(error).__name__}: {reason}); try again with `fathom pull {hub_id}`"
        ) from None
    if missing := _missing_files(folder):
        raise CheckpointError(
            f"{hub_id}: {some_names(missing)}: not in the repository, or not downloaded yet; "
            f"with a network, `fathom pull {hub_id}` fetches what is there"
        )
    return folder


def _cached_snapshot(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _missing_files(folder: Path) -> list[str]:
    """What a complete checkpoint has and this folder has not, as after a broken download."""
    needed = ["config.json", "tokenizer.json"]
    index = folder / INDEX_NAME
    if index.exists():
        needed += sorted(set(read_weight_map(index).values()))
    elif not any(folder.glob("*.safetensors")):
        needed.append("model.safetensors")
    return [name for name in needed if not (folder / name).exists()]


# -- headers -------------------------------------------------------------------------------------


def inspect_checkpoint(folder: Path) -> Checkpoint:
    """Check config.json and every safetensors header of ``folder``; reads no weights.

    Raises `CheckpointError`: one line with the file, the tensor or key, and why.
    """
    config_path = folder / "config.json"
    fields = Fields(read_json(config_path), str(config_path))
    architecture = _architecture(fields)
    _refuse_quantization(fields)
    family = FAMILIES[architecture]
    dtype = parse_dtype(fields)
    stored = read_headers(folder)
    config = family.parse_config(fields, stored.keys())
    model = family.build(config, device=torch.device("meta"), dtype=torch.float32, max_model_len=1)
    targets = model.weight_targets()
    _check_tensors(folder, stored, targets, model.ignores)
    tensors = {name: stored[name] for name in targets}
    generation = GenerationDefaults.load(folder, config.vocab_size)
    eos_token_ids = fields.token_ids("eos_token_id", config.vocab_size)
    return Checkpoint(
        folder=folder,
        architecture=architecture,
        family=family,
        config=config,
        dtype=dtype or STORED_DTYPES[next(iter(tensors.values())).dtype],
        tensors=tensors,
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        generation=generation,
        eos_token_ids=generation.eos_token_ids or eos_token_ids,
    )


def _architecture(fields: Fields) -> str:
    named = fields.raw("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if not isinstance(name, str) or name not in FAMILIES:
        raise fields.error("architectures", f"{name!r} is not one of {', '.join(FAMILIES)}")
    return name


def _refuse_quantization(fields: Fields) -> None:
    if fields.has("quantization_config"):
        method = fields.object("quantization_config").raw("quant_method", "unknown")
        name = "FP8" if method == "fp8" else f"{str(method)[:40]!r}-quantized"
        raise fields.error(
            "quantization_config", f"{name} checkpoints are not supported by this version"
        )


def _check_tensors(
    folder: Path,
    stored: dict[str, StoredTensor],
    targets: dict[str, Tensor],
    ignores: Callable[[str], bool],
) -> None:
    if missing := [name for name in targets if name not in stored]:
        raise CheckpointError(
            f"{folder}: {some_names(missing)}: {len(missing)} of {len(targets)} tensors missing"
        )
    unknown = [name for name in stored if name not in targets and not ignores(name)]
    if unknown:
        path = stored[unknown[0]].path
        raise CheckpointError(
            f"{path}: {some_names(unknown)}: {len(unknown)} tensors this model does not have"
        )
    for name, target in targets.items():
        tensor = stored[name]
        if tensor.dtype.startswith("F8_"):
            raise CheckpointError(
                f"{tensor.path}: {name}: FP8 checkpoints are not supported by this version"
            )
        if tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{tensor.path}: {name}: dtype {tensor.dtype} is not one of "
                f"{', '.join(STORED_DTYPES)}"
            )
        if tensor.shape != tuple(target.shape):
            raise CheckpointError(
                f"{tensor.path}: {name}: shape {list(tensor.shape)} where config.json asks for "
                f"{list(target.shape)}"
            )


# -- loading -------------------------------------------------------------------------------------


def build_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int | None = None,
) -> CausalLM:
    """The checkpoint's model with uninitialised parameters on ``device``.

    ``max_model_len`` None, or above what the model was made for, means the model's own limit.
    Raises `CheckpointError` if the device has no room for the parameters.
    """
    limit = checkpoint.config.max_position_embeddings
    num_positions = limit if max_model_len is None else min(max_model_len, limit)
    try:
        return checkpoint.family.build(
            checkpoint.config, device=device, dtype=dtype, max_model_len=num_positions
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        num_bytes = checkpoint.num_parameters * dtype.itemsize
        raise CheckpointError(
            f"{checkpoint.folder}: {num_bytes / 1e9:.1f} GB of {dtype} weights do not fit on "
            f"{device}"
        ) from None


def cache_bytes_per_token(model: CausalLM, dtype: torch.dtype) -> int:
    """Bytes of KV cache one token takes, all layers together."""
    shapes = [shape for layer in model.cache_spec() for shape in layer.values()]
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def load_weights(
    checkpoint: Checkpoint, model: CausalLM, progress: Progress = lambda done, total: None
) -> None:
    """Fill every parameter of ``model`` and finish it; peak memory is the model and one chunk.

    Raises `CheckpointError` (file: tensor: why) for a file that cannot be read or has changed, and
    for a NaN or an infinity, also one that only the model's dtype makes.
    """
    targets = model.weight_targets()
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    on_gpu = any(target.is_cuda for target in targets.values())
    buffer = torch.empty(min(CHUNK_BYTES, total), dtype=torch.uint8, pin_memory=on_gpu)
    done = 0
    progress(done, total)
    in_file_order = sorted(
        checkpoint.tensors.items(), key=lambda item: (item[1].path, item[1].offset)
    )
    for path, tensors in itertools.groupby(in_file_order, key=lambda item: item[1].path):
        with _open(path) as file:
            for name, tensor in tensors:
                for num_bytes in _fill(targets[name], name, tensor, file, buffer):
                    done += num_bytes
                    progress(done, total)
    model.finish_loading()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _fill(
    target: Tensor, name: str, tensor: StoredTensor, file: BinaryIO, buffer: Tensor
) -> Iterator[int]:
    """Read a tensor chunk by chunk into ``target``; yields the bytes of each chunk."""
    dtype = STORED_DTYPES[tensor.dtype]
    flat = target.view(-1)
    begin = 0  # first element of the chunk
    while begin < flat.numel():
        num_elements = min(flat.numel() - begin, buffer.numel() // dtype.itemsize)
        num_bytes = num_elements * dtype.itemsize
        try:
            _read_exactly(file, tensor.offset + begin * dtype.itemsize, buffer[:num_bytes])
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: {name}: {error.strerror or error}") from None
        chunk = flat[begin : begin + num_elements]
        chunk.copy_(buffer[:num_bytes].view(dtype))
        if not _all_finite(chunk):
            raise CheckpointError(f"{tensor.path}: {name}: {_why_not_finite(chunk, buffer, dtype)}")
        begin += num_elements
        yield num_bytes


def _read_exactly(file: BinaryIO, offset: int, buffer: Tensor) -> None:
    """Fill ``buffer``. Plain reads: on a mapped file an I/O error would kill the process."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    file.seek(offset)
    while view:
        num_read = file.readinto(view)  # type: ignore[attr-defined]
        if not num_read:
            raise OSError(
                0, "the file ends inside the tensor; it changed since the headers were read"
            )
        view = view[num_read:]


def _all_finite(values: Tensor) -> bool:
    # One pass: a NaN or an infinity always shows in the sum. Finite values may overflow it.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _why_not_finite(chunk: Tensor, buffer: Tensor, dtype: torch.dtype) -> str:
    stored = buffer[: chunk.numel() * dtype.itemsize].view(dtype)
    if bool(stored.isfinite().all()):
        return (
            f"a {dtype} value does not fit {chunk.dtype}; run it with --dtype bfloat16 or float32"
        )
    return "holds NaN" if bool(stored.isnan().any()) else "holds an infinity"
