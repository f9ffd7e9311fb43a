"""``POST /v1/chat/completions``: one generator of chunks behind both kinds of answer.

A stream writes the chunks as events; a plain answer is folded from the very same chunks, so the two
cannot drift apart.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
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
    BadRequest,
    RequestError,
    SamplingParams,
    TextAssembler,
)

MAX_UNKNOWN_FIELDS = 256

logger = logging.getLogger("fathom.api")


class Admitted(NamedTuple):
    """What is left of a request once its choices are queued: nothing of its messages."""

    answer: Answer
    stream: bool
    include_usage: bool


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
        del body  # the answer may take long, and needs none of it
        admitted = await while_connected(request.receive, preparing)
        request.scope["held_body"].release()
    except BaseException:
        running.leave()
        raise
    answer = admitted.answer
    if admitted.stream:
        chunks = answer.chunks(include_usage=admitted.include_usage)
        return EventStream(events(chunks, running), answer.close)
    try:
        folding = fold(answer.chunks(include_usage=True), running)
        data = await while_connected(request.receive, folding)
        return Response(data, media_type="application/json")
    finally:
        answer.close()


async def prepare(state: ServerState, body: dict[str, Any], running: RunningRequest) -> Admitted:
    """Check a request, encode its prompt and queue its choices.

    Raises `RequestError` for what is wrong with it and if there is no room for it.
    """
    with contained(running.id):
        chat = parse_chat(body)
        _note_unknown(state, body)
        model = state.check_model(chat.model)
        params = sampling_params(chat, state.defaults)
        messages = template_messages(chat)
        check_choices(state, chat)
        state.engine.check_room(chat.num_choices + state.running.num_encoding)
        # A long prompt takes seconds, in which other streams must go on.
        encode = partial(
            state.tokenizer.encode_chat,
            messages,
            thinking=thinking_wanted(chat),
            variables=template_variables(chat),
            max_model_len=state.max_model_len,
        )
        prompt = await state.running.encode(
            running.key_id, chat.num_choices, state.limits.queue_seconds, encode
        )
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
        return Admitted(answer, bool(chat.stream), chat.include_usage)


def check_choices(state: ServerState, chat: ChatRequest) -> None:
    """Raises `BadRequest` for more choices than there is ever room for: waiting cannot help."""
    max_num_seqs = state.engine.info.max_num_seqs
    most = max_num_seqs + state.limits.queue
    if chat.num_choices > most:
        raise BadRequest(
            f"n is {chat.num_choices}, but this server has room for {most} choices: "
            f"{max_num_seqs} that run and {state.limits.queue} that wait. Ask for fewer.",
            param="n",
            code="invalid_value",
        )


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


async def fold(chunks: AsyncGenerator[Chunk | None], running: RunningRequest) -> bytes:
    """The JSON of the one answer that the chunks of a stream add up to."""
    with contained(running.id):
        async with aclosing(chunks):
            return "".join(json_pieces(await _fold(chunks))).encode()


class Json(str):
    """Text that is JSON already."""


def to_json(value: Any) -> Json:
    return Json(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def json_pieces(value: Any) -> Iterator[str]:
    """The JSON of ``value``, in which a `Json` stands for itself."""
    if isinstance(value, Json):
        yield value
    elif value and isinstance(value, dict):
        opening = "{"
        for name, item in value.items():
            yield f"{opening}{to_json(name)}:"
            yield from json_pieces(item)
            opening = ","
        yield "}"
    elif value and isinstance(value, list):
        opening = "["
        for item in value:
            yield opening
            yield from json_pieces(item)
            opening = ","
        yield "]"
    else:
        yield to_json(value)


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
                    choice["logprobs"][name] = choice["logprobs"].get(name) or []
                    # A long answer has millions of numbers: as text they cost no time at its end
                    # and none whenever Python looks for garbage.
                    choice["logprobs"][name] += map(to_json, entries)
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
