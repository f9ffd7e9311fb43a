"""Token ids to the text of an answer, as it grows: UTF-8, thoughts, stop strings.

    token -> Detokenizer (bytes to characters) -> thought or content -> StopMatcher -> TextPiece

Where functions may be called, content passes through a ToolCallParser before the StopMatcher.

Each stage holds back only what later tokens could still change, and never emits text twice.
`TextAssembler` joins the stages; streaming and non-streaming answers both come from it.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.control_tokens import THINK_END
from runtime.request import FinishReason, SamplingParams
from runtime.tokenizer import Tokenizer
from runtime.tool_calls import MARKERS, OPENERS, Parsed, ToolCallParser, ToolDelta

Kind = Literal["reasoning", "content", "tool_call"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that is final, or part of a call, and the answer's tokens that show first in it.

    ``token_indices`` count from the answer's first token, 0. Over all pieces they ascend and none
    comes twice, so a token's logprob goes out with the piece that carries its text. Tokens that
    show no text are in no piece: end of sequence, control tokens, trimmed newlines, and what a
    stop string cut off. The tokens of a call's form are in the pieces of the call.
    """

    kind: Kind
    text: str  # "" of a call
    token_indices: tuple[int, ...]
    call: ToolDelta | None = None


class Detokenizer:
    """Bytes of tokens to text. What is fed and flushed joins to one decoding of all bytes."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters this token completes; bytes of an unfinished one wait."""
        return self._utf8.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        """U+FFFD for an unfinished character; the next token starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class StopMatcher:
    """Finds the stop string that is complete first; of several at once, the first in the list.

    Only a tail that could still become a stop string is held back. Each stop string is followed
    by the automaton of Knuth, Morris and Pratt, so a character costs a constant time whatever a
    client sends.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._num_matched = [0] * len(self._stops)  # length of the tail that begins each stop
        self._held = ""
        self.rest = ""  # after a match: text behind the stop string

    def feed(self, text: str) -> tuple[str, str | None]:
        """``(text to show, stop string or None)``; after a match, feed no more."""
        first_end, matched = len(text) + 1, None
        for i, stop in enumerate(self._stops):
            end = self._follow(i, text)
            if end is not None and end < first_end:
                first_end, matched = end, stop
        text = self._held + text
        if matched is not None:
            end = len(self._held) + first_end
            self._held, self.rest = "", text[end:]
            return text[: end - len(matched)], matched
        num_shown = len(text) - max(self._num_matched, default=0)
        self._held = text[num_shown:]
        return text[:num_shown], None

    @property
    def holds(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def flush(self) -> str:
        """What is still held; no stop string will come of it."""
        held, self._held = self._held, ""
        self._num_matched = [0] * len(self._stops)
        return held

    def _follow(self, i: int, text: str) -> int | None:
        """Move stop ``i`` along ``text``; the index behind its first match, if any."""
        stop, failure, matched = self._stops[i], self._failures[i], self._num_matched[i]
        if matched == 0 and stop[0] not in text:
            return None
        for end, char in enumerate(text, start=1):
            while matched and stop[matched] != char:
                matched = failure[matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                return end
        self._num_matched[i] = matched
        return None


def _failure_table(pattern: str) -> list[int]:
    """Per prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    matched = 0
    for i in range(1, len(pattern)):
        while matched and pattern[i] != pattern[matched]:
            matched = table[matched - 1]
        if pattern[i] == pattern[matched]:
            matched += 1
        table[i] = matched
    return table


class _PendingTokens:
    """Tokens whose text is not shown yet, each with the place of its first character."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[int, int]] = deque()  # (index, first character)

    def add(self, index: int, first: int) -> None:
        self._tokens.append((index, first))

    def pop(self, end: int) -> tuple[int, ...]:
        """The indices of those that begin before the character ``end``."""
        indices = []
        while self._tokens and self._tokens[0][1] < end:
            indices.append(self._tokens.popleft()[0])
        return tuple(indices)


class _Section:
    """A run of text of one kind: matches stop strings and knows which token a character is of."""

    def __init__(self, kind: Kind, stops: Sequence[str], *, trim: bool) -> None:
        self.kind: Kind = kind
        self.matcher = StopMatcher(stops)
        self.matched: str | None = None
        self.trims = trim  # newlines at its start are not part of it
        self._num_fed = 0  # characters
        self._num_shown = 0
        self._tokens = _PendingTokens()

    def feed(self, index: int, text: str) -> list[TextPiece]:
        """Add the text a token completes; "" for a token inside an unfinished character."""
        self._tokens.add(index, self._num_fed)
        self._num_fed += len(text)
        shown, self.matched = self.matcher.feed(text)
        return self._show(shown)

    def finish(self, rest: str) -> list[TextPiece]:
        """Add what the detokenizer still had and show all that is held, unless a stop matches."""
        shown, self.matched = self.matcher.feed(rest)
        if self.matched is None:
            shown += self.matcher.flush()
        return self._show(shown)

    def _show(self, text: str) -> list[TextPiece]:
        if not text:
            return []
        self._num_shown += len(text)
        return [TextPiece(self.kind, text, self._tokens.pop(self._num_shown))]


class _ContentWithCalls:
    """A run of content in which the model may call functions.

    Stop strings match in the text only: arguments may hold anything, and half a call helps nobody.
    """

    kind: Kind = "content"

    def __init__(self, stops: Sequence[str], parser: ToolCallParser, *, trim: bool) -> None:
        self.matcher = StopMatcher(stops)
        self.matched: str | None = None
        self._parser = parser
        self.trims = trim
        self._num_shown = parser.num_chars  # of what the parser was fed
        self._tokens = _PendingTokens()

    def feed(self, index: int, text: str) -> list[TextPiece]:
        self._tokens.add(index, self._parser.num_chars)
        return self._take(self._parser.feed(text))

    def finish(self, rest: str) -> list[TextPiece]:
        pieces = self._take(self._parser.feed(rest) + self._parser.finish())
        if self.matched is None:
            pieces += self._show(self.matcher.flush())
        return pieces

    def _take(self, parsed: Sequence[Parsed]) -> list[TextPiece]:
        pieces: list[TextPiece] = []
        for part in parsed:
            if part.call is not None:
                pieces += self._show(self.matcher.flush())
                pieces.append(TextPiece("tool_call", "", self._tokens.pop(part.end), part.call))
                continue
            if not self.matcher.holds:  # white space around a call is shown nowhere
                self._num_shown = part.end - len(part.text)
            shown, self.matched = self.matcher.feed(part.text)
            pieces += self._show(shown)
            if self.matched is not None:
                break
        return pieces

    def _show(self, text: str) -> list[TextPiece]:
        if not text:
            return []
        self._num_shown += len(text)
        return [TextPiece(self.kind, text, self._tokens.pop(self._num_shown))]


class TextAssembler:
    """An answer's tokens to pieces of its thought, its content and its calls.

    ``thinking`` says how the answer begins: True inside a thought (the prompt opened it), False
    outside (a ``<think>`` that comes before any text opens one), None for a raw completion, where
    thoughts are text like any other. Stop strings end the content only: a match inside a thought
    does not count. Newlines right behind ``<think>`` and ``</think>`` belong to neither side.
    With a ``parser`` functions may be called; a call that begins in a thought ends the thought.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        thinking: bool | None,
        parser: ToolCallParser | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = params.stop
        self._parser = parser
        self._detokenizer = Detokenizer(tokenizer.token_bytes)
        self._splits = thinking is not None
        self._may_open = thinking is False
        self._section: _Section | _ContentWithCalls = (
            self._thought() if thinking else self._content(trim=False)
        )
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # up to and with </think>
        self.num_calls = 0  # of functions
        self.stop_string: str | None = None  # the one that ended the answer

    @property
    def stopped(self) -> bool:
        """Whether the text is complete before the engine ends it, which should be told: by a stop
        string, or by as many calls as may be.
        """
        return self.stop_string is not None or (self._parser is not None and self._parser.is_full)

    def feed(self, token_id: int | None, finish_reason: FinishReason | None) -> list[TextPiece]:
        """The text that this token makes final; with a finish reason, all the rest.

        ``finish_reason`` STOP means that the engine ended on this token, which is then no text.
        Tokens after a stop string are counted and dropped.
        """
        pieces: list[TextPiece] = []
        if token_id is not None:
            was_thinking = self._section.kind == "reasoning"
            if not self.stopped and finish_reason != FinishReason.STOP:
                pieces = self._feed_token(self.num_tokens, token_id)
            self.num_tokens += 1
            self.num_reasoning_tokens += was_thinking or self._section.kind == "reasoning"
        if finish_reason is not None and not self.stopped:
            pieces += self._finish_section()
        if self._parser is not None:
            self.num_calls += sum(bool(piece.call and piece.call.name) for piece in pieces)
        return pieces

    def _feed_token(self, index: int, token_id: int) -> list[TextPiece]:
        if self._splits and token_id == self._tokenizer.think_end_id:
            if self._section.kind == "content":
                return []  # a stray one
            return self._switch(self._content(trim=True))
        if self._splits and token_id == self._tokenizer.think_start_id:
            if not self._may_open:
                return []
            self._may_open = False
            return self._switch(self._thought())
        if self._tokenizer.is_special(token_id) and not self._is_marker(token_id):
            return []
        text = self._detokenizer.feed(token_id)
        self._may_open = self._may_open and text.isspace()
        return self._feed_text(index, text)

    def _feed_text(self, index: int, text: str) -> list[TextPiece]:
        section = self._section
        if section.trims and text:
            text = text.lstrip("\n")
            if not text:
                return []
            section.trims = False
        pieces = section.feed(index, text)
        if section.matched is None:
            return pieces
        if section.kind == "reasoning":  # </think> spelt in several tokens, or a call
            self._section = self._content(trim=True)
            opener = "" if section.matched == THINK_END else section.matched
            rest = opener + section.matcher.rest
            return pieces + (self._feed_text(index, rest) if rest else [])
        self.stop_string = section.matched
        return pieces

    def _thought(self) -> _Section:
        ends = () if self._parser is None else OPENERS
        if self._tokenizer.think_end_id is None:
            ends = (THINK_END, *ends)
        return _Section("reasoning", ends, trim=True)

    def _content(self, *, trim: bool) -> _Section | _ContentWithCalls:
        if self._parser is None:
            return _Section("content", self._stops, trim=trim)
        return _ContentWithCalls(self._stops, self._parser, trim=trim)

    def _is_marker(self, token_id: int) -> bool:
        """Whether a control token is part of a call's form, which the parser has to see."""
        if self._parser is None:
            return False
        return self._tokenizer.token_bytes[token_id].decode(errors="replace") in MARKERS

    def _switch(self, section: _Section | _ContentWithCalls) -> list[TextPiece]:
        pieces = self._finish_section()
        self._section = section
        return pieces

    def _finish_section(self) -> list[TextPiece]:
        section = self._section
        pieces = section.finish(self._detokenizer.flush())
        if section.kind == "content":
            self.stop_string = section.matched
        return pieces
