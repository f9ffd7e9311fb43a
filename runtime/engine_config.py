"""What the user asked for (`EngineConfig`) and what the engine will do (`EngineInfo`)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import multiplies_fp8
from kernels.int8_linear import multiplies_int8
from kernels.packed_linear import QUANTIZED, PackFormat
from kernels.quant import ActivationScale
from runtime.config import Fp8Checkpoint
from runtime.errors import ConfigError
from runtime.models.layers import Fp8Format

GIB = 1 << 30
MAX_THREADS = 1024
CGROUP = Path("/sys/fs/cgroup")
DEFAULT_PAGE_SIZE = 16
WORKSPACE_BYTES = GIB
"""Left free on a GPU beside weights and pages, for activations and recorded decode steps."""
ONE_THREAD_PARAMETERS = 1 << 25
"""Up to so many a step has too little work for two threads: waiting for each other takes longer."""
CPU_FLOAT32_BYTES = 2 * GIB
"""Up to this many bytes of float32 weights the CPU runs float32: exact, and faster at that size."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Engine options as given; None and "auto" are decided when the engine starts.

    Raises `ConfigError` naming the flag, the value and what is allowed.
    """

    model: str
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    max_model_len: int | None = None  # tokens of prompt and answer together
    max_num_seqs: int | None = None  # sequences running at once
    max_step_tokens: int | None = None  # tokens of one step: decodes and prompt chunks together
    quantization: str = "auto"  # auto: as stored | none: matrices in dtype | fp8 | int8 | int4
    fp8_activations: str = "auto"  # auto: if meant so and the chip multiplies fp8 | on | off
    yarn_attn_factor: str = "checkpoint"  # checkpoint: as config.json says | ignore
    page_size: int = DEFAULT_PAGE_SIZE  # tokens in a page of the KV cache
    kv_cache_memory: int | None = None  # bytes
    prefix_cache: bool = True  # keep full pages, for prompts that begin as an earlier one did
    cuda_graphs: str = "lazy"  # of decode steps: lazy: when first needed | start | off
    batch_invariant: bool = False  # no token's bits follow its batch: on GPUs, in bf16 on CPUs
    run_ahead: int | None = None  # steps launched before the oldest is read; None: 1 on a GPU
    num_threads: int | None = None  # CPU threads of the engine process; None: by the model's size

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda") and not (
            re.fullmatch(r"cuda:\d{1,3}", self.device, re.ASCII)
        ):
            raise ConfigError(f"--device {self.device!r} is not one of auto, cpu, cuda, cuda:N")
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("quantization", ("auto", "none", "fp8", *QUANTIZED)),
            ("fp8_activations", ("auto", "on", "off")),
            ("yarn_attn_factor", ("checkpoint", "ignore")),
            ("cuda_graphs", ("lazy", "start", "off")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {value!r} is not one of {', '.join(allowed)}")
        for name, limit in (
            ("max_model_len", 1 << 24),
            ("max_num_seqs", 4096),
            ("max_step_tokens", 1 << 17),
            ("kv_cache_memory", 1 << 50),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be between 1 and {limit}, got {value}")
        if self.run_ahead not in (None, 0, 1):
            raise ConfigError(f"run_ahead must be 0 or 1, got {self.run_ahead}")
        if self.num_threads is not None and not 1 <= self.num_threads <= MAX_THREADS:
            raise ConfigError(
                f"--threads must be between 1 and {MAX_THREADS}, got {self.num_threads}"
            )
        if not self.model:
            raise ConfigError("the model's name is empty; give a folder or a hub id")
        if self.page_size not in (1, 2, 4, 8, 16, 32, 64, 128):
            raise ConfigError(f"--page-size must be a power of two up to 128, got {self.page_size}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resolve_device(self) -> torch.device:
        """The device to run on. Raises `ConfigError` if a GPU was asked for and none is there."""
        if self.device == "auto":
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if device.type == "cpu":
            return device
        device = torch.device("cuda", device.index or 0)  # torch's functions want the index
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {self.device}: this machine shows {torch.cuda.device_count()} CUDA "
                "devices to PyTorch; use --device cpu or install a CUDA build of torch"
            )
        return device

    def resolve_threads(self, num_parameters: int) -> int | None:
        """CPU threads to use, None for torch's choice, which is a thread a core."""
        if self.num_threads is None and num_parameters <= ONE_THREAD_PARAMETERS:
            return 1
        return self.num_threads

    def resolve_run_ahead(self, device: torch.device) -> int:
        """A CPU computes in the thread that plans, so there is nothing to run ahead of."""
        return int(device.type == "cuda") if self.run_ahead is None else self.run_ahead

    def resolve_model_len(self, limit: int) -> int:
        """Longest context wanted from a model made for ``limit`` tokens. Raises `ConfigError`."""
        wanted = self.max_model_len or limit
        if wanted > limit:
            raise ConfigError(f"--max-model-len {wanted} is above the {limit} tokens of this model")
        return wanted

    def resolve_dtype(
        self, device: torch.device, checkpoint_dtype: torch.dtype, num_parameters: int
    ) -> torch.dtype:
        """The dtype of weights, activations and cache."""
        if self.dtype != "auto":
            dtype = getattr(torch, self.dtype)
            assert isinstance(dtype, torch.dtype)
            return dtype
        is_quantized = self.quantization in QUANTIZED  # for less memory, so that stays less
        is_small = 4 * num_parameters <= CPU_FLOAT32_BYTES and not is_quantized
        if device.type == "cpu" and is_small:
            return torch.float32
        return checkpoint_dtype

    def resolve_packing(self, device: torch.device) -> PackFormat | None:
        """How linear layers are packed. Raises `ConfigError` for what this device cannot do."""
        if self.quantization not in QUANTIZED:
            return "dtype" if device.type == "cpu" else None
        if device.type != "cpu":
            raise ConfigError(
                f"--quantization {self.quantization} is for CPUs; on a GPU use fp8, or --device cpu"
            )
        if not multiplies_int8():
            raise ConfigError(
                f"--quantization {self.quantization} needs a CPU with VNNI, whose int8 products "
                "are exact; use none"
            )
        return QUANTIZED[self.quantization]

    def resolve_fp8(self, device: torch.device, stored: Fp8Checkpoint | None) -> Fp8Format | None:
        """How matrices are kept in FP8, None if they are not. Raises `ConfigError`.

        Activations are quantized too (W8A8) where the checkpoint was made for it and the chip has
        fp8 matrix units; a matrix quantized here, from a bf16 checkpoint, is W8A16 unless asked.
        """
        is_fp8 = self.quantization == "fp8" or (self.quantization == "auto" and stored is not None)
        if not is_fp8:
            if self.fp8_activations == "on":
                raise ConfigError(
                    "--fp8-activations on needs FP8 weights: an FP8 checkpoint or "
                    "--quantization fp8"
                )
            return None
        scale: ActivationScale = "float32" if stored is None else stored.activation_scale
        wanted = self.fp8_activations == "on" or (
            self.fp8_activations == "auto" and stored is not None and multiplies_fp8(device)
        )
        return Fp8Format(scale if wanted else None)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine decided at its start; shown once to the user and used for admission."""

    model: str
    architecture: str
    num_parameters: int
    weight_bytes: int
    device: str
    dtype: str
    quantization: str  # of matrices: none, fp8 (W8A16 or W8A8), int8 or int4
    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    page_size: int
    num_pages: int
    kv_cache_bytes: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    run_ahead: int = 0  # steps launched before the oldest is read
    prefix_cache: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> EngineInfo:
        return cls(**{**raw, "eos_token_ids": tuple(raw["eos_token_ids"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the CPU, what Linux calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = _read(Path("/proc/meminfo"))
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(available[1]) * 1024 if available else 4 * GIB
    # A container's own limit, which /proc/meminfo does not know.
    limit, used = (_read(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        free = min(free, max(int(limit) - int(used), 0))
    return free


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def resolve_pages(
    config: EngineConfig,
    *,
    device: torch.device,
    bytes_per_token: int,
    model_max_len: int,
    reserved: int = 0,
) -> tuple[int, int, int]:
    """``(num_pages, max_model_len, max_num_seqs)`` by arithmetic, before the weights are read.

    ``reserved`` bytes of the free memory belong to the weights.

    Pages never exceed what every sequence at full length would use. Without ``--kv-cache-memory``
    a GPU gives all that is free but `WORKSPACE_BYTES`, a CPU a quarter of the free memory up to
    4 GiB. Without ``--max-model-len`` the context shrinks to what the pages hold.
    Raises `ConfigError` if the flags cannot be met.
    """
    max_num_seqs = config.max_num_seqs or (256 if device.type == "cuda" else 64)
    wanted_len = config.resolve_model_len(model_max_len)
    free = max(available_memory(device) - reserved, 0)
    budget = config.kv_cache_memory
    if budget is None:
        budget = free - WORKSPACE_BYTES if device.type == "cuda" else min(free // 4, 4 * GIB)
    elif budget > free:
        raise ConfigError(
            f"--kv-cache-memory {budget} bytes is above the {free} bytes free on {device}"
        )
    page_bytes = config.page_size * bytes_per_token
    pages_per_seq = -(-wanted_len // config.page_size)
    num_pages = min(budget // page_bytes - 1, max_num_seqs * pages_per_seq)  # 1: the dummy page
    if num_pages < 1:
        raise ConfigError(
            f"the KV cache has room for {max(budget, 0)} bytes on {device}, but one page takes "
            f"{page_bytes}; free memory or give --kv-cache-memory"
        )
    capacity = num_pages * config.page_size
    if capacity < wanted_len and config.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {wanted_len} needs {pages_per_seq * page_bytes} bytes of KV cache, "
            f"but {budget} bytes are there; lower it to {capacity} or raise --kv-cache-memory"
        )
    return num_pages, min(wanted_len, capacity), max_num_seqs
