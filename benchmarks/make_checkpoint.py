"""A checkpoint of random weights at a released shape, in the released layout, without a download.

    python -m benchmarks.make_checkpoint qwen2.5_0.5b FOLDER [--dtype bfloat16] [--layers N]

Names, shapes, dtypes, shards and their index, config.json and a tokenizer.json of the right size
are as released; draft layers are left out. Tensors are written as they are made, so memory stays
at a few chunks. The same shape and seed give the same bytes. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.machine import print_record
from benchmarks.random_models import WEIGHT_SCALE, config_json, known_configs
from runtime.config import Fields, parse_quantization
from runtime.models import FAMILIES
from runtime.models.layers import SCALE_SUFFIX, Fp8Format, Placement

SHARD_BYTES = 5_000_000_000  # released shards are about so large
CHUNK_VALUES = 1 << 22  # made at once
DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
BIAS_SUFFIX = "e_score_correction_bias"  # float32 in every release
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL_TOKENS = {"eos_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def tensor_spec(config: dict[str, Any], dtype: torch.dtype) -> Spec:
    """Name -> shape and stored dtype of each tensor, in the order of the layers."""
    fields = Fields(config, "config.json")
    family = FAMILIES[config["architectures"][0]]
    fp8 = parse_quantization(fields)
    placement = Placement(torch.device("meta"), dtype, None if fp8 is None else Fp8Format())
    model = family.build(family.parse_config(fields, ()), placement, 1)
    spec: Spec = {}
    for name, target in model.weight_targets().items():
        kept = target.dtype == torch.float8_e4m3fn or name.endswith((BIAS_SUFFIX, SCALE_SUFFIX))
        spec[name] = tuple(target.shape), target.dtype if kept else dtype
    return spec


def num_bytes(spec: Spec) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def split(spec: Spec, shard_bytes: int) -> list[Spec]:
    """The tensors in shards of at most ``shard_bytes``, but for a tensor that is larger."""
    shards: list[Spec] = [{}]
    for name, (shape, dtype) in spec.items():
        one = {name: (shape, dtype)}
        if shards[-1] and num_bytes(shards[-1]) + num_bytes(one) > shard_bytes:
            shards.append({})
        shards[-1] |= one
    return shards


def make_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    show: bool = False,
) -> int:
    """Write all files of a checkpoint into ``folder``; how many bytes of tensors.

    Raises `OSError` if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    spec = tensor_spec(config, dtype)
    shards = split(spec, shard_bytes)
    total = num_bytes(spec)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as progress:
        task = progress.add_task("writing", total=total)
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            places |= dict.fromkeys(shard, name)
            with (folder / name).open("wb") as file:
                for written in write_shard(file, shard, generator):
                    progress.update(task, advance=written)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config)
    write_tokenizer(folder, config)
    return total


def write_shard(file: BinaryIO, shard: Spec, generator: torch.Generator) -> Iterator[int]:
    """Write one safetensors file, a chunk at a time; the bytes of each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in shard.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (shape, dtype) in shard.items():
        left = math.prod(shape)
        while left:
            count = min(left, CHUNK_VALUES)
            values = random_values(name, count, dtype, generator)
            file.write(values.view(torch.uint8).numpy().data)
            left -= count
            yield count * dtype.itemsize


def random_values(
    name: str, count: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Values of the size that trained ones have: an answer stays finite through all layers."""
    if name.endswith(SCALE_SUFFIX):
        return torch.full((count,), WEIGHT_SCALE, dtype=dtype)  # of values around 1
    scale = 1.0 if dtype == torch.float8_e4m3fn else WEIGHT_SCALE
    values = torch.empty(count).normal_(0.0, scale, generator=generator)
    if name.endswith("norm.weight"):
        values += 1.0
    return values.to(dtype)


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """A byte-level tokenizer with a token for every embedding, the special ids in their places."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = config["vocab_size"]
    special: dict[int, str] = {}
    for name, text in SPECIAL_TOKENS.items():
        token_id = config.get(f"{name}_id")
        if isinstance(token_id, int):
            special.setdefault(token_id, text)
    texts = _texts(letters)
    vocab = {special[i] if i in special else next(texts): i for i in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {name: special.get(config.get(f"{name}_id", -1)) for name in SPECIAL_TOKENS}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": names["bos_token"] or names["eos_token"],
            "eos_token": names["eos_token"],
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _texts(letters: list[str]) -> Iterator[str]:
    """Each byte, then pairs of them, then threes."""
    yield from letters
    yield from (a + b for a in letters for b in letters)
    yield from (a + b + c for a in letters for b in letters for c in letters)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    shapes = sorted(known_configs())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=shapes, metavar="SHAPE", help=", ".join(shapes))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer than released")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--tiny", action="store_true", help="the family only, to test with")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be at least 1, got {options.layers}")
    if options.shard_bytes < 1:
        parser.error(f"--shard-bytes must be at least 1, got {options.shard_bytes}")
    return options


def main() -> int:
    options = parse()
    config = config_json(options.shape, tiny=options.tiny)
    if config["architectures"][0] not in FAMILIES:
        print(f"make_checkpoint: {config['architectures'][0]} does not run yet", file=sys.stderr)
        return 2
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    if options.tiny:
        config |= {"bos_token_id": 300, "eos_token_id": 301}
    start = time.monotonic()
    try:
        total = make_checkpoint(
            options.folder,
            config,
            dtype=getattr(torch, options.dtype),
            seed=options.seed,
            shard_bytes=options.shard_bytes,
            show=sys.stderr.isatty(),
        )
    except OSError as error:
        print(f"make_checkpoint: {options.folder}: {error.strerror}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    print(f"{options.folder}: {total / 1e9:.2f} GB of tensors in {seconds:.1f} s")
    print_record("make_checkpoint", shape=options.shape, tensor_bytes=total, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
