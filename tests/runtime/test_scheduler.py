"""The scheduler without tensors: exact plans, preemption, abort in every state, no leaks."""

from __future__ import annotations

from collections import deque
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.request import FinishReason, SamplingParams, Sequence, SequenceStatus
from runtime.scheduler import MAX_PREEMPTIONS, NOT_A_TOKEN, Plan, SampledToken, Scheduler

EOS = 1


def make_scheduler(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 8,
    max_step_tokens: int = 16,
    prefix_cache: bool = False,
) -> Scheduler:
    return Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
        eos_token_ids=[EOS],
        prefix_cache=prefix_cache,
    )


def make_sequence(
    seq_id: int, num_prompt: int, max_new_tokens: int = 4, params: SamplingParams | None = None
) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        prompt_ids=list(range(10, 10 + num_prompt)),
        params=params or SamplingParams(),
        seed=0,
        max_new_tokens=max_new_tokens,
    )


def shape(plan: Plan | None) -> list[tuple[int, int, int]]:
    assert plan is not None
    return [(chunk.seq.seq_id, chunk.start, chunk.end) for chunk in plan.chunks]


def finish_step(scheduler: Scheduler, plan: Plan | None, token_id: int = 7) -> None:
    assert plan is not None
    scheduler.commit(plan, [SampledToken(token_id) for chunk in plan.chunks if chunk.samples])
    scheduler.check()


def test_decodes_come_first_and_prompts_fill_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=16)
    scheduler.add(make_sequence(0, 5))
    plan = scheduler.plan()
    assert shape(plan) == [(0, 0, 5)]
    finish_step(scheduler, plan)
    scheduler.add(make_sequence(1, 20))
    scheduler.add(make_sequence(2, 3))
    plan = scheduler.plan()
    assert shape(plan) == [(0, 5, 6), (1, 0, 15)]
    assert plan is not None
    assert [chunk.samples for chunk in plan.chunks] == [True, False]
    assert plan.num_decodes == 1
    finish_step(scheduler, plan)
    assert shape(scheduler.plan()) == [(0, 6, 7), (1, 15, 20), (2, 0, 3)]


def test_a_running_sequence_gets_a_token_in_every_step_while_long_prompts_arrive() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_sequence(0, 2, max_new_tokens=30))
    finish_step(scheduler, scheduler.plan())
    for seq_id in range(1, 5):
        scheduler.add(make_sequence(seq_id, 25))
    for step in range(20):
        plan = scheduler.plan()
        assert (0, 2 + step, 3 + step) in shape(plan)
        finish_step(scheduler, plan)


def test_no_part_of_a_prompt_is_a_single_token() -> None:
    scheduler = make_scheduler(max_step_tokens=11)
    scheduler.add(make_sequence(0, 10))
    scheduler.add(make_sequence(1, 12))
    scheduler.add(make_sequence(2, 1))
    plan = scheduler.plan()
    assert shape(plan) == [(0, 0, 10)]  # one token of the budget is left, and not used
    finish_step(scheduler, plan)
    plan = scheduler.plan()
    assert shape(plan) == [(0, 10, 11), (1, 0, 10)]
    finish_step(scheduler, plan)
    plan = scheduler.plan()  # a prompt that is a single token is run as one
    assert shape(plan) == [(0, 11, 12), (2, 0, 1), (1, 10, 12)]
    assert plan is not None
    assert plan.num_decodes == 2


