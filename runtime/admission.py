"""What the engine refuses at the door, so that no plan ever meets an impossible sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

from runtime.engine_config import EngineInfo
from runtime.errors import BadRequest, ContextLengthExceeded
from runtime.request import SamplingParams, Sequence

MAX_PRIORITY = 1000
_SEEDS = random.SystemRandom()


def admit(
    seq_id: int,
    prompt_ids: Seq[int],
    params: SamplingParams,
    info: EngineInfo,
    *,
    namespace: str = "",
    priority: int = 0,
) -> Sequence:
    """A waiting `Sequence` for this request.

    ``max_tokens`` beyond the context is clamped (the answer then ends with "length").
    Raises `BadRequest` for an empty prompt, a token id outside the vocabulary or a priority out of
    range, and `ContextLengthExceeded` for a prompt that leaves no room for a token.
    """
    if abs(priority) > MAX_PRIORITY:
        raise BadRequest(
            f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {priority}",
            param="priority",
            code="integer_below_min_value" if priority < 0 else "integer_above_max_value",
        )
    if not prompt_ids:
        raise BadRequest("the prompt is empty", param="messages", code="invalid_value")
    if len(prompt_ids) >= info.max_model_len:
        raise ContextLengthExceeded(len(prompt_ids), info.max_model_len)
    check_token_ids(prompt_ids, info.vocab_size, "messages")
    check_params(params, info.vocab_size)
    room = info.max_model_len - len(prompt_ids)
    return Sequence(
        seq_id=seq_id,
        prompt_ids=prompt_ids,
        params=params,
        seed=_SEEDS.getrandbits(63) if params.seed is None else params.seed,
        max_new_tokens=min(params.max_tokens or room, room),
        namespace=namespace,
        priority=priority,
    )


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises `BadRequest` for an id in ``params`` that the model has no token for."""
    check_token_ids(params.stop_token_ids, vocab_size, "stop_token_ids")
    biased = tuple(token_id for token_id, _ in params.logit_bias)
    check_token_ids(biased, vocab_size, "logit_bias")


def check_token_ids(token_ids: Seq[int], vocab_size: int, param: str) -> None:
    """Raises `BadRequest` for an id that the model has no token for."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise BadRequest(
            f"token id {bad} is outside the vocabulary of {vocab_size} tokens",
            param=param,
            code="invalid_value",
        )
