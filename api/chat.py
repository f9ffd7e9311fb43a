"""``POST /v1/chat/completions``: one generator of chunks behind both kinds of answer.

A stream writes the chunks as events; a plain answer is folded from the very same chunks, so the two
cannot drift apart.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from api.answer import Answer, Choice, Chunk
from api.containment import contained
from api.errors import envelope, shorten
from api.guard import read_json
from api.running import RunningRequest
from api.schemas import (
    ChatRequest,
    cache_namespace,
    parse_chat,
    sampling_params,
    template_messages,
    template_variables,
    thinking_wanted,
    unknown_fields,
)
from api.sse import DONE, KEEP_ALIVE, EventStream, frame, while_connected
from api.state import ServerState
from runtime import (
    INT64_MAX,
    ContextLengthExceeded,
    RequestError,
    SamplingParams,
    TextAssembler,
)

MAX_UNKNOWN_FIELDS = 256

logger = logging.getLogger("fathom.api")


async def chat_completions(request: Request) -> Response:
    """Admit the request, then stream or fold its answer; the status is sent only once admitted."""
    state: ServerState = request.app.state.server

    async def receive() -> Message:
        message = await request.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            # A server that has no time for a body must not spend any on parsing it.
            state.check_open()
            state.engine.check_room(1 + state.running.num_encoding)
        return message

    body = await read_json(request.scope, receive)
    running = state.running.admit(request.scope, state.limits.request_seconds)
    try:
        preparing = prepare(state, body, running)
        chat, answer = await while_connected(request.receive, preparing)
    except BaseException:
        running.leave()
        raise
    if chat.stream:
        chunks = answer.chunks(include_usage=chat.include_usage)
        return EventStream(events(chunks, running), answer.close)
    try:
        folding = fold(answer.chunks(include_usage=True), running)
        return JSONResponse(await while_connected(request.receive, folding))
    finally:
        answer.close()


async def prepare(
    state: ServerState, body: dict[str, Any], running: RunningRequest
) -> tuple[ChatRequest, Answer]:
    """Check a request, encode its prompt and queue its choices.

    Raises `RequestError` for what is wrong with it and if there is no room for it.
    """
    with contained(running.id):
        chat = parse_chat(body)
        _note_unknown(state, body)
        model = state.check_model(chat.model)
        params = sampling_params(chat, state.defaults)
        messages = template_messages(chat)
        refuse_hopeless(state, messages)
        state.engine.check_room(chat.num_choices + state.running.num_encoding)
        # A long prompt takes seconds, in which other streams must go on.
        encode = partial(
            state.tokenizer.encode_chat,
            messages,
            thinking=thinking_wanted(chat),
            variables=template_variables(chat),
        )
        prompt = await state.running.encode(chat.num_choices, encode)
        running.check()
        answer = Answer(
            model=model,
            system_fingerprint=state.system_fingerprint,
            num_prompt_tokens=len(prompt.token_ids),
            silence_seconds=state.limits.ping,
            running=running,
            choices=submit(
                state, chat, prompt.token_ids, params, running.key_id, thinking=prompt.thinking
            ),
        )
        running.submitted(answer.abort, len(prompt.token_ids))
        return chat, answer


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
    key_id: str | None,
    *,
    thinking: bool,
) -> list[Choice]:
    """Queue every choice of a request, or none. Raises what `EngineClient.submit` raises."""
    choices: list[Choice] = []
    namespace = cache_namespace(chat, key_id)
    try:
        for index in range(chat.num_choices):
            own = params
            if params.seed is not None and index:
                # Choices differ, each reproducibly; past the largest seed they wrap around.
                seed = (params.seed + index + INT64_MAX + 1) % 2**64 - INT64_MAX - 1
                own = replace(params, seed=seed)
            generation = state.engine.submit(
                prompt_ids, own, namespace=namespace, priority=chat.priority or 0
            )
            assembler = TextAssembler(state.tokenizer, own, thinking=thinking)
            choices.append(Choice(index, generation, assembler, state.tokenizer))
    except BaseException:
        for choice in choices:
            choice.generation.abort()
        raise
    return choices


async def events(
    chunks: AsyncGenerator[Chunk | None], running: RunningRequest
) -> AsyncGenerator[bytes]:
    """Chunks as server-sent events. A failure is an event of its own, and then no ``[DONE]``."""
    try:
        with contained(running.id):
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield KEEP_ALIVE if chunk is None else frame(chunk)
            yield DONE
    except RequestError as failure:
        answer = envelope(failure)
        running.record.outcome = answer["error"]["code"]
        yield frame(answer)


async def fold(chunks: AsyncGenerator[Chunk | None], running: RunningRequest) -> dict[str, Any]:
    """The one answer that the chunks of a stream add up to."""
    with contained(running.id):
        async with aclosing(chunks):
            return await _fold(chunks)


async def _fold(chunks: AsyncIterable[Chunk | None]) -> dict[str, Any]:
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


def _note_unknown(state: ServerState, body: dict[str, Any]) -> None:
    for name in sorted(unknown_fields(body) - state.unknown_fields):
        if len(state.unknown_fields) < MAX_UNKNOWN_FIELDS:
            state.unknown_fields.add(name)
            logger.info("a client sends the unknown field %r; it is ignored", shorten(name))