def test_pages_that_run_out_leave_no_single_token_of_a_prompt_either() -> None:
    scheduler = make_scheduler(num_pages=10, page_size=4, max_step_tokens=31)
    for seq_id, num_prompt in enumerate([16, 12, 6, 6]):
        scheduler.add(make_sequence(seq_id, num_prompt))
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        for chunk in plan.chunks:
            assert chunk.num_tokens > 1 or chunk.start >= chunk.seq.num_prompt
        finish_step(scheduler, plan)


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        (SamplingParams(), [7, EOS], FinishReason.STOP),
        (SamplingParams(), [7, 7, 7, 7], FinishReason.LENGTH),
        (SamplingParams(ignore_eos=True), [EOS, EOS, EOS, EOS], FinishReason.LENGTH),
        (SamplingParams(stop_token_ids=(9,)), [7, 9], FinishReason.STOP),
        (SamplingParams(), [7, 7, 7, EOS], FinishReason.STOP),
    ],
)
def test_finish_reason(params: SamplingParams, tokens: list[int], reason: FinishReason) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 3, params=params))
    reasons = []
    for token_id in tokens:
        plan = scheduler.plan()
        assert plan is not None
        reasons += [e.finish_reason for e in scheduler.commit(plan, [SampledToken(token_id)])]
    assert reasons == [None] * (len(tokens) - 1) + [reason]
    assert scheduler.num_sequences == 0
    assert scheduler.pool.num_free == scheduler.pool.num_pages


def test_the_latest_arrival_yields_its_pages_and_recomputes_later() -> None:
    scheduler = make_scheduler(num_pages=4, page_size=4)
    scheduler.add(make_sequence(0, 7, max_new_tokens=9))
    scheduler.add(make_sequence(1, 7, max_new_tokens=9))
    finish_step(scheduler, scheduler.plan())  # both hold two pages: 7 tokens and room for 1
    finish_step(scheduler, scheduler.plan())
    plan = scheduler.plan()  # position 8 needs a third page for each, and none is free
    assert shape(plan) == [(0, 8, 9)]
    finish_step(scheduler, plan)
    [waiting] = scheduler.waiting
    assert (waiting.seq_id, waiting.num_computed, waiting.output_ids) == (1, 0, [7, 7])
    while 0 in {seq.seq_id for seq in scheduler.running}:
        finish_step(scheduler, scheduler.plan())
    plan = scheduler.plan()
    assert shape(plan) == [(1, 0, 9)]  # prompt and its two known answers in one chunk
    assert plan is not None
    assert plan.chunks[0].samples
    assert [seq.seq_id for seq in plan.started] == [1]


def test_two_half_read_prompts_that_fill_the_pool_do_not_deadlock() -> None:
    scheduler = make_scheduler(num_pages=8, page_size=1, max_step_tokens=4)
    scheduler.add(make_sequence(0, 6, max_new_tokens=2))
    scheduler.add(make_sequence(1, 5, max_new_tokens=3))
    for _ in range(40):
        plan = scheduler.plan()
        if plan is None:
            break
        finish_step(scheduler, plan)
    assert scheduler.num_sequences == 0


def test_abort_is_idempotent_and_frees_pages_in_every_state() -> None:
    scheduler = make_scheduler(num_pages=6, max_num_seqs=1)
    scheduler.add(make_sequence(0, 5))
    scheduler.add(make_sequence(1, 5))
    finish_step(scheduler, scheduler.plan())
    assert scheduler.abort(1)  # waiting
    assert scheduler.abort(0)  # running
    assert not scheduler.abort(0)
    assert not scheduler.abort(99)
    scheduler.check()
    assert scheduler.plan() is None
    assert scheduler.pool.num_free == 6


def test_a_failed_step_ends_the_running_and_spares_the_waiting() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence(0, 5))
    scheduler.add(make_sequence(1, 5))
    scheduler.plan()
    events = scheduler.fail_running()
    assert [(e.seq_id, e.token_id, e.finish_reason) for e in events] == [
        (0, None, FinishReason.ERROR)
    ]
    scheduler.check()
    assert shape(scheduler.plan()) == [(1, 0, 5)]


def test_a_lower_priority_number_goes_first_and_equal_ones_by_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for seq_id, priority in enumerate([0, 5, -3, 0, -3]):
        seq = make_sequence(seq_id, 3, max_new_tokens=1)
        seq.priority = priority
        scheduler.add(seq)
    order = []
    while scheduler.has_work:
        plan = scheduler.plan()
        order += [seq_id for seq_id, _, _ in shape(plan)]
        finish_step(scheduler, plan)
    assert order == [2, 4, 0, 3, 1]


