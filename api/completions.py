"""``POST /v1/completions``: prompts as they are, without a conversation around them."""

from __future__ import annotations

from collections.abc import AsyncIterable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.answer import Choice, Chunk, Pause
from api.completion_fields import (
    CompletionRequest,
    completion_sampling,
    parse_completion,
)
from api.containment import contained
from api.generating import Admitted, admit, check_choices, generate, note_unknown, to_json
from api.running import RunningRequest
from api.sampling_fields import unknown_fields
from api.state import GenerationLike, ServerState
from api.text_answer import Prompt, TextChoice
from runtime import (
    BadRequest,
    ContextLengthExceeded,
    SamplingParams,
    TextAssembler,
    check_token_ids,
)


async def completions(request: Request) -> Response:
    """Go on with one or several prompts."""
    return await generate(request, prepare, fold)


async def prepare(state: ServerState, body: dict[str, Any], running: RunningRequest) -> Admitted:
    """Check a request, encode its prompts and queue the choices of all of them, or none.

    Raises `RequestError` for what is wrong with it and if there is no room for it.
    """
    with contained(running.id):
        asked = parse_completion(body)
        note_unknown(state, unknown_fields(CompletionRequest, body))
        model = state.check_model(asked.model)
        params = completion_sampling(asked, state.defaults)
        check_choices(state, asked.num_choices, len(asked.prompt))
        num_choices = asked.num_choices * len(asked.prompt)
        state.engine.check_room(num_choices + state.running.num_encoding)
        # Long prompts take seconds, in which other streams must go on.
        prompts = await state.running.encode(
            running.key_id,
            num_choices,
            state.limits.queue_seconds,
            partial(encode_prompts, state, asked),
        )

        def start(index: int, generation: GenerationLike, own: SamplingParams) -> Choice:
            return TextChoice(
                index,
                generation,
                TextAssembler(state.tokenizer, own, thinking=None),
                state.tokenizer,
                echo=prompts[index // asked.num_choices] if asked.echo else None,
                has_logprobs=asked.logprobs is not None,
                is_empty=asked.max_new_tokens == 0,
            )

        return admit(
            state,
            asked,
            running,
            [prompt.token_ids for prompt in prompts],
            params,
            start,
            model=model,
            id_prefix="cmpl",
            chunk_object="text_completion",
        )


def encode_prompts(state: ServerState, asked: CompletionRequest) -> list[Prompt]:
    """Raises `BadRequest` for a prompt that has no tokens, too many, or unknown ones."""
    return [encode_prompt(state, asked, prompt) for prompt in asked.prompt]


def encode_prompt(state: ServerState, asked: CompletionRequest, given: str | list[int]) -> Prompt:
    """As `encode_prompts`, one of them."""
    if isinstance(given, str):
        text = state.tokenizer.infill(given, asked.suffix) if asked.suffix else given
        token_ids = state.tokenizer.encode(
            text,
            add_special_tokens=asked.add_special_tokens is not False,
            max_model_len=state.max_model_len,
        )
        prompt = Prompt(token_ids, state.tokenizer.num_in_front(text, token_ids))
    else:
        check_token_ids(given, state.engine.info.vocab_size, "prompt")
        prompt = Prompt(given)
    if not prompt.token_ids:
        raise BadRequest("The prompt is empty.", param="prompt", code="invalid_value")
    num_tokens = len(prompt.token_ids)
    if num_tokens >= state.max_model_len:
        raise ContextLengthExceeded(num_tokens, state.max_model_len, param="prompt")
    return prompt


async def fold(chunks: AsyncIterable[Chunk | Pause]) -> dict[str, Any]:
    """The one answer that the chunks of a stream add up to."""
    head: Chunk = {}
    texts: dict[int, list[str]] = {}
    choices: dict[int, dict[str, Any]] = {}
    async for chunk in chunks:
        if isinstance(chunk, Pause):
            continue
        head = chunk
        for part in chunk["choices"]:
            index = part["index"]
            choice = choices.setdefault(
                index, {"index": index, "text": "", "logprobs": None, "finish_reason": None}
            )
            texts.setdefault(index, []).append(part["text"])
            for name, values in (part["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                # as text they cost no time at the end of a long answer
                choice["logprobs"].setdefault(name, []).extend(map(to_json, values))
            choice["finish_reason"] = part["finish_reason"]
    for index, choice in choices.items():
        choice["text"] = "".join(texts[index])
    return {**head, "choices": [choices[index] for index in sorted(choices)]}
