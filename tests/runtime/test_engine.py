"""The whole engine against transformers, and against itself under every way to run a request."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime import (
    BadRequest,
    ContextLengthExceeded,
    Engine,
    FinishReason,
    SamplingParams,
    Tokenizer,
)
from runtime.graphs import HostQueue
from runtime.request import Sequence
from tests.runtime.checkpoints import (
    DEEPSEEK_V3,
    LINEAR_ROPE,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    write_checkpoint,
)
from tests.runtime.engines import TINY, Oracle, Recorder, chats, make_engine

NUM_NEW = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
RANDOM = {
    "qwen2": QWEN2,
    "llama3-rope": LLAMA | {"rope_scaling": LLAMA3_ROPE},
    "linear-rope": LLAMA | {"rope_scaling": LINEAR_ROPE, "num_key_value_heads": 1},
    "deepseek-v3": DEEPSEEK_V3,
}
FAMILIES = ["fathom-tiny", *RANDOM]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    num_tokens = Tokenizer.load(TINY).num_tokens
    sizes = {"vocab_size": num_tokens, "max_position_embeddings": 1024}
    return {"fathom-tiny": TINY} | {
        name: write_checkpoint(root / name, config | sizes, with_tokenizer=True)
        for name, config in RANDOM.items()
    }


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, folders: dict[str, Path]
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, twelve prompts of ragged lengths, and transformers' greedy continuations."""
    folder = folders[request.param]
    oracle = Oracle(folder)
    if request.param == "fathom-tiny":
        tokenizer = make_engine(folder).tokenizer
        assert tokenizer is not None
        prompts = [tokenizer.encode_chat(chat).token_ids for chat in chats()[::5]]
        prompts += [prompts[0] * 14, prompts[1] * 3]
    else:
        rng = random.Random(7)
        vocab_size = oracle.model.config.vocab_size
        lengths = [1, 2, 15, 16, 17, 31, 33, 47, 64, 65, 100, 300]
        prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return folder, prompts, [oracle.greedy(prompt, NUM_NEW) for prompt in prompts]


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(prompts, GREEDY)]


def assert_idle(engine: Engine) -> None:
    """Nothing is left behind: no sequence, no page, no row."""
    engine.scheduler.check()
    stats = engine.stats()
    assert stats["num_sequences"] == stats["num_running"] == stats["num_waiting"] == 0
    assert stats["num_free_pages"] == stats["num_pages"]


def test_logits_are_the_reference_models_at_every_position_of_fifty_prompts() -> None:
    engine, oracle = make_engine(TINY), Oracle(TINY)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    worst = 0.0
    for chat in chats():
        prompt = tokenizer.encode_chat(chat)
        engine.runner.model = recorder = Recorder(engine.runner.model)  # type: ignore[attr-defined]
        [completion] = engine.generate(
            [prompt.token_ids], SamplingParams(temperature=0, max_tokens=4)
        )
        engine.runner.model = recorder._model  # type: ignore[attr-defined]
        known = prompt.token_ids + completion.token_ids[:-1]
        difference = (recorder.all_logits() - oracle.logits(known)).abs().max()
        worst = max(worst, float(difference))
    assert worst < 1e-4
    assert_idle(engine)


@pytest.mark.parametrize("chunk", [1, 15, 16, 17, 64, 4096])
def test_chunk_size_changes_no_token(
    family: tuple[Path, list[list[int]], list[list[int]]], chunk: int
) -> None:
    folder, prompts, expected = family
    engine = make_engine(folder, max_step_tokens=chunk)
    assert [answers(engine, [prompt])[0] for prompt in prompts] == expected
    assert_idle(engine)


@pytest.mark.parametrize("page_size", [1, 8, 16, 32])
def test_page_size_and_company_change_no_token(
    family: tuple[Path, list[list[int]], list[list[int]]], page_size: int
) -> None:
    folder, prompts, expected = family
    engine = make_engine(folder, page_size=page_size)
    assert answers(engine, prompts) == expected
    assert_idle(engine)


def test_neighbours_that_join_and_leave_change_no_token(
    family: tuple[Path, list[list[int]], list[list[int]]],
) -> None:
    folder, prompts, expected = family
    engine = make_engine(folder, max_num_seqs=32)
    rng = random.Random(3)
    watched = {engine.add(prompt, GREEDY): i for i, prompt in enumerate(prompts)}
    received: dict[int, list[int]] = {seq_id: [] for seq_id in watched}
    strangers: list[int] = []
    most_running = 0
    while not all(len(tokens) == NUM_NEW for tokens in received.values()):
        while engine.stats()["num_sequences"] < 32:
            params = SamplingParams(max_tokens=rng.randint(1, 40), seed=rng.getrandbits(60))
            strangers.append(engine.add(rng.choice(prompts)[: rng.randint(1, 60)], params))
        if rng.random() < 0.3:
            engine.abort(strangers.pop(rng.randrange(len(strangers))))
        for event in engine.step():
            if event.seq_id in received:
                received[event.seq_id].append(event.token_id or 0)
        most_running = max(most_running, engine.stats()["num_running"])
    for seq_id in strangers:
        engine.abort(seq_id)
    assert most_running > 25
    assert [received[seq_id] for seq_id in watched] == expected
    assert_idle(engine)


