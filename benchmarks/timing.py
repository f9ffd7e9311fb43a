"""Seconds per call of device code, several candidates measured in turn.

On a GPU each candidate is captured as a CUDA graph of many calls, whose replays are timed with
device events: neither Python nor the gaps between launches count. Calls rotate over several sets of
inputs, so that together they exceed the L2. On a CPU, where this only tests the benchmark, the
calls are timed one after the other.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
ROTATED_BYTES = 256 << 20  # four times the L2 of an H200
MAX_SETS = 64
GRAPH_SECONDS = 1.5e-3  # a graph holds calls for about this long
MAX_GRAPH_CALLS = 256


def num_sets(bytes_per_set: int) -> int:
    """How many sets of inputs of this size exceed the L2 several times, up to a limit."""
    return max(1, min(MAX_SETS, -(-ROTATED_BYTES // max(bytes_per_set, 1))))


@torch.inference_mode()
def time_calls(
    candidates: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    estimate: float = 1e-3,
    rounds: int = 7,
) -> dict[str, float]:
    """Median seconds of one call of each candidate.

    Args:
        candidates: name -> the same call on each set of inputs. All are measured in turn, round by
            round, after a warm-up that compiles what has to be compiled.
        device: where they run.
        estimate: about how many seconds a call takes; decides how many calls a graph holds.
        rounds: timed replays of each candidate.
    """
    if device.type != "cuda":
        return _time_on_cpu(candidates, min(rounds, 3))
    torch.cuda.synchronize(device)  # the inputs were made on another stream
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    with torch.cuda.stream(stream):
        for name, calls in candidates.items():
            least = min(int(GRAPH_SECONDS / max(estimate, 1e-6)), MAX_GRAPH_CALLS)
            num_calls = len(calls) * max(-(-least // len(calls)), 1)
            graphs[name] = _capture(calls, num_calls, pool), num_calls
        for graph, _ in graphs.values():
            graph.replay()
        spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in graphs}
        for _ in range(rounds):
            for name, (graph, _) in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                spans[name].append((start, end))
        stream.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in spans[name])
        / 1e3
        / num_calls
        for name, (_, num_calls) in graphs.items()
    }


def _capture(calls: Sequence[Call], num_calls: int, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """A graph of ``num_calls`` calls on the current stream; `torch.cuda.graph` would also collect
    garbage and empty the allocator's cache, a quarter of a second each time.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        for index in range(num_calls):
            calls[index % len(calls)]()
    except Exception:
        with contextlib.suppress(RuntimeError):  # it only says that the capture broke off
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _time_on_cpu(candidates: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for calls in candidates.values():
        calls[0]()
    for _ in range(rounds):
        for name, calls in candidates.items():
            start = time.perf_counter()
            for call in calls[:4]:
                call()
            taken[name].append((time.perf_counter() - start) / len(calls[:4]))
    return {name: statistics.median(values) for name, values in taken.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a host clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
