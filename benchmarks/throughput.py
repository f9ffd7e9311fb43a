"""Tokens per second of the offline engine by batch size, on any checkpoint.

    python -m benchmarks.throughput [MODEL] [--batch 1 8 64] [--prompt 64] [--new 64] [--rounds 5]

Every prompt is fixed-seed random tokens, answers ignore the end token, decoding is greedy. Prefill
is timed apart from decode: it ends when every answer has its first token. A decode step's ceiling
is the time to read the weights and the cache it needs at the machine's measured bandwidth. The last
line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.cpu_ceilings import read_bandwidth
from benchmarks.machine import EMBEDDED_MODEL, percent_of, print_record, rounds_within, shown
from benchmarks.offline import floor_of, random_prompts, run_batch
from benchmarks.own_environment import start_as_engine
from runtime import Engine, EngineConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over these")
    parser.add_argument("--seconds", type=float, default=86400.0, help="fewer rounds after these")
    add_engine_options(parser)
    return parser.parse_args()


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that loads a checkpoint into an engine."""
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--quantization", default="auto", help="as `fathom serve` takes it")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the engine")


def measure(
    engine: Engine, options: argparse.Namespace, bandwidth: float | None
) -> list[dict[str, float | int | None]]:
    """A row per batch size."""
    floor = floor_of(engine)
    rows = []
    end = time.monotonic() + options.seconds
    for number, batch in enumerate(options.batch):
        prompts = random_prompts(batch, options.prompt, engine.info.vocab_size)
        share = (end - time.monotonic()) / (len(options.batch) - number)
        run_batch(engine, prompts, min(options.new, 8))  # warm-up
        turns = rounds_within(options.rounds, share)
        next(turns)
        rounds = [run_batch(engine, prompts, options.new) for _ in turns]
        prefill = statistics.median(times.prefill_tok_s for times in rounds)
        decode = statistics.median(times.decode_tok_s for times in rounds)
        read = floor.step_bytes(batch, options.prompt + options.new / 2)
        ceiling = batch * bandwidth / read if bandwidth else None
        percent = percent_of(decode, ceiling)
        rows.append(
            {
                "batch": batch,
                "prefill_tok_s": prefill,
                "decode_tok_s": decode,
                "ceiling_tok_s": ceiling,
                "percent": percent,
                "num_new": sum(times.num_new for times in rounds),
                "rounds": len(rounds),
            }
        )
        print(
            f"{batch:>6}{prefill:>15,.0f}{decode:>15,.0f}{decode / batch:>10,.0f}"
            f"{shown(ceiling):>15}{shown(percent, '.1f'):>8}",
            flush=True,
        )
    return rows


def main() -> None:
    options = parse()
    engine = Engine.from_checkpoint(
        EngineConfig(
            model=options.model,
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            max_num_seqs=max(options.batch),
            max_model_len=options.prompt + options.new,
            prefix_cache=False,  # each round reads its prompts again
            num_threads=options.threads,
        )
    )
    info = engine.info
    bandwidth = read_bandwidth() if info.device == "cpu" else None
    print(
        f"{info.model}: {info.num_parameters / 1e6:.1f} M parameters, {info.dtype}, "
        f"quantization {info.quantization}, on {info.device}"
    )
    if bandwidth is not None:
        print(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {torch.get_num_threads()} threads")
    print(
        f"{'batch':>6}{'prefill tok/s':>15}{'decode tok/s':>15}{'steps/s':>10}"
        f"{'ceiling tok/s':>15}{'%':>8}"
    )
    rows = measure(engine, options, bandwidth)
    print_record(
        "throughput",
        model=Path(info.model).name,
        threads=torch.get_num_threads(),
        dtype=info.dtype,
        quantization=info.quantization,
        device=info.device,
        num_parameters=info.num_parameters,
        num_prompt=options.prompt,
        num_new=options.new,
        rounds=options.rounds,
        read_bandwidth_bytes_s=bandwidth,
        results=rows,
    )


if __name__ == "__main__":
    start_as_engine()
    main()
