"""``POST /v1/chat/completions``: one generator of chunks behind both kinds of answer.

A stream writes the chunks as events; a plain answer is folded from the very same chunks, so the two
cannot drift apart.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import HttpError, envelope, internal_error, shorten
from api.guard import log_fault, read_json
from api.schemas import (
    ChatRequest,
    parse_chat,
    sampling_params,
    template_messages,
    template_variables,
    thinking_wanted,
    unknown_fields,
)
from api.sse import DONE, KEEP_ALIVE, EventStream, frame, while_connected
from api.state import GenerationLike, ServerState
from runtime import (
    INT64_MAX,
    ContextLengthExceeded,
    EngineDead,
    FinishReason,
    RequestError,
    SamplingParams,
    TextAssembler,
    TextPiece,
    TokenEvent,
    Tokenizer,
    TokenLogprobs,
)

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; this is what OpenAI writes for a probability of zero."""
MAX_UNKNOWN_FIELDS = 256

Chunk = dict[str, Any]

logger = logging.getLogger("fathom.api")


async def chat_completions(request: Request) -> Response:
    """Admit the request, then stream or fold its answer; the status is sent only once admitted."""
    state: ServerState = request.app.state.server
    body = await read_json(request.scope, request.receive)
    chat = parse_chat(body)
    _note_unknown(state, body)
    model = state.check_model(chat.model)
    params = sampling_params(chat, state.defaults)
    messages = template_messages(chat)
    refuse_hopeless(state, messages)
    # A long prompt takes tens of milliseconds, in which other streams must go on.
    prompt = await asyncio.to_thread(
        state.tokenizer.encode_chat,
        messages,
        thinking=thinking_wanted(chat),
        variables=template_variables(chat),
    )
    answer = Answer(
        model=model,
        system_fingerprint=state.system_fingerprint,
        num_prompt_tokens=len(prompt.token_ids),
        keep_alive_seconds=state.keep_alive_seconds,
        choices=submit(state, chat, prompt.token_ids, params, thinking=prompt.thinking),
    )
    if chat.stream:
        chunks = answer.chunks(include_usage=chat.include_usage)
        return EventStream(events(chunks, request.scope["request_id"]), answer.abort)
    try:
        chunks = answer.chunks(include_usage=True)
        return JSONResponse(await while_connected(request.receive, fold(chunks)))
    finally:
        answer.abort()


def refuse_hopeless(state: ServerState, messages: Sequence[dict[str, Any]]) -> None:
    """Raises `ContextLengthExceeded` for text that cannot fit however it is encoded.

    An assistant's text does not count: its thoughts may be dropped from the prompt.
    """
    texts = (message["content"] for message in messages if message["role"] != "assistant")
    num_tokens = sum(state.tokenizer.fewest_tokens(text) for text in texts if text)
    if num_tokens >= state.max_model_len:
        raise ContextLengthExceeded(num_tokens, state.max_model_len)


