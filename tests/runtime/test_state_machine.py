"""Any sequence of rules, the eleven invariants after each, and the pool against a model of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from runtime.blocks import PagePool, Prefix
from runtime.request import SamplingParams
from runtime.scheduler import Plan
from tests.runtime.canary import StepFault, StepFaults
from tests.runtime.checked_engine import CheckedEngine, Sizes

VOCAB_SIZE = 7
STEMS = [[1, 2, 3, 4, 5, 6] * 8, [1, 2, 3, 4, 6, 6] * 8, [2] * 48]
NAMESPACES = ["a", "b"]


class ReferencePool:
    """What a pool must do, as facts about each page and nothing that makes it fast."""

    def __init__(self, num_pages: int) -> None:
        self.num_refs = dict.fromkeys(range(1, num_pages + 1), 0)
        self.contents: dict[int, Prefix] = {}  # of published pages
        self.left: list[int] = []  # published pages that nobody uses, longest ago first

    def free(self) -> set[int]:
        return {
            page_id
            for page_id, count in self.num_refs.items()
            if count == 0 and page_id not in self.contents
        }

    def allocate(self, count: int, page_ids: list[int] | None) -> None:
        free = self.free()
        if count > len(free) + len(self.left):
            assert page_ids is None, "more pages were given than are free"
            return
        assert page_ids is not None, "pages are free, and were not given"
        assert len(page_ids) == len(set(page_ids)) == count
        num_evicted = max(count - len(free), 0)
        evicted, self.left = self.left[:num_evicted], self.left[num_evicted:]
        assert set(page_ids) - free == set(evicted), f"{page_ids} given, {evicted} were due"
        for page_id in evicted:
            del self.contents[page_id]
        for page_id in page_ids:
            self.num_refs[page_id] = 1

    def find(self, prefix: Prefix) -> int | None:
        found = [page_id for page_id, contents in self.contents.items() if contents == prefix]
        assert len(found) <= 1, f"pages {found} are published with the same contents"
        return found[0] if found else None

    def share(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            assert page_id in self.contents, f"page {page_id} is shared and not published"
            self.num_refs[page_id] += 1
            if page_id in self.left:
                self.left.remove(page_id)

    def publish(self, page_id: int, prefix: Prefix) -> None:
        assert self.num_refs[page_id] > 0, f"page {page_id} is published and not used"
        if self.find(prefix) is None:
            self.contents.setdefault(page_id, prefix)

    def give_back(self, page_ids: Seq[int]) -> None:
        for page_id in reversed(page_ids):
            self.num_refs[page_id] -= 1
            assert self.num_refs[page_id] >= 0, f"page {page_id} is given back twice"
            if self.num_refs[page_id] == 0 and page_id in self.contents:
                self.left.append(page_id)

    def forget(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            self.contents.pop(page_id, None)
            if page_id in self.left:
                self.left.remove(page_id)

    def check(self, pool: PagePool) -> None:
        for page_id, count in self.num_refs.items():
            assert pool._num_refs[page_id] == count, f"page {page_id} has {count} references"
            assert pool._prefixes[page_id] == self.contents.get(page_id), f"contents of {page_id}"
        assert pool.num_free == len(self.free()) + len(self.left)
        assert pool.num_cached == len(self.contents)
        assert list(pool._idle) == self.left, "the order of eviction"


class ComparedPool(PagePool):
    """A pool that does everything in its model too."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.reference = ReferencePool(num_pages)

    def allocate(self, count: int) -> list[int] | None:
        page_ids = super().allocate(count)
        self.reference.allocate(count, page_ids)
        return page_ids

    def find(self, prefix: Prefix) -> int | None:
        page_id = super().find(prefix)
        assert page_id == self.reference.find(prefix), "another page is found than published"
        return page_id

    def num_idle(self, page_ids: Iterable[int]) -> int:
        page_ids = list(page_ids)
        count = super().num_idle(page_ids)
        assert count == sum(self.reference.num_refs[page_id] == 0 for page_id in page_ids)
        return count

    def share(self, page_ids: Iterable[int]) -> None:
        page_ids = list(page_ids)
        super().share(page_ids)
        self.reference.share(page_ids)

    def publish(self, page_id: int, prefix: Prefix) -> None:
        super().publish(page_id, prefix)
        self.reference.publish(page_id, prefix)

    def free(self, page_ids: Seq[int]) -> None:
        page_ids = list(page_ids)
        super().free(page_ids)
        self.reference.give_back(page_ids)

    def forget(self, page_ids: Iterable[int]) -> None:
        page_ids = list(page_ids)
        super().forget(page_ids)
        self.reference.forget(page_ids)


