"""Text of an answer against decoding and cutting the whole of it at once."""

from __future__ import annotations

import codecs
from functools import cache
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.request import FinishReason, SamplingParams
from runtime.text import Detokenizer, StopMatcher, TextAssembler, TextPiece
from runtime.tokenizer import Tokenizer
from tests.runtime.checkpoints import FATHOM_TINY

thorough = settings(deadline=None, max_examples=300)


@cache
def tiny() -> Tokenizer:
    return Tokenizer.load(FATHOM_TINY)


@cache
def without_think_tokens() -> Tokenizer:
    """Every byte is a token, and nothing else is."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(
        backend, special_tokens={}, add_bos=False, chat=None, eos_token_ids=frozenset()
    )


def any_tokens(max_size: int = 60) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds: words, single bytes (broken UTF-8), control tokens, think tokens."""
    tokenizer = tiny()
    single_bytes = [i for i, text in enumerate(tokenizer.token_bytes) if len(text) == 1]
    control = [i for i in range(tokenizer.num_tokens) if tokenizer.is_special(i)]
    think = [i for i in (tokenizer.think_start_id, tokenizer.think_end_id) if i is not None]
    newline = tokenizer.encode("\n\n") + tokenizer.encode("\n")
    emoji = tokenizer.encode("🙂é中")
    token = st.one_of(
        st.integers(0, tokenizer.num_tokens - 1),
        *[st.sampled_from(ids) for ids in (single_bytes, control, think, newline, emoji)],
    )
    return st.lists(token, max_size=max_size)


# -- detokenizer ---------------------------------------------------------------------------------


@thorough
@given(any_tokens())
def test_fed_and_flushed_text_is_the_whole_decoded(token_ids: list[int]) -> None:
    token_bytes = tiny().token_bytes
    detokenizer = Detokenizer(token_bytes)
    text = "".join(detokenizer.feed(i) for i in token_ids) + detokenizer.flush()
    assert text == b"".join(token_bytes[i] for i in token_ids).decode(errors="replace")


def test_a_character_in_four_tokens_comes_once_and_whole() -> None:
    tokenizer = without_think_tokens()
    detokenizer = Detokenizer(tokenizer.token_bytes)
    token_ids = tokenizer.encode("🙂")
    assert len(token_ids) == 4
    assert [detokenizer.feed(i) for i in token_ids] == ["", "", "", "🙂"]


def test_a_real_replacement_character_does_not_stall() -> None:
    tokenizer = without_think_tokens()
    detokenizer = Detokenizer(tokenizer.token_bytes)
    assert "".join(map(detokenizer.feed, tokenizer.encode("\ufffdx"))) == "\ufffdx"


# -- stop strings --------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: where some stop string is complete first, the first in the list."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def holdable(text: str, stops: list[str]) -> int:
    """Length of the longest tail that some stop string begins with."""
    tails = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(tails, default=0)


short_texts = st.text("ab<", max_size=8)


