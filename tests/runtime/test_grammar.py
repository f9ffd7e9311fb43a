"""Which formats are refused, and what the tokens of a vocabulary are to a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import BadRequest, Grammar, Tokenizer, check_grammar
from runtime.grammar import MAX_GRAMMAR_CHARS, MAX_LEVELS, GrammarVocabulary
from tests.runtime.engines import TINY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def chain(count: int, **part: Any) -> str:
    """A schema whose definitions refer to each other one behind the other."""
    definitions: dict[str, Any] = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}], **part} for i in range(count)
    }
    return json.dumps(
        {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": {"type": "object"}}}
    )


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def together(*parts: dict[str, Any]) -> str:
    return json.dumps({"allOf": parts})


def record(count: int, **more: Any) -> str:
    """An object of which nothing is required, so that any property may come next."""
    return json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(count)}, **more})


def in_turn(*parts: dict[str, Any], reference: str = "#/$defs/d", **more: str) -> str:
    """Each part refers to the next, which holds too."""
    definitions = {
        f"d{i}": {"$anchor": f"d{i}", **part, "$ref": f"{reference}{i + 1}"}
        for i, part in enumerate(parts)
    }
    last = {f"d{len(parts)}": {"$anchor": f"d{len(parts)}"}}
    return json.dumps({"$ref": f"{reference}0", "$defs": definitions | last, **more})


SEARCHES = [{"type": "string", "pattern": f"a{i}"} for i in range(60)]
LARGE = [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949)]
RULES = "\n".join(f"r{i}: r{i + 1}" for i in range(MAX_LEVELS))
REFUSED = [
    (Grammar("json_schema", '{"type": "strin"}'), "strin"),
    (Grammar("json_schema", '{"type": '), "not JSON"),
    (Grammar("json_schema", "[]"), "object"),
    (Grammar("json_schema", '{"not": {}}'), "not"),
    (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable"),
    (Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum"),
    (Grammar("json_schema", '{"$ref": "#"}'), "no answer fits"),
    (Grammar("json_schema", '{"$ref": "#/$defs/x"}'), "x"),
    (Grammar("json_schema", '{"$ref": "http://localhost:1/x"}'), "localhost"),
    (Grammar("json_schema", nested(5000)), "nested"),
    (Grammar("json_schema", chain(1000)), f"{MAX_LEVELS} levels"),
    (Grammar("json_schema", '{"const": "\\ud800"}'), ""),
    (
        Grammar("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(1001)}})),
        "1000 properties",
    ),
    (Grammar("regex", "(a"), "unclosed"),
    (Grammar("regex", "(?=a)b"), "look-around"),
    (Grammar("regex", "(" * 9000 + ")" * 9000), "nest"),
    (Grammar("regex", "\ud800"), ""),
    (Grammar("lark", ""), "Empty"),
    (Grammar("lark", "start: nothing"), "nothing"),
    (Grammar("lark", "start: <nothing>"), "nothing"),
    (Grammar("lark", "start: " + "(" * 9000 + '"a"' + ")" * 9000), "nested"),
    (Grammar("lark", f'start: r0\n{RULES}\nr{MAX_LEVELS}: "a"'), f"{MAX_LEVELS} levels"),
    (Grammar("lark", f"start: %json {chain(1000)}"), f"{MAX_LEVELS} levels"),
    (Grammar("lark", 'start: %json {"a": '), "embeds"),
    # No thread that starts to compile one of these ever ends.
    (Grammar("json_schema", together(*SEARCHES)), "patterns"),
    (Grammar("json_schema", in_turn(*SEARCHES)), "patterns"),
    (Grammar("json_schema", in_turn(*SEARCHES, reference="#/%24defs/d")), "patterns"),
    (Grammar("json_schema", in_turn(*SEARCHES, reference="#d")), "#d0"),
    (
        Grammar(
            "json_schema",
            in_turn(*SEARCHES, reference="http://x/y#/$defs/d", **{"$id": "http://x/y"}),
        ),
        "http://x/y",
    ),
    (
        Grammar("json_schema", together({"$id": "http://x/z", "$ref": "#/$defs/d"}, {"$defs": {}})),
        "",
    ),
    (Grammar("json_schema", together(*({"properties": {"x": s}} for s in SEARCHES))), "patterns"),
    (Grammar("json_schema", together(*({"anyOf": [s, {}]} for s in SEARCHES))), "patterns"),
    (Grammar("json_schema", together(*LARGE)), "multipleOf"),
    (Grammar("json_schema", json.dumps({"items": {"anyOf": LARGE}})), "multipleOf"),
    (Grammar("json_schema", together({"multipleOf": 1e-7}, {"multipleOf": 7.3})), "multipleOf"),
    (Grammar("lark", f"start: %json {together(*SEARCHES)}"), "patterns"),
    (Grammar("lark", "start: T\nT: " + " & ".join(f"/.*a{i}.*/" for i in range(60))), "&"),
    # These take seconds, for which all sequences would wait, or fail at the second token.
    (Grammar("regex", "a?" * 9000 + "a" * 9000), ""),
    (Grammar("regex", "a{4294967295}"), "too many"),
    (Grammar("lark", "start: " + '"a"? ' * 9000), ""),
    (Grammar("lark", f"start: %json {record(999, type='object')}"), "max"),
]


@pytest.mark.parametrize(
    ("grammar", "reason"), REFUSED, ids=[f"{g.kind}-{i}" for i, (g, _) in enumerate(REFUSED)]
)
def test_a_bad_format_is_one_line_that_says_why(
    tokenizer: Tokenizer, grammar: Grammar, reason: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        check_grammar(grammar, tokenizer)
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_json_schema")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_object"),
        Grammar("json_schema", "{}"),
        Grammar("json_schema", chain(100)),
        Grammar("json_schema", '{"type": "array", "minItems": 100000}'),
        Grammar("json_schema", record(999)),
        Grammar("json_schema", record(900, additionalProperties={"type": "integer"})),
        Grammar("json_schema", json.dumps({"enum": [{"a": i} for i in range(2500)]})),
        Grammar("json_schema", json.dumps({"anyOf": SEARCHES})),
        Grammar("json_schema", together({"properties": {s["pattern"]: s for s in SEARCHES}}, {})),
        Grammar("json_schema", json.dumps({"properties": dict(zip("abc", LARGE, strict=True))})),
        Grammar("json_schema", together({"multipleOf": 0.01}, {"multipleOf": 0.05})),
        Grammar("lark", 'start: "&&&&&&" | /&+&+&+&+/ // & & & & &'),
        Grammar("regex", ""),
        Grammar("regex", "(((x{1,1000}){1,1000}){1,1000})*"),
        Grammar(
            "lark", 'start: <｜tool▁calls▁begin｜> %json {"$ref": "#/$defs/a", "$defs": {"a": {}}}'
        ),
    ],
)
def test_formats_that_are_taken(tokenizer: Tokenizer, grammar: Grammar) -> None:
    check_grammar(grammar, tokenizer)


def test_a_format_has_a_limited_length() -> None:
    Grammar("regex", "a" * MAX_GRAMMAR_CHARS)
    with pytest.raises(BadRequest, match=str(MAX_GRAMMAR_CHARS)):
        Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1))
    with pytest.raises(BadRequest, match="xml"):
        Grammar("xml")  # type: ignore[arg-type]


def allowed(vocabulary: GrammarVocabulary, grammar: Grammar, *token_ids: int) -> set[int]:
    matcher = vocabulary.compile(grammar)
    assert matcher.consume_tokens(list(token_ids))
    mask = matcher.compute_bitmask()
    return {i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1}


TOKENS = [
    b"<end>",
    b"a",
    b"b",
    b"ab",
    b"<ctl>",
    b"",
    b"<stop>",
    "é".encode()[:1],
    b"\xa9",
    b"<",
    b">",
]
TOKENS += [bytes([letter]) for letter in b"ctl"]


def make_vocabulary() -> GrammarVocabulary:
    def encode(text: str) -> list[int]:
        if text.startswith("<ctl>"):
            return [4]
        letters = [bytes([letter]) for letter in text.encode()]
        return [TOKENS.index(letter) for letter in letters if letter in TOKENS]

    return GrammarVocabulary(TOKENS, control_ids=[4], end_ids=[6, 0], encode=encode)


def test_every_spelling_of_a_text_is_allowed() -> None:
    vocabulary = make_vocabulary()
    assert allowed(vocabulary, Grammar("regex", "a(b|c)?")) == {1, 3}
    assert allowed(vocabulary, Grammar("regex", "a(b|c)?"), 1) == {2, 11, 0, 6}
    assert allowed(vocabulary, Grammar("regex", "[éx]"), 7) == {8}
    assert allowed(vocabulary, Grammar("regex", "a(b|c)?"), 3) == {0, 6}  # complete


def test_a_control_token_is_not_its_text() -> None:
    vocabulary = make_vocabulary()
    assert allowed(vocabulary, Grammar("regex", "<ctl>")) == {9}
    assert allowed(vocabulary, Grammar("lark", "start: <ctl>")) == {4}
    assert b"".join(TOKENS[i] for i in vocabulary.spell(b"<ctl>a")) == b"<ctl>a"
    assert 4 not in vocabulary.spell(b"<ctl>a")


def test_a_checkpoint_without_an_end_token_takes_no_format() -> None:
    vocabulary = GrammarVocabulary(TOKENS, control_ids=[], end_ids=[], encode=lambda text: [])
    with pytest.raises(BadRequest, match="end-of-sequence"):
        vocabulary.compile(Grammar("json_object"))


def test_preparing_leaves_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = make_vocabulary()
    vocabulary.prepare()
    monkeypatch.delattr("llguidance.LLTokenizer")
    assert allowed(vocabulary, Grammar("regex", "a(b|c)?")) == {1, 3}


@pytest.mark.parametrize("end_ids", [[], [0]])
def test_preparing_leaves_failures_to_the_grammar(
    end_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise Panic("vocabulary")

    vocabulary = GrammarVocabulary(TOKENS, control_ids=[4], end_ids=end_ids, encode=lambda text: [])
    monkeypatch.setattr("llguidance.LLTokenizer", fail)
    vocabulary.prepare()
    with pytest.raises(BadRequest):
        vocabulary.compile(Grammar("regex", "ab"))


def test_a_panic_of_the_library_is_a_bad_request() -> None:
    class Panic(BaseException):
        pass

    def encode(text: str) -> list[int]:
        raise Panic("spelling")

    vocabulary = GrammarVocabulary(TOKENS, control_ids=[4], end_ids=[0], encode=encode)
    with pytest.raises(BadRequest):
        vocabulary.compile(Grammar("regex", "ab"))
