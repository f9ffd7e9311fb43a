"""An answer as it grows: the engine's tokens of all choices to the chunks of OpenAI's API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
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
    ToolDelta,
)

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; this is what OpenAI writes for a probability of zero."""
FAILURES = (FinishReason.ABORT, FinishReason.ERROR, FinishReason.NOT_FINITE)

Chunk = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One of the answers to a request while it grows."""

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

    def logprobs_of(self, piece: TextPiece) -> dict[str, Any] | None:
        """The ``logprobs`` object of a chunk; a thought's tokens have a list of their own."""
        if not self.logprobs:
            return None
        entries = [
            {
                **_logprob_entry(self.tokenizer, token_id, logprobs.logprob),
                "top_logprobs": [_logprob_entry(self.tokenizer, *top) for top in logprobs.top],
            }
            for token_id, logprobs in (self.logprobs[index] for index in piece.token_indices)
        ]
        if piece.kind == "reasoning":
            return {"content": None, "reasoning_content": entries, "refusal": None}
        return {"content": entries, "refusal": None}


@dataclass(slots=True)
class Answer:
    """Everything the chunks of one request have in common."""

    model: str
    system_fingerprint: str
    num_prompt_tokens: int
    silence_seconds: float
    running: RunningRequest
    choices: list[Choice]
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.running.answer_id("chatcmpl")

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
        """Of the prompt, as the first choice found it: the others may find what it left there."""
        return self.choices[0].generation.num_cached_tokens

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.assembler.num_tokens for choice in self.choices)

    async def chunks(self, *, include_usage: bool) -> AsyncGenerator[Chunk | None]:
        """The answer in OpenAI's order: roles, deltas, finish reasons, usage if asked for.

        None stands for `silence_seconds` in which nothing came. Raises `RequestError` if the engine
        fails or the request is ended from outside.
        """
        for choice in self.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""}, include_usage)
        arriving = arrivals(self.choices, self.running, self.silence_seconds)
        async with aclosing(arriving):
            async for arrival in arriving:
                if arrival is None:
                    yield None
                    continue
                choice, token_events = arrival
                if choice.finish_reason is not None:
                    continue  # it ended on a stop string; this is the echo of our abort
                pieces = choice.take(token_events)
                num_tokens = choice.assembler.num_tokens
                self.running.note_progress(choice.index, num_tokens, self.num_cached_tokens)
                for piece in pieces:
                    chunk = self._chunk(choice, _delta(piece), include_usage)
                    if logprobs := choice.logprobs_of(piece):
                        chunk["choices"][0]["logprobs"] = logprobs
                    yield chunk
                if choice.finish_reason is not None:
                    chunk = self._chunk(choice, {}, include_usage)
                    if not include_usage and all(each.finish_reason for each in self.choices):
                        chunk |= timings_entry(self.running, self.choices, self.num_cached_tokens)
                    yield chunk
        if include_usage:
            timings = timings_entry(self.running, self.choices, self.num_cached_tokens)
            yield {**self._head(), "choices": [], "usage": self._usage(), **timings}

    def _head(self) -> Chunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def _chunk(self, choice: Choice, delta: dict[str, Any], include_usage: bool) -> Chunk:
        finish_reason = None if delta else choice.finish_reason  # it comes with an empty delta
        entry = {"index": choice.index, "delta": delta, "finish_reason": finish_reason}
        chunk = {**self._head(), "choices": [entry]}
        if include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage_object(self.num_prompt_tokens, self.num_cached_tokens, self.choices)


def usage_object(num_prompt: int, num_cached: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """``usage``: tokens of the prompts, those of them that the cache had, and the choices'."""
    num_new = sum(choice.assembler.num_tokens for choice in choices)
    num_reasoning = sum(choice.assembler.num_reasoning_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        "prompt_cache_hit_tokens": num_cached,
        "prompt_cache_miss_tokens": num_prompt - num_cached,
    }


def settle(running: RunningRequest, choices: Sequence[Choice], num_cached_tokens: int) -> None:
    """Count what the choices of a request have come to, and let it leave. Idempotent."""
    for choice in choices:
        running.note_progress(choice.index, choice.assembler.num_tokens, num_cached_tokens)
    record = running.record
    record.num_cached_tokens = num_cached_tokens
    record.num_completion_tokens = sum(choice.assembler.num_tokens for choice in choices)
    record.finish_reasons = [each.finish_reason for each in choices if each.finish_reason]
    record.timings = _timings(running, choices, num_cached_tokens)
    running.leave()


def timings_entry(
    running: RunningRequest, choices: Sequence[Choice], num_cached_tokens: int
) -> dict[str, Any]:
    """``timings`` for the last chunk of an answer; empty unless its client asked for them."""
    if not running.wants_timings:
        return {}
    return {"timings": _timings(running, choices, num_cached_tokens).to_dict()}


def _timings(running: RunningRequest, choices: Sequence[Choice], num_cached_tokens: int) -> Timings:
    return measure(
        running.record.submitted,
        [choice.generation for choice in choices],
        num_prompt_tokens=running.record.num_prompt_tokens or 0,
        num_cached_tokens=num_cached_tokens,
        num_predicted_tokens=sum(choice.assembler.num_tokens for choice in choices),
    )


async def arrivals(
    choices: Sequence[Choice], running: RunningRequest, silence_seconds: float
) -> AsyncGenerator[tuple[Choice, list[TokenEvent]] | None]:
    """What the choices' generations yield, as it comes; None for each period of silence.

    Raises the error that ends the request from outside.
    """
    waiting = {asyncio.ensure_future(_next(choice.generation)): choice for choice in choices}
    try:
        while waiting:
            futures: list[asyncio.Future[Any]] = [*waiting, running.ended]
            await asyncio.wait(
                futures, timeout=silence_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            running.check()
            done = [task for task in waiting if task.done()]
            if not done:
                yield None
            for task in done:
                choice, token_events = waiting.pop(task), task.result()
                if token_events is not None:
                    waiting[asyncio.ensure_future(_next(choice.generation))] = choice
                    yield choice, token_events
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(generation: GenerationLike) -> list[TokenEvent] | None:
    return await anext(generation, None)


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


def _delta(piece: TextPiece) -> dict[str, Any]:
    if piece.call is not None:
        return {"tool_calls": [_call_delta(piece.call)]}
    if piece.kind == "reasoning":  # DeepSeek's clients read the first, vLLM's the second
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    return {"content": piece.text}


def _call_delta(call: ToolDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprob_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes[token_id]
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(data),
    }


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
