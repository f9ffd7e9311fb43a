"""The engine as a plain synchronous object: ``add``, ``abort``, ``step``, ``generate``.

``step`` is the table of contents of the whole runtime: plan, launch, commit. On a GPU it plans and
launches one step ahead: the device always has work while the host reads, commits and streams.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kernels.dispatch import prepare_loops
from kernels.packed_linear import QUANTIZED, PackFormat
from runtime.admission import admit
from runtime.constraints import Constraints
from runtime.engine_config import EngineConfig, EngineInfo, resolve_pages
from runtime.errors import ConfigError
from runtime.models.layers import Fp8Format, Placement
from runtime.packing import bytes_added
from runtime.request import FinishReason, SamplingParams, Sequence, TokenEvent, TokenLogprobs
from runtime.runner import ModelRunner
from runtime.scheduler import Plan, SampledToken, Scheduler
from runtime.text import TextAssembler
from runtime.tokenizer import Tokenizer
from runtime.weights import (
    build_model,
    cache_bytes_per_token,
    find_checkpoint,
    inspect_checkpoint,
    load_weights,
    weight_bytes,
)

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while weights are read."""


class RunningStep(Protocol):
    """A step under way on the device."""

    @property
    def failed(self) -> Seq[Sequence]:
        """Sequences of the step whose own parameters could not be prepared."""

    def tokens(self) -> list[SampledToken]:
        """Wait for the step; one token per sampling chunk, in plan order. Call it once."""


class Runner(Protocol):
    """What the engine needs from a model runner; tests put a scripted one here."""

    def launch(self, plan: Plan) -> RunningStep:
        """Start a step behind those already started, without waiting for any."""

    def record_all(self) -> None:
        """Record every decode step that is usual, now instead of when it comes up."""


@dataclass(slots=True)
class Completion:
    """One finished answer of `Engine.generate`."""

    token_ids: list[int] = field(default_factory=list)
    reasoning: str = ""  # the thought, if the prompt opened one
    text: str = ""
    finish_reason: FinishReason = FinishReason.ABORT
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # but of the first token


