"""An engine with a canary model whose every event is compared with what its request gets alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.blocks import PagePool
from runtime.engine import Engine, make_scheduler
from runtime.engine_config import EngineInfo
from runtime.prefix_cache import PrefixCache
from runtime.request import FinishReason, SamplingParams, Sequence, SequenceStatus, TokenEvent
from runtime.scheduler import Plan
from tests.runtime.canary import EOS, CanaryRunner, StepFault, StepFaults, solo
from tests.runtime.invariants import Invariants


class Broken(Exception):
    """The engine did what it must never do."""


@dataclass(slots=True)
class Sizes:
    """Of one engine."""

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_step_tokens: int
    run_ahead: int
    vocab_size: int
    max_preemptions: int = 8

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds: the longest context."""
        return self.num_pages * self.page_size


@dataclass(slots=True, eq=False)
class Request:
    seq_id: int  # also its arrival
    prompt_ids: list[int]
    params: SamplingParams
    namespace: str
    priority: int
    oracle: list[int]
    seq: Sequence
    num_tokens: int = 0  # answered so far
    started: bool = False


class CheckedEngine:
    """Methods do what a server and its clients do, and raise for whatever is wrong with it.

    That is `Broken`, `CanaryError` from the device, `AssertionError`, or whatever a mistake raises.
    ``faults`` is asked before each step what goes wrong in it. After a `StepFault` or when memory
    runs out the engine is told so, or, if ``is_replaced`` says so after a `StepFault`, replaced,
    and those that never ran are added again.
    """

    def __init__(
        self,
        sizes: Sizes,
        faults: Callable[[Plan], StepFaults],
        is_replaced: Callable[[], bool],
        trace: deque[str] | None = None,
    ) -> None:
        self.sizes = sizes
        self.faults = faults
        self.is_replaced = is_replaced
        self.trace = trace
        self.counts: Counter[str] = Counter()
        self.live: dict[int, Request] = {}
        self.unstarted: dict[int, Request] = {}
        self.not_finite: set[int] = set()  # ids of sequences whose rows got NaN
        self._num_added = 0
        self._start_engine()

    # -- what clients do -------------------------------------------------------------------

    def add(
        self, prompt_ids: list[int], params: SamplingParams, namespace: str, priority: int
    ) -> None:
        seq_id = self._num_added
        self._num_added += 1
        self.note(f"add {seq_id}: {prompt_ids} in {namespace}, priority {priority}")
        self.engine.add(prompt_ids, params, seq_id=seq_id, namespace=namespace, priority=priority)
        seq = self.scheduler._sequences[seq_id]
        oracle = solo(
            prompt_ids,
            seq.max_new_tokens,
            namespace=namespace,
            page_size=self.sizes.page_size,
            vocab_size=self.sizes.vocab_size,
            ends=(*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))),
        )
        request = Request(seq_id, prompt_ids, params, namespace, priority, oracle, seq)
        self.live[seq_id] = self.unstarted[seq_id] = request
        self.counts["requests"] += 1

    def abort(self, seq_id: int) -> None:
        request = self.live[seq_id]
        seq = request.seq
        state = "preempted" if seq.num_preemptions and seq.row < 0 else seq.status.name.lower()
        self.note(f"abort {seq_id}, which is {state}")
        self.counts[f"aborts ({state})"] += 1
        self.counts["aborts (token on its way)"] += bool(seq.num_pending)
        if not self.engine.abort(seq_id):
            raise Broken(f"sequence {seq_id} is {state}, but could not be aborted")
        if self.engine.abort(seq_id):
            raise Broken(f"sequence {seq_id} could be aborted twice")
        if seq.status is not SequenceStatus.FINISHED or seq.block_table:
            raise Broken(f"sequence {seq_id} was aborted and still holds something")
        self._end(request)

    def revoke(self, namespace: str) -> None:
        self.note(f"revoke {namespace}")
        self.counts["revoked namespaces"] += 1
        for seq_id in [s for s, request in self.live.items() if request.namespace == namespace]:
            self.abort(seq_id)

    def reset_cache(self) -> None:
        self.note("reset the cache")
        self.counts["cache resets"] += 1
        self.engine.reset_cache()
        if self.engine.stats()["num_cached_pages"]:
            raise Broken("a page is cached after a reset")

    def preempt(self, index: int) -> None:
        """Take the pages of one that runs, as if another needed them, if it may still yield."""
        running = self.scheduler.running
        if running and running[index % len(running)].num_preemptions < (self.sizes.max_preemptions):
            self.note(f"preempt {running[index % len(running)].seq_id}")
            self.scheduler._preempt(running[index % len(running)])

    # -- a step ----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def step(self) -> None:
        before = self.runner.num_launched, self.runner.num_in_flight
        self.runner.last_read = None
        try:
            events = self.engine.step()
        except (torch.OutOfMemoryError, MemoryError):
            self.note("out of memory")
            self._fail_in_place()
            return
        except StepFault as error:
            self.note(f"the step failed: {error}")
            if self.is_replaced():
                self._replace_engine()
            else:
                self._fail_in_place()
            return
        self.counts["steps"] += 1
        for event in events:
            self._receive(event)
        is_finite = all(event.finish_reason is not FinishReason.NOT_FINITE for event in events)
        if self.runner.last_read is not None and is_finite:
            self.invariants.check_published(self.runner.last_read)
        after = self.runner.num_launched, self.runner.num_in_flight
        if before == after and not events and self.engine.has_work:
            raise Broken("nothing moves, though there is work")

    def _before_step(self, plan: Plan) -> StepFaults:
        for seq in plan.started:
            if seq.seq_id in self.unstarted:
                raise Broken(f"sequence {seq.seq_id} runs, and nobody was told")
            start = next(chunk.start for chunk in plan.chunks if chunk.seq is seq)
            self.invariants.check_hit(seq, start)
            if seq.num_preemptions == 0 and start != seq.num_cached:
                raise Broken(f"{seq.num_cached} cached tokens reported, {start} not computed")
        faults = self.faults(plan)
        for chunk in plan.chunks:
            if chunk.seq.seq_id in faults.not_finite:
                self.not_finite.add(chunk.seq.seq_id)
                self.note(f"NaN in the row of {chunk.seq.seq_id}")
        return faults

    # -- what comes back -------------------------------------------------------------------

    def _on_start(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            request = self.unstarted.pop(seq.seq_id, None)
            if request is None:
                raise Broken(f"sequence {seq.seq_id} starts for the first time once more")
            order = request.priority, request.seq_id
            for other in self.unstarted.values():
                if (other.priority, other.seq_id) < order:
                    raise Broken(f"sequence {seq.seq_id} starts before {other.seq_id}")
            request.started = True
            self.counts["hits"] += seq.num_cached > 0
            self.counts["hit tokens"] += seq.num_cached

    def _receive(self, event: TokenEvent) -> None:
        request = self.live.get(event.seq_id)
        if request is None:
            raise Broken(f"{event} for a sequence that had ended")
        if event.token_id is None:
            self.note(f"{event.seq_id} ends: {event.finish_reason}")
            if event.finish_reason is FinishReason.NOT_FINITE:
                self._receive_not_finite(request)
            elif event.finish_reason is FinishReason.ERROR:
                self.counts["ends by a fault"] += 1
            else:
                raise Broken(f"{event} without a token")
            self._end(request)
            return
        self.counts["tokens"] += 1
        index = request.num_tokens
        oracle = request.oracle
        if index == len(oracle) or event.token_id != oracle[index]:
            got = [*oracle[:index], event.token_id]
            raise Broken(f"sequence {event.seq_id} got {got}, alone it gets {oracle}")
        request.num_tokens = index + 1
        expected = None
        if index + 1 == len(oracle):
            is_end = event.token_id in request.params.stop_token_ids or (
                event.token_id == EOS and not request.params.ignore_eos
            )
            expected = FinishReason.STOP if is_end else FinishReason.LENGTH
        if event.finish_reason is not expected:
            raise Broken(f"sequence {event.seq_id}: {event.finish_reason}, not {expected}")
        if expected is not None:
            self._end(request)
            self.counts["answers"] += 1

    def _receive_not_finite(self, request: Request) -> None:
        self.counts["ends by NaN"] += 1
        if request.seq_id not in self.not_finite:
            self.counts["ends by NaN of another"] += 1
            if request.seq_id not in self.runner.poison_of:
                raise Broken(f"sequence {request.seq_id} never met NaN")
        left = self.runner.remaining_poison(request.seq_id)
        if left:
            raise Broken(f"pages {left} with NaN stay published after {request.seq_id} ended")

    def _end(self, request: Request) -> None:
        seq_id = request.seq_id
        del self.live[seq_id]
        self.unstarted.pop(seq_id, None)
        self.not_finite.discard(seq_id)
        self.runner.poison_of.pop(seq_id, None)
        seq = request.seq
        num_preemptions = seq.num_preemptions
        if num_preemptions:
            self.counts[f"preempted {num_preemptions} times"] += 1
            self.counts["preemptions"] += num_preemptions
        if num_preemptions > self.sizes.max_preemptions:
            raise Broken(f"sequence {seq_id} was preempted {num_preemptions} times")
        if seq.output_ids != request.oracle[: request.num_tokens]:
            raise Broken(f"sequence {seq_id} has {seq.output_ids}, told were {request.num_tokens}")

    # -- faults of a whole step ------------------------------------------------------------

    def _fail_in_place(self) -> None:
        started = [request for request in self.live.values() if request.started]
        self.runner.give_up()
        waiting = [r.seq for r in started if r.seq.status is SequenceStatus.WAITING]
        for event in self.engine.fail_running():
            if event.finish_reason is not FinishReason.ERROR or event.token_id is not None:
                raise Broken(f"{event} after a fault")
            self._receive(event)
        for request in started:
            # A preempted one may wait on, if no token of it was on its way.
            if request.seq_id in self.live and request.seq not in waiting:
                raise Broken(f"sequence {request.seq_id} ran in a step that failed, and lives on")
        if self.scheduler.running:
            raise Broken("something runs after a fault")
        self.check()

    def _replace_engine(self) -> None:
        self.counts["engines replaced"] += 1
        for request in [request for request in self.live.values() if request.started]:
            self.counts["ends by a fault"] += 1
            self._end(request)
        self._start_engine()
        for seq_id, request in self.live.items():
            self.counts["requests that survived"] += 1
            self.engine.add(
                request.prompt_ids,
                request.params,
                seq_id=seq_id,
                namespace=request.namespace,
                priority=request.priority,
            )
            request.seq = self.scheduler._sequences[seq_id]

    def _start_engine(self) -> None:
        sizes = self.sizes
        info = EngineInfo(
            model="canary",
            architecture="canary",
            num_parameters=0,
            weight_bytes=0,
            device="canary",
            dtype="",
            quantization="none",
            max_model_len=sizes.capacity,
            max_num_seqs=sizes.max_num_seqs,
            max_step_tokens=sizes.max_step_tokens,
            page_size=sizes.page_size,
            num_pages=sizes.num_pages,
            kv_cache_bytes=0,
            vocab_size=sizes.vocab_size,
            eos_token_ids=(EOS,),
            run_ahead=sizes.run_ahead,
        )
        scheduler = self.scheduler = make_scheduler(info)
        scheduler.max_preemptions = self.sizes.max_preemptions
        pool = scheduler.pool = self.make_pool()
        scheduler.prefix_cache = PrefixCache(pool, sizes.page_size, info.model)
        self.runner = CanaryRunner(
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            max_num_seqs=sizes.max_num_seqs,
            max_step_tokens=sizes.max_step_tokens,
            vocab_size=sizes.vocab_size,
            faults=self._before_step,
        )
        self.runner.running = lambda: scheduler.running
        self.runner.is_published = lambda page_id: pool._prefixes[page_id] is not None
        self.engine = Engine(self.runner, scheduler, info, on_start=self._on_start)
        self.invariants = Invariants(scheduler, self.runner)

    def make_pool(self) -> PagePool:
        """The engine's pool; here one that counts evictions."""
        counts = self.counts

        class CountingPool(PagePool):
            def allocate(self, count: int) -> list[int] | None:
                num_cached = self.num_cached
                page_ids = super().allocate(count)
                counts["evictions"] += num_cached - self.num_cached
                return page_ids

        return CountingPool(self.sizes.num_pages)

    # -- checks ----------------------------------------------------------------------------

    def check(self) -> None:
        """The eleven invariants: of pool, scheduler and device, and of what was told (I9, I10)."""
        self.invariants.check()
        if self.live.keys() != self.scheduler._sequences.keys():
            raise Broken("I9 live requests and sequences differ")
        for request in self.live.values():
            if len(request.seq.output_ids) != request.num_tokens:
                raise Broken(f"I10 {request.seq.output_ids} of {request.seq_id} were not all told")

    def check_idle(self) -> None:
        """Once nothing is live, every page can be had."""
        self.check()
        self.invariants.check_idle()
        self.counts["idle checks"] += 1

    def ideal_steps(self) -> int:
        """How many steps what is live would take one at a time, with nobody preempted."""
        steps = 0
        for request in self.live.values():
            num_tokens = request.seq.num_tokens
            steps += -(-num_tokens // self.sizes.max_step_tokens)
            steps += request.seq.max_num_tokens - num_tokens
        return steps * (1 + self.sizes.run_ahead)

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"step {self.counts['steps']}: {text}")
