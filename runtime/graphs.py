"""Decode steps recorded once and replayed: one launch for the host instead of hundreds.

A graph is made for a number of rows, a limit on contexts and a kind of sampling. A step takes the
smallest graph that holds it; rows beyond its sequences are padding: token 0 at position 0 of the
dummy page. Graphs end with drawn tokens, or with logits where the sampling is out of the ordinary.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.sampler_rows import SamplingKind
from runtime.scheduler import Plan
from runtime.staging import Array, Field, Staging, end_of, views

FIRST_CONTEXT_LIMIT = 1024

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class GraphKey:
    batch_size: int
    context_limit: int  # tokens
    kind: SamplingKind | None  # None: ends with the logits


class DeviceQueue(Protocol):
    """The device's work in order: records a step, and tells when what was queued is done."""

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run ``step`` to warm up and record it: ``(replay, the tensor that replays fill)``."""

    def mark(self) -> Callable[[], None]:
        """A function that waits until everything queued so far is done."""


class HostQueue:
    """A CPU: work is done when the call returns, and a replay runs the step again."""

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        output = step()

        def replay() -> None:
            output.copy_(step())

        return replay, output

    def mark(self) -> Callable[[], None]:
        return lambda: None


class CudaQueue:
    """The current stream of a GPU; graphs share one memory pool, since only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # one for all: memory is shared only between captures on the same stream
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # `torch.cuda.graph` would also empty the allocator's caches each time
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            step()  # kernels must be compiled and loaded before a capture
            torch.cuda.synchronize()
            graph.capture_begin(pool=self._pool)
            try:
                output = step()
            except Exception:
                with contextlib.suppress(RuntimeError):  # it only says that the capture broke off
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay, output

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize


@dataclass(slots=True)
class _Graph:
    block: Tensor  # [num_bytes] uint8, the inputs
    inputs: Inputs  # views of the block
    replay: Callable[[], None]
    output: Tensor


class DecodeGraphs:
    """The recorded steps, each made when it is first needed or by ``record``.

    A step for whose recording the memory does not suffice is not recorded.
    """

    def __init__(
        self,
        queue: DeviceQueue,
        device: torch.device,
        max_num_seqs: int,
        max_model_len: int,
        step: Callable[[GraphKey, Inputs], Tensor],
        padding: Callable[[GraphKey], dict[str, Array]],
    ) -> None:
        """``step`` computes what a key describes from inputs that stay where they are.

        ``padding`` gives inputs of which every row is padding: running them changes no sequence.
        """
        self.batch_sizes = batch_sizes(max_num_seqs)
        self.context_limits = context_limits(max_model_len)
        self._queue = queue
        self._device = device
        self._step = step
        self._padding = padding
        self._graphs: dict[GraphKey, _Graph | None] = {}

    @property
    def num_graphs(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def usual_keys(self) -> list[GraphKey]:
        """The graphs of every size and limit, but for rare mixtures of filters, large ones first.

        The others find room in the memory of the largest.
        """
        kinds = [
            None,
            SamplingKind(all_greedy=False, any_filter=True, any_top_k=True, any_top_p=True),
            SamplingKind(all_greedy=False, any_filter=True, any_top_p=True),
            SamplingKind(all_greedy=False),
            SamplingKind(all_greedy=True),
        ]
        return [
            GraphKey(size, limit, kind)
            for size in reversed(self.batch_sizes)
            for limit in reversed(self.context_limits)
            for kind in kinds
        ]

    def key_of(self, plan: Plan, kind: SamplingKind | None) -> GraphKey | None:
        """The graph that holds a step, recorded now if it is new; None if it must run eagerly.

        Only a step whose every chunk is a decode that samples has one.
        """
        num_seqs = len(plan.chunks)
        if kind is None or plan.num_decodes < num_seqs or num_seqs > self.batch_sizes[-1]:
            return None
        longest = 0
        for chunk in plan.chunks:
            if not chunk.samples:
                return None
            longest = max(longest, chunk.end)
        key = GraphKey(
            batch_size=self.batch_sizes[bisect_left(self.batch_sizes, num_seqs)],
            context_limit=self.context_limits[bisect_left(self.context_limits, longest)],
            kind=kind if kind.is_plain else None,
        )
        return key if self.record(key) else None

    def run(self, key: GraphKey, staging: Staging, fields: list[Field]) -> tuple[Inputs, Tensor]:
        """Replay the step of a key that `key_of` gave: its inputs on the device and its output.

        Both are overwritten by the next replay; read or copy them on the same stream before.
        """
        graph = self._graphs[key]
        assert graph is not None
        staging.upload_into(graph.block, fields)
        graph.replay()
        return graph.inputs, graph.output

    def record(self, key: GraphKey) -> bool:
        """Make the graph of a key if it is not there; whether it is there now."""
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(key)
            except torch.OutOfMemoryError:
                self._graphs[key] = None
        return self._graphs[key] is not None

    def _record(self, key: GraphKey) -> _Graph:
        staging = Staging(self._device)
        fields = staging.pack(self._padding(key))
        block = torch.empty(end_of(fields), dtype=torch.uint8, device=self._device)
        staging.upload_into(block, fields)
        inputs = views(block, fields)
        replay, output = self._queue.record(lambda: self._step(key, inputs))
        return _Graph(block, inputs, replay, output)


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the graphs: close together where a row more costs most."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def context_limits(max_model_len: int) -> list[int]:
    """Longest contexts of the graphs: powers of 4, so that few programs find nothing to do."""
    limits = []
    limit = FIRST_CONTEXT_LIMIT
    while limit < max_model_len:
        limits.append(limit)
        limit *= 4
    return [*limits, max_model_len]
