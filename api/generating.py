"""What every route that generates has in common: admission, then a stream or one folded answer.

One generator of chunks is behind both: a stream writes the chunks as events, a plain answer is
folded from the very same chunks, so the two cannot drift apart.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from api.answer import Answer, Choice, Chunk, Pause
from api.containment import contained
from api.errors import envelope, shorten
from api.guard import read_json
from api.running import RunningRequest
from api.sampling_fields import SamplingFields, cache_namespace
from api.sse import DONE, KEEP_ALIVE, EventStream, encode_json, frame, while_connected
from api.state import GenerationLike, ServerState
from runtime import INT64_MAX, BadRequest, RequestError, SamplingParams

MAX_UNKNOWN_FIELDS = 256

logger = logging.getLogger("fathom.api")

Chunks = AsyncGenerator[Chunk | Pause]
Fold = Callable[[Chunks], Coroutine[Any, Any, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Admitted:
    """What is left of a request once its choices are queued: nothing of its messages."""

    answer: Answer
    stream: bool
    include_usage: bool


Prepare = Callable[[ServerState, dict[str, Any], RunningRequest], Coroutine[Any, Any, Admitted]]
"""Checks a body, encodes its prompt and queues its choices; raises `RequestError`."""


async def generate(request: Request, prepare: Prepare, fold: Fold) -> Response:
    """Admit the request, then stream or fold its answer; the status is sent only once admitted."""
    state: ServerState = request.app.state.server
    request.scope["record"].is_generating = True

    async def receive() -> Message:
        message = await request.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            # A server that has no time for a body must not spend any on parsing it.
            state.check_open()
            state.running.check_limits(request.scope.get("api_key"))
            state.engine.check_room(1 + state.running.num_encoding)
        return message

    body = await read_json(request.scope, receive)
    if "name" in request.path_params:  # openai's old client: /engines/{name}/...
        name = state.check_model(request.path_params["name"])
        if body.get("model") is None:
            body["model"] = name
    running = state.running.admit(request.scope, state.limits.request_seconds)
    running.wants_timings = timings_wanted(request, body)
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
        folding = _folded(answer.chunks(include_usage=True), fold, running)
        data = await while_connected(request.receive, folding)
        return Response(data, media_type="application/json")
    finally:
        answer.close()


def timings_wanted(request: Request, body: dict[str, Any]) -> bool:
    """Whether the answer shall say how long it took; what is no boolean is refused later."""
    asked = request.headers.get("x-fathom-timings", "").strip() in ("1", "true")
    return asked or body.get("timings") is True or body.get("timings_per_token") is True


def note_unknown(state: ServerState, names: set[str]) -> None:
    """Log fields of a request that mean nothing here, each once."""
    for name in sorted(names - state.unknown_fields):
        if len(state.unknown_fields) < MAX_UNKNOWN_FIELDS:
            state.unknown_fields.add(name)
            logger.info("a client sends the unknown field %r; it is ignored", shorten(name))


def check_choices(state: ServerState, num_choices: int, num_prompts: int = 1) -> None:
    """Raises `BadRequest` for more choices than there is ever room for: waiting cannot help."""
    max_num_seqs = state.engine.info.max_num_seqs
    most = max_num_seqs + state.limits.queue
    if num_choices * num_prompts > most:
        each = f" for each of {num_prompts} prompts" if num_prompts > 1 else ""
        raise BadRequest(
            f"n is {num_choices}{each}, but this server has room for {most} choices: "
            f"{max_num_seqs} that run and {state.limits.queue} that wait. Ask for fewer.",
            param="n" if num_prompts == 1 else "prompt",
            code="invalid_value",
        )


Start = Callable[[int, GenerationLike, SamplingParams], Choice]
"""Makes the choice of an index from its generation and its own parameters."""


def admit(
    state: ServerState,
    request: SamplingFields,
    running: RunningRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    start: Start,
    *,
    model: str,
    id_prefix: str,
    chunk_object: str,
) -> Admitted:
    """Queue every choice of a request whose prompts are encoded, or none.

    ``chunk_object`` is what a chunk of its stream calls itself. Raises what `EngineClient.submit`
    raises, and what the request was ended with while it was encoded.
    """
    running.check()
    num_prompt_tokens = sum(map(len, prompts))
    answer = Answer(
        id=running.answer_id(id_prefix),
        chunk_object=chunk_object,
        model=model,
        system_fingerprint=state.system_fingerprint,
        num_prompt_tokens=num_prompt_tokens,
        choices_per_prompt=request.num_choices,
        silence_seconds=state.limits.ping,
        running=running,
        choices=submit(state, request, prompts, params, running.key_id, start),
    )
    running.submitted(answer.abort, num_prompt_tokens)
    return Admitted(answer, bool(request.stream), request.include_usage)


def submit(
    state: ServerState,
    request: SamplingFields,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    key_id: str | None,
    start: Start,
) -> list[Choice]:
    """Queue every choice of a request, or none: ``n`` of the first prompt, then of the next.

    Raises what `EngineClient.submit` raises.
    """
    choices: list[Choice] = []
    namespace = cache_namespace(request, key_id)
    try:
        for index in range(len(prompts) * request.num_choices):
            of_prompt, number = divmod(index, request.num_choices)
            own = params
            if params.seed is not None and number:
                # Choices differ, each reproducibly; past the largest seed they wrap around.
                seed = (params.seed + number + INT64_MAX + 1) % 2**64 - INT64_MAX - 1
                own = replace(params, seed=seed)
            generation = state.engine.submit(
                prompts[of_prompt], own, namespace=namespace, priority=request.priority or 0
            )
            choices.append(start(index, generation, own))
    except BaseException:
        for choice in choices:
            choice.generation.abort()
        raise
    return choices


async def events(chunks: Chunks, running: RunningRequest) -> AsyncGenerator[bytes]:
    """Chunks as server-sent events, together what comes between two pauses.

    A failure is an event of its own, and then no ``[DONE]``.
    """
    frames: list[bytes] = []
    try:
        with contained(running.id):
            async with aclosing(chunks):
                async for chunk in chunks:
                    if not isinstance(chunk, Pause):
                        frames.append(frame(chunk))
                    elif frames:
                        yield b"".join(frames)
                        frames.clear()
                    elif chunk is Pause.SILENCE:
                        yield KEEP_ALIVE
        frames.append(DONE)
    except RequestError as failure:
        answer = envelope(failure)
        running.record.outcome = answer["error"]["code"]
        frames.append(frame(answer))
    yield b"".join(frames)


async def _folded(chunks: Chunks, fold: Fold, running: RunningRequest) -> bytes:
    """The JSON of the one answer that the chunks of a stream add up to."""
    with contained(running.id):
        async with aclosing(chunks):
            return "".join(json_pieces(await fold(chunks))).encode()


class Json(str):
    """Text that is JSON already."""


def to_json(value: Any) -> Json:
    return Json(encode_json(value))


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
