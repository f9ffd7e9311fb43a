"""Whole engine steps of released models with random weights, against their floors.

A context is reached without computing it: caches are filled with random numbers, and while the
engine takes in the prompts its model passes them over (`PromptPassing`). From then on the engine
runs as it serves: plans, recorded steps, sampling. `benchmarks.floors` says what a step must read.

    python -m benchmarks.decode [--device cpu --tiny]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import random_models
from benchmarks.ceilings import ceilings_of
from benchmarks.floors import Floor, model_floor
from benchmarks.part import Part, Row, parse_part, release
from benchmarks.timing import synchronize
from kernels.batch import PagedBatch
from runtime.engine import Engine, make_scheduler
from runtime.engine_config import EngineInfo
from runtime.models import CausalLM
from runtime.request import SamplingParams
from runtime.runner import ModelRunner

MODELS = ["r1_distill_qwen_7b", "r1_distill_qwen_1.5b", "r1_distill_llama_8b", "v2_lite"]
PAGE_SIZE = 16
WARM_UP_STEPS = 8
ROUNDS = 3
MIN_STEPS = 32  # of a round
PASSED_TOKENS = 1 << 17  # of prompts passed over in one step
WORKSPACE_BYTES = 6 << 30  # left free beside weights and caches


@dataclass(frozen=True, slots=True)
class Scale:
    """Which batches and contexts are measured, the most valuable first."""

    decodes: list[tuple[int, int]]  # (batch, context)
    prompt: int  # tokens of the prompt whose prefill is timed, after the first two decodes
    step_tokens: int


FULL = Scale(
    [
        *((1, 1024), (64, 1024), (8, 1024), (1, 8192), (64, 8192), (256, 1024), (8, 8192)),
        *((1, 32768), (8, 32768), (256, 8192), (64, 32768)),
    ],
    prompt=8192,
    step_tokens=8192,
)
TINY = Scale([(1, 64), (4, 64), (2, 192), (4, 100_000)], prompt=128, step_tokens=128)


class PromptPassing:
    """A model that can pass prompts over: a step with a chunk of one writes and computes nothing.

    Steps of decodes alone always run, so that whatever records them records the model.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.passes_prompts = False
        self._passed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(
        self, token_ids: Tensor, batch: PagedBatch, caches: list[dict[str, Tensor]]
    ) -> Tensor:
        self._passed = self.passes_prompts and batch.num_decodes < batch.num_seqs
        if not self._passed:
            return self._model.forward(token_ids, batch, caches)
        row = torch.zeros(1, self._model.config.hidden_size, device=token_ids.device)
        return row.expand(token_ids.shape[0], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        if not self._passed:
            return self._model.logits(hidden)
        # random, so that the sequences go on from different tokens
        return torch.randn(hidden.shape[0], self._model.config.vocab_size, device=hidden.device)


def make_engine(
    model: CausalLM, part: Part, *, name: str, num_pages: int, max_model_len: int, scale: Scale
) -> tuple[Engine, PromptPassing]:
    """An engine as `Engine.from_checkpoint` makes it, around a model that has no files."""
    max_num_seqs = max([batch for batch, _ in scale.decodes])
    passing = PromptPassing(model)
    runner = ModelRunner(
        passing,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_tokens=model.config.vocab_size,
        eos_token_ids=frozenset(),
        device=part.device,
        dtype=part.dtype,
    )
    if part.on_gpu:
        runner.record_steps()
    for layer in runner.caches:
        for cache in layer.values():
            cache.normal_()
    info = EngineInfo(
        model=name,
        architecture=name,
        num_parameters=0,
        weight_bytes=0,
        device=str(part.device),
        dtype=str(part.dtype).removeprefix("torch."),
        quantization="none",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max(scale.step_tokens, max_num_seqs),
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        kv_cache_bytes=0,
        vocab_size=model.config.vocab_size,
        eos_token_ids=(),
        run_ahead=int(part.on_gpu),
        prefix_cache=False,
    )
    return Engine(runner, make_scheduler(info), info), passing


def start_decoding(
    engine: Engine, passing: PromptPassing, batch: int, context: int, params: SamplingParams
) -> list[int]:
    """Add ``batch`` sequences of ``context`` tokens and step until all of them decode; their ids.

    The first to be taken in are a few tokens ahead of the last, `num_ahead` at most.
    """
    rng = np.random.default_rng(0)
    vocab_size = engine.info.vocab_size
    seq_ids = [
        engine.add(rng.integers(0, vocab_size, context).tolist(), params) for _ in range(batch)
    ]
    step_tokens, engine.scheduler.max_step_tokens = engine.scheduler.max_step_tokens, PASSED_TOKENS
    passing.passes_prompts = True
    waiting = set(seq_ids)
    while waiting:
        waiting -= {event.seq_id for event in engine.step()}
    passing.passes_prompts = False
    engine.scheduler.max_step_tokens = step_tokens
    return seq_ids


def num_ahead(batch: int, context: int) -> int:
    """Tokens that the first sequence draws until the last one decodes, at most."""
    return -(-batch * context // PASSED_TOKENS) + 4


def room_of(batch: int, context: int) -> int:
    """Tokens that a sequence may draw in a measurement."""
    return num_ahead(batch, context) + WARM_UP_STEPS + MIN_STEPS * ROUNDS + 4


def time_decode(
    engine: Engine,
    passing: PromptPassing,
    batch: int,
    context: int,
    params: SamplingParams,
    device: torch.device,
) -> tuple[float, float]:
    """``(seconds per step, mean context)`` of steady decoding: the median of several rounds."""
    seq_ids = start_decoding(engine, passing, batch, context, params)
    try:
        run_steps(engine, WARM_UP_STEPS, device)
        _, num_before = _context(engine)
        rounds = [run_steps(engine, MIN_STEPS, device) for _ in range(ROUNDS)]
        num_seqs, num_after = _context(engine)
    finally:
        for seq_id in seq_ids:
            engine.abort(seq_id)
        while engine.has_work:
            engine.step()
    if num_seqs < batch:
        raise RuntimeError(f"only {num_seqs} of {batch} sequences ran to the end")
    return statistics.median(rounds), (num_before + num_after) / 2 / batch


def run_steps(engine: Engine, num_steps: int, device: torch.device) -> float:
    """Seconds of an engine's step, the mean of several."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    synchronize(device)
    return (time.perf_counter() - start) / num_steps


def _context(engine: Engine) -> tuple[int, int]:
    """How many sequences run, and their tokens together."""
    running = engine.scheduler.running
    return len(running), sum(seq.num_tokens for seq in running)


def time_prompt(engine: Engine, num_tokens: int, device: torch.device) -> float:
    """Seconds from a prompt's arrival to its first token: the median of three, after a warm-up."""
    rng = np.random.default_rng(1)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    taken = []
    for _ in range(4):
        prompt = rng.integers(0, engine.info.vocab_size, num_tokens).tolist()
        synchronize(device)
        start = time.perf_counter()
        engine.add(prompt, params)
        while engine.has_work:
            engine.step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


class ModelRun:
    """The measurements of one model."""

    def __init__(self, part: Part, name: str, scale: Scale, seconds: float) -> None:
        self.part, self.name, self.scale = part, name, scale
        self.deadline = time.monotonic() + seconds
        config = random_models.config_json(name, tiny=part.tiny)
        longest = max(scale.prompt, *(context for _, context in scale.decodes))
        longest += max(room_of(batch, context) for batch, context in scale.decodes)
        max_model_len = min(longest, config["max_position_embeddings"])
        self.model = random_models.build(
            config, device=part.device, dtype=part.dtype, max_model_len=max_model_len
        )
        random_models.fill(self.model, part.device)
        self.floor: Floor = model_floor(self.model, part.dtype.itemsize)
        page_bytes = PAGE_SIZE * self.floor.cache_bytes_per_token
        budget = 64 << 20
        if part.on_gpu:
            budget = torch.cuda.mem_get_info(part.device)[0] - WORKSPACE_BYTES
        self.num_pages = budget // page_bytes - 1
        fitting = [self._pages(*case) for case in scale.decodes]
        fitting = [pages for pages in fitting if pages <= self.num_pages]
        self.num_pages = max([self._pages(1, scale.prompt), *fitting])
        self.engine, self.passing = make_engine(
            self.model,
            part,
            name=name,
            num_pages=self.num_pages,
            max_model_len=max_model_len,
            scale=scale,
        )

    def _pages(self, batch: int, context: int) -> int:
        return batch * -(-(context + room_of(batch, context)) // PAGE_SIZE)

    def run(self) -> None:
        prompt_at = min(2, len(self.scale.decodes))
        steps: list[tuple[Row, Callable[[], None]]] = [
            ({"batch": batch, "context": context}, lambda b=batch, c=context: self.decode(b, c))
            for batch, context in self.scale.decodes
        ]
        steps.insert(prompt_at, ({"prompt": self.scale.prompt}, self.prompt))
        for label, step in steps:
            if "batch" in label and self._pages(**label) > self.num_pages:
                gigabytes = (
                    self.floor.cache_bytes_per_token * label["batch"] * label["context"] / 1e9
                )
                self._skip(label, f"{gigabytes:.1f} GB of cache do not fit beside the weights")
            elif time.monotonic() > self.deadline:
                self._skip(label, "no time left")
            else:
                try:
                    step()
                except Exception as error:  # whatever a kernel, a compiler or a library raises
                    self.part.fail({"model": self.name, **label}, error)

    def _skip(self, label: Row, why: str) -> None:
        self.part.record(model=self.name, **label, skipped=why)

    def decode(self, batch: int, context: int) -> None:
        has_experts = self.floor.num_experts > 0
        # Greedy answers of many sequences may meet; experts are hit as the floor expects if not.
        params = SamplingParams(
            max_tokens=room_of(batch, context),
            temperature=1.0 if has_experts else 0.0,
            ignore_eos=True,
            seed=1,
        )
        seconds, mean_context = time_decode(
            self.engine, self.passing, batch, context, params, self.part.device
        )
        read = self.floor.step_bytes(batch, mean_context)
        least = read / ceilings_of(self.part)["memory_bytes_per_s"]
        self.part.record(
            model=self.name,
            batch=batch,
            context=context,
            step_ms=seconds * 1e3,
            tok_s=batch / seconds,
            floor_ms=least * 1e3,
            floor_tok_s=batch / least,
            percent=100 * least / seconds,
            sampling="temperature 1" if has_experts else "greedy",
        )

    def prompt(self) -> None:
        num_tokens = self.scale.prompt
        seconds = time_prompt(self.engine, num_tokens, self.part.device)
        flops = self.floor.prompt_flops(num_tokens)
        self.part.record(
            model=self.name,
            prompt=num_tokens,
            step_tokens=self.engine.info.max_step_tokens,
            ms=seconds * 1e3,
            tok_s=num_tokens / seconds,
            tflop_s=flops / seconds / 1e12,
            percent=100 * flops / ceilings_of(self.part)["matmul_flops_per_s"] / seconds,
        )


def cases(part: Part, scale: Scale) -> Iterator[tuple[Row, Callable[[], None]]]:
    """One case per model; each has an equal share of the time that is left."""
    for index, name in enumerate(MODELS):

        def run(index: int = index, name: str = name) -> None:
            release(part)
            share = part.seconds_left / (len(MODELS) - index)
            start = time.monotonic()
            if part.on_gpu:
                weights = random_models.num_bytes(random_models.config_json(name), part.dtype)
                if weights + 2 * WORKSPACE_BYTES > torch.cuda.mem_get_info(part.device)[0]:
                    part.record(model=name, skipped=f"{weights / 1e9:.1f} GB of weights do not fit")
                    return
            model_run = ModelRun(part, name, scale, share)
            print(f"{name}: made in {time.monotonic() - start:.1f} s", flush=True)
            model_run.run()

        yield {"model": name}, run


def main() -> int:
    part = parse_part(__doc__)
    ceilings_of(part)
    return part.run_cases(cases(part, TINY if part.tiny else FULL))


if __name__ == "__main__":
    sys.exit(main())
