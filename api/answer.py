"""An answer as it grows: the engine's tokens of all choices to the chunks of OpenAI's API."""

from __future__ import annotations

import asyncio
import enum
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from api.errors import HttpError
from api.running import RunningRequest
from api.state import GenerationLike
from api.timings import Timings, measure
from runtime import (
    EngineDead,
    FinishReason,
    RequestError,
    TextAssembler,
    TextPiece,
    TokenEvent,
    Tokenizer,
    TokenLogprobs,
)

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a probability of zero."""
FAILURES = (FinishReason.ABORT, FinishReason.ERROR, FinishReason.NOT_FINITE)

Chunk = dict[str, Any]
Part = dict[str, Any]
"""An item of a chunk's ``choices``: what the chunk says of one choice."""


class Pause(enum.Enum):
    """Between the chunks of an answer: for now there are no more."""

    WAIT = "the next ones follow when the engine has drawn more"
    SILENCE = "none came for as long as a client should hear nothing"


@dataclass(slots=True)
class Choice(ABC):
    """One of the answers to a request while it grows; each route writes it in its own form."""

    index: int
    generation: GenerationLike
    assembler: TextAssembler
    tokenizer: Tokenizer
    finish_reason: str | None = None
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)  # per token, if asked

    def take(self, events: Sequence[TokenEvent]) -> list[TextPiece]:
        """The text that new events make final, joined where it is of one kind or one call.

        Raises `RequestError` if the engine gave the sequence up.
        """
        pieces: list[TextPiece] = []
        for event in events:
            if self.finish_reason is not None:
                break
            if event.finish_reason in FAILURES:
                raise _given_up(event.finish_reason)
            if event.token_id is not None and event.logprobs is not None:
                self.logprobs.append((event.token_id, event.logprobs))
            for piece in self.assembler.feed(event.token_id, event.finish_reason):
                _append(pieces, piece)
            if self.assembler.stopped:
                self.finish_reason = FinishReason.STOP.value
                self.generation.abort()
            elif event.finish_reason is not None:
                self.finish_reason = event.finish_reason.value
            if self.finish_reason == FinishReason.STOP and self.assembler.num_calls:
                self.finish_reason = "tool_calls"
        return pieces

    @abstractmethod
    def opening(self) -> list[Part]:
        """What is said of it before its first token."""

    @abstractmethod
    def grow(self, events: Sequence[TokenEvent]) -> list[Part]:
        """What is said of new events, in order. Raises as `take` does."""

    @abstractmethod
    def closing(self) -> Part:
        """What is said once it has its ``finish_reason``."""


