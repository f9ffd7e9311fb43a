"""Finds a checkpoint, checks everything its headers tell, and streams its tensors into a model.

Only safetensors are read and nothing is ever unpickled. `inspect_checkpoint` opens headers only and
finishes before any long work; `load_weights` then reads every byte once, through one small buffer,
straight into the model's parameters.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.quant import BLOCK, num_blocks
from runtime.config import (
    Fields,
    Fp8Checkpoint,
    GenerationDefaults,
    parse_architecture,
    parse_dtype,
    parse_quantization,
    read_json,
    without_attn_factor,
)
from runtime.errors import CheckpointError
from runtime.fill import FP8, STORED_DTYPES, fill_from_file, least_read, open_file
from runtime.hub_files import cached_snapshot, missing_files
from runtime.models import FAMILIES, CausalLM, Family, ModelConfig
from runtime.models.layers import SCALE_SUFFIX, Fp8Format, Placement
from runtime.packing import Packing
from runtime.shards import StoredTensor, read_headers, some_names

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

NEEDED_FILES = ("config.json", "tokenizer.json")  # beside the weights
PULL_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
MAX_BUFFER_BYTES = 32 << 20
BUFFER_SHARE = 32  # the read buffer is this part of the checkpoint, up to its maximum


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose headers were found in order."""

    folder: Path
    architecture: str
    family: Family
    config: ModelConfig
    dtype: torch.dtype  # the one config.json names, else that of the stored embeddings
    fp8: Fp8Checkpoint | None  # how its matrices are quantized, if they are
    tensors: dict[str, StoredTensor]  # the ones to load, the scales of FP8 matrices among them
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
    cached = cached_snapshot(model)
    if cached is not None and not missing_files(cached, NEEDED_FILES):
        return cached
    return pull(model)


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
    if missing := missing_files(folder, NEEDED_FILES):
        raise CheckpointError(
            f"{hub_id}: {some_names(missing)}: not in the repository, or not downloaded yet; "
            f"with a network, `fathom pull {hub_id}` fetches what is there"
        )
    return folder


# -- headers -------------------------------------------------------------------------------------


def inspect_checkpoint(folder: Path, *, ignore_attn_factor: bool = False) -> Checkpoint:
    """Check config.json and every safetensors header of ``folder``; reads no weights.

    ``ignore_attn_factor`` drops YaRN's ``attn_factor`` from the config, as transformers does.
    Raises `CheckpointError`: one line with the file, the tensor or key, and why.
    """
    config_path = folder / "config.json"
    values = read_json(config_path)
    fields = Fields(without_attn_factor(values) if ignore_attn_factor else values, str(config_path))
    architecture = parse_architecture(fields, FAMILIES)
    fp8 = parse_quantization(fields)
    family = FAMILIES[architecture]
    dtype = parse_dtype(fields)
    stored = read_headers(folder)
    config = family.parse_config(fields, stored.keys())
    _check_num_layers(fields, config, len(stored))
    meta = torch.device("meta")
    placement = Placement(meta, torch.float32, None if fp8 is None else Fp8Format())
    model = family.build(config, placement, 1)
    targets = model.weight_targets()
    tensors = _check_tensors(folder, stored, targets, model.ignores, fp8)
    generation = GenerationDefaults.load(folder, config.vocab_size)
    eos_token_ids = fields.token_ids("eos_token_id", config.vocab_size)
    embeddings = STORED_DTYPES.get(next(iter(tensors.values())).dtype, torch.bfloat16)
    return Checkpoint(
        folder=folder,
        architecture=architecture,
        family=family,
        config=config,
        dtype=dtype or embeddings,
        fp8=fp8,
        tensors=tensors,
        num_parameters=sum(
            math.prod(target.shape)
            for name, target in targets.items()
            if not name.endswith(SCALE_SUFFIX)
        ),
        generation=generation,
        eos_token_ids=generation.eos_token_ids or eos_token_ids,
    )


def _check_num_layers(fields: Fields, config: ModelConfig, num_stored: int) -> None:
    """A config that lies about its size is refused before a model of that size is laid out."""
    experts = getattr(config, "experts", None)  # of the families that have them
    num_expert_layers = config.num_layers - experts.num_dense_layers if experts else 0
    num_experts = num_expert_layers * experts.num_experts if experts else 0
    if config.num_layers > num_stored or num_experts > num_stored:
        raise fields.error(
            "num_hidden_layers",
            f"{config.num_layers} layers with {num_experts} experts in all, but the files have "
            f"only {num_stored} tensors",
        )


def _check_tensors(
    folder: Path,
    stored: dict[str, StoredTensor],
    targets: dict[str, Tensor],
    ignores: Callable[[str], bool],
    fp8: Fp8Checkpoint | None,
) -> dict[str, StoredTensor]:
    """The stored tensors to load. An FP8 matrix brings its scales, whatever becomes of it."""
    weights = [name for name in targets if not name.endswith(SCALE_SUFFIX)]
    _check_presence(folder, weights, stored)
    for name in weights:
        _check_tensor(name, stored[name], targets[name], fp8)
    quantized = [name for name in weights if stored[name].dtype == FP8]
    needed = weights + [name + SCALE_SUFFIX for name in quantized]
    _check_presence(folder, needed, stored)
    for name in quantized:
        _check_scales(name + SCALE_SUFFIX, stored[name + SCALE_SUFFIX], stored[name].shape)
    tensors = {name: stored[name] for name in needed}
    unknown = [name for name in stored if name not in tensors and not ignores(name)]
    if unknown:
        path = stored[unknown[0]].path
        raise CheckpointError(
            f"{path}: {some_names(unknown)}: {len(unknown)} tensors this model does not have"
        )
    return tensors


