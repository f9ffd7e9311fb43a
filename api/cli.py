"""The `fathom` command and its subcommands. Every mistake is one line and exit code 2."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from api.inspect_command import inspect_command
from api.keys_command import keys_app
from api.limits import Limits
from api.terminal import LoadingBar, describe, parse_bytes
from api.terminal_chat import chat as run_chat
from api.top_command import top_command
from runtime import (
    ConfigError,
    Engine,
    EngineConfig,
    FathomError,
    find_checkpoint,
    inspect_checkpoint,
    pull,
)

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "weights" / "fathom-tiny"
# Typer carries its own click, whose base of usage errors is reached through a public child.
LIMITS = ", ".join(f"{name} ({default})" for name, default, _ in Limits.describe())
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="fathom",
    help="Serve DeepSeek models on your own machine through the OpenAI API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(keys_app, name="keys")

Model = Annotated[
    str | None,
    typer.Argument(
        help="Checkpoint folder or Hugging Face id (deepseek-ai/…). Default: the small model that "
        "comes with Fathom.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto follows the checkpoint.")
]
Quantization = Annotated[
    str,
    typer.Option(
        help="auto (as the checkpoint is), fp8 (quantize at load), none (decode FP8 at load); on a "
        "CPU int8 or int4, weights only."
    ),
]
Fp8Activations = Annotated[
    str,
    typer.Option(
        help="Multiply in fp8 too (W8A8): on, off, or auto: if the checkpoint is made for it and "
        "the GPU can."
    ),
]
YarnAttnFactor = Annotated[
    str,
    typer.Option(
        help="YaRN's attn_factor in config.json: follow the checkpoint, or ignore it as "
        "transformers does."
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Longest prompt and answer together, in tokens.", show_default="the model's"),
]
KvCacheMemory = Annotated[
    str | None,
    typer.Option(help="Memory for the KV cache, for example 8GiB.", show_default="what is free"),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="On a GPU, and in bfloat16 or float16 on a CPU, keep every bit of an answer from "
        "depending on how many requests run beside it; slower.",
    ),
]
CudaGraphs = Annotated[
    str,
    typer.Option(
        help="Record decode steps on a GPU: lazy (when first needed), start (before the first "
        "request) or off."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads of the engine.", show_default="the cores; 1 for tiny models"),
]


def main() -> None:
    """Entry point of the console script; turns expected errors into one line and exit code 2."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal must not end the program
    try:
        sys.exit(app(standalone_mode=False))
    except FathomError as error:
        console.print(f"fathom: {' '.join(str(error).splitlines())}", markup=False)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        command = getattr(getattr(error, "ctx", None), "command_path", "fathom")
        if message:  # none when the help was shown for want of a command
            console.print(f"fathom: {message} (see `{command} --help`)", markup=False)
        sys.exit(2)


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name clients ask for; may be given several times.", show_default="the model's"
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    fp8_activations: Fp8Activations = "auto",
    yarn_attn_factor: YarnAttnFactor = "checkpoint",
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="Sequences running at once.", show_default="256 on a GPU, 64 on a CPU"),
    ] = None,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one step, decodes and prompt chunks together.",
            show_default="2048 on a GPU, 512 on a CPU",
        ),
    ] = None,
    kv_cache_memory: KvCacheMemory = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a page of the KV cache.")] = 16,
    no_prefix_cache: Annotated[
        bool,
        typer.Option(
            "--no-prefix-cache",
            help="Compute every prompt from its start, also one that begins as an earlier one did.",
        ),
    ] = False,
    cuda_graphs: CudaGraphs = "lazy",
    batch_invariant: BatchInvariant = False,
    threads: Threads = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Let any program on this machine in without a key.")
    ] = False,
    uds: Annotated[
        Path | None,
        typer.Option(
            help="Listen on a Unix socket of this path, for this user only, instead of a port.",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="PEM file with the certificate chain for HTTPS.", show_default=False),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file with its private key.", show_default=False)
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name of this server that requests may have as their Host; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A web page's origin to let in without a key, such as http://host:3000; may be "
            "given several times.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Set a limit, such as queue=64 or body=16MiB; may be given several times. Names: "
            f"{LIMITS}.",
            show_default=False,
        ),
    ] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that answers may still take once the server stops.")
    ] = 30.0,
    watchdog: Annotated[
        float, typer.Option(help="Seconds of silence after which a working engine is replaced.")
    ] = 60.0,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON, one object a line.")
    ] = False,
) -> None:
    """Load a model and answer the OpenAI API on http://HOST:PORT/v1.

    [bold]Examples[/bold]

      fathom serve

      fathom serve deepseek-ai/DeepSeek-R1-Distill-Qwen-7B

      fathom serve ./DeepSeek-R1-Distill-Llama-8B --max-model-len 32768 --port 9000
    """
    from api.serve import ServeOptions, serve_forever  # the other commands need no web server

    config = EngineConfig(
        model=str(EMBEDDED_MODEL) if model is None else model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        fp8_activations=fp8_activations,
        yarn_attn_factor=yarn_attn_factor,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
        page_size=page_size,
        kv_cache_memory=_bytes(kv_cache_memory),
        prefix_cache=not no_prefix_cache,
        cuda_graphs=cuda_graphs,
        batch_invariant=batch_invariant,
        num_threads=threads,
    )
    names = served_model_name or _default_names(model)
    for name in names:
        if not name or not name.isprintable():
            raise ConfigError(f"--served-model-name {name!r} is empty or not printable")
    options = ServeOptions(
        host,
        port,
        tuple(names),
        needs_key=not no_key,
        uds=uds,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        allowed_hosts=frozenset(allowed_host or ()),
        allowed_origins=frozenset(allowed_origin or ()),
        limits=Limits.parse(limit or ()),
        drain_seconds=drain,
        watchdog_seconds=watchdog,
        log_json=log_json,
    )
    serve_forever(config, options)