def test_the_lowest_priority_yields_its_pages_first() -> None:
    scheduler = make_scheduler(num_pages=4, page_size=4)
    urgent = make_sequence(1, 7, max_new_tokens=9)
    urgent.priority = -1
    scheduler.add(make_sequence(0, 7, max_new_tokens=9))
    finish_step(scheduler, scheduler.plan())
    scheduler.add(urgent)
    finish_step(scheduler, scheduler.plan())
    finish_step(scheduler, scheduler.plan())
    assert [seq.seq_id for seq in scheduler.running] == [1]
    assert [seq.seq_id for seq in scheduler.waiting] == [0]


def test_nobody_is_preempted_for_ever() -> None:
    """A crowd of growing sequences in a small pool: each yields a bounded number of times."""
    scheduler = make_scheduler(num_pages=12, page_size=2, max_num_seqs=8, max_step_tokens=64)
    sequences = [make_sequence(seq_id, 3, max_new_tokens=20) for seq_id in range(24)]
    for seq in sequences:
        scheduler.add(seq)
    while scheduler.has_work:
        finish_step(scheduler, scheduler.plan())
    assert all(len(seq.output_ids) == 20 for seq in sequences)
    assert 2 <= max(seq.num_preemptions for seq in sequences) <= MAX_PREEMPTIONS


def test_a_row_that_is_not_finite_ends_alone() -> None:
    scheduler = make_scheduler()
    for seq_id in range(3):
        scheduler.add(make_sequence(seq_id, 3))
    plan = scheduler.plan()
    assert plan is not None
    events = scheduler.commit(plan, [SampledToken(7), SampledToken(NOT_A_TOKEN), SampledToken(EOS)])
    assert [(e.seq_id, e.token_id, e.finish_reason) for e in events] == [
        (0, 7, None),
        (1, None, FinishReason.NOT_FINITE),
        (2, EOS, FinishReason.STOP),
    ]
    scheduler.check()
    assert shape(scheduler.plan()) == [(0, 3, 4)]


def test_a_step_is_planned_before_the_tokens_of_the_last_are_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 3, max_new_tokens=3))
    first, second, third = scheduler.plan(), scheduler.plan(), scheduler.plan()
    assert [shape(plan) for plan in (first, second, third)] == [
        [(0, 0, 3)],
        [(0, 3, 4)],
        [(0, 4, 5)],
    ]
    assert scheduler.plan() is None  # three tokens are on their way, and no more may come
    for plan in (first, second, third):
        finish_step(scheduler, plan)
    assert scheduler.num_sequences == 0


def test_what_is_drawn_after_the_end_is_dropped() -> None:
    scheduler = make_scheduler()
    seq = make_sequence(0, 3)
    scheduler.add(seq)
    first, second = scheduler.plan(), scheduler.plan()
    assert first is not None and second is not None
    [event] = scheduler.commit(first, [SampledToken(EOS)])
    assert event.finish_reason is FinishReason.STOP
    scheduler.add(make_sequence(1, 3))  # takes the row and the pages while the second step runs
    third = scheduler.plan()
    assert scheduler.commit(second, [SampledToken(7)]) == []
    assert seq.output_ids == [EOS]
    finish_step(scheduler, third)


