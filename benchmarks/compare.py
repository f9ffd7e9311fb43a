"""One checkpoint through our engine and its peers, in turn, and the ratios pair by pair.

    python -m benchmarks.compare FOLDER [--dtype bfloat16 float32] [--batch 1 8] [--threads 2]
    python -m benchmarks.compare FOLDER --llama-bench PATH --gguf FILE
    python -m benchmarks.compare FOLDER --llama-server http://127.0.0.1:8080/v1

The sides are fathom, transformers' `generate`, and llama.cpp where it is given: by `llama-bench`
(batch 1) or `llama-batched-bench`, or as any OpenAI server with the same weights. Each round runs
every side once, A B A B; a ratio is ours over theirs in the same round; medians of --rounds.
Prefill ends when every answer has its first token, decode is all that follows. The ceiling of
decode is the bytes of a step at the bandwidth measured in the same run. `python -m
benchmarks.make_checkpoint` makes a FOLDER of random weights. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cpu_ceilings import read_bandwidth
from benchmarks.machine import print_record, rounds_within, shown, usable_cores
from benchmarks.offline import checkpoint_floor
from benchmarks.sides import EngineSide, Job, LlamaBenchSide, ServerSide, Side, SideFailed, Times
from kernels.packed_linear import QUANTIZED
from runtime import FathomError, find_checkpoint, inspect_checkpoint

OURS = "fathom"
WARM_UP_TOKENS = 8  # of each answer in the round that is not measured


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", help="a checkpoint")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument(
        "--quantization", nargs="*", choices=list(QUANTIZED), default=[], help="more sides of ours"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=86400.0, help="fewer rounds after these")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--llama-bench", help="path of llama-bench or llama-batched-bench")
    parser.add_argument("--gguf", help="the same weights for --llama-bench")
    parser.add_argument("--llama-server", help="URL of a server with the same weights, up to /v1")
    parser.add_argument("--server-key", help="its API key")
    parser.add_argument("--server-model", default="model", help="the name to ask it for")
    options = parser.parse_args(arguments)
    if min(*options.batch, options.prompt, options.rounds, options.threads) < 1 or options.new < 2:
        parser.error("batch, prompt, rounds and threads must be at least 1, and --new at least 2")
    if (options.llama_bench is None) != (options.gguf is None):
        parser.error("--llama-bench needs the weights as --gguf FILE, and the other way round")
    return options


def quantized_name(kind: str) -> str:
    return f"{OURS} {kind}"


def open_sides(
    options: argparse.Namespace, dtype: str, stack: contextlib.ExitStack
) -> tuple[list[Side], dict[str, str]]:
    """The sides of one dtype, ours first, and why others cannot run.

    Raises `SideFailed` if ours cannot.
    """
    flags = ["--dtype", dtype, "--threads", str(options.threads)]
    flags += ["--max-batch", str(max(options.batch))]
    flags += ["--max-len", str(options.prompt + options.new + 1)]
    makers: list[tuple[str, Any]] = [
        (OURS, lambda: EngineSide(OURS, "fathom", options.folder, flags))
    ]
    if not options.no_transformers:
        name = "transformers"
        makers.append((name, lambda: EngineSide(name, name, options.folder, flags)))
    if options.llama_bench:
        bench = (options.llama_bench, options.gguf, options.threads)
        makers.append((LlamaBenchSide.name, lambda: LlamaBenchSide(*bench)))
    if options.llama_server:
        server = (options.llama_server, options.server_key, options.server_model)
        makers.append((ServerSide.name, lambda: ServerSide(*server)))
    for kind in options.quantization:
        named = quantized_name(kind)
        more = [*flags, "--quantization", kind]
        makers.append((named, lambda n=named, f=more: EngineSide(n, "fathom", options.folder, f)))
    sides: list[Side] = []
    failures: dict[str, str] = {}
    for name, make in makers:
        try:
            side = make()
        except SideFailed as error:
            if name == OURS:
                raise
            failures[name] = str(error)
            continue
        stack.callback(side.close)
        sides.append(side)
    return sides, failures


def run_rounds(
    sides: list[Side], job: Job, rounds: int, seconds: float, failures: dict[str, str]
) -> dict[str, list[Times]]:
    """``rounds`` turns of every side that can; one that fails is left out and its reason kept.

    No round but the first begins after ``seconds``.
    """
    taking_part = [side for side in sides if side.can(job) and side.name not in failures]
    times: dict[str, list[Times]] = {side.name: [] for side in taking_part}
    few = replace(job, num_new=min(job.num_new, WARM_UP_TOKENS))
    for number in rounds_within(rounds, seconds):
        for side in list(taking_part):
            try:
                taken = side.run(job if number else few)
            except SideFailed as error:
                failures[side.name] = str(error)
                taking_part.remove(side)
                times.pop(side.name)
                continue
            if number:
                times[side.name].append(taken)
    return times


def rows_of(
    job: Job, times: dict[str, list[Times]], ceilings: Mapping[str, float], dtype: str
) -> list[dict[str, Any]]:
    """A row per side: medians, and the medians of ours over theirs, round by round.

    ``ceilings`` are in tokens/s, by the name of the side; others have that of `OURS`.
    """
    rows = []
    ours = times.get(OURS, [])
    for name, taken in times.items():
        ceiling = ceilings.get(name, ceilings[OURS])
        prefill = [one.prefill_tok_s(job) for one in taken]
        decode = [one.decode_tok_s for one in taken]
        pairs = list(zip(ours, taken, strict=True)) if ours else []
        ratios = {
            "prefill_ratio": [
                mine.prefill_tok_s(job) / other.prefill_tok_s(job) for mine, other in pairs
            ],
            "decode_ratio": [mine.decode_tok_s / other.decode_tok_s for mine, other in pairs],
        }
        rows.append(
            {
                "side": name,
                "dtype": dtype,
                "batch": job.batch,
                "prefill_tok_s": statistics.median(prefill),
                "decode_tok_s": statistics.median(decode),
                "ceiling_tok_s": ceiling,
                "percent": 100 * statistics.median(decode) / ceiling,
                **{key: statistics.median(v) if v else None for key, v in ratios.items()},
                "prefill_tok_s_rounds": prefill,
                "decode_tok_s_rounds": decode,
                "num_new": sum(one.num_new for one in taken),
                "rounds": len(taken),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['dtype']:9}{row['batch']:>6}  {row['side']:16}{row['prefill_tok_s']:>10,.1f}"
            f"{row['decode_tok_s']:>10,.1f}{row['ceiling_tok_s']:>10,.1f}{row['percent']:>7.1f}"
            f"{shown(row['prefill_ratio'], '.2f'):>10}{shown(row['decode_ratio'], '.2f'):>9}",
            flush=True,
        )


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    peaks: dict[str, int] = {}
    print(
        f"{'dtype':9}{'batch':>6}  {'side':16}{'prefill':>10}{'decode':>10}{'ceiling':>10}{'%':>7}"
        f"{'ours/its: prefill':>10}{'decode':>9}   tokens/s"
    )
    end = time.monotonic() + options.seconds
    num_left = len(options.dtype) * len(options.batch)
    try:
        for dtype in options.dtype:
            vocab_size = inspect_checkpoint(find_checkpoint(options.folder)).config.vocab_size
            floors = {OURS: checkpoint_floor(options.folder, getattr(torch, dtype))[0]}
            for kind in options.quantization:
                floor, _ = checkpoint_floor(options.folder, getattr(torch, dtype), kind)
                floors[quantized_name(kind)] = floor
            with contextlib.ExitStack() as stack:
                sides, failed = open_sides(options, dtype, stack)
                for batch in options.batch:
                    job = Job(batch, options.prompt, options.new, vocab_size)
                    bandwidth = read_bandwidth()
                    share = (end - time.monotonic()) / num_left
                    num_left -= 1
                    times = run_rounds(sides, job, options.rounds, share, failed)
                    bandwidth = max(bandwidth, read_bandwidth())  # others may have been busy once
                    context = options.prompt + options.new / 2
                    ceilings = {
                        name: batch * bandwidth / floor.step_bytes(batch, context)
                        for name, floor in floors.items()
                    }
                    new_rows = rows_of(job, times, ceilings, dtype)
                    print_rows(new_rows)
                    rows += [row | {"read_bandwidth_bytes_s": bandwidth} for row in new_rows]
                for side in sides:
                    if (peak := side.peak_bytes()) is not None:
                        peaks[f"{side.name} {dtype}"] = peak
                failures |= {f"{name} {dtype}": reason for name, reason in failed.items()}
    except (SideFailed, FathomError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for name, reason in failures.items():
        print(f"FAILED {name}: {reason}")
    for name, peak in peaks.items():
        print(f"peak memory of {name}: {peak / (1 << 30):.2f} GiB")
    print_record(
        "compare",
        folder=options.folder,
        num_prompt=options.prompt,
        num_new=options.new,
        threads=options.threads,
        rounds=options.rounds,
        results=rows,
        failures=failures,
        peak_bytes=peaks,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
