"""Tokens per second of the offline engine by batch size, on any checkpoint.

    python -m benchmarks.throughput [MODEL] [--batch 1 8 64] [--prompt 64] [--new 64] [--rounds 5]

Every prompt is fixed-seed random tokens, answers ignore the end token, decoding is greedy. Prefill
is timed apart from decode. The floor of a decode step is the time to read every parameter once at
the machine's measured copy bandwidth; on a mixture of experts a step may read fewer. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu import commit
from runtime import Engine, EngineConfig, SamplingParams

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "weights" / "fathom-tiny"


def read_bandwidth() -> float:
    """Bytes per second that one pass over 256 MiB reads, the best of five."""
    data = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def measure(engine: Engine, batch: int, num_prompt: int, num_new: int) -> tuple[float, float]:
    """(prefill tokens/s, decode tokens/s) of one round."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    for _ in range(batch):
        engine.add(rng.integers(3, engine.info.vocab_size, num_prompt).tolist(), params)
    start = time.perf_counter()
    num_tokens = 0
    while num_tokens < batch:
        num_tokens += len(engine.step())
    prefilled = time.perf_counter()
    while engine.has_work:
        num_tokens += len(engine.step())
    end = time.perf_counter()
    return batch * num_prompt / (prefilled - start), (num_tokens - batch) / (end - prefilled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over these")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()

    config = EngineConfig(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        max_num_seqs=max(options.batch),
        max_model_len=options.prompt + options.new,
        prefix_cache=False,  # each round reads its prompts again
        num_threads=options.threads,
    )
    engine = Engine.from_checkpoint(config)
    info = engine.info
    bandwidth = read_bandwidth() if info.device == "cpu" else None
    print(
        f"{info.model}: {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}"
    )
    floor = None
    if bandwidth is not None:
        floor = bandwidth / info.weight_bytes
        print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s: at most {floor:,.0f} decode steps/s")
    print(f"{'batch':>6}{'prefill tok/s':>15}{'decode tok/s':>15}{'steps/s':>10}{'of floor':>10}")
    rows = []
    for batch in options.batch:
        measure(engine, batch, options.prompt, min(options.new, 8))  # warm-up
        rounds = [
            measure(engine, batch, options.prompt, options.new) for _ in range(options.rounds)
        ]
        prefill, decode = (statistics.median(values) for values in zip(*rounds, strict=True))
        share = decode / batch / floor if floor else None
        rows.append({"batch": batch, "prefill_tok_s": prefill, "decode_tok_s": decode})
        percent = f"{100 * share:.1f} %" if share is not None else "-"
        print(f"{batch:>6}{prefill:>15,.0f}{decode:>15,.0f}{decode / batch:>10,.0f}{percent:>10}")
    print(json.dumps(_record(options, engine, bandwidth, rows)))


def _record(
    options: argparse.Namespace,
    engine: Engine,
    bandwidth: float | None,
    rows: list[dict[str, float]],
) -> dict[str, object]:
    return {
        "benchmark": "throughput",
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": engine.info.dtype,
        "device": engine.info.device,
        "num_parameters": engine.info.num_parameters,
        "num_prompt": options.prompt,
        "num_new": options.new,
        "rounds": options.rounds,
        "read_bandwidth_bytes_s": bandwidth,
        "results": rows,
    }


if __name__ == "__main__":
    main()
