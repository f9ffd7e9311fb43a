"""Logprobs of a prompt's own tokens, against transformers, however the prompt is run."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from runtime import (
    BadRequest,
    Engine,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    prompt_scores,
    wire,
)
from runtime.engine_process import Channel
from tests.api.scripted import in_background
from tests.runtime.engines import TINY, Oracle, make_engine

NUM_TOP = 5


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(TINY)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(TINY)


def prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, 2031) for _ in range(length)] for length in (1, 2, 3, 17, 64, 150)]


def asked(num_top: int = NUM_TOP, **more: Any) -> SamplingParams:
    more = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **more}
    return SamplingParams(prompt_logprobs=num_top, **more)


def check(oracle: Oracle, prompt: list[int], scores: Iterable[TokenLogprobs]) -> None:
    """Each token but the first has its logprob and the best ones, as transformers tells them."""
    scores = list(scores)
    expected = oracle.logits(prompt).log_softmax(dim=-1)[:-1]
    assert len(scores) == len(prompt) - 1
    for row, token_id, score in zip(expected, prompt[1:], scores, strict=True):
        assert score.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        best = row.topk(len(score.top)).values.tolist()
        assert [value for _, value in score.top] == pytest.approx(best, abs=1e-4)
        for top_id, value in score.top:
            assert value == pytest.approx(float(row[top_id]), abs=1e-4)


def test_they_are_those_of_transformers(engine: Engine, oracle: Oracle) -> None:
    for prompt, completion in zip(prompts(), engine.generate(prompts(), asked()), strict=True):
        check(oracle, prompt, completion.prompt_logprobs)
        assert all(len(score.top) == NUM_TOP for score in completion.prompt_logprobs)


@pytest.mark.parametrize("num_top", [0, 20])
def test_as_many_of_the_best_as_asked_for(engine: Engine, oracle: Oracle, num_top: int) -> None:
    [completion] = engine.generate([prompts()[3]], asked(num_top))
    check(oracle, prompts()[3], completion.prompt_logprobs)
    assert {len(score.top) for score in completion.prompt_logprobs} == {num_top}


@pytest.mark.parametrize(("max_step_tokens", "run_ahead"), [(1, 0), (7, 1), (16, 1)])
def test_a_prompt_in_parts_beside_others(
    oracle: Oracle, max_step_tokens: int, run_ahead: int
) -> None:
    engine = make_engine(TINY, max_step_tokens=max_step_tokens, run_ahead=run_ahead, max_num_seqs=4)
    engine.runner.record_steps()  # type: ignore[attr-defined]
    neighbour = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    few = prompts()[:4] if max_step_tokens == 1 else prompts()
    each = [asked() if i % 2 else neighbour for i in range(len(few))]
    for prompt, params, one in zip(few, each, engine.generate(few, each), strict=True):
        if params.prompt_logprobs is None:
            assert one.prompt_logprobs == []
        else:
            check(oracle, prompt, one.prompt_logprobs)


def test_logits_are_made_a_piece_at_a_time(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "MAX_LOGITS", 5000)  # two rows of 2048
    engine = make_engine(TINY)
    model = engine.runner.model  # type: ignore[attr-defined]
    most = 0

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            nonlocal most
            most = max(most, len(hidden))
            return model.logits(hidden)

    engine.runner.model = Watched()  # type: ignore[attr-defined]
    [completion] = engine.generate([prompts()[4]], asked())
    check(oracle, prompts()[4], completion.prompt_logprobs)
    assert most == 2


def test_what_the_cache_holds_is_computed_once_more(engine: Engine, oracle: Oracle) -> None:
    prompt = prompts()[5]
    engine.generate([prompt], SamplingParams(max_tokens=1))
    assert engine.stats()["num_cached_pages"] >= 9
    [first] = engine.generate([prompt], asked())
    [second] = engine.generate([prompt], asked())
    check(oracle, prompt, first.prompt_logprobs)
    assert first == second
    started = []
    engine.on_start = started.extend
    engine.generate([prompt], SamplingParams(max_tokens=1))
    engine.on_start = None
    assert started[0].num_cached >= 144, "pages of such a prompt are shared like all others"


def test_the_answer_is_what_it_is_without(engine: Engine) -> None:
    prompt = prompts()[3]
    [plain] = engine.generate(
        [prompt], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    )
    [scored] = engine.generate([prompt], asked())
    assert scored.token_ids == plain.token_ids


def test_preemption_reports_nothing_twice_and_loses_nothing(oracle: Oracle) -> None:
    engine = make_engine(TINY, max_model_len=128, max_num_seqs=4, max_step_tokens=16, run_ahead=1)
    engine.scheduler.pool.allocate(engine.info.num_pages - 10)
    rng = random.Random(5)
    asking = {}
    for _ in range(4):
        prompt = [rng.randrange(3, 2031) for _ in range(rng.randint(50, 80))]
        asking[engine.add(prompt, asked(max_tokens=20))] = prompt
    scores: dict[int, list[TokenLogprobs]] = {seq_id: [] for seq_id in asking}
    tokens = dict.fromkeys(asking, 0)
    half_read = False
    while engine.has_work:
        victim = engine.scheduler.running[-1] if engine.scheduler.running else None
        is_half_read = victim is not None and victim.num_scored > 0 and victim.num_to_score
        if victim is not None and is_half_read and victim.num_preemptions == 0:
            engine.scheduler._preempt(victim)
            half_read = True
        for event in engine.step():
            scores[event.seq_id] += event.prompt_logprobs
            tokens[event.seq_id] += event.token_id is not None
            if event.prompt_logprobs:
                assert event.token_id is None
                assert tokens[event.seq_id] == 0, "the prompt comes before the answer"
    assert half_read
    assert engine.scheduler.num_preemptions > 2
    assert set(tokens.values()) == {20}
    for seq_id, prompt in asking.items():
        check(oracle, prompt, scores[seq_id])


def test_steps_that_were_lost_are_no_gap(oracle: Oracle) -> None:
    """A sequence that waits again while its step fails tells of that step's tokens later."""
    engine = make_engine(TINY, max_step_tokens=16, run_ahead=1, max_num_seqs=2)
    prompt = prompts()[4]
    seq_id = engine.add(prompt, asked())
    events = engine.step() + engine.step()
    [seq] = engine.scheduler.running
    engine.scheduler._preempt(seq)
    assert engine.fail_running() == []
    scores = [score for event in events for score in event.prompt_logprobs]
    while engine.has_work:
        for event in engine.step():
            assert event.seq_id == seq_id
            scores += event.prompt_logprobs
    check(oracle, prompt, scores)


