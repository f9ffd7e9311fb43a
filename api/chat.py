"""``POST /v1/chat/completions``: from a conversation to chunks, and from chunks to one answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.answer import Choice, Chunk, Pause
from api.chat_answer import ChatChoice
from api.containment import contained
from api.generating import Admitted, admit, check_choices, generate, note_unknown, to_json
from api.response_format import grammar_of
from api.running import RunningRequest
from api.sampling_fields import unknown_fields
from api.schemas import (
    ChatRequest,
    chat_sampling,
    parse_chat,
    template_messages,
    template_variables,
    thinking_wanted,
)
from api.state import GenerationLike, ServerState
from api.tools import ToolUse, tool_use
from runtime import (
    ChatPrompt,
    SamplingParams,
    TextAssembler,
    ToolFormat,
    check_grammar,
    with_object_arguments,
)

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
        note_unknown(state, unknown_fields(ChatRequest, body))
        model = state.check_model(chat.model)
        params = chat_sampling(chat, state.defaults)
        tools = chosen_tools(state, chat)
        if tools is not None and tools.grammar is not None:
            params = replace(params, grammar=tools.grammar)
        encode = prompt_encoding(state, chat, tools)
        check_choices(state, chat.num_choices)
        state.engine.check_room(chat.num_choices + state.running.num_encoding)
        # A long prompt takes seconds, in which other streams must go on.
        prompt = await state.running.encode(
            running.key_id, chat.num_choices, state.limits.queue_seconds, encode
        )

        def start(index: int, generation: GenerationLike, own: SamplingParams) -> Choice:
            parser = None if tools is None else tools.parser()
            assembler = TextAssembler(state.tokenizer, own, thinking=prompt.thinking, parser=parser)
            return ChatChoice(index, generation, assembler, state.tokenizer)

        return admit(
            state,
            chat,
            running,
            [prompt.token_ids],
            params,
            start,
            model=model,
            id_prefix="chatcmpl",
            chunk_object="chat.completion.chunk",
        )


def chosen_tools(state: ServerState, chat: ChatRequest) -> ToolUse | None:
    """How the answer may call functions; None if it is to be plain. Raises `BadRequest`."""
    tools = tool_use(
        state.tokenizer,
        chat.tools,
        chat.tool_choice,
        parallel=chat.parallel_tool_calls is not False,
    )
    is_left_out = bool(chat.tools) and tools is None and chat.tool_choice != "none"
    if is_left_out and "tools" not in state.unknown_fields:
        state.unknown_fields.add("tools")
        logger.info(
            "a client sends tools, but the model was not taught to call any; they are left out of "
            "the prompt unless tool_choice asks for a call"
        )
    return tools


def prompt_encoding(
    state: ServerState, chat: ChatRequest, tools: ToolUse | None
) -> Callable[[], ChatPrompt]:
    """What makes the prompt of a conversation, to be called in a thread.

    Raises `BadRequest` for what no template is asked about, and so does what it returns.
    """
    messages = template_messages(chat)
    if any(message.get("tool_calls") for message in messages):
        style = state.tokenizer.tool_style
        if style.wants_objects or style.format == ToolFormat.DSML:
            messages = with_object_arguments(messages)
    encode = partial(
        state.tokenizer.encode_chat,
        messages,
        tools=None if tools is None else tools.tools,
        thinking=thinking_wanted(chat),
        add_generation_prompt=chat.add_generation_prompt is not False,
        continue_final_message=chat.continues_final_message,
        variables=template_variables(chat),
        max_model_len=state.max_model_len,
    )

    grammar = grammar_of(chat.response_format)

    def checked() -> ChatPrompt:
        if tools is not None:
            tools.check(state.tokenizer)
        if grammar is not None:
            check_grammar(grammar, state.tokenizer)
        return encode()

    return checked


async def fold(chunks: AsyncIterable[Chunk | Pause]) -> dict[str, Any]:
    """The one answer that the chunks of a stream add up to."""
    head: Chunk = {}
    usage: dict[str, Any] | None = None
    choices: dict[int, dict[str, Any]] = {}
    async for chunk in chunks:
        if isinstance(chunk, Pause):
            continue
        head, usage = chunk, chunk["usage"]
        for part in chunk["choices"]:
            index = part["index"]
            empty = {"index": index, "message": {}, "logprobs": None, "finish_reason": None}
            choice = choices.setdefault(index, empty)
            for name, value in part["delta"].items():
                if name == "tool_calls":
                    _fold_calls(choice["message"].setdefault(name, []), value)
                else:
                    choice["message"][name] = choice["message"].get(name, "") + value
            for name, entries in (part["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {"content": None, "refusal": None}
                if entries is not None:
                    choice["logprobs"][name] = choice["logprobs"].get(name) or []
                    # A long answer has millions of numbers: as text they cost no time at its end
                    # and none whenever Python looks for garbage.
                    choice["logprobs"][name] += map(to_json, entries)
            choice["finish_reason"] = part["finish_reason"]
    for choice in choices.values():
        message = choice["message"]
        message["refusal"] = None
        if "tool_calls" in message:
            message["content"] = message["content"] or None
    return {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "system_fingerprint": head["system_fingerprint"],
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage,
        **({"timings": head["timings"]} if "timings" in head else {}),
    }


def _fold_calls(calls: list[dict[str, Any]], deltas: list[dict[str, Any]]) -> None:
    """A call's first delta makes it, the others add to its arguments."""
    for delta in deltas:
        if "id" in delta:
            call = {name: delta[name] for name in delta if name != "index"}
            calls.append(call | {"function": dict(delta["function"])})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