def test_a_preempted_sequence_waits_for_the_token_that_is_still_drawn() -> None:
    scheduler = make_scheduler(num_pages=4, page_size=4)
    scheduler.add(make_sequence(0, 7, max_new_tokens=9))
    scheduler.add(make_sequence(1, 7, max_new_tokens=9))
    plans = [scheduler.plan(), scheduler.plan(), scheduler.plan()]
    assert shape(plans[2]) == [(0, 8, 9)]  # sequence 1 gave its pages, with two tokens to come
    scheduler.abort(0)
    assert scheduler.plan() is None
    for plan in plans:
        finish_step(scheduler, plan)
    assert shape(scheduler.plan()) == [(1, 0, 9)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_history_leaves_no_page_behind_and_loses_no_token(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    capacity = data.draw(st.integers(2, 12)) * page_size
    scheduler = make_scheduler(
        num_pages=capacity // page_size,
        page_size=page_size,
        max_num_seqs=data.draw(st.integers(1, 5)),
        max_step_tokens=data.draw(st.sampled_from([1, 3, 16, 64])),
        prefix_cache=data.draw(st.booleans()),
    )
    device = Device(scheduler, run_ahead=data.draw(st.integers(0, 2)))
    next_id = count()
    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["add", "step", "step", "step", "abort"])):
            case "add":
                num_prompt = data.draw(st.integers(1, capacity - 1))
                room = capacity - num_prompt
                device.add(
                    make_sequence(next(next_id), num_prompt, data.draw(st.integers(1, room)))
                )
            case "abort" if device.live:
                assert scheduler.abort(device.live.popitem()[0])
            case "step":
                device.step()
        scheduler.check()
    live = device.live.values()
    bound = sum(seq.num_tokens + seq.max_new_tokens for seq in live) * 4 * (len(live) + 1)
    for _ in range(bound + 1):
        if not scheduler.has_work:
            break
        device.step()
    assert not device.live
    assert scheduler.pool.num_free == scheduler.pool.num_pages


class Device:
    """Runs plans late, as a GPU does; what it draws follows from a sequence and a position."""

    def __init__(self, scheduler: Scheduler, run_ahead: int) -> None:
        self.scheduler = scheduler
        self.run_ahead = run_ahead
        self.in_flight: deque[Plan] = deque()
        self.live: dict[int, Sequence] = {}
        self.written: dict[int, int] = {}  # tokens of a sequence that the device has

    def add(self, seq: Sequence) -> None:
        self.live[seq.seq_id] = seq
        self.scheduler.add(seq)

    @staticmethod
    def drawn(seq_id: int, position: int) -> int:
        return EOS if (seq_id * 7 + position * 5) % 11 == 0 else 100 + (seq_id * 31 + position) % 50

    def step(self) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work
        else:
            self._launch(plan)
            if len(self.in_flight) <= self.run_ahead:
                return
        if not self.in_flight:
            return
        plan = self.in_flight.popleft()
        chunks = [chunk for chunk in plan.chunks if chunk.samples]
        tokens = [SampledToken(self.drawn(chunk.seq.seq_id, chunk.end)) for chunk in chunks]
        for event in self.scheduler.commit(plan, tokens):
            seq = self.live[event.seq_id]
            position = seq.num_prompt + len(seq.output_ids) - 1
            assert seq.output_ids[-1] == event.token_id == self.drawn(event.seq_id, position)
            is_last = event.token_id == EOS or len(seq.output_ids) == seq.max_new_tokens
            assert (event.finish_reason is not None) == is_last
            if is_last:
                del self.live[event.seq_id]

    def _launch(self, plan: Plan) -> None:
        assert plan.num_tokens <= self.scheduler.max_step_tokens
        assert [chunk.num_tokens for chunk in plan.chunks[: plan.num_decodes]] == (
            [1] * plan.num_decodes
        )
        for seq in plan.started:
            cached = next(chunk.start for chunk in plan.chunks if chunk.seq is seq)
            assert cached % self.scheduler.page_size == 0
            assert cached == 0 or self.scheduler.prefix_cache
            self.written[seq.seq_id] = cached
        for chunk in plan.chunks:
            seq = chunk.seq
            assert seq.status is SequenceStatus.RUNNING
            assert chunk.start == self.written[seq.seq_id] < chunk.end
            assert len(seq.block_table) * self.scheduler.page_size >= chunk.end
            self.written[seq.seq_id] = chunk.end
        self.in_flight.append(plan)