def submit(
    state: ServerState,
    chat: ChatRequest,
    prompt_ids: list[int],
    params: SamplingParams,
    *,
    thinking: bool,
) -> list[Choice]:
    """Queue every choice of a request, or none. Raises what `EngineClient.submit` raises."""
    choices: list[Choice] = []
    try:
        for index in range(chat.num_choices):
            own = params
            if params.seed is not None and index:
                # Choices differ, each reproducibly; past the largest seed they wrap around.
                seed = (params.seed + index + INT64_MAX + 1) % 2**64 - INT64_MAX - 1
                own = replace(params, seed=seed)
            generation = state.engine.submit(prompt_ids, own)
            assembler = TextAssembler(state.tokenizer, own, thinking=thinking)
            choices.append(Choice(index, generation, assembler, state.tokenizer))
    except BaseException:
        for choice in choices:
            choice.generation.abort()
        raise
    return choices


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
        """The text that new events make final, joined while its kind is the same.

        Raises `RequestError` if the engine gave the sequence up.
        """
        pieces: list[TextPiece] = []
        for event in events:
            if self.finish_reason is not None:
                break
            if event.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise _given_up(event.finish_reason)
            if event.token_id is not None and event.logprobs is not None:
                self.logprobs.append((event.token_id, event.logprobs))
            for piece in self.assembler.feed(event.token_id, event.finish_reason):
                if pieces and pieces[-1].kind == piece.kind:
                    last = pieces.pop()
                    indices = last.token_indices + piece.token_indices
                    piece = TextPiece(piece.kind, last.text + piece.text, indices)
                pieces.append(piece)
            if self.assembler.stopped:
                self.finish_reason = FinishReason.STOP.value
                self.generation.abort()
            elif event.finish_reason is not None:
                self.finish_reason = event.finish_reason.value
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
    keep_alive_seconds: float
    choices: list[Choice]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def abort(self) -> None:
        """Free whatever the engine still holds for this request. Idempotent, never waits."""
        for choice in self.choices:
            choice.generation.abort()

    async def chunks(self, *, include_usage: bool) -> AsyncGenerator[Chunk | None]:
        """The answer in OpenAI's order: roles, deltas, finish reasons, usage if asked for.

        None stands for `keep_alive_seconds` of silence. Raises `RequestError` if the engine fails.
        """
        for choice in self.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""}, include_usage)
        async with aclosing(arrivals(self.choices, self.keep_alive_seconds)) as arriving:
            async for arrival in arriving:
                if arrival is None:
                    yield None
                    continue
                choice, token_events = arrival
                if choice.finish_reason is not None:
                    continue  # it ended on a stop string; this is the echo of our abort
                for piece in choice.take(token_events):
                    chunk = self._chunk(choice, _delta(piece), include_usage)
                    if logprobs := choice.logprobs_of(piece):
                        chunk["choices"][0]["logprobs"] = logprobs
                    yield chunk
                if choice.finish_reason is not None:
                    yield self._chunk(choice, {}, include_usage)
        if include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    def _head(self) -> Chunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def _chunk(self, choice: Choice, delta: dict[str, str], include_usage: bool) -> Chunk:
        finish_reason = None if delta else choice.finish_reason  # it comes with an empty delta
        entry = {"index": choice.index, "delta": delta, "finish_reason": finish_reason}
        chunk = {**self._head(), "choices": [entry]}
        if include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        num_new = sum(choice.assembler.num_tokens for choice in self.choices)
        num_reasoning = sum(choice.assembler.num_reasoning_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_new,
            "total_tokens": self.num_prompt_tokens + num_new,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": num_reasoning},
            "prompt_cache_hit_tokens": 0,
            "prompt_cache_miss_tokens": self.num_prompt_tokens,
        }


async def arrivals(
    choices: Sequence[Choice], silence_seconds: float
) -> AsyncGenerator[tuple[Choice, list[TokenEvent]] | None]:
    """What the choices' generations yield, as it comes; None for each period of silence."""
    waiting = {asyncio.ensure_future(_next(choice.generation)): choice for choice in choices}
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=silence_seconds, return_when=asyncio.FIRST_COMPLETED
            )
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


async def events(chunks: AsyncGenerator[Chunk | None], request_id: str) -> AsyncGenerator[bytes]:
    """Chunks as server-sent events. A failure is an event of its own, and then no ``[DONE]``."""
    failure: RequestError
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield KEEP_ALIVE if chunk is None else frame(chunk)
        yield DONE
        return
    except RequestError as error:
        failure = error
    except Exception as error:
        log_fault(request_id, error)
        failure = internal_error()
    yield frame(envelope(failure))


async def fold(chunks: AsyncIterable[Chunk | None]) -> dict[str, Any]:
    """The one answer that the chunks of a stream add up to."""
    head: Chunk = {}
    usage: dict[str, Any] | None = None
    choices: dict[int, dict[str, Any]] = {}
    async for chunk in chunks:
        if chunk is None:
            continue
        head, usage = chunk, chunk["usage"]
        for part in chunk["choices"]:
            index = part["index"]
            empty = {"index": index, "message": {}, "logprobs": None, "finish_reason": None}
            choice = choices.setdefault(index, empty)
            for name, text in part["delta"].items():
                choice["message"][name] = choice["message"].get(name, "") + text
            for name, entries in part.get("logprobs", {}).items():
                choice["logprobs"] = choice["logprobs"] or {"content": None, "refusal": None}
                if entries is not None:
                    choice["logprobs"][name] = (choice["logprobs"].get(name) or []) + entries
            choice["finish_reason"] = part["finish_reason"]
    for choice in choices.values():
        choice["message"]["refusal"] = None
    return {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "system_fingerprint": head["system_fingerprint"],
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage,
    }


def _delta(piece: TextPiece) -> dict[str, str]:
    if piece.kind == "reasoning":  # DeepSeek's clients read the first, vLLM's the second
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    return {"content": piece.text}


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
    return HttpError(
        500,
        "The engine failed while it worked on this request.",
        code="engine_error",
        error_type="server_error",
    )


def _note_unknown(state: ServerState, body: dict[str, Any]) -> None:
    for name in sorted(unknown_fields(body) - state.unknown_fields):
        if len(state.unknown_fields) < MAX_UNKNOWN_FIELDS:
            state.unknown_fields.add(name)
            logger.info("a client sends the unknown field %r; it is ignored", shorten(name))
