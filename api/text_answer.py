"""A choice of a completion request as it grows: text as it is, logprobs in the old form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from api.answer import FAILURES, Choice, Part, finite
from runtime import Detokenizer, FinishReason, TextPiece, TokenEvent, Tokenizer, TokenLogprobs

Scored = tuple[int, TokenLogprobs | None]
"""A token, and how likely it was; None for the first of a prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is encoded. Its first ``num_hidden`` tokens are not of the client's text."""

    token_ids: list[int]
    num_hidden: int = 0


class LogprobsWriter:
    """Tokens to the ``logprobs`` objects of one choice; ``text_offset`` counts from its start."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.token_bytes)
        self._num_chars = 0

    def write(self, tokens: Sequence[Scored], num_hidden: int = 0) -> tuple[str, dict[str, Any]]:
        """The text that the tokens complete, and their object. The first ones may show no text."""
        text = ""
        offsets = []
        for index, (token_id, _) in enumerate(tokens):
            offsets.append(self._num_chars + len(text))
            if index >= num_hidden:
                text += self._detokenizer.feed(token_id)
        self._num_chars += len(text)
        return text, {
            "tokens": [self._name(token_id) for token_id, _ in tokens],
            "token_logprobs": [None if one is None else finite(one.logprob) for _, one in tokens],
            "top_logprobs": [self._best(token_id, one) for token_id, one in tokens],
            "text_offset": offsets,
        }

    def flush(self) -> str:
        """What is left of a character that the last token did not complete."""
        text = self._detokenizer.flush()
        self._num_chars += len(text)
        return text

    def _best(self, token_id: int, logprobs: TokenLogprobs | None) -> dict[str, float] | None:
        if logprobs is None:
            return None
        best: dict[str, float] = {}
        for other_id, logprob in (*logprobs.top, (token_id, logprobs.logprob)):
            best.setdefault(self._name(other_id), finite(logprob))
        return best

    def _name(self, token_id: int) -> str:
        """The token's text; of one that is part of a character, its bytes as OpenAI spells them."""
        data = self._tokenizer.token_bytes[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(slots=True)
class TextChoice(Choice):
    """A choice that may repeat its prompt. With ``is_empty`` it draws a token that nobody sees."""

    echo: Prompt | None = None
    has_logprobs: bool = False
    is_empty: bool = False
    writer: LogprobsWriter = field(init=False)
    num_echoed: int = 0  # tokens of the prompt

    def __post_init__(self) -> None:
        self.writer = LogprobsWriter(self.tokenizer)

    def opening(self) -> list[Part]:
        """The prompt if it is to be repeated; with logprobs its first token, as the others' come
        from the engine.
        """
        if self.echo is None:
            return []
        if self.has_logprobs:
            return [self._echo_next(self.echo, [None])]
        tokens: list[Scored] = [(token_id, None) for token_id in self.echo.token_ids]
        text, _ = self.writer.write(tokens, self.echo.num_hidden)
        return [self._part(text + self.writer.flush())]

    def grow(self, events: Sequence[TokenEvent]) -> list[Part]:
        """As of any choice; an empty one ends with its first token."""
        echoed = [
            self._echo_next(self.echo, event.prompt_logprobs)
            for event in events
            if event.prompt_logprobs and self.echo is not None
        ]
        if self.is_empty:
            events = [_without_token(event) for event in events]
        pieces = self.take(events)
        return echoed + [self._part(piece.text, self._logprobs_of(piece)) for piece in pieces]

    def closing(self) -> Part:
        """As of any choice."""
        return {**self._part(""), "finish_reason": self.finish_reason}

    def _part(self, text: str, logprobs: dict[str, Any] | None = None) -> Part:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _echo_next(self, prompt: Prompt, logprobs: Sequence[TokenLogprobs | None]) -> Part:
        """The prompt's next tokens, as many as there are logprobs."""
        start, end = self.num_echoed, self.num_echoed + len(logprobs)
        self.num_echoed = end
        tokens = list(zip(prompt.token_ids[start:end], logprobs, strict=True))
        text, written = self.writer.write(tokens, max(prompt.num_hidden - start, 0))
        if end == len(prompt.token_ids):
            text += self.writer.flush()
        return self._part(text, written)

    def _logprobs_of(self, piece: TextPiece) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        return self.writer.write([self.logprobs[index] for index in piece.token_indices])[1]


def _without_token(event: TokenEvent) -> TokenEvent:
    reason = event.finish_reason
    if event.token_id is not None and reason not in FAILURES:
        reason = FinishReason.LENGTH
    return replace(event, token_id=None, finish_reason=reason)