def test_preemption_changes_no_token(
    family: tuple[Path, list[list[int]], list[list[int]]],
) -> None:
    folder, prompts, expected = family
    short = [i for i, prompt in enumerate(prompts) if len(prompt) <= 100]
    engine = make_engine(folder, max_model_len=128, max_num_seqs=8)
    engine.scheduler.pool.allocate(engine.info.num_pages - 16)  # leave room for two at full length
    preempted = 0
    pending = {engine.add(prompts[i], GREEDY): i for i in short}
    received: dict[int, list[int]] = {i: [] for i in short}
    while engine.has_work:
        for event in engine.step():
            received[pending[event.seq_id]].append(event.token_id or 0)
        preempted += sum(seq.num_preemptions for seq in engine.scheduler.waiting)
    assert preempted > 0
    assert received == {i: expected[i] for i in short}


def replaying(engine: Engine) -> Engine:
    """The same engine, whose decode steps are recorded and replayed as graphs are on a GPU."""
    engine.runner.record_steps()  # type: ignore[attr-defined]
    return engine


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_replayed_steps_and_late_reading_change_no_token(
    family: tuple[Path, list[list[int]], list[list[int]]], run_ahead: int
) -> None:
    """Batches of 1 to 12 padded to recorded sizes, contexts on both sides of a limit."""
    folder, prompts, expected = family
    engine = replaying(make_engine(folder, run_ahead=run_ahead, max_num_seqs=12, page_size=8))
    assert answers(engine, prompts) == expected
    assert [answers(engine, [prompt])[0] for prompt in prompts] == expected
    assert answers(engine, prompts[:3]) == expected[:3]
    assert engine.runner.graphs.num_graphs >= 3  # type: ignore[attr-defined]
    assert_idle(engine)


def test_steps_that_memory_does_not_suffice_to_record_run_unrecorded(tiny: Engine) -> None:
    class FullQueue(HostQueue):
        def record(self, step: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(TINY, run_ahead=1)
    engine.runner.queue = FullQueue()  # type: ignore[attr-defined]
    replaying(engine)
    prompts = [chat_ids(tiny, "hello"), chat_ids(tiny, "count to 10")]
    assert answers(engine, prompts) == answers(tiny, prompts)
    assert engine.runner.graphs.num_graphs == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("replays", [False, True])
def test_steps_run_ahead_of_every_kind_of_sampling(tiny: Engine, replays: bool) -> None:
    """Penalties, bias, min_tokens and logprobs of a token follow from those before it."""
    prompts = [chat_ids(tiny, chat[-1]["content"]) for chat in chats()[:12]]
    kinds = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.9, "top_k": 30},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"logit_bias": ((77, 3.0), (78, -100.0)), "min_tokens": 6},
        {"logprobs": 3, "min_p": 0.05},
    ]
    each = [
        SamplingParams(**({"max_tokens": 5 + i, "seed": i} | kinds[i % len(kinds)]))
        for i in range(len(prompts))
    ]
    ahead = make_engine(TINY, run_ahead=1)
    if replays:
        replaying(ahead)
    for chosen in (slice(None), slice(2, 3), slice(3, 4), slice(0, 2)):
        assert ahead.generate(prompts[chosen], each[chosen]) == (
            tiny.generate(prompts[chosen], each[chosen])
        )
    assert_idle(ahead)


def test_preemption_and_aborts_while_running_ahead_change_no_token(
    family: tuple[Path, list[list[int]], list[list[int]]],
) -> None:
    folder, prompts, expected = family
    short = [i for i, prompt in enumerate(prompts) if len(prompt) <= 100]
    engine = replaying(make_engine(folder, max_model_len=128, max_num_seqs=8, run_ahead=1))
    engine.scheduler.pool.allocate(engine.info.num_pages - 16)
    watched = {engine.add(prompts[i], GREEDY): i for i in short}
    strangers = [engine.add(prompts[i], GREEDY) for i in short]
    received: dict[int, list[int]] = {i: [] for i in short}
    preempted = 0
    while engine.has_work:
        for event in engine.step():
            if event.seq_id in watched:
                received[watched[event.seq_id]].append(event.token_id or 0)
        preempted += sum(seq.num_preemptions for seq in engine.scheduler.waiting)
        if strangers and preempted:
            engine.abort(strangers.pop())
    assert preempted > 0
    assert received == {i: expected[i] for i in short}


