"""``POST /v1/chat/completions``: from a conversation to chunks, and from chunks to one answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.answer import Answer, Chunk
from api.containment import contained
from api.errors import shorten
from api.generating import Admitted, check_choices, generate, submit, to_json
from api.running import RunningRequest
from api.schemas import (
    chat_sampling,
    parse_chat,
    template_messages,
    template_variables,
    thinking_wanted,
    unknown_fields,
)
from api.state import ServerState

MAX_UNKNOWN_FIELDS = 256

logger = logging.getLogger("fathom.api")


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await generate(request, prepare, fold)


async def prepare(state: ServerState, body: dict[str, Any], running: RunningRequest) -> Admitted:
    """Check a request, encode its prompt and queue its choices.

    Raises `RequestError` for what is wrong with it and if there is no room for it.
    """
    with contained(running.id):
        chat = parse_chat(body)
        _note_unknown(state, body)
        model = state.check_model(chat.model)
        params = chat_sampling(chat, state.defaults)
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
