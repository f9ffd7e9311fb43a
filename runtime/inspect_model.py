"""What a model is and what it takes: from config.json and tensor headers, never from weights.

The numbers come from the model itself, laid out on the meta device, so they are what the engine
will load. A hub id costs config.json, the index and one header; nothing else is downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runtime.config import Fields, is_there, parse_architecture, parse_quantization, read_json
from runtime.engine_config import DEFAULT_PAGE_SIZE, WORKSPACE_BYTES
from runtime.errors import CheckpointError
from runtime.hub_files import (
    StoredFiles,
    by_size,
    cached_snapshot,
    fetch_config,
    fetch_headers,
    missing_files,
    read_index,
)
from runtime.models import FAMILIES, CausalLM, ModelConfig
from runtime.models.deepseek_v4 import (
    DeepseekV4Config,
    parse_deepseek_v4,
    parse_deepseek_v41,
)
from runtime.models.deepseek_v4_layout import (
    DRAFT_PREFIX,
    TABLE_SUFFIX,
    cache_values_per_token,
    tensor_layout,
    window_values,
)
from runtime.models.experts import ExpertsConfig
from runtime.models.layers import Fp8Format, Placement, Targets
from runtime.shards import INDEX_NAME, read_headers
from runtime.weights import find_checkpoint, inspect_checkpoint, is_hub_id

LAYOUTS: dict[str, Callable[[Fields, Container[str]], DeepseekV4Config]] = {
    "DeepseekV4ForCausalLM": parse_deepseek_v4,
    "DeepseekV41ForCausalLM": parse_deepseek_v41,
}
"""Architectures that are known but not run yet: their config's parser."""

MAX_PARAMETERS = 10**13  # six times the largest release
MAX_ROWS = 1 << 26  # of all matrices; ten times the largest. The FP8 layout counts them one by one
MAX_EXPERTS = 1 << 17  # of all layers together; four times the largest release
CACHE_VALUE_BYTES = 2  # bf16
USABLE_SHARE = 0.95  # of a GPU's memory; the rest goes to the driver and to fragmentation
MIN_CONTEXT = 4096  # tokens; with less a model is of no use
PER_EXPERT = re.compile(r"\.mlp\.(experts|gate)\.")  # tensors of one expert, or with a row for each


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What there is to know about a model before its weights are there."""

    model: str
    architecture: str
    can_run: bool
    num_layers: int
    max_position_embeddings: int
    num_parameters: int  # of the main model
    num_active_parameters: int | None  # of those; less `_num_idle`; None: all of them
    extra_parameters: dict[str, int]  # beside the main model: draft layers, n-gram tables
    stored: StoredFiles | None  # None if only config.json could be had
    released_precision: str  # one of the keys of weight_bytes
    weight_bytes: dict[str, int]  # precision -> all parameters as loaded, the extra ones among them
    cache_bytes_per_token: dict[str, int]  # kind -> all layers, in bf16
    cache_bytes_per_sequence: int  # that do not grow with it, in bf16


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU to put a model on, found or imagined."""

    name: str
    memory: int  # bytes
    free: int  # bytes for weights, cache and workspace


def find_gpus() -> list[Gpu]:
    """The GPUs that PyTorch sees, with what is free on them now."""
    gpus: list[Gpu] = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        try:
            free, memory = torch.cuda.mem_get_info(i)
        except RuntimeError:  # so full that not even the question finds room
            free, memory = 0, properties.total_memory
        gpus.append(Gpu(properties.name, memory, free))
    return gpus


def imagine_gpu(name: str, memory: int) -> Gpu:
    """A GPU of ``memory`` bytes that nothing else uses."""
    return Gpu(name, memory, int(memory * USABLE_SHARE))


