"""Answers keep the form that was asked for, and thoughts end where they should."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from runtime import Completion, Engine, FinishReason, Grammar, SamplingParams
from runtime.constraints import Constraint, Constraints, LoopDetector
from runtime.request import TokenEvent
from runtime.runner import ModelRunner
from runtime.tokenizer import Tokenizer
from tests.runtime.engines import TINY, make_engine
from tests.runtime.schema_cases import schemas

SCHEMAS = schemas()
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return make_engine(TINY)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def schema_grammar(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def prompt(engine: Engine, question: str, *, thinking: bool = True) -> list[int]:
    """Of a chat; without a thought the prompt closes it, as the templates of V3.1 do."""
    assert engine.tokenizer is not None
    messages = [{"role": "user", "content": question}]
    ids = engine.tokenizer.encode_chat(messages).token_ids
    assert engine.tokenizer.opens_thought(ids) and engine.tokenizer.think_end_id is not None
    return ids if thinking else [*ids, engine.tokenizer.think_end_id]


def answers(engine: Engine, params: Seq[SamplingParams], **options: Any) -> list[Completion]:
    prompts = [prompt(engine, f"{i} plus {i % 7}", **options) for i in range(len(params))]
    return engine.generate(prompts, params)


def check_schemas(engine: Engine, cases: Seq[dict[str, Any]], **options: Any) -> int:
    """Answer every schema; how many answers came to their end. Those are all valid."""
    params = [
        SamplingParams(grammar=schema_grammar(schema), max_tokens=120, seed=index, **options)
        for index, schema in enumerate(cases)
    ]
    num_complete = 0
    for schema, answer in zip(cases, answers(engine, params, thinking=False), strict=True):
        assert answer.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), schema
        if answer.finish_reason is FinishReason.STOP:
            num_complete += 1
            validator = jsonschema.Draft202012Validator(schema)
            validator.validate(json.loads(answer.text))
    return num_complete


def test_there_are_200_schemas() -> None:
    assert len({json.dumps(schema) for schema in SCHEMAS}) >= 200
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("part", "options"),
    [(0, {}), (1, {"frequency_penalty": 1.0, "repetition_penalty": 1.3, "top_k": 20})],
)
def test_answers_are_valid_under_their_schema(
    tiny: Engine, part: int, options: dict[str, Any]
) -> None:
    cases = SCHEMAS[part::8]
    assert check_schemas(tiny, cases, **options) > 0.9 * len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "options", [{}, {"presence_penalty": 2.0}, {"temperature": 2.0}, {"min_p": 0.2, "top_p": 0.5}]
)
def test_all_answers_are_valid(tiny: Engine, seed: int, options: dict[str, Any]) -> None:
    cases = SCHEMAS[seed:] + SCHEMAS[:seed]
    assert check_schemas(tiny, cases, **options) > 0.9 * len(cases)


def test_greedy_json_objects_parse(tiny: Engine) -> None:
    assert tiny.tokenizer is not None
    bias = tuple((tiny.tokenizer.token_bytes.index(end), 12.0) for end in (b'"', b"}"))
    params = [
        SamplingParams(grammar=Grammar("json_object"), temperature=0, max_tokens=n, logit_bias=bias)
        for n in (60, 61, 62, 63)
    ]
    complete = [a for a in answers(tiny, params) if a.finish_reason is FinishReason.STOP]
    assert complete and all(isinstance(json.loads(answer.text), dict) for answer in complete)


@pytest.mark.parametrize("thinking", [True, False])
def test_answers_match_their_expression(tiny: Engine, thinking: bool) -> None:
    expressions = ["[0-9]{3}-[a-f]{2}", "yes|no", "(ab)+c?", "[äöü]{3}", "<think>x", ""]
    params = [
        SamplingParams(grammar=Grammar("regex", text), seed=3, max_tokens=100)
        for text in expressions
    ]
    for text, answer in zip(expressions, answers(tiny, params, thinking=thinking), strict=True):
        assert answer.finish_reason is FinishReason.STOP
        assert re.fullmatch(text, answer.text), text
        assert bool(answer.reasoning) is thinking


def test_a_grammar_may_name_control_tokens(tiny: Engine) -> None:
    grammar = Grammar("lark", "start: <｜tool▁calls▁begin｜> /[a-c]{2}/ <｜tool▁calls▁end｜>")
    [answer] = answers(tiny, [SamplingParams(grammar=grammar, seed=1)], thinking=False)
    assert tiny.tokenizer is not None
    spelt = b"".join(tiny.tokenizer.token_bytes[i] for i in answer.token_ids).decode()
    assert re.match("<｜tool▁calls▁begin｜>[a-c]{2}<｜tool▁calls▁end｜>", spelt)
    assert re.fullmatch("[a-c]{2}", answer.text)


MIXED = [
    SamplingParams(grammar=schema_grammar(RECORD), seed=1, max_tokens=90, thinking_budget=4),
    SamplingParams(grammar=schema_grammar(RECORD), seed=2, max_tokens=90, frequency_penalty=0.5),
    SamplingParams(seed=3, max_tokens=60),
    SamplingParams(seed=4, max_tokens=60, thinking_budget=3, break_loops=True),
    SamplingParams(grammar=Grammar("regex", "[a-z]{20,30}"), seed=5, thinking_budget=0, logprobs=1),
    SamplingParams(
        seed=6, max_tokens=40, min_tokens=30, logit_bias=((5, 3.0),), presence_penalty=1
    ),
]


@functools.cache
def mixed_alone() -> list[list[int]]:
    engine = make_engine(TINY)
    prompts = [prompt(engine, f"{i} plus {i % 7}") for i in range(len(MIXED))]
    return [
        engine.generate([one], params)[0].token_ids
        for one, params in zip(prompts, MIXED, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"run_ahead": 1, "replays": True},
        {"run_ahead": 1, "max_num_seqs": 2},
        {"max_model_len": 128, "page_size": 16, "num_pages": 8},
        {"prefix_cache": False, "max_step_tokens": 8, "max_num_seqs": 4},
    ],
)
def test_neighbours_steps_ahead_and_preemptions_change_no_token(options: dict[str, Any]) -> None:
    options = dict(options)
    num_pages, replays = options.pop("num_pages", None), options.pop("replays", False)
    engine = make_engine(TINY, **options)
    if replays:
        assert isinstance(engine.runner, ModelRunner)
        engine.runner.record_steps()
    if num_pages is not None:
        engine.scheduler.pool.allocate(engine.info.num_pages - num_pages)
    preempted = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda seq: (preempted.append(seq), preempt(seq))[1]  # type: ignore[method-assign]
    for _ in range(1 + engine.info.prefix_cache):  # the second time from the cache
        assert [answer.token_ids for answer in answers(engine, MIXED)] == mixed_alone()
    assert bool(preempted) == (num_pages is not None)


# -- the end of an answer --------------------------------------------------------------------


def test_a_complete_answer_is_followed_by_end_tokens_only(tiny: Engine) -> None:
    assert tiny.tokenizer is not None
    [end_id] = tiny.tokenizer.eos_token_ids
    params = SamplingParams(grammar=Grammar("regex", "abc"), ignore_eos=True, max_tokens=12)
    least = SamplingParams(grammar=Grammar("regex", "abc"), min_tokens=9)
    ignoring, waiting = answers(tiny, [params, least], thinking=False)
    assert ignoring.text == waiting.text == "abc"
    assert len(ignoring.token_ids) == 12 and ignoring.finish_reason is FinishReason.LENGTH
    assert len(waiting.token_ids) == 9 and waiting.finish_reason is FinishReason.STOP
    assert set(ignoring.token_ids[3:] + waiting.token_ids[3:]) == {end_id}


def test_min_tokens_hold_back_an_end_that_the_grammar_allows(tiny: Engine) -> None:
    params = SamplingParams(grammar=Grammar("regex", "[a-z]*"), min_tokens=20, max_tokens=20)
    [answer] = answers(tiny, [params], thinking=False)
    assert len(answer.token_ids) == 20 and re.fullmatch("[a-z]{19,}", answer.text)


def test_a_stop_token_ends_an_answer_that_a_grammar_forms(tiny: Engine) -> None:
    assert tiny.tokenizer is not None
    stop_id = tiny.tokenizer.token_bytes.index(b",")
    params = SamplingParams(grammar=Grammar("regex", "abc,+"), stop_token_ids=(stop_id,))
    waiting = SamplingParams(
        grammar=Grammar("regex", "abc,"), stop_token_ids=(stop_id,), min_tokens=50, max_tokens=60
    )
    [first, second] = answers(tiny, [params, waiting], thinking=False)
    assert (first.text, first.token_ids[-1]) == ("abc", stop_id)
    assert second.text == "abc," and second.finish_reason is FinishReason.STOP


# -- the thought -----------------------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("budget", [0, 1, 2, 7])
def test_a_thought_has_as_many_tokens_as_its_budget(budget: int, run_ahead: int) -> None:
    engine = make_engine(TINY, run_ahead=run_ahead)
    assert engine.tokenizer is not None
    params = SamplingParams(thinking_budget=budget, temperature=0, max_tokens=40)
    [answer] = engine.generate([prompt(engine, "Tell me about Python")], params)
    assert answer.token_ids.index(engine.tokenizer.think_end_id or 0) == budget
    assert len(answer.text) > 20


def test_a_budget_above_the_thought_changes_nothing(tiny: Engine) -> None:
    plain = SamplingParams(temperature=0, max_tokens=60)
    wide = SamplingParams(temperature=0, max_tokens=60, thinking_budget=50, break_loops=True)
    one = prompt(tiny, "hello")
    assert len({tuple(a.token_ids) for a in tiny.generate([one, one], [plain, wide])}) == 1


def steps_until_done(engine: Engine, params: SamplingParams) -> int:
    engine.add(prompt(engine, "Tell me about Python"), params)
    count = 0
    while engine.has_work:
        engine.step()
        count += 1
    return count


def test_only_what_depends_on_the_last_token_waits_for_it() -> None:
    engine = make_engine(TINY, run_ahead=1)
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    count = steps_until_done(engine, plain)
    for constraint in ({"thinking_budget": 30}, {"break_loops": True}):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **constraint)
        assert steps_until_done(engine, params) == count
    formed = SamplingParams(max_tokens=40, grammar=Grammar("regex", "[a-z]{900}"))
    assert steps_until_done(engine, formed) > 1.8 * count


@pytest.mark.parametrize(
    ("period", "count"), [(1, 64), (2, 64), (3, 64), (16, 64), (17, 68), (64, 256)]
)
def test_a_loop_counts_once_it_is_long_and_holds_its_period_often(period: int, count: int) -> None:
    detector = LoopDetector()
    for token_id in range(1000, 1100):  # what came before does not matter
        detector.feed(token_id)
    for index in range(count):
        assert not detector.may_loop_within(0)
        assert detector.may_loop_within(1) == (index == count - 1)
        detector.feed(index % period)
    assert detector.may_loop_within(0)


def test_what_nearly_repeats_is_no_loop() -> None:
    detector = LoopDetector()
    for index in range(2000):
        detector.feed(index % 7 if index % 61 else 1000 + index)
        assert not detector.may_loop_within(0)
    for index in range(2000):  # a period too long to be looked for
        detector.feed(index % 65)
        assert not detector.may_loop_within(0)


def follow(tokenizer: Tokenizer, prompt_ids: Seq[int], params: SamplingParams) -> Constraint:
    constraint = Constraints(tokenizer).make(prompt_ids, params)
    assert constraint is not None
    return constraint


def allowed(constraint: Constraint, output_ids: Seq[int], banned: Seq[int] = ()) -> set[int]:
    words = constraint.bitmask(output_ids, banned)
    return {i for i in range(32 * len(words)) if int(words[i // 32]) >> i % 32 & 1}


def test_a_loop_in_a_thought_closes_it(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    assert start is not None and end is not None
    constraint = follow(tokenizer, [0, start], SamplingParams(break_loops=True))
    thought = [5, 6, 7, *[10, 11] * 32]
    assert not constraint.is_masked(thought[:-1])
    assert constraint.depends_on_pending(thought[:-1], 1)
    assert constraint.is_masked(thought) and allowed(constraint, thought) == {end}
    assert not constraint.is_masked([*thought, end])
    assert not constraint.is_masked([*thought, end, *[3] * 100])  # an answer may repeat itself


def test_an_answer_may_begin_with_a_thought_unless_the_prompt_closed_it(
    tokenizer: Tokenizer,
) -> None:
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    assert start is not None and end is not None
    [eos] = tokenizer.eos_token_ids
    newline = tokenizer.token_bytes.index(b"\n")
    params = SamplingParams(grammar=Grammar("regex", "7x"), thinking_budget=2)
    seven, x = (tokenizer.token_bytes.index(text) for text in (b"7", b"x"))
    opening = follow(tokenizer, [0, 20], params)
    assert allowed(opening, []) == {seven, start}
    thought = allowed(opening, [start])
    assert eos not in thought and len(thought) == tokenizer.num_tokens - 1
    assert allowed(opening, [start, 9, 9]) == {end}
    after = allowed(opening, [start, 9, 9, end])
    assert {seven, newline} <= after and start not in after
    assert allowed(opening, [start, 9, 9, end, newline]) == {seven}
    assert allowed(opening, [start, 9, 9, end, newline, seven]) == {x}
    closed = follow(tokenizer, [0, start, end, newline], params)
    assert allowed(closed, []) == {seven}
    assert allowed(closed, [seven, x]) == {eos}
    assert allowed(closed, [seven, x], [eos]) == {eos}


def test_a_thought_without_a_token_of_its_own_is_closed_by_text(tokenizer: Tokenizer) -> None:
    other = Tokenizer.load(TINY)
    other.think_start_id = other.think_end_id = None
    prompt_ids = other.grammar_vocabulary.spell(b"x<think>")
    assert other.opens_thought(prompt_ids)
    params = SamplingParams(grammar=Grammar("regex", "7"), thinking_budget=2)
    constraint = follow(other, prompt_ids, params)
    output = [30, 31]
    while constraint.is_masked(output) and len(choice := allowed(constraint, output)) == 1:
        output += choice
    assert b"".join(other.token_bytes[i] for i in output[2:]).startswith(b"</think>")
    assert other.token_bytes.index(b"7") in allowed(constraint, output)


def test_a_sequence_that_no_token_can_follow_ends_alone() -> None:
    engine = make_engine(TINY)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    grammar = Grammar("regex", "a{1,9}")
    prompts = [prompt(engine, "hello", thinking=False)] * 3
    expected = engine.generate(prompts[:1], params)[0].token_ids
    ids = [
        engine.add(prompts[0], params),
        engine.add(prompts[1], SamplingParams(grammar=grammar, ignore_eos=True, seed=1)),
        engine.add(prompts[2], params),
    ]
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
        for seq in engine.scheduler.running:
            if seq.seq_id == ids[1] and len(seq.output_ids) == 2:
                seq.output_ids[1] = 5  # what the grammar does not allow
    ends = {e.seq_id: e.finish_reason for e in events if e.finish_reason is not None}
    assert ends == {ids[0]: "length", ids[1]: "error", ids[2]: "length"}
    for seq_id in (ids[0], ids[2]):
        assert [e.token_id for e in events if e.seq_id == seq_id] == expected
    assert engine.stats()["num_sequences"] == 0
    engine.scheduler.check()


def test_an_engine_is_ready_for_its_first_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(TINY)
    monkeypatch.delattr("llguidance.LLTokenizer")  # a second for a large vocabulary
    params = SamplingParams(grammar=Grammar("regex", "[0-9]{3}"), temperature=0.0)
    [completion] = engine.generate(["7 + 5 ="], params)
    assert re.fullmatch("[0-9]{3}", completion.text)


def test_end_tokens_that_the_tokenizer_lacks_are_no_end(tmp_path: Path) -> None:
    """A head may have more rows than there are tokens, and a checkpoint may end on one of those."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    num_tokens = Tokenizer.load(TINY).num_tokens
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": num_tokens + 1000}))
    generation = folder / "generation_config.json"
    end_id = min(Tokenizer.load(TINY).eos_token_ids)
    generation.write_text(json.dumps({"eos_token_id": [end_id, num_tokens + 900]}))
    tokenizer = Tokenizer.load(folder)
    constraint = follow(tokenizer, [5], SamplingParams(grammar=Grammar("regex", "[0-9]")))
    seven = tokenizer.encode_text("7")
    assert allowed(constraint, seven) == {end_id}
