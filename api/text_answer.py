"""The answer to a completion request as it grows: text as it is, and logprobs in the old form."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from api.answer import (
    FAILURES,
    LOWEST_LOGPROB,
    Choice,
    Chunk,
    arrivals,
    settle,
    timings_entry,
    usage_object,
)
from api.running import RunningRequest
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
            "token_logprobs": [None if one is None else _number(one.logprob) for _, one in tokens],
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
            best.setdefault(self._name(other_id), _number(logprob))
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

    def echo_first(self) -> tuple[str, dict[str, Any] | None]:
        """The prompt; with logprobs its first token, as the others' come from the engine."""
        if self.has_logprobs:
            return self.echo_more([None])
        assert self.echo is not None
        tokens: list[Scored] = [(token_id, None) for token_id in self.echo.token_ids]
        text, _ = self.writer.write(tokens, self.echo.num_hidden)
        return text + self.writer.flush(), None

    def echo_more(self, logprobs: Sequence[TokenLogprobs | None]) -> tuple[str, dict[str, Any]]:
        """The prompt's next tokens."""
        assert self.echo is not None
        start, end = self.num_echoed, self.num_echoed + len(logprobs)
        self.num_echoed = end
        tokens = list(zip(self.echo.token_ids[start:end], logprobs, strict=True))
        text, written = self.writer.write(tokens, max(self.echo.num_hidden - start, 0))
        return text + (self.writer.flush() if end == len(self.echo.token_ids) else ""), written

    def take(self, events: Sequence[TokenEvent]) -> list[TextPiece]:
        """As of any choice; an empty one has ended with its first token."""
        if self.is_empty:
            events = [_without_token(event) for event in events]
        return Choice.take(self, events)

    def written(self, piece: TextPiece) -> dict[str, Any] | None:
        """The ``logprobs`` of a piece of the answer."""
        if not self.has_logprobs:
            return None
        return self.writer.write([self.logprobs[index] for index in piece.token_indices])[1]


@dataclass(slots=True)
class TextAnswer:
    """Everything the chunks of one request have in common."""

    model: str
    system_fingerprint: str
    num_prompt_tokens: int  # of all prompts, each counted once
    choices_per_prompt: int
    silence_seconds: float
    running: RunningRequest
    choices: list[TextChoice]
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.running.answer_id("cmpl")

    def abort(self) -> None:
        """Free whatever the engine still holds for this request. Idempotent, never waits."""
        for choice in self.choices:
            choice.generation.abort()

    def close(self) -> None:
        """The request is over: nobody reads on. Idempotent, never waits."""
        self.abort()
        settle(self.running, self.choices, self.num_cached_tokens)

    @property
    def num_cached_tokens(self) -> int:
        """Of every prompt, as the first of its choices found it."""
        first = self.choices[:: self.choices_per_prompt]
        return sum(choice.generation.num_cached_tokens for choice in first)

    async def chunks(self, *, include_usage: bool) -> AsyncGenerator[Chunk | None]:
        """Prompts if they are to be repeated, text, finish reasons, usage if asked for.

        None stands for `silence_seconds` in which nothing came. Raises `RequestError` if the engine
        fails or the request is ended from outside.
        """
        for choice in self.choices:
            if choice.echo is not None:
                yield self._chunk(choice, *choice.echo_first(), include_usage=include_usage)
        arriving = arrivals(self.choices, self.running, self.silence_seconds)
        async with aclosing(arriving):
            async for arrival in arriving:
                if arrival is None:
                    yield None
                    continue
                choice, events = self.choices[arrival[0].index], arrival[1]
                if choice.finish_reason is not None:
                    continue  # it ended on a stop string; this is the echo of our abort
                for event in events:
                    if event.prompt_logprobs:
                        part = choice.echo_more(event.prompt_logprobs)
                        yield self._chunk(choice, *part, include_usage=include_usage)
                pieces = choice.take(events)
                num_tokens = choice.assembler.num_tokens
                self.running.note_progress(choice.index, num_tokens, self.num_cached_tokens)
                for piece in pieces:
                    logprobs = choice.written(piece)
                    yield self._chunk(choice, piece.text, logprobs, include_usage=include_usage)
                if choice.finish_reason is not None:
                    chunk = self._chunk(
                        choice, "", None, choice.finish_reason, include_usage=include_usage
                    )
                    if not include_usage and all(each.finish_reason for each in self.choices):
                        chunk |= timings_entry(self.running, self.choices, self.num_cached_tokens)
                    yield chunk
        if include_usage:
            timings = timings_entry(self.running, self.choices, self.num_cached_tokens)
            usage = usage_object(self.num_prompt_tokens, self.num_cached_tokens, self.choices)
            yield {**self._head(), "choices": [], "usage": usage, **timings}

    def _head(self) -> Chunk:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def _chunk(
        self,
        choice: TextChoice,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None = None,
        *,
        include_usage: bool,
    ) -> Chunk:
        entry = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head(), "choices": [entry]}
        if include_usage:
            chunk["usage"] = None
        return chunk


def _number(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _without_token(event: TokenEvent) -> TokenEvent:
    reason = event.finish_reason
    if event.token_id is not None and reason not in FAILURES:
        reason = FinishReason.LENGTH
    return replace(event, token_id=None, finish_reason=reason)