def test_the_next_step_is_launched_before_the_last_is_read(tiny: Engine) -> None:
    """The order that keeps a device busy: launch, launch, read, launch, read, ..., read."""
    calls: list[str] = []

    class Watched:
        def __init__(self, runner: Any) -> None:
            self.runner = runner

        def launch(self, plan: Any) -> Any:
            step = self.runner.launch(plan)
            calls.append("launch")
            return SimpleNamespace(failed=[], tokens=lambda: calls.append("read") or step.tokens())

    engine = make_engine(TINY, run_ahead=1)
    engine.runner = Watched(engine.runner)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.generate([chat_ids(tiny, "hello")], params)
    assert calls == ["launch", *["launch", "read"] * 4, "read"]


@pytest.mark.interpreter
def test_the_triton_bodies_give_the_reference_models_tokens(
    family: tuple[Path, list[list[int]], list[list[int]]],
) -> None:
    folder, prompts, expected = family
    chosen = [i for i, prompt in enumerate(prompts) if len(prompt) <= 64][:5]
    engine = make_engine(folder, max_step_tokens=48, page_size=8)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    completions = engine.generate([prompts[i] for i in chosen], params)
    assert [c.token_ids for c in completions] == [expected[i][:6] for i in chosen]
    assert_idle(engine)


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return make_engine(TINY)


def chat_ids(engine: Engine, question: str) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode_chat([{"role": "user", "content": question}]).token_ids


def test_the_same_seed_gives_the_same_answer_alone_and_in_a_batch(tiny: Engine) -> None:
    prompts = [chat_ids(tiny, chat[-1]["content"]) for chat in chats()[:24]]
    each = [
        SamplingParams(
            temperature=0.7 + 0.05 * (i % 5),
            top_p=[1.0, 0.95, 0.8][i % 3],
            top_k=[0, 20][i % 2],
            frequency_penalty=[0.0, 0.3][i % 2],
            min_p=[0.0, 0.02][i % 2],
            max_tokens=40,
            seed=1000 + i,
        )
        for i in range(len(prompts))
    ]
    together = [c.token_ids for c in tiny.generate(prompts, each)]
    alone = [
        tiny.generate([prompt], params)[0].token_ids
        for prompt, params in zip(prompts, each, strict=True)
    ]
    assert together == alone
    assert_idle(tiny)


def test_another_seed_gives_another_answer_and_no_seed_varies(tiny: Engine) -> None:
    prompt = chat_ids(tiny, "hello")
    fixed = SamplingParams(temperature=2.0, max_tokens=30, seed=1)
    seeds = [fixed, fixed, SamplingParams(temperature=2.0, max_tokens=30, seed=2)]
    first, second, third = (c.token_ids for c in tiny.generate([prompt] * 3, seeds))
    assert first == second != third
    free = tiny.generate([prompt] * 4, SamplingParams(temperature=2.0, max_tokens=30))
    assert len({tuple(c.token_ids) for c in free}) > 1


def test_a_greeting_is_thought_about_and_answered(tiny: Engine) -> None:
    [completion] = tiny.generate([chat_ids(tiny, "hello")], SamplingParams(temperature=0))
    assert completion.finish_reason is FinishReason.STOP
    assert "hello there" in completion.text.lower()
    assert completion.reasoning.strip()
    assert "</think>" not in completion.text + completion.reasoning


def test_max_tokens_ends_with_length_and_stop_ends_before_its_text(tiny: Engine) -> None:
    prompt = chat_ids(tiny, "count to 10")
    [whole] = tiny.generate([prompt], SamplingParams(temperature=0))
    [cut] = tiny.generate([prompt], SamplingParams(temperature=0, max_tokens=5))
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.token_ids == whole.token_ids[:5]
    assert "6" in whole.text
    [stopped] = tiny.generate([prompt], SamplingParams(temperature=0, stop=("6",)))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text == whole.text.split("6")[0]
    assert len(stopped.token_ids) < len(whole.token_ids)
    assert_idle(tiny)


def test_min_tokens_holds_the_end_back(tiny: Engine) -> None:
    prompt = chat_ids(tiny, "hello")
    [free] = tiny.generate([prompt], SamplingParams(temperature=0))
    longer = len(free.token_ids) + 10
    [held] = tiny.generate([prompt], SamplingParams(temperature=0, min_tokens=longer))
    assert len(held.token_ids) >= longer


def test_logit_bias_bans_and_forces(tiny: Engine) -> None:
    prompt = chat_ids(tiny, "hello")
    [free] = tiny.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
    banned = free.token_ids[0]
    params = SamplingParams(temperature=0, max_tokens=1, logit_bias=((banned, -100.0),))
    [other] = tiny.generate([prompt], params)
    assert other.token_ids[0] != banned
    forced = SamplingParams(temperature=1, max_tokens=5, logit_bias=((77, 100.0),))
    assert tiny.generate([prompt], forced)[0].token_ids == [77] * 5