@dataclass(slots=True)
class Answer:
    """Everything the chunks of one request have in common."""

    id: str
    chunk_object: str  # what a chunk calls itself
    model: str
    system_fingerprint: str
    num_prompt_tokens: int  # of all prompts, each counted once
    choices_per_prompt: int
    silence_seconds: float
    running: RunningRequest
    choices: Sequence[Choice]
    created: int = field(default_factory=lambda: int(time.time()))

    def abort(self) -> None:
        """Free whatever the engine still holds for this request. Idempotent, never waits."""
        for choice in self.choices:
            choice.generation.abort()

    def close(self) -> None:
        """The request is over: count it and let it leave. Idempotent, never waits."""
        self.abort()
        for choice in self.choices:
            self._note_progress(choice)
        record = self.running.record
        record.num_cached_tokens = self.num_cached_tokens
        record.num_completion_tokens = self.num_completion_tokens
        record.finish_reasons = [each.finish_reason for each in self.choices if each.finish_reason]
        record.timings = self._timings()
        self.running.leave()

    @property
    def num_cached_tokens(self) -> int:
        """Of each prompt, as its first choice found it: the others may find what it left there."""
        first = self.choices[:: self.choices_per_prompt]
        return sum(choice.generation.num_cached_tokens for choice in first)

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.assembler.num_tokens for choice in self.choices)

    async def chunks(self, *, include_usage: bool) -> AsyncGenerator[Chunk | Pause]:
        """The answer in OpenAI's order: openings, what grows, finish reasons, usage if asked for.

        Whoever writes them can write at once what comes between two pauses. Raises `RequestError`
        if the engine fails or the request is ended from outside.
        """
        for choice in self.choices:
            for part in choice.opening():
                yield self._chunk(part, include_usage)
        arriving = arrivals(self.choices, self.running, self.silence_seconds)
        async with aclosing(arriving):
            async for arrival in arriving:
                if isinstance(arrival, Pause):
                    yield arrival
                    continue
                for chunk in self._grow(*arrival, include_usage):
                    yield chunk
        if include_usage:
            end = {"choices": [], "usage": self._usage()}
            yield {**self._head(), **end, **self._timings_if_wanted()}

    def _grow(
        self, choice: Choice, token_events: list[TokenEvent], include_usage: bool
    ) -> Iterator[Chunk]:
        """What new events say of one choice."""
        if choice.finish_reason is not None:
            return  # it ended on a stop string; this is the echo of our abort
        parts = choice.grow(token_events)
        self._note_progress(choice)
        for part in parts:
            yield self._chunk(part, include_usage)
        if choice.finish_reason is not None:
            chunk = self._chunk(choice.closing(), include_usage)
            if not include_usage and all(each.finish_reason for each in self.choices):
                chunk |= self._timings_if_wanted()
            yield chunk

    def _head(self) -> Chunk:
        return {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def _chunk(self, part: Part, include_usage: bool) -> Chunk:
        chunk = {**self._head(), "choices": [part]}
        if include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        num_prompt, num_cached = self.num_prompt_tokens, self.num_cached_tokens
        num_new = self.num_completion_tokens
        num_reasoning = sum(choice.assembler.num_reasoning_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "completion_tokens_details": {"reasoning_tokens": num_reasoning},
            "prompt_cache_hit_tokens": num_cached,
            "prompt_cache_miss_tokens": num_prompt - num_cached,
        }

    def _note_progress(self, choice: Choice) -> None:
        num_tokens = choice.assembler.num_tokens
        self.running.note_progress(choice.index, num_tokens, self.num_cached_tokens)

    def _timings(self) -> Timings:
        return measure(
            self.running.record.submitted,
            [choice.generation for choice in self.choices],
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_predicted_tokens=self.num_completion_tokens,
        )

    def _timings_if_wanted(self) -> Chunk:
        return {"timings": self._timings().to_dict()} if self.running.wants_timings else {}


def finite(logprob: float) -> float:
    """As it is written: JSON has no infinity, so a probability of zero has a number of its own."""
    return max(logprob, LOWEST_LOGPROB)


class Silence:
    """Whether nothing happened for ``seconds`` since `restart`, and a call of ``tell`` once so.

    A restart only notes the time, and the one timer looks at it: to move a timer for every token
    would cost as much as the token's text.
    """

    def __init__(self, seconds: float, tell: Callable[[], None]) -> None:
        self.is_over = False
        self._seconds = seconds
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def restart(self) -> None:
        self.is_over = False
        self._since = self._loop.time()

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        end = self._since + self._seconds
        if now >= end:
            self.is_over = True
            self._tell()
            end = now + self._seconds
        self._timer = self._loop.call_at(end, self._look)


async def arrivals(
    choices: Sequence[Choice], running: RunningRequest, silence_seconds: float
) -> AsyncGenerator[tuple[Choice, list[TokenEvent]] | Pause]:
    """What the choices' generations bring, as it comes, and the pauses between.

    However many choices bring something at once, there is one wake-up for all, and no task or timer
    for any. Raises the error that ends the request from outside.
    """
    arrived = asyncio.Event()
    for choice in choices:
        choice.generation.announce(arrived)
    silence = Silence(silence_seconds, arrived.set)
    unfinished = list(choices)
    try:
        while True:
            running.check()  # whoever ends the request aborts its generations, which wakes us
            for choice in unfinished:
                if token_events := choice.generation.take():
                    yield choice, token_events
            unfinished = [choice for choice in unfinished if not choice.generation.finished]
            if not unfinished:
                return
            yield Pause.SILENCE if silence.is_over else Pause.WAIT
            silence.restart()
            await arrived.wait()
            arrived.clear()
    finally:
        silence.cancel()


def _append(pieces: list[TextPiece], piece: TextPiece) -> None:
    """Add a piece, to the last one if that begins the same text or arguments."""
    last = pieces[-1] if pieces else None
    if last is not None and last.kind == piece.kind:
        indices = last.token_indices + piece.token_indices
        if last.call is None or piece.call is None:
            pieces[-1] = TextPiece(piece.kind, last.text + piece.text, indices)
            return
        if last.call.name is None and last.call.index == piece.call.index:
            arguments = last.call.arguments + piece.call.arguments
            pieces[-1] = replace(
                last, token_indices=indices, call=replace(last.call, arguments=arguments)
            )
            return
    pieces.append(piece)


def _given_up(reason: FinishReason) -> RequestError:
    if reason == FinishReason.ABORT:
        return EngineDead("The server ended this answer before it was complete.")
    if reason == FinishReason.NOT_FINITE:
        return HttpError(
            500,
            "The model's numbers overflowed (NaN or infinity) while it worked on this request, so "
            "its answer was ended. Other requests go on.",
            code="not_finite",
            error_type="server_error",
        )
    return HttpError(
        500,
        "The engine failed while it worked on this request.",
        code="engine_error",
        error_type="server_error",
    )