class ComparedEngine(CheckedEngine):
    pool: ComparedPool

    def make_pool(self) -> PagePool:
        self.pool = ComparedPool(self.sizes.num_pages)
        return self.pool


class EngineMachine(RuleBasedStateMachine):
    """One engine. Faults are set by rules and strike the next step."""

    @initialize(
        num_pages=st.integers(3, 16),
        page_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        max_step_tokens=st.sampled_from([1, 3, 8, 32]),
        run_ahead=st.integers(0, 2),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        run_ahead: int,
    ) -> None:
        self.row_faults: list[tuple[int, bool]] = []
        self.step_faults: list[Callable[[Plan], StepFaults]] = []
        self.is_paused = self.is_replaced = False
        self.engine = ComparedEngine(
            Sizes(num_pages, page_size, max_num_seqs, max_step_tokens, run_ahead, VOCAB_SIZE),
            self._faults,
            lambda: self.is_replaced,
        )

    def _faults(self, plan: Plan) -> StepFaults:
        faults = StepFaults()
        for index, is_prepared in self.row_faults:
            if is_prepared:
                faults.not_finite = {plan.chunks[index % len(plan.chunks)].seq.seq_id}
            elif plan.started:
                faults.failed = {plan.started[index % len(plan.started)].seq_id}
        self.row_faults.clear()
        if not self.step_faults:
            return faults
        strike = self.step_faults.pop()
        whole = strike(plan)
        whole.failed = faults.failed
        return whole

    # -- rules -----------------------------------------------------------------------------

    @rule(
        stem=st.integers(0, len(STEMS) - 1),
        num_prompt=st.integers(1, 20),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        namespace=st.sampled_from(NAMESPACES),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
    )
    def add(
        self,
        stem: int,
        num_prompt: int,
        tail: list[int],
        max_tokens: int,
        ignore_eos: bool,
        namespace: str,
        priority: int,
    ) -> None:
        prompt_ids = (STEMS[stem][:num_prompt] + tail)[: self.engine.sizes.capacity - 1]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, seed=0)
        self.engine.add(prompt_ids, params, namespace, priority)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(0 if self.is_paused else count):
            self.engine.step()
            self.compare()

    @precondition(lambda self: self.engine.live)
    @rule(index=st.integers(0, 99))
    def abort(self, index: int) -> None:
        live = list(self.engine.live)
        self.engine.abort(live[index % len(live)])

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(index=st.integers(0, 99))
    def preempt(self, index: int) -> None:
        self.engine.preempt(index)

    @rule(index=st.integers(0, 99), is_prepared=st.sampled_from([True, True, False]))
    def break_row(self, index: int, is_prepared: bool) -> None:
        self.row_faults.append((index, is_prepared))

    @rule(
        kind=st.sampled_from(["before", "within", "read", "out of memory"]),
        num_chunks=st.integers(0, 3),
        is_replaced=st.booleans(),
    )
    def break_step(self, kind: str, num_chunks: int, is_replaced: bool) -> None:
        def strike(plan: Plan) -> StepFaults:
            match kind:
                case "before":
                    raise StepFault("CUDA error: device-side assert triggered")
                case "within":
                    return StepFaults(dies_after=num_chunks % len(plan.chunks))
                case "read":
                    return StepFaults(at_read=StepFault("CUDA error: unspecified"))
                case _:
                    raise torch.OutOfMemoryError("out of memory")

        self.is_replaced = is_replaced
        self.step_faults = [strike]

    @rule(namespace=st.sampled_from(NAMESPACES))
    def revoke(self, namespace: str) -> None:
        self.engine.revoke(namespace)

    @rule()
    def pause_or_resume(self) -> None:
        self.is_paused = not self.is_paused

    @rule()
    def reset_cache(self) -> None:
        self.engine.reset_cache()

    # -- what always holds -----------------------------------------------------------------

    @invariant()
    def compare(self) -> None:
        self.engine.check()
        self.engine.pool.reference.check(self.engine.pool)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps_left = 3 * self.engine.ideal_steps() + 20
        while self.engine.has_work:
            self.engine.step()
            steps_left -= 1
            assert steps_left > 0, f"{list(self.engine.live)} should have ended long ago"
        assert not self.engine.live
        self.engine.check_idle()


def run(num_examples: int, num_steps: int, *, shrink: bool = True) -> None:
    """Raises what breaks once hypothesis has printed the way there, a short one if ``shrink``."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink]
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            deadline=None,
            phases=phases if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_invariants_hold_after_any_sequence_of_rules() -> None:
    run(500, 50)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_invariants_hold_after_any_sequence_of_rules_for_long() -> None:
    run(100_000, 100)
