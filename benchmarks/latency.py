"""Time to the first token and per token of the offline engine, by prompt, batch and context.

    python -m benchmarks.latency MODEL [--prompts 128 512 2048] [--batch 1 2 4 8 16]
                                 [--contexts 1024 2048 … 32768] [--context-batch 1]

    ttft    one prompt, nothing else running; ceiling: its operations over the measured matmul rate
    batch   a decode step by batch size at one context; ceiling: bytes over the measured bandwidth
    context a decode step by context, with the line that fits and the slope of the bytes read

A context is reached without computing it: caches hold random numbers and prompts are passed over.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.cpu_ceilings import matmul_rate, read_bandwidth
from benchmarks.decode import PAGE_SIZE, PromptPassing, num_ahead, run_steps, start_decoding
from benchmarks.decode import time_prompt as prompt_seconds
from benchmarks.fit import fit_line
from benchmarks.floors import Floor
from benchmarks.machine import EMBEDDED_MODEL, percent_of, print_record
from benchmarks.offline import checkpoint_floor, floor_of
from benchmarks.own_environment import start_as_engine
from benchmarks.throughput import add_engine_options
from runtime import (
    Engine,
    EngineConfig,
    FathomError,
    SamplingParams,
    find_checkpoint,
    inspect_checkpoint,
)
from runtime.runner import ModelRunner

WARM_UP_STEPS = 3
PROMPT_SHARE, BATCH_SHARE = 0.3, 0.6  # of the time, by when prompts and batches are done


class Latency:
    """One engine and the ceilings of its machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises `FathomError` for a checkpoint or an option that cannot be."""
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.num_drawn = WARM_UP_STEPS + options.rounds * options.steps + 2
        checkpoint = inspect_checkpoint(find_checkpoint(options.model))
        limit = checkpoint.config.max_position_embeddings
        points = [(batch, options.batch_context) for batch in options.batch]
        points += [(options.context_batch, context) for context in options.contexts]
        longest = max([self.room_of(*point) for point in points] + options.prompts)
        self.max_model_len = min(longest + 1, limit)
        num_pages = max(
            batch * -(-min(self.room_of(batch, context), self.max_model_len) // PAGE_SIZE)
            for batch, context in [*points, (1, self.max_model_len)]
        )
        config = EngineConfig(
            model=options.model,
            device="cpu",
            dtype=options.dtype,
            quantization=options.quantization,
            num_threads=options.threads,
            max_model_len=self.max_model_len,
            max_num_seqs=max(batch for batch, _ in points),
            prefix_cache=False,
        )
        dtype = config.resolve_dtype(
            torch.device("cpu"), checkpoint.dtype, checkpoint.num_parameters
        )
        token_bytes = checkpoint_floor(options.model, dtype)[0].cache_bytes_per_token
        cache = (num_pages + 2) * PAGE_SIZE * token_bytes
        self.engine = Engine.from_checkpoint(EngineConfig(**_with(config, kv_cache_memory=cache)))
        self.floor: Floor = floor_of(self.engine)
        runner = self.engine.runner
        assert isinstance(runner, ModelRunner)
        self.passing = PromptPassing(runner.model)
        runner.model = self.passing
        for layer in runner.caches:
            for values in layer.values():
                values.normal_()
        self.bandwidth = read_bandwidth()
        self.matmul = matmul_rate(dtype)

    def room_of(self, batch: int, context: int) -> int:
        """Tokens that a sequence of this context reaches while it is measured."""
        return context + num_ahead(batch, context) + int(self.num_drawn)

    def prompt(self, num_tokens: int) -> dict[str, Any]:
        seconds = prompt_seconds(self.engine, num_tokens, torch.device("cpu"))
        least = self.floor.prompt_flops(num_tokens) / self.matmul
        return {
            "prompt": num_tokens,
            "ttft_ms": 1e3 * seconds,
            "tok_s": num_tokens / seconds,
            "floor_ms": 1e3 * least,
            "percent": percent_of(least, seconds),
        }

    def is_late(self, share: float, seconds: float = 0.0) -> bool:
        """Whether ``seconds`` more would end after this share of the time."""
        return time.monotonic() + seconds > self.end - (1 - share) * self.options.seconds

    def step(self, batch: int, context: int, share: float) -> dict[str, Any]:
        """A decode step: the median over rounds, ending at the longest context if need be."""
        if context > self.max_model_len:
            why = f"the model's context is {self.max_model_len:,} tokens"
            return {"batch": batch, "context": context, "skipped": why}
        if self.is_late(share):
            return {"batch": batch, "context": context, "skipped": "no time left"}
        room = self.room_of(batch, context) - context
        first = min(context, self.max_model_len - room)
        params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        seq_ids = start_decoding(self.engine, self.passing, batch, first, params)
        device = torch.device("cpu")
        try:
            run_steps(self.engine, WARM_UP_STEPS, device)
            rounds = [
                run_steps(self.engine, self.options.steps, device)
                for _ in range(self.options.rounds)
            ]
            running = self.engine.scheduler.running
            mean_context = sum(seq.num_tokens for seq in running) / batch
            mean_context -= self.options.steps * self.options.rounds / 2
        finally:
            for seq_id in seq_ids:
                self.engine.abort(seq_id)
        seconds = statistics.median(rounds)
        least = self.floor.step_bytes(batch, mean_context) / self.bandwidth
        return {
            "batch": batch,
            "context": context,
            "mean_context": mean_context,
            "step_ms": 1e3 * seconds,
            "tok_s": batch / seconds,
            "floor_ms": 1e3 * least,
            "percent": percent_of(least, seconds),
        }


def _with(config: EngineConfig, **changes: Any) -> dict[str, Any]:
    return config.to_dict() | changes


def print_steps(rows: list[dict[str, Any]]) -> None:
    print(f"{'batch x context':>18}{'step ms':>10}{'tok/s':>10}{'floor ms':>10}{'%':>7}")
    for row in rows:
        at = f"{row['batch']} x {row['context']}"
        if "skipped" in row:
            print(f"{at:>18}  skipped: {row['skipped']}")
            continue
        print(
            f"{at:>18}{row['step_ms']:>10.2f}{row['tok_s']:>10,.1f}{row['floor_ms']:>10.3f}"
            f"{row['percent']:>7.1f}"
        )
    sys.stdout.flush()


def fit_steps(rows: list[dict[str, Any]], key: str, unit: str) -> dict[str, float] | None:
    """The line of step time over ``key``, printed beside that of the floor."""
    measured = [row for row in rows if "step_ms" in row]
    x = [row[key] for row in measured]
    line = fit_line(x, [row["step_ms"] for row in measured])
    least = fit_line(x, [row["floor_ms"] for row in measured])
    if line is None or least is None:
        return None
    print(
        f"fit: {line.intercept:.2f} ms + {1e3 * line.slope:.3f} us per {unit}, "
        f"R² {line.r_squared:.4f}; the bytes alone: {1e3 * least.slope:.3f} us per {unit}"
    )
    return line.to_dict() | {"floor_slope": least.slope}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch-context", type=int, default=1024)
    contexts = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--contexts", type=int, nargs="*", default=contexts)
    parser.add_argument("--context-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over these")
    parser.add_argument("--seconds", type=float, default=86400.0, help="start nothing new after")
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    if options.device not in ("auto", "cpu"):
        parser.error("--device: GPUs are measured by benchmarks.decode")
    numbers = [*options.prompts, *options.batch, *options.contexts, options.batch_context]
    if min(*numbers, options.context_batch, options.steps, options.rounds) < 1:
        parser.error("sizes, steps and rounds must be at least 1")
    return options


def main() -> int:
    options = parse()
    try:
        latency = Latency(options)
    except FathomError as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    info, threads = latency.engine.info, torch.get_num_threads()
    print(
        f"{info.model}: {info.dtype}, quantization {info.quantization}, {threads} threads; "
        f"{latency.bandwidth / 1e9:.1f} GB/s, {latency.matmul / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'prompt':>18}{'ttft ms':>10}{'tok/s':>10}{'floor ms':>10}{'%':>7}")
    prompts = []
    for num_tokens in sorted(options.prompts):
        expected = 4 * num_tokens / prompts[-1]["tok_s"] if prompts else 0.0
        if prompts and latency.is_late(PROMPT_SHARE, expected):
            print(f"{num_tokens:>18}  skipped: no time left")
            continue
        prompts.append(row := latency.prompt(num_tokens))
        print(
            f"{row['prompt']:>18}{row['ttft_ms']:>10.1f}{row['tok_s']:>10,.0f}"
            f"{row['floor_ms']:>10.2f}{row['percent']:>7.1f}"
        )
    by_batch = [latency.step(batch, options.batch_context, BATCH_SHARE) for batch in options.batch]
    print_steps(by_batch)
    batch_fit = fit_steps(by_batch, "batch", "sequence")
    by_context = [latency.step(options.context_batch, context, 1.0) for context in options.contexts]
    print_steps(by_context)
    context_fit = fit_steps(by_context, "mean_context", "token of context")
    print_record(
        "latency",
        model=info.model,
        dtype=info.dtype,
        quantization=info.quantization,
        threads=threads,
        read_bandwidth_bytes_s=latency.bandwidth,
        matmul_flops_s=latency.matmul,
        prompts=prompts,
        by_batch=by_batch,
        batch_fit=batch_fit,
        by_context=by_context,
        context_fit=context_fit,
    )
    return 0


if __name__ == "__main__":
    start_as_engine()
    sys.exit(main())
