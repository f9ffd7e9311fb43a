"""Host time of a decode step, and whether the device ever waits for it.

    python -m benchmarks.planner [--sequences 1 64 256] [--steps 400] [--rounds 5]

The engine, the scheduler and the runner are the real ones; only the device is not: a replayed step
takes as long as Distill-Qwen-7B's floor on an H200 (benchmarks/floors.py), asleep. Host time is
what a step costs apart from that sleep: plan, pack, launch, read, commit, and packing the events
for the server. Idle is the time between the end of a device step and the launch of the next.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.machine import print_record
from kernels.batch import PagedBatch
from runtime import Engine, EngineInfo, SamplingParams, wire
from runtime.engine import make_scheduler
from runtime.runner import ModelRunner

STEP_SECONDS = {1: 3.3e-3, 8: 3.4e-3, 64: 4.2e-3, 256: 6.8e-3}
"""Device time of a step of Distill-Qwen-7B at 1k of context, by sequences."""
TARGET_SECONDS = {1: 0.15e-3, 64: 0.6e-3, 256: 1.5e-3}
VOCAB_SIZE = 1000
NUM_PROMPT = 1024


def step_seconds(num_seqs: int) -> float:
    """Device time of a step, that of the nearest number of sequences."""
    return STEP_SECONDS[min(STEP_SECONDS, key=lambda known: abs(known - num_seqs))]


class NoModel:
    """A model of nothing, for the prompts; decode steps are never computed."""

    config = None

    def cache_spec(self) -> list[dict[str, tuple[int, ...]]]:
        return []

    def forward(self, token_ids: Tensor, batch: PagedBatch, caches: list[object]) -> Tensor:
        return torch.zeros(token_ids.shape[0], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape[0], VOCAB_SIZE)


@dataclass
class SleepingQueue:
    """A device that sleeps through each step it is given, one after the other."""

    step_seconds: float
    num_rows: int
    free_at: float = 0.0  # when the device will have done what it was given
    asleep: float = 0.0  # seconds in which the host waited for the device
    idle: list[float] = field(default_factory=list)  # device's seconds without work, per replay

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        output = torch.full((self.num_rows,), 7)

        def replay() -> None:
            now = time.perf_counter()
            self.idle.append(max(now - self.free_at, 0.0))
            self.free_at = max(now, self.free_at) + self.step_seconds

        return replay, output

    def mark(self) -> Callable[[], None]:
        done_at = self.free_at

        def wait() -> None:
            start = time.perf_counter()
            if done_at > start:
                time.sleep(done_at - start)
                self.asleep += time.perf_counter() - start

        return wait


def make_engine(num_seqs: int, num_steps: int, queue: SleepingQueue) -> Engine:
    max_model_len = NUM_PROMPT + num_steps + 32
    num_pages = num_seqs * (max_model_len // 16 + 1)
    info = EngineInfo(
        **{"model": "none", "architecture": "none", "num_parameters": 0, "weight_bytes": 0},
        **{"device": "cpu", "dtype": "float32", "quantization": "none", "page_size": 16},
        **{"max_model_len": max_model_len, "max_num_seqs": num_seqs, "num_pages": num_pages},
        **{"max_step_tokens": 1 << 17, "kv_cache_bytes": 0, "vocab_size": VOCAB_SIZE},
        **{"eos_token_ids": (2,), "run_ahead": 1},
    )
    runner = ModelRunner(
        NoModel(),
        num_pages=num_pages,
        page_size=16,
        max_num_seqs=num_seqs,
        max_model_len=max_model_len,
        num_tokens=VOCAB_SIZE,
        eos_token_ids=frozenset([2]),
        device=torch.device("cpu"),
        dtype=torch.float32,
        queue=queue,
    )
    runner.record_steps()
    return Engine(runner, make_scheduler(info), info)


def measure(num_seqs: int, num_steps: int) -> tuple[float, float, float]:
    """Host seconds per step (median, 95th percentile) and the device's idle seconds in all."""
    queue = SleepingQueue(step_seconds(num_seqs), num_seqs)
    engine = make_engine(num_seqs, num_steps, queue)
    params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=num_steps + 16, ignore_eos=True)
    for _ in range(num_seqs):
        engine.add([5] * NUM_PROMPT, params)
    while len(engine.step()) < num_seqs:
        pass  # the prompts
    for _ in range(5):
        engine.step()  # the recording
    queue.idle.clear()
    hosts = []
    for _ in range(num_steps):
        asleep = queue.asleep
        start = time.perf_counter()
        events = engine.step()
        wire.encode({"type": "events", "events": wire.pack_events(events)})
        hosts.append(time.perf_counter() - start - (queue.asleep - asleep))
        assert len(events) == num_seqs
    hosts.sort()
    return statistics.median(hosts), hosts[int(0.95 * len(hosts))], sum(queue.idle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as the engine process does
    print(f"{'sequences':>10}{'host ms':>10}{'95 %':>10}{'target':>10}{'device ms':>11}{'idle':>9}")
    results = []
    for num_seqs in options.sequences:
        rounds = [measure(num_seqs, options.steps) for _ in range(options.rounds)]
        host, late, idle = (statistics.median(values) for values in zip(*rounds, strict=True))
        step = step_seconds(num_seqs)
        target = TARGET_SECONDS.get(num_seqs)
        share = idle / (options.steps * step)
        print(
            f"{num_seqs:>10}{1e3 * host:>10.3f}{1e3 * late:>10.3f}"
            f"{'-' if target is None else f'{1e3 * target:.2f}':>10}"
            f"{1e3 * step:>11.1f}{100 * share:>8.2f}%"
        )
        row = {"sequences": num_seqs, "host_s": host, "host_95_s": late, "device_s": step}
        results.append({**row, "idle_share": share})
    print_record("planner", results=results)


if __name__ == "__main__":
    main()