def _check_presence(folder: Path, needed: list[str], stored: dict[str, StoredTensor]) -> None:
    if missing := [name for name in needed if name not in stored]:
        raise CheckpointError(
            f"{folder}: {some_names(missing)}: {len(missing)} of {len(needed)} tensors missing"
        )


def _check_tensor(
    name: str, tensor: StoredTensor, target: Tensor, fp8: Fp8Checkpoint | None
) -> None:
    where = f"{tensor.path}: {name}"
    if tensor.shape != tuple(target.shape):
        raise CheckpointError(
            f"{where}: shape {list(tensor.shape)} where config.json asks for {list(target.shape)}"
        )
    if tensor.dtype == FP8:
        if fp8 is None:
            raise CheckpointError(
                f"{where}: dtype {FP8}, but config.json has no quantization_config"
            )
        if len(tensor.shape) != 2:
            raise CheckpointError(f"{where}: dtype {FP8}, but it is not a matrix")
    elif tensor.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{where}: dtype {tensor.dtype} is not one of {', '.join(STORED_DTYPES)}"
        )
    elif target.dtype == torch.float8_e4m3fn:
        raise CheckpointError(f"{where}: dtype {tensor.dtype} where an FP8 checkpoint has {FP8}")


def _check_scales(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    grid = [num_blocks(size) for size in shape]
    if list(tensor.shape) != grid:
        raise CheckpointError(
            f"{tensor.path}: {name}: shape {list(tensor.shape)} where blocks of {BLOCK} x {BLOCK} "
            f"of {list(shape)} make {grid}"
        )
    if tensor.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{tensor.path}: {name}: dtype {tensor.dtype} is not one of {', '.join(STORED_DTYPES)}"
        )


# -- loading -------------------------------------------------------------------------------------


def build_model(
    checkpoint: Checkpoint, placement: Placement, max_model_len: int | None = None
) -> CausalLM:
    """The checkpoint's model with uninitialised parameters.

    ``max_model_len`` None, or above what the model was made for, means the model's own limit.
    Matrices are kept as ``placement`` says, however the checkpoint stores them.
    Raises `CheckpointError` if the device has no room for the parameters.
    """
    limit = checkpoint.config.max_position_embeddings
    num_positions = limit if max_model_len is None else min(max_model_len, limit)

    try:
        return checkpoint.family.build(checkpoint.config, placement, num_positions)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        meta = replace(placement, device=torch.device("meta"))
        num_bytes = weight_bytes(checkpoint.family.build(checkpoint.config, meta, num_positions))
        raise CheckpointError(
            f"{checkpoint.folder}: {num_bytes / 1e9:.1f} GB of weights do not fit on "
            f"{placement.device}"
        ) from None


def weight_bytes(model: CausalLM) -> int:
    """Bytes of all parameters, before any is packed."""
    return sum(target.nbytes for target in model.weight_targets().values())


def cache_bytes_per_token(model: CausalLM, dtype: torch.dtype) -> int:
    """Bytes of KV cache one token takes, all layers together."""
    shapes = [shape for layer in model.cache_spec() for shape in layer.values()]
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def load_weights(
    checkpoint: Checkpoint, model: CausalLM, progress: Progress = lambda done, total: None
) -> None:
    """Fill every parameter of ``model`` and finish it; peak memory is the model and one chunk.

    A matrix is quantized to FP8, or decoded from it, on its way if the model keeps it otherwise
    than the file does. Linear layers that may be packed are, each as soon as it is whole, so that
    packed and unpacked weights are never in memory at once. Raises `CheckpointError` (file: tensor:
    why) for a file that cannot be read or has changed, and for a NaN or an infinity, also one that
    only the model's dtype makes.
    """
    targets, stored = model.weight_targets(), checkpoint.tensors
    total = sum(tensor.num_bytes for tensor in stored.values())
    wanted = min(total // BUFFER_SHARE, MAX_BUFFER_BYTES)
    least = max(least_read(targets.get(name), tensor) for name, tensor in stored.items())
    num_buffered = max(wanted, least)
    on_gpu = any(target.is_cuda for target in targets.values())
    buffer = torch.empty(num_buffered, dtype=torch.uint8, pin_memory=on_gpu)
    packing = Packing(model, targets)
    done = 0
    progress(done, total)
    in_file_order = sorted(stored, key=lambda name: (stored[name].path, stored[name].offset))
    for path, names in itertools.groupby(in_file_order, key=lambda name: stored[name].path):
        with open_file(path) as file:
            for name in names:
                for num_bytes in fill_from_file(targets, stored, name, file, buffer):
                    done += num_bytes
                    progress(done, total)
                packing.filled(name)
    model.finish_loading()
