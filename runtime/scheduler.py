"""Who runs in the next step and how many tokens each: admission, chunking, preemption, the end.

Pure Python, no tensors. One step is a token budget filled with decodes first, then with prompt
chunks in arrival order; a decode is a chunk of length 1, so there is one path for everything.
A step may be planned while earlier ones still run: what they draw is pending, and counts. A
sequence whose next token depends on what is pending is left out until it is known.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from runtime.blocks import PagePool
from runtime.prefix_cache import PrefixCache
from runtime.request import FinishReason, Sequence, SequenceStatus, TokenEvent, TokenLogprobs

MAX_SCORED = 1024
"""Tokens of a prompt whose logprobs one event reports."""
MAX_PREEMPTIONS = 8
"""So often a sequence yields; then it waits until it fits whole, and no newcomer passes it."""
NOT_A_TOKEN = -1
"""Drawn from logits that are not finite."""
FIRST = -(1 << 31)
"""Comes before every priority that a client may ask for."""
_order = attrgetter("order")


@dataclass(slots=True)  # not frozen, here and below: thousands are made in a second
class Chunk:
    """Tokens [start, end) of one sequence; ``samples`` if the step draws its next token."""

    seq: Sequence
    start: int
    end: int
    samples: bool
    num_preemptions: int  # of the sequence when this was planned
    first_scored: int = 0  # the first token of the prompt whose logprobs the step finds out
    num_scored: int = 0  # how many, from there on
    prompt_logprobs: Seq[TokenLogprobs] = ()  # them, once the step was read

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step will do. Chunks of a single token come first; every page is allocated."""

    chunks: list[Chunk]
    num_decodes: int  # chunks with one token
    started: list[Sequence]  # sequences that got a row since the last plan, also once more

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(slots=True)
class SampledToken:
    """What the runner drew for one chunk whose ``samples`` is set."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """First come, first served, continuous batching over a `PagePool`.

    ``plan()`` chooses chunks with at most ``max_step_tokens`` tokens and allocates their pages;
    ``commit()`` is the only place that appends tokens, decides ``finish_reason``, publishes pages
    and frees them. Plans are committed in their order, but the next may be made before. Steps run
    in order too, so pages freed while a later step that still writes to them is under way may be
    given out again.
    A sequence that cannot get a page makes the latest arrival give its pages back and recompute
    later, so the earliest always moves on: at most one prompt is half read, and what it lacks comes
    free with the decodes. Callers admit only sequences that fit the whole pool.

    With ``prefix_cache`` a sequence begins behind the pages that hold the start of its tokens
    already; its last tokens are always computed. Such pages are full and never written.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        eos_token_ids: Iterable[int],
        model: str = "",
        prefix_cache: bool = True,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefix_cache = PrefixCache(self.pool, page_size, model) if prefix_cache else None
        self.max_preemptions = MAX_PREEMPTIONS
        self.num_preemptions = 0  # of all sequences so far
        self.waiting: list[Sequence] = []  # by priority, then by arrival
        self.running: list[Sequence] = []  # likewise
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = itertools.count()
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    # -- in and out ------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        assert seq.seq_id not in self._sequences, f"sequence {seq.seq_id} added twice"
        self._sequences[seq.seq_id] = seq
        seq.order = (seq.priority, next(self._arrivals))
        insort(self.waiting, seq, key=_order)

    def abort(self, seq_id: int) -> bool:
        """Forget a sequence in any state and free its pages. False if it is already gone."""
        seq = self._sequences.get(seq_id)
        if seq is None:
            return False
        self._finish(seq)
        return True

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # -- one step --------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run before a commit. Deterministic."""
        decodes, chunks = self._plan_running()
        budget = self.max_step_tokens - len(decodes) - sum(chunk.num_tokens for chunk in chunks)
        started = self._plan_waiting(budget)
        for chunk in started:
            (decodes if chunk.num_tokens == 1 else chunks).append(chunk)
        if not decodes and not chunks:
            return None
        return Plan(
            chunks=decodes + chunks,
            num_decodes=len(decodes),
            started=[chunk.seq for chunk in started],
        )

    def commit(self, plan: Plan, sampled: Seq[SampledToken]) -> list[TokenEvent]:
        """Record a finished step. ``sampled`` has one entry per sampling chunk, in plan order.

        What a step drew for a sequence that had ended before is dropped.
        """
        events = []
        tokens: Iterator[SampledToken] = iter(sampled)
        for chunk in plan.chunks:
            seq, token = chunk.seq, next(tokens) if chunk.samples else None
            if seq.status is SequenceStatus.FINISHED:
                continue
            if token is not None and token.token_id == NOT_A_TOKEN:
                events.append(self._fail_not_finite(seq))
                continue
            if chunk.prompt_logprobs:
                if not all(math.isfinite(one.logprob) for one in chunk.prompt_logprobs):
                    events.append(self._fail_not_finite(seq))
                    continue
                events += _scored(chunk)
            # its pages may have been given back since
            if self.prefix_cache is not None and chunk.num_preemptions == seq.num_preemptions:
                self.prefix_cache.publish(seq, chunk.end)
            if token is None:
                continue
            seq.num_pending -= 1
            seq.output_ids.append(token.token_id)
            reason = self._finish_reason(seq, token.token_id)
            if reason is not None:
                self._finish(seq)
            events.append(TokenEvent(seq.seq_id, token.token_id, reason, token.logprobs))
        return events

    def fail(self, seq: Sequence, reason: FinishReason = FinishReason.ERROR) -> TokenEvent:
        """End one sequence that went wrong."""
        self._finish(seq)
        return TokenEvent(seq.seq_id, None, reason)

    def _fail_not_finite(self, seq: Sequence) -> TokenEvent:
        """End a sequence whose numbers overflowed, and let nobody find its pages."""
        # not by its table, which is empty if it was preempted since
        self.pool.forget_prefixes(seq.prefixes)
        return self.fail(seq, FinishReason.NOT_FINITE)

    def fail_running(self) -> list[TokenEvent]:
        """End what runs, and what waits for a token that will not come; others wait on."""
        failed = self.running + [seq for seq in self.waiting if seq.num_pending]
        return [self.fail(seq) for seq in failed]

    def check(self) -> None:
        """Assert that pages, rows and sequence lists agree. For tests."""
        self.pool.check(seq.block_table for seq in self.running)
        rows = [seq.row for seq in self.running]
        assert sorted(rows + self._free_rows) == list(range(self.max_num_seqs))
        assert {*self.running, *self.waiting} == set(self._sequences.values())
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_order)
        for seq in self.running:
            assert len(seq.block_table) * self.page_size >= seq.num_computed
            assert seq.num_published * self.page_size <= seq.num_computed
        for seq in self.waiting:
            assert not seq.block_table and seq.num_computed == 0 and seq.row == -1
        assert all(0 <= seq.num_pending <= seq.max_new_tokens for seq in self._sequences.values())

    # -- parts of plan ---------------------------------------------------------------------

    def _plan_running(self) -> tuple[list[Chunk], list[Chunk]]:
        """Decodes, then chunks of prompts that have begun."""
        decodes: list[Chunk] = []
        prompts: list[Sequence] = []
        budget = self.max_step_tokens
        for seq in list(self.running):
            if seq.status is not SequenceStatus.RUNNING:
                continue  # preempted by an earlier sequence of this very loop
            remaining = seq.num_tokens - seq.num_computed
            if remaining > 1:
                prompts.append(seq)
            elif seq.has_to_wait:
                continue
            elif budget and not self._is_complete(seq) and self._make_room(seq):
                decodes.append(self._chunk(seq, 1))
                budget -= 1
        chunks: list[Chunk] = []
        for seq in prompts:
            if seq.status is not SequenceStatus.RUNNING:
                continue
            remaining = seq.num_tokens - seq.num_computed
            room = self._grow(seq, self._part(remaining, budget))
            num_tokens = self._part(remaining, room)
            if num_tokens:
                (decodes if num_tokens == 1 else chunks).append(self._chunk(seq, num_tokens))
                budget -= num_tokens
        return decodes, chunks

    def _plan_waiting(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        while self.waiting and self._free_rows and budget and self.pool.num_free:
            seq = self.waiting[0]
            if seq.num_pending:
                break  # it was preempted, and a token of it is still being drawn
            cached = [] if self.prefix_cache is None else self.prefix_cache.find(seq)
            num_cached = len(cached) * self.page_size
            num_tokens = self._part(seq.num_tokens - num_cached, budget)
            if num_tokens == 0 or not self._has_room(seq, cached):
                break
            self.pool.share(cached)
            seq.block_table = cached
            seq.num_computed, seq.num_published = num_cached, len(cached)
            if seq.num_preemptions == 0:
                seq.num_cached = num_cached
            del self.waiting[0]
            seq.status = SequenceStatus.RUNNING
            seq.row = self._free_rows.pop()
            insort(self.running, seq, key=_order)
            num_tokens = self._grow(seq, num_tokens)
            chunks.append(self._chunk(seq, num_tokens))
            budget -= num_tokens
        return chunks

    def _part(self, remaining: int, budget: int) -> int:
        """How many of ``remaining`` tokens of a prompt to run within ``budget``.

        A single token would run as a decode, which rounds differently on a GPU; so that neighbours
        do not decide that, a prompt is cut into parts of two or more, unless steps are so short
        that decodes could leave it less for long.
        """
        if remaining <= budget or self.max_step_tokens < self.max_num_seqs + 3:
            return min(remaining, budget)
        return min(budget, remaining - 2) if min(budget, remaining - 2) > 1 else 0

    def _chunk(self, seq: Sequence, num_tokens: int) -> Chunk:
        start, end = seq.num_computed, seq.num_computed + num_tokens
        samples = end == seq.num_tokens
        seq.num_computed = end
        seq.num_pending += samples
        chunk = Chunk(seq, start, end, samples, seq.num_preemptions)
        if seq.num_to_score:
            chunk.first_scored = max(start, seq.num_scored) + 1
            last_scored = min(end, seq.num_prompt - 1)
            chunk.num_scored = max(last_scored + 1 - chunk.first_scored, 0)
        return chunk

    def _is_complete(self, seq: Sequence) -> bool:
        """Whether the tokens on their way are the last that the sequence may have."""
        return len(seq.output_ids) + seq.num_pending >= seq.max_new_tokens

    # -- pages -----------------------------------------------------------------------------

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _grow(self, seq: Sequence, num_tokens: int) -> int:
        """Allocate pages for up to ``num_tokens`` more tokens; how many of them now have room."""
        have = len(seq.block_table)
        want = self._pages_for(seq.num_computed + num_tokens) - have
        if want <= 0:
            return num_tokens
        take = min(want, self.pool.num_free)
        page_ids = self.pool.allocate(take)
        assert page_ids is not None
        seq.block_table += page_ids
        return min(num_tokens, (have + take) * self.page_size - seq.num_computed)

    def _make_room(self, seq: Sequence) -> bool:
        """Get a decode its slot, preempting later arrivals; False if it had to yield itself."""
        while self._grow(seq, 1) == 0:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Give a sequence's pages back; it waits and recomputes what the cache has lost by then."""
        self._release(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        if seq.num_preemptions == self.max_preemptions:
            seq.order = (FIRST, seq.order[1])
        insort(self.waiting, seq, key=_order)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pool.free(seq.block_table)
        seq.block_table = []
        seq.num_published = 0
        self._free_rows.append(seq.row)
        seq.row = -1

    def _has_room(self, seq: Sequence, cached: list[int]) -> bool:
        """Whether a waiting sequence may begin behind the pages ``cached``.

        One page beyond its tokens keeps a newcomer from preempting itself at its first token. One
        that was preempted too often must also fit whole beside all those that do not yield either.
        """
        num_free = self.pool.num_free - self.pool.num_idle(cached)
        if self._pages_for(seq.num_tokens + 1) - len(cached) > num_free:
            return False
        if seq.num_preemptions < self.max_preemptions:
            return True
        firm = [seq, *(one for one in self.running if one.num_preemptions >= self.max_preemptions)]
        return sum(self._pages_for(one.max_num_tokens) for one in firm) <= self.pool.num_pages

    # -- the end ---------------------------------------------------------------------------

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.params
        if len(seq.output_ids) >= params.min_tokens:
            if token_id in params.stop_token_ids:
                return FinishReason.STOP
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP
        return FinishReason.LENGTH if len(seq.output_ids) >= seq.max_new_tokens else None

    def _finish(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        del self._sequences[seq.seq_id]


def _scored(chunk: Chunk) -> Iterator[TokenEvent]:
    """What a chunk tells of its prompt, unless it was told before a preemption."""
    seq = chunk.seq
    new = chunk.prompt_logprobs[seq.num_scored + 1 - chunk.first_scored :]
    seq.num_scored += len(new)
    for start in range(0, len(new), MAX_SCORED):
        part = tuple(new[start : start + MAX_SCORED])
        yield TokenEvent(seq.seq_id, None, prompt_logprobs=part)