def test_logprobs_are_the_models_own_log_probabilities(tiny: Engine) -> None:
    prompt = chat_ids(tiny, "hello")
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=6, logprobs=4, presence_penalty=1)
    [completion] = tiny.generate([prompt], params)
    assert tiny.tokenizer is not None
    num_tokens = tiny.tokenizer.num_tokens
    logits = Oracle(TINY).logits(prompt + completion.token_ids[:-1])[-6:, :num_tokens]
    expected = logits.double().log_softmax(-1)
    for row, token_id, logprobs in zip(
        expected, completion.token_ids, completion.logprobs, strict=True
    ):
        assert logprobs.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        values, ids = row.topk(4)
        assert [i for i, _ in logprobs.top] == ids.tolist()
        assert [v for _, v in logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_presence_penalty_forbids_what_was_said(tiny: Engine) -> None:
    prompt = chat_ids(tiny, "count to 10")
    params = SamplingParams(
        temperature=0, max_tokens=40, presence_penalty=2, frequency_penalty=2, ignore_eos=True
    )
    [penalized] = tiny.generate([prompt], params)
    [free] = tiny.generate([prompt], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert len(set(penalized.token_ids)) > len(set(free.token_ids))


def test_a_sequence_whose_parameters_cannot_be_taken_over_ends_alone(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [chat_ids(tiny, question) for question in ("hello", "who are you?", "thanks")]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = [completion.token_ids for completion in tiny.generate(prompts, params)]
    ids = [tiny.add(prompt, params) for prompt in prompts]
    sampler = tiny.runner.sampler  # type: ignore[attr-defined]
    start = sampler.start

    def failing(seq: Sequence) -> None:
        if seq.seq_id == ids[1]:
            raise RecursionError("of this row")
        start(seq)

    monkeypatch.setattr(sampler, "start", failing)
    received: dict[int, list[int | None]] = {seq_id: [] for seq_id in ids}
    while tiny.has_work:
        for event in tiny.step():
            received[event.seq_id].append(event.token_id)
            assert (event.finish_reason is FinishReason.ERROR) == (event.seq_id == ids[1])
    assert list(received.values()) == [expected[0], [None], expected[2]]
    assert_idle(tiny)
    assert "of this row" in capsys.readouterr().err


def test_a_completion_whose_row_is_not_finite_breaks_off_alone(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [chat_ids(tiny, question) for question in ("hello", "who are you?", "thanks")]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = [completion.token_ids for completion in tiny.generate(prompts, params)]
    model = tiny.runner.model  # type: ignore[attr-defined]
    logits, steps = model.logits, []

    def spoilt(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = logits(hidden)
        steps.append(len(result))
        if len(steps) == 3:
            result[1, 7] = torch.nan
        return result

    monkeypatch.setattr(model, "logits", spoilt)
    completions = tiny.generate(prompts, params)
    assert [completion.finish_reason for completion in completions] == [
        FinishReason.LENGTH,
        FinishReason.NOT_FINITE,
        FinishReason.LENGTH,
    ]
    assert [completion.token_ids for completion in completions] == [
        expected[0],
        expected[1][:2],
        expected[2],
    ]
    assert_idle(tiny)


def test_refusals_leave_nothing_behind(tiny: Engine) -> None:
    with pytest.raises(ContextLengthExceeded):
        tiny.add([5] * 1024, SamplingParams())
    with pytest.raises(BadRequest):
        tiny.generate([[5], []], SamplingParams())
    assert_idle(tiny)


def test_thousand_random_adds_steps_and_aborts_leave_every_page_free(tiny: Engine) -> None:
    rng = random.Random(11)
    live: list[int] = []
    for _ in range(1000):
        action = rng.random()
        if action < 0.4:
            params = SamplingParams(max_tokens=rng.randint(1, 30), seed=rng.getrandbits(60))
            live.append(tiny.add([rng.randrange(5, 300)] * rng.randint(1, 200), params))
        elif action < 0.6 and live:
            tiny.abort(live.pop(rng.randrange(len(live))))
        else:
            tiny.step()
        tiny.scheduler.check()
    for seq_id in live:
        tiny.abort(seq_id)
    assert_idle(tiny)


def test_bfloat16_answers_the_greeting_too() -> None:
    engine = make_engine(TINY, dtype="bfloat16")
    [completion] = engine.generate([chat_ids(engine, "hello")], SamplingParams(temperature=0))
    assert "hello there" in completion.text.lower()
    assert engine.runner.caches[0]["latent"].dtype is torch.bfloat16  # type: ignore[attr-defined]