def context_left(report: ModelReport, precision: str, gpu: Gpu) -> int | None:
    """Tokens of bf16 cache beside the weights, as `fathom serve` counts them; None if too few."""
    page_bytes = DEFAULT_PAGE_SIZE * sum(report.cache_bytes_per_token.values())
    num_bytes = gpu.free - WORKSPACE_BYTES - report.weight_bytes[precision]
    num_tokens = (num_bytes // page_bytes - 1) * DEFAULT_PAGE_SIZE  # 1: the dummy page
    return num_tokens if num_tokens >= min(MIN_CONTEXT, report.max_position_embeddings) else None


def describe_model(model: str) -> ModelReport:
    """The report on a folder or a hub id. Raises `CheckpointError`: one line that says why."""
    if is_hub_id(model) and not Path(model).exists():
        return _inspect_hub(model)
    return _inspect_folder(model, find_checkpoint(model))


# -- where config and headers come from ----------------------------------------------------------


def _inspect_folder(model: str, folder: Path) -> ModelReport:
    """Files are checked as `fathom serve` checks them; without files config.json has to do."""
    config_path = folder / "config.json"
    fields = Fields(read_json(config_path), str(config_path))
    architecture = parse_architecture(fields, FAMILIES | LAYOUTS)
    if not any(folder.glob("*.safetensors")):
        index_path = folder / INDEX_NAME
        if not is_there(index_path):
            return _report(model, architecture, fields, None, None)
        weight_map, stored = read_index(index_path)
        return _report(model, architecture, fields, weight_map, stored)
    can_run = architecture in FAMILIES
    tensors = inspect_checkpoint(folder).tensors if can_run else read_headers(folder)
    dtype_bytes: dict[str, int] = {}
    for tensor in tensors.values():
        dtype_bytes[tensor.dtype] = dtype_bytes.get(tensor.dtype, 0) + tensor.num_bytes
    stored = StoredFiles(
        num_bytes=sum(dtype_bytes.values()),
        num_files=len({tensor.path for tensor in tensors.values()}),
        dtypes=by_size(dtype_bytes),
    )
    return _report(model, architecture, fields, tensors, stored)


def _inspect_hub(hub_id: str) -> ModelReport:
    """From the cache if everything is there, else config.json and what tells about the files."""
    folder = cached_snapshot(hub_id)
    if folder is not None and not missing_files(folder, ["config.json"]):
        return _inspect_folder(hub_id, folder)
    fields = Fields(read_json(fetch_config(hub_id)), f"{hub_id}: config.json")
    architecture = parse_architecture(fields, FAMILIES | LAYOUTS)
    names, stored = fetch_headers(hub_id)
    return _report(hub_id, architecture, fields, names, stored)


# -- what follows from them ----------------------------------------------------------------------


def _report(
    model: str,
    architecture: str,
    fields: Fields,
    names: Collection[str] | None,
    stored: StoredFiles | None,
) -> ModelReport:
    """``names`` are the stored tensors'; None for a config alone, which is then believed."""
    describe = _describe_family if architecture in FAMILIES else _describe_layout
    return ModelReport(
        model=model,
        architecture=architecture,
        can_run=architecture in FAMILIES,
        stored=stored,
        **describe(architecture, fields, names),
    )


def _describe_family(
    architecture: str, fields: Fields, names: Collection[str] | None
) -> dict[str, Any]:
    """The numbers of a model that the engine can build."""
    is_fp8 = parse_quantization(fields) is not None
    family = FAMILIES[architecture]
    config: Any = family.parse_config(fields, _mtp_names(fields) if names is None else names)
    experts: ExpertsConfig | None = getattr(config, "experts", None)
    if experts:  # one of each layer is laid out; the others are like it
        config = replace(config, experts=replace(experts, num_experts=1))

    def build(fp8: Fp8Format | None) -> CausalLM:
        return family.build(config, Placement(torch.device("meta"), torch.bfloat16, fp8), 1)

    def num_copies(name: str) -> int:
        return experts.num_experts if experts and PER_EXPERT.search(name) else 1

    def num_bytes(targets: Targets) -> int:
        return sum(tensor.nbytes * num_copies(name) for name, tensor in targets.items())

    model = build(None)
    targets = model.weight_targets()
    sizes = {name: tensor.numel() * num_copies(name) for name, tensor in targets.items()}
    _check_num_parameters(
        fields, sum(sizes.values()), sum(tensor.shape[0] for tensor in targets.values())
    )
    mtp = getattr(config, "mtp", None)
    prefixes = tuple(f"model.layers.{i}." for i in mtp.loaded) if mtp else ()
    num_mtp = sum(size for name, size in sizes.items() if name.startswith(prefixes))
    num_parameters = sum(sizes.values()) - num_mtp
    num_active = None
    if experts:
        routed = (
            size
            for name, size in sizes.items()
            if ".mlp.experts." in name and not name.startswith(prefixes)
        )
        num_active = num_parameters - _num_idle(config, sum(routed), experts)
    cache: dict[str, int] = {}
    for layer in model.cache_spec():
        for kind, shape in layer.items():
            cache[kind] = cache.get(kind, 0) + math.prod(shape) * CACHE_VALUE_BYTES
    return {
        "num_layers": config.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "num_parameters": num_parameters,
        "num_active_parameters": num_active,
        "extra_parameters": {"MTP": num_mtp} if num_mtp else {},
        "released_precision": "fp8" if is_fp8 else "bf16",
        "weight_bytes": {
            "bf16": num_bytes(targets),
            "fp8": num_bytes(build(Fp8Format()).weight_targets()),
        },
        "cache_bytes_per_token": cache,
        "cache_bytes_per_sequence": 0,
    }


def _mtp_names(fields: Fields) -> list[str]:
    """What tells that the MTP layers which config.json declares are in the files."""
    first = fields.integer("num_hidden_layers", high=1024)
    num_layers = fields.integer("num_nextn_predict_layers", 0, low=0, high=16)
    return [f"model.layers.{first + i}.eh_proj.weight" for i in range(num_layers)]


def _describe_layout(
    architecture: str, fields: Fields, names: Collection[str] | None
) -> dict[str, Any]:
    """The numbers of a model whose layout is all that is known."""
    config = LAYOUTS[architecture](fields, names or ())
    num_experts = (config.num_layers + config.num_mtp_layers) * config.num_experts
    if config.dspark:
        num_experts += config.dspark.num_stages * config.dspark.num_experts
    if num_experts > MAX_EXPERTS:
        raise fields.error(
            "n_routed_experts", f"{num_experts} experts in all layers; at most {MAX_EXPERTS}"
        )
    layout = tensor_layout(config)
    draft = "DSpark" if config.dspark else "MTP"
    extra = {draft: 0, "Engram": 0}
    num_parameters = num_routed = 0
    for name, tensor in layout.items():
        if name.startswith(DRAFT_PREFIX):
            extra[draft] += tensor.num_parameters
        elif name.endswith(TABLE_SUFFIX):
            extra["Engram"] += tensor.num_parameters
        else:
            num_parameters += tensor.num_parameters
            num_routed += tensor.num_parameters if ".ffn.experts." in name else 0
    num_in_all = num_parameters + sum(extra.values())
    _check_num_parameters(fields, num_in_all, 0)
    released = config.expert_storage.value
    return {
        "num_layers": config.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "num_parameters": num_parameters,
        "num_active_parameters": num_parameters - _num_idle(config, num_routed, config),
        "extra_parameters": {part: count for part, count in extra.items() if count},
        "released_precision": released,
        "weight_bytes": {
            "bf16": 2 * num_in_all,
            released: sum(tensor.stored_bytes(config.block_size) for tensor in layout.values()),
        },
        "cache_bytes_per_token": {
            kind: math.ceil(CACHE_VALUE_BYTES * count)
            for kind, count in cache_values_per_token(config).items()
        },
        "cache_bytes_per_sequence": CACHE_VALUE_BYTES * window_values(config),
    }


def _num_idle(
    config: ModelConfig, num_routed: int, experts: ExpertsConfig | DeepseekV4Config
) -> int:
    """Parameters that one token is not multiplied by: experts not chosen, and the embeddings.

    It looks one row of them up. Papers differ in whether they count them.
    """
    num_idle = experts.num_experts - experts.num_experts_per_token
    return num_routed // experts.num_experts * num_idle + config.vocab_size * config.hidden_size


def _check_num_parameters(fields: Fields, num_parameters: int, num_rows: int) -> None:
    """A config that lies about its size is refused before it takes time and memory."""
    if num_parameters > MAX_PARAMETERS or num_rows > MAX_ROWS:
        raise CheckpointError(
            f"{fields.where}: describes {num_parameters / 1e9:,.0f} B parameters in {num_rows:,} "
            f"rows; at most {MAX_PARAMETERS / 1e9:,.0f} B in {MAX_ROWS:,} rows are believed"
        )
