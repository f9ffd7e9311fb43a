"""`fathom inspect`: what a model is, what it takes, and which GPU holds it, before any download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from api.terminal import format_bytes, format_count, parse_bytes
from runtime import (
    ConfigError,
    Gpu,
    ModelReport,
    context_left,
    describe_model,
    find_gpus,
    imagine_gpu,
)

GIB = 1 << 30
COMMON_GPUS = {"24 GB": 24 * GIB, "48 GB": 48 * GIB, "80 GB": 80 * GIB, "141 GB": 139.8 * GIB}
"""Asked about where no GPU is found and no ``--memory`` given; an H200's 141 GB are 139.8 GiB."""
FLAGS = {"fp8": "with --quantization fp8", "bf16": "with --quantization none"}
"""What loads a model in another precision than its own."""
CACHE_KINDS = {
    "k": "keys",
    "v": "values",
    "latent": "latents",
    "kv": "compressed keys and values",
    "index_k": "index keys",
}


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder or Hugging Face id (deepseek-ai/…).")
    ],
    memory: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask about a GPU with this much memory, for example 24GiB; may be given several "
            "times.",
            show_default="the GPUs found, else common sizes",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Show a model's size, its cache, and which GPUs hold it; downloads no weights.

    [bold]Examples[/bold]

      fathom inspect deepseek-ai/DeepSeek-V2-Lite

      fathom inspect ./DeepSeek-R1-Distill-Llama-8B --memory 12GiB --memory 16GiB
    """
    gpus = [imagine_gpu(text, parse_bytes(text, "--memory")) for text in memory or ()]
    report = describe_model(model)
    gpus = gpus or find_gpus()
    gpus = gpus or [imagine_gpu(name, int(size)) for name, size in COMMON_GPUS.items()]
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        lines = [json.dumps(as_object(report, gpus), indent=2)]
    else:
        lines = [*summary(report), "", *fits(report, gpus)]
    try:
        for line in lines:
            console.print(line, markup=False)
    except OSError as error:
        raise ConfigError(f"standard output took no report: {error}") from None


def summary(report: ModelReport) -> Iterator[str]:
    """What there is to say about a model, a line for each thing."""
    yield f"model         {report.model}"
    yield (
        f"architecture  {report.architecture}, {report.num_layers} layers, "
        f"context {report.max_position_embeddings:,} tokens"
    )
    active = report.num_active_parameters
    share = "" if active is None else f", {format_count(active)} active per token"
    yield f"parameters    {format_count(report.num_parameters)}{share}"
    if report.extra_parameters:
        extra = [f"{format_count(n)} {part}" for part, n in report.extra_parameters.items()]
        yield f"              and {', '.join(extra)}"
    yield f"files         {_describe_files(report)}"
    for i, precision in enumerate(_precisions(report)):
        size = format_bytes(report.weight_bytes[precision])
        how = "as released" if i == 0 else FLAGS[precision] if report.can_run else "decoded"
        yield f"{'' if i else 'weights':<12}  {precision:<4}  {size:>9}  {how}"
    kinds = ", ".join(CACHE_KINDS[kind] for kind in report.cache_bytes_per_token)
    yield f"cache         {sum(report.cache_bytes_per_token.values()):,} bytes per token ({kinds})"
    if report.cache_bytes_per_sequence:
        yield f"              and {format_bytes(report.cache_bytes_per_sequence)} per sequence"


def fits(report: ModelReport, gpus: list[Gpu]) -> Iterator[str]:
    """A table: what each GPU has left for the cache, in each precision."""
    if not report.can_run:
        yield "Fathom knows this architecture but cannot run it yet."
        return
    precisions = _precisions(report)
    width = max(3, *(len(gpu.name) for gpu in gpus))
    yield "Tokens of context that fit beside the weights:"
    yield f"{'GPU':<{width}}  {'free':>9}" + "".join(f"{name:>14}" for name in precisions)
    for gpu in gpus:
        left = [context_left(report, name, gpu) for name in precisions]
        cells = ["does not fit" if tokens is None else f"{tokens:,}" for tokens in left]
        row = "".join(f"{cell:>14}" for cell in cells)
        yield f"{gpu.name:<{width}}  {format_bytes(gpu.free):>9}{row}"


def _precisions(report: ModelReport) -> list[str]:
    """The released one first."""
    return sorted(report.weight_bytes, key=lambda name: name != report.released_precision)


def _describe_files(report: ModelReport) -> str:
    stored = report.stored
    if stored is None:
        return "not seen; everything here follows from config.json"
    size = "size unknown" if stored.num_bytes is None else format_bytes(stored.num_bytes)
    num_files = "1 file" if stored.num_files == 1 else f"{stored.num_files} files"
    return ", ".join([f"{size} in {num_files}", *stored.dtypes])


def as_object(report: ModelReport, gpus: list[Gpu]) -> dict[str, Any]:
    """The report for `--json`; sizes in bytes, contexts in tokens, null for what does not fit."""
    return asdict(report) | {
        "gpus": [
            asdict(gpu)
            | {"context_left": {name: context_left(report, name, gpu) for name in FLAGS}}
            for gpu in gpus
            if report.can_run
        ]
    }