class Engine:
    """Continuous batching over one model on one device, one step at a time.

    Not thread-safe: whoever calls ``step`` also calls ``add`` and ``abort``, between steps.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        tokenizer: Tokenizer | None = None,
        *,
        on_start: Callable[[list[Sequence]], None] | None = None,
    ) -> None:
        """``on_start`` is told of sequences that run for the first time, before they do."""
        self.runner = runner
        self.scheduler = scheduler
        self.info = info
        self.tokenizer = tokenizer
        self.constraints = None if tokenizer is None else Constraints(tokenizer)
        self.on_start = on_start
        self._seq_ids = itertools.count()
        self._in_flight: deque[tuple[Plan, RunningStep]] = deque()

    @classmethod
    def from_checkpoint(cls, config: EngineConfig, progress: Progress | None = None) -> Engine:
        """Load a checkpoint and be ready for ``add``.

        Raises `ConfigError` for options that cannot work here and `CheckpointError` for files that
        are missing, damaged or not understood.
        """
        device = config.resolve_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current device
        folder = find_checkpoint(config.model)
        checkpoint = inspect_checkpoint(
            folder, ignore_attn_factor=config.yarn_attn_factor == "ignore"
        )
        num_threads = config.resolve_threads(checkpoint.num_parameters)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        tokenizer = Tokenizer.load(folder)
        config.resolve_model_len(checkpoint.config.max_position_embeddings)
        dtype = config.resolve_dtype(device, checkpoint.dtype, checkpoint.num_parameters)
        fp8 = config.resolve_fp8(device, checkpoint.fp8)
        packing = config.resolve_packing(device)
        placement = Placement(device, dtype, fp8, config.batch_invariant, packing)
        model = build_model(checkpoint, placement, config.max_model_len)
        num_weight_bytes = weight_bytes(model) + bytes_added(model)
        bytes_per_token = cache_bytes_per_token(model, dtype)
        num_pages, max_model_len, max_num_seqs = resolve_pages(
            config,
            device=device,
            bytes_per_token=bytes_per_token,
            model_max_len=model.config.max_position_embeddings,
            # A GPU has set the weights' memory aside already, a CPU does so as they are written.
            reserved=num_weight_bytes if device.type == "cpu" else 0,
        )
        # reading weights leaves Python's lock free most of the time
        prepare = tokenizer.grammar_vocabulary.prepare
        preparing = threading.Thread(target=prepare, name="grammars", daemon=True)
        preparing.start()
        try:
            load_weights(checkpoint, model, progress or (lambda done, total: None))
            if device.type == "cpu":
                prepare_loops(dtype)
        finally:
            preparing.join()  # Python's end can crash beside a thread that still computes
        info = EngineInfo(
            model=str(config.model),
            architecture=checkpoint.architecture,
            num_parameters=checkpoint.num_parameters,
            weight_bytes=num_weight_bytes,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            quantization=_describe(fp8, packing),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_step_tokens=config.max_step_tokens
            or max(2048 if device.type == "cuda" else 512, max_num_seqs),
            page_size=config.page_size,
            num_pages=num_pages,
            kv_cache_bytes=(num_pages + 1) * config.page_size * bytes_per_token,
            vocab_size=tokenizer.num_tokens,
            eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
            run_ahead=config.resolve_run_ahead(device),
            prefix_cache=config.prefix_cache,
        )
        runner = ModelRunner(
            model,
            num_pages=num_pages,
            page_size=config.page_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_tokens=tokenizer.num_tokens,
            eos_token_ids=frozenset(info.eos_token_ids),
            device=device,
            dtype=dtype,
        )
        if device.type == "cuda" and config.cuda_graphs != "off":
            runner.record_steps()
        engine = cls(runner, make_scheduler(info), info, tokenizer)
        if device.type == "cuda":
            engine.warm_up(record_all=config.cuda_graphs == "start")
        return engine

    # -- the step API ----------------------------------------------------------------------

    def add(
        self,
        prompt_ids: Seq[int],
        params: SamplingParams,
        *,
        seq_id: int | None = None,
        namespace: str = "",
        priority: int = 0,
    ) -> int:
        """Queue a sequence; its id. Raises `BadRequest` or `ContextLengthExceeded`.

        Only sequences of one ``namespace`` share cached pages. A lower ``priority`` runs first.
        """
        seq_id = next(self._seq_ids) if seq_id is None else seq_id
        seq = admit(seq_id, prompt_ids, params, self.info, namespace=namespace, priority=priority)
        if self.constraints is not None:
            seq.constraint = self.constraints.make(prompt_ids, params)
        elif params.is_constrained:
            raise RuntimeError("constraints need a tokenizer; use Engine.from_checkpoint")
        self.scheduler.add(seq)
        return seq_id

    def abort(self, seq_id: int) -> bool:
        """Drop a sequence and free its pages now; idempotent. False if it was already gone."""
        return self.scheduler.abort(seq_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[TokenEvent]:
        """Launch what is due, and commit the oldest step once enough are under way.

        Empty if there is nothing to do or nothing to report yet. What it raises concerns every
        sequence that runs.
        """
        failed: Seq[Sequence] = ()
        plan = self.scheduler.plan()
        if plan is not None:
            new = [seq for seq in plan.started if seq.num_preemptions == 0]
            if new and self.on_start is not None:
                self.on_start(new)
            step = self.runner.launch(plan)
            failed = step.failed
            self._in_flight.append((plan, step))
        if plan is not None and len(self._in_flight) <= self.info.run_ahead:
            return [self.scheduler.fail(seq) for seq in failed]
        if not self._in_flight:
            return []
        plan, step = self._in_flight.popleft()
        tokens = step.tokens()
        # Only now: if reading raised, whoever calls `fail_running` ends these too.
        events = [self.scheduler.fail(seq) for seq in failed]
        return events + self.scheduler.commit(plan, tokens)

    def fail_running(self) -> list[TokenEvent]:
        """End every sequence that runs or had a step under way, after one that raised."""
        self._in_flight.clear()
        return self.scheduler.fail_running()

    def stats(self) -> dict[str, int]:
        """Counts that a leak would show in, and how often a sequence gave its pages back so far."""
        return {
            "num_sequences": self.scheduler.num_sequences,
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "num_pages": self.scheduler.pool.num_pages,
            "num_free_pages": self.scheduler.pool.num_free,
            "num_cached_pages": self.scheduler.pool.num_cached,
            "num_preemptions": self.scheduler.num_preemptions,
        }

    def reset_cache(self) -> None:
        """Forget what finished sequences left in the cache; those that run go on."""
        self.scheduler.pool.forget_all()

    def warm_up(self, *, record_all: bool = False) -> None:
        """Compile what every request needs, so that a GPU that cannot run it fails the start.

        Raises `ConfigError`.
        """
        num_prompt = max(min(20, self.info.max_model_len - 2), 1)
        greedy = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0)
        drawn = SamplingParams(max_tokens=2, ignore_eos=True, top_p=0.9, seed=0)
        try:
            # kernels differ for 1, 2, 3, 4 and more rows, and compiling one takes a second
            for num_seqs in range(min(5, self.info.max_num_seqs), 0, -1):
                for _ in range(num_seqs):
                    self.add([0] * num_prompt, greedy if num_seqs == 1 else drawn)
                while self.has_work:
                    self.step()
                self.reset_cache()
            if record_all:
                self.runner.record_all()
        except Exception as error:  # whatever driver, compiler or memory raise
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{self.info.device} cannot run the kernels; use --device cpu "
                f"({type(error).__name__}: {reason})"
            ) from error

    # -- offline use -----------------------------------------------------------------------

    def generate(
        self, prompts: Iterable[str | Seq[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """Answer all prompts together; completions come in the order of the prompts.

        A prompt is text (encoded as it is) or token ids. Stop strings end an answer as they do
        over HTTP. Needs the tokenizer that `from_checkpoint` provides.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RuntimeError("Engine.generate needs a tokenizer; use Engine.from_checkpoint")
        prompt_ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        each = [params] * len(prompt_ids) if isinstance(params, SamplingParams) else list(params)
        completions: list[Completion] = []
        pending: dict[int, tuple[Completion, TextAssembler]] = {}
        try:
            for ids, one in zip(prompt_ids, each, strict=True):
                completion = Completion()
                completions.append(completion)
                opens = tokenizer.opens_thought(ids)
                assembler = TextAssembler(tokenizer, one, thinking=opens or None)
                pending[self.add(ids, one)] = completion, assembler
            while pending:
                for event in self.step():
                    if event.seq_id not in pending:
                        continue  # of a sequence that the caller added
                    completion, assembler = pending[event.seq_id]
                    if self._extend(completion, assembler, event):
                        self.abort(event.seq_id)
                        del pending[event.seq_id]
        finally:
            for seq_id in pending:
                self.abort(seq_id)
        return completions

    @staticmethod
    def _extend(completion: Completion, assembler: TextAssembler, event: TokenEvent) -> bool:
        """Add one event to an answer; True once the answer is complete, or broken off."""
        if event.prompt_logprobs:
            completion.prompt_logprobs += event.prompt_logprobs
            return False
        if event.token_id is None:
            assert event.finish_reason is not None
            completion.finish_reason = event.finish_reason
            return True
        completion.token_ids.append(event.token_id)
        if event.logprobs is not None:
            completion.logprobs.append(event.logprobs)
        for piece in assembler.feed(event.token_id, event.finish_reason):
            if piece.kind == "reasoning":
                completion.reasoning += piece.text
            else:
                completion.text += piece.text
        if assembler.stopped:
            completion.finish_reason = FinishReason.STOP
        elif event.finish_reason is not None:
            completion.finish_reason = event.finish_reason
        return assembler.stopped or event.finish_reason is not None


def _describe(fp8: Fp8Format | None, packing: PackFormat | None) -> str:
    if packing is not None and packing in QUANTIZED:
        return packing
    if fp8 is None:
        return "none"
    return "fp8 (W8A16)" if fp8.activations is None else f"fp8 (W8A8, {fp8.activations} scales)"


def make_scheduler(info: EngineInfo) -> Scheduler:
    return Scheduler(
        num_pages=info.num_pages,
        page_size=info.page_size,
        max_num_seqs=info.max_num_seqs,
        max_step_tokens=info.max_step_tokens,
        eos_token_ids=info.eos_token_ids,
        model=info.model,
        prefix_cache=info.prefix_cache,
    )