@thorough
@given(
    st.lists(short_texts, max_size=12), st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4)
)
def test_stop_matcher_equals_cutting_the_whole(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, fed = "", ""
    for chunk in chunks:
        fed += chunk
        emitted, matched = matcher.feed(chunk)
        shown += emitted
        if matched is not None:
            assert (shown, matched) == cut(fed, stops)
            assert shown + matched + matcher.rest == fed
            return
        assert len(shown) == len(fed) - holdable(fed, stops)
    assert (shown + matcher.flush(), None) == cut(fed, stops)


@pytest.mark.parametrize(
    ("stops", "chunks", "shown", "matched"),
    [
        (["STOP"], ["ab S", "TO", "P cd"], "ab ", "STOP"),
        (["STOP"], ["S", "T", "x"], "STx", None),
        (["aab"], ["aaab"], "a", "aab"),
        (["bc", "abcd"], ["abcd"], "a", "bc"),
        (["b", "ab"], ["ab"], "a", "b"),
        (["ab", "b"], ["ab"], "", "ab"),
        (["。\n"], ["好。", "\n再"], "好", "。\n"),
    ],
)
def test_stop_examples(
    stops: list[str], chunks: list[str], shown: str, matched: str | None
) -> None:
    matcher = StopMatcher(stops)
    text = ""
    for chunk in chunks:
        emitted, found = matcher.feed(chunk)
        text += emitted
        if found is not None:
            break
    assert (text + matcher.flush(), found) == (shown, matched)


def test_hostile_stop_strings_cost_a_constant_per_character() -> None:
    """Counted, not timed: the automaton moves at most twice per character and stop string."""

    class CountingText(str):
        comparisons = 0

        def __getitem__(self, index: object) -> str:  # type: ignore[override]
            CountingText.comparisons += 1
            return super().__getitem__(index)  # type: ignore[index]

    matcher = StopMatcher([CountingText("a" * 5000 + "b")])
    CountingText.comparisons = 0
    for _ in range(100):
        matcher.feed("a" * 100 + "c")
    assert CountingText.comparisons <= 6 * 100 * 101


# -- the assembler -------------------------------------------------------------------------------


def assemble(
    token_ids: list[int],
    *,
    tokenizer: Tokenizer | None = None,
    stops: tuple[str, ...] = (),
    thinking: bool | None,
    reason: FinishReason = FinishReason.LENGTH,
) -> tuple[TextAssembler, list[TextPiece]]:
    assembler = TextAssembler(tokenizer or tiny(), SamplingParams(stop=stops), thinking=thinking)
    pieces: list[TextPiece] = []
    for i, token_id in enumerate(token_ids):
        last = i == len(token_ids) - 1
        pieces += assembler.feed(token_id, reason if last else None)
        if assembler.stopped:
            break
    return assembler, pieces


def joined(pieces: list[TextPiece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def expected_answer(
    token_ids: list[int], stops: tuple[str, ...], thinking: bool | None
) -> tuple[str, str, str | None, int]:
    """Reasoning, content, stop string and reasoning tokens, from all tokens at once."""
    tokenizer = tiny()
    start, end = tokenizer.think_start_id, tokenizer.think_end_id

    def text(ids: list[int]) -> str:
        dropped = () if thinking is None else (start, end)
        shown = [i for i in ids if i not in dropped and not tokenizer.is_special(i)]
        return b"".join(tokenizer.token_bytes[i] for i in shown).decode(errors="replace")

    before: list[int] = []
    thought: list[int] = []
    rest = token_ids
    if thinking is False:
        opener = token_ids.index(start) if start in token_ids else len(token_ids)
        before = token_ids[:opener]
        shown = [i for i in before if i != end and not tokenizer.is_special(i)]
        if opener == len(token_ids) or not all(
            tokenizer.token_bytes[i].decode(errors="replace").isspace() for i in shown
        ):
            content, stop = cut(text(token_ids), list(stops))
            return "", content, stop, 0
        content, stop = cut(text(before), list(stops))
        if stop is not None:
            return "", content, stop, 0
        rest = token_ids[opener:]
    if thinking is not None:
        close = rest.index(end) + 1 if end in rest else len(rest)
        thought, rest = rest[:close], rest[close:]
    trimmed = text(rest) if thinking is None else text(rest).lstrip("\n")
    content, stop = cut(trimmed, list(stops))
    return text(thought).lstrip("\n"), text(before) + content, stop, len(thought)


stop_lists = st.lists(
    st.sampled_from(["\n", "e", "th", " the", "e t", "�", "🙂", "。"]), max_size=3, unique=True
).map(tuple)


@thorough
@given(any_tokens(), stop_lists, st.sampled_from([True, False, None]))
def test_answer_equals_cutting_the_whole(
    token_ids: list[int], stops: tuple[str, ...], thinking: bool | None
) -> None:
    assembler, pieces = assemble(token_ids, stops=stops, thinking=thinking)
    reasoning, content, stop, num_reasoning = expected_answer(token_ids, stops, thinking)
    assert joined(pieces, "reasoning") == reasoning
    assert joined(pieces, "content") == content
    assert assembler.stop_string == stop
    assert assembler.num_reasoning_tokens == num_reasoning


@thorough
@given(any_tokens(), stop_lists, st.sampled_from([True, False, None]))
def test_a_token_goes_with_the_piece_its_text_begins_in(
    token_ids: list[int], stops: tuple[str, ...], thinking: bool | None
) -> None:
    assembler, pieces = assemble(token_ids, stops=stops, thinking=thinking)
    indices = [i for piece in pieces for i in piece.token_indices]
    assert all(a < b for a, b in pairwise(indices))
    assert not any(tiny().is_special(token_ids[i]) for i in indices)
    if thinking is None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        starts, num_chars = {}, 0
        for i, token_id in enumerate(token_ids[: assembler.num_tokens]):
            if not tiny().is_special(token_id):
                starts[i] = num_chars
                num_chars += len(decoder.decode(tiny().token_bytes[token_id]))
        begin = 0
        for piece in pieces:
            end = begin + len(piece.text)
            inside = tuple(i for i, start in starts.items() if begin <= start < end)
            assert piece.token_indices == inside
            begin = end


def test_every_token_of_plain_text_is_in_a_piece() -> None:
    token_ids = tiny().encode("The sea is deep. 海很深🙂")
    _, pieces = assemble(token_ids, thinking=None)
    assert [i for piece in pieces for i in piece.token_indices] == list(range(len(token_ids)))


def test_thought_then_answer() -> None:
    tokenizer = tiny()
    token_ids = tokenizer.encode("\nhm\n</think>\n\nIt is blue.")
    assembler, pieces = assemble(token_ids, thinking=True)
    assert joined(pieces, "reasoning") == "hm\n"
    assert joined(pieces, "content") == "It is blue."
    assert tokenizer.think_end_id is not None
    assert assembler.num_reasoning_tokens == token_ids.index(tokenizer.think_end_id) + 1
    assert assembler.num_tokens == len(token_ids)


def test_the_model_may_open_the_thought_itself() -> None:
    token_ids = tiny().encode("<think>\nhm</think>\n\nBlue.")
    assembler, pieces = assemble(token_ids, thinking=False)
    assert (joined(pieces, "reasoning"), joined(pieces, "content")) == ("hm", "Blue.")
    assert assembler.num_reasoning_tokens > 0


def test_a_raw_completion_shows_thoughts_as_text() -> None:
    _, pieces = assemble(tiny().encode("<think>hm</think>\n\nBlue."), thinking=None)
    assert joined(pieces, "content") == "<think>hm</think>\n\nBlue."


def test_stop_strings_do_not_match_in_a_thought() -> None:
    token_ids = tiny().encode("the END of\n</think>\n\nblue END red")
    assembler, pieces = assemble(token_ids, stops=("END",), thinking=True)
    assert joined(pieces, "reasoning") == "the END of\n"
    assert joined(pieces, "content") == "blue "
    assert assembler.stop_string == "END"


def test_a_token_cut_by_a_stop_string_keeps_its_piece() -> None:
    tokenizer = without_think_tokens()
    _, pieces = assemble(
        tokenizer.encode("aXYb"), tokenizer=tokenizer, stops=("XY",), thinking=None
    )
    assert [(piece.text, piece.token_indices) for piece in pieces] == [("a", (0,))]


def test_a_token_that_is_held_back_waits_for_its_own_piece() -> None:
    tokenizer = without_think_tokens()
    _, pieces = assemble(tokenizer.encode("ttx"), tokenizer=tokenizer, stops=("th",), thinking=None)
    assert [(piece.text, piece.token_indices) for piece in pieces] == [("t", (0,)), ("tx", (1, 2))]


def test_tokens_after_a_stop_string_are_counted_and_dropped() -> None:
    tokenizer = without_think_tokens()
    assembler = TextAssembler(tokenizer, SamplingParams(stop=("b",)), thinking=None)
    pieces = [piece for i in tokenizer.encode("abc") for piece in assembler.feed(i, None)]
    pieces += assembler.feed(tokenizer.encode("d")[0], FinishReason.LENGTH)
    assert joined(pieces, "content") == "a"
    assert assembler.num_tokens == 4


def test_end_of_sequence_is_no_text_and_shows_what_was_held() -> None:
    tokenizer = without_think_tokens()
    token_ids = tokenizer.encode("abSTOZ")
    assembler, pieces = assemble(
        token_ids, tokenizer=tokenizer, stops=("STOP",), thinking=None, reason=FinishReason.STOP
    )
    assert joined(pieces, "content") == "abSTO"
    assert not assembler.stopped


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_end_without_a_token_shows_what_was_held(reason: FinishReason) -> None:
    tokenizer = without_think_tokens()
    assembler = TextAssembler(tokenizer, SamplingParams(stop=("STOP",)), thinking=None)
    for token_id in tokenizer.encode("abST"):
        assembler.feed(token_id, None)
    assert [piece.text for piece in assembler.feed(None, reason)] == ["ST"]
    assert assembler.num_tokens == 4


@thorough
@given(st.lists(short_texts, max_size=6), st.text("ab<", max_size=6))
def test_thought_without_think_tokens_is_split_by_text(thought: list[str], answer: str) -> None:
    tokenizer = without_think_tokens()
    text = "".join(thought)
    token_ids = tokenizer.encode(f"{text}</think>\n{answer}")
    assembler, pieces = assemble(token_ids, tokenizer=tokenizer, stops=("ba",), thinking=True)
    assert joined(pieces, "reasoning") == text
    assert joined(pieces, "content") == cut(answer, ["ba"])[0]
    assert assembler.num_reasoning_tokens == len(text.encode()) + len("</think>")