@app.command()
def chat(
    model: Model = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy.", show_default="the model's", min=0.0, max=2.0),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    fp8_activations: Fp8Activations = "auto",
    yarn_attn_factor: YarnAttnFactor = "checkpoint",
    max_model_len: MaxModelLen = None,
    kv_cache_memory: KvCacheMemory = None,
    threads: Threads = None,
) -> None:
    """Talk to a model in the terminal; thoughts are dimmed, Ctrl-C stops an answer."""
    config = EngineConfig(
        model=str(EMBEDDED_MODEL) if model is None else model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        fp8_activations=fp8_activations,
        yarn_attn_factor=yarn_attn_factor,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_cache_memory=_bytes(kv_cache_memory),
        num_threads=threads,
    )
    if sys.stdin is None or sys.stdout is None:
        raise ConfigError("fathom chat needs standard input and output")
    console = Console(highlight=False)
    started = time.monotonic()
    bar = LoadingBar(console, Path(config.model).name)
    bar.start()
    try:
        engine = Engine.from_checkpoint(config, bar.update)
    finally:
        bar.stop()
    for line in describe(engine.info, time.monotonic() - started):
        console.print(line, style="dim", markup=False)
    defaults = inspect_checkpoint(find_checkpoint(config.model)).generation
    run_chat(engine, defaults, console, temperature)


app.command(name="inspect")(inspect_command)
app.command(name="top")(top_command)


@app.command(name="pull")
def pull_command(
    hub_id: Annotated[
        str, typer.Argument(help="For example deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    ],
) -> None:
    """Download a checkpoint from Hugging Face; run it again to resume."""
    path = pull(hub_id)
    Console(soft_wrap=True).print(f"{hub_id} is in {path}", markup=False, highlight=False)


def _bytes(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text, "--kv-cache-memory")


def _default_names(model: str | None) -> list[str]:
    """The embedded model also answers to the name in the provider's document."""
    if model is None:
        return [EMBEDDED_MODEL.name, "deepseek-r1"]
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return [name] if Path(model).is_dir() or name == model else [name, model]
