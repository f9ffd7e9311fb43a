"""``POST /tokenize`` and ``/detokenize``: what the model reads of a text, and what ids stand for.

The forms are vLLM's; llama.cpp's names for the same fields are taken too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from api.chat import chosen_tools, prompt_encoding
from api.containment import contained
from api.fields import FAIL_FAST, Body, Integer, parse
from api.generating import to_json
from api.guard import read_json
from api.schemas import chat_sampling, parse_chat
from api.sse import while_connected
from api.state import ServerState
from runtime import BadRequest, Tokenizer, check_params, check_token_ids

MAX_TOKENS = 1 << 17


class TokenizeRequest(Body):
    """``POST /tokenize`` of a text; a conversation is a chat request."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None  # llama.cpp's name
    add_special_tokens: bool | None = None
    add_special: bool | None = None  # llama.cpp's name; with it, false if left out
    with_pieces: bool | None = None


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[Integer], Field(max_length=MAX_TOKENS), FAIL_FAST]


Work = Callable[[], dict[str, Any]]


async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a conversation as the chat template writes it."""
    return await _answer(request, tokenizing)


async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    return await _answer(request, detokenizing)


def tokenizing(state: ServerState, body: dict[str, Any]) -> Work:
    """What answers the request, to be called in a thread. Raises `BadRequest`."""
    if body.get("messages") is not None:
        chat = parse_chat(body)
        state.check_model(chat.model)
        # refuse what the chat route would
        check_params(chat_sampling(chat, state.defaults), state.engine.info.vocab_size)
        encode = prompt_encoding(state, chat, chosen_tools(state, chat))
        return lambda: _counted(state, encode().token_ids)
    asked = parse(TokenizeRequest, body)
    state.check_model(asked.model)
    name = "content" if asked.prompt is None else "prompt"
    text = asked.content if asked.prompt is None else asked.prompt
    if text is None:
        raise BadRequest(
            "Missing required parameter: 'prompt', or 'messages'.",
            param="prompt",
            code="missing_required_parameter",
        )
    adds = asked.add_special if name == "content" else asked.add_special_tokens is not False
    encode_text = partial(
        state.tokenizer.encode,
        text,
        param=name,
        add_special_tokens=bool(adds),
        max_model_len=MAX_TOKENS + 1,
    )
    pieces_of = state.tokenizer if asked.with_pieces else None
    return lambda: _counted(state, encode_text(), pieces_of)


def detokenizing(state: ServerState, body: dict[str, Any]) -> Work:
    """What answers the request, to be called in a thread. Raises `BadRequest`."""
    asked = parse(DetokenizeRequest, body)
    state.check_model(asked.model)

    def work() -> dict[str, Any]:
        check_token_ids(asked.tokens, state.engine.info.vocab_size, "tokens")
        token_bytes = state.tokenizer.token_bytes
        text = b"".join(token_bytes[token_id] for token_id in asked.tokens).decode(errors="replace")
        return {"prompt": text, "content": text}

    return work


def _counted(
    state: ServerState, token_ids: list[int], pieces_of: Tokenizer | None = None
) -> dict[str, Any]:
    tokens: list[Any] = token_ids
    if pieces_of is not None:
        tokens = [{"id": i, "piece": _piece(pieces_of.token_bytes[i])} for i in token_ids]
    return {"count": len(tokens), "max_model_len": state.max_model_len, "tokens": tokens}


def _piece(data: bytes) -> str | list[int]:
    """A token's text, or its bytes if they are only part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def _answer(
    request: Request, prepare: Callable[[ServerState, dict[str, Any]], Work]
) -> Response:
    """Do the work in a thread for encoding, within the limits of what generates."""
    state: ServerState = request.app.state.server

    async def receive() -> Message:
        message = await request.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            state.check_open()
            state.engine.check_room(1 + state.running.num_encoding)
        return message

    body = await read_json(request.scope, receive)
    running = state.running.admit(request.scope, state.limits.request_seconds)

    async def work() -> str:
        with contained(running.id):
            do = prepare(state, body)

            def to_text() -> str:
                return str(to_json(do()))

            text = await state.running.encode(
                running.key_id, 1, state.limits.queue_seconds, to_text
            )
            running.check()
            return text

    try:
        data = await while_connected(request.receive, work())
        return Response(data, media_type="application/json")
    finally:
        running.leave()