def test_numbers_that_overflow_end_the_sequence(oracle: Oracle) -> None:
    engine = make_engine(TINY, max_step_tokens=16, max_num_seqs=2)
    model = engine.runner.model  # type: ignore[attr-defined]

    class Overflowing:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = model.logits(hidden)
            logits[:, 7] = float("inf")
            return logits

    engine.add(prompts()[4], asked())
    engine.runner.model = Overflowing()  # type: ignore[attr-defined]
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.finish_reason for event in events] == [FinishReason.NOT_FINITE]
    assert not any(event.prompt_logprobs for event in events)


def test_a_long_report_comes_in_messages_of_bounded_size(engine: Engine) -> None:
    prompt = [5] * 1000
    engine.add(prompt, asked(20, max_tokens=1))
    events = []
    while engine.has_work:
        events += engine.step()
    left, right = socket.socketpair()
    received: list[TokenEvent] = []

    def receive_all() -> None:
        while (message := wire.receive(right)) is not None:
            assert sum(len(row) > 3 for row in message["events"]) <= 1
            received.extend(wire.unpack_events(message["events"]))

    with right, in_background(receive_all), left:
        Channel(left).send_events([*events, *events])
    assert received == [*events, *events]
    del received[: len(events)]
    assert sum(len(event.prompt_logprobs) for event in received) == 999


def test_values_out_of_range_are_refused() -> None:
    for value in (-1, 21):
        with pytest.raises(BadRequest, match="prompt_logprobs must be between 0 and 20") as refused:
            SamplingParams(prompt_logprobs=value)
        assert refused.value.param == "prompt_logprobs"
    params = SamplingParams(prompt_logprobs=0)
    assert wire.unpack_params(wire.pack_params(params)) == params
