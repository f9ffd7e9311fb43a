"""What a caller asks for (`SamplingParams`) and the engine's own record of it (`Sequence`)."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.blocks import Prefix
from runtime.errors import BadRequest
from runtime.grammar import Grammar

if TYPE_CHECKING:
    from runtime.constraints import Constraint

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end. Ranges are checked here, once, for every caller.

    Defaults are the API's neutral ones; a checkpoint's recommendations come in above the engine.
    Raises `BadRequest` naming the field, the value and the limit.
    """

    max_tokens: int | None = None  # None: until the context is full
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 0 keeps the best token only, 1 is off
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None: the engine draws one
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None  # None: none; n: the token's own and the n best
    grammar: Grammar | None = None  # of the answer, after the thought
    thinking_budget: int | None = None  # tokens of the thought; then it is closed
    break_loops: bool = False  # a thought that repeats itself is closed too
    prompt_logprobs: int | None = None  # as logprobs, of the prompt's tokens but the first

    def __post_init__(self) -> None:
        def number(name: str, low: float, high: float) -> None:
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                kind = "integer" if isinstance(value, int) else "decimal"
                side = "below_min" if value < low else "above_max"
                raise BadRequest(
                    f"{name} must be between {low:g} and {high:g}, got {value:g}",
                    param=name,
                    code=f"{kind}_{side}_value",
                )

        number("temperature", 0.0, 2.0)
        number("top_p", 0.0, 1.0)
        number("min_p", 0.0, 1.0)
        number("presence_penalty", -2.0, 2.0)
        number("frequency_penalty", -2.0, 2.0)
        number("top_k", -1, 2**31 - 1)
        number("min_tokens", 0, 2**31 - 1)
        if self.max_tokens is not None:
            number("max_tokens", 1, 2**31 - 1)
        if self.seed is not None:
            number("seed", INT64_MIN, INT64_MAX)
        if self.logprobs is not None:
            number("logprobs", 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            number("prompt_logprobs", 0, MAX_TOP_LOGPROBS)
        if self.thinking_budget is not None:
            number("thinking_budget", 0, 2**31 - 1)
        if not (math.isfinite(self.repetition_penalty) and 0 < self.repetition_penalty <= 10):
            raise BadRequest(
                "repetition_penalty must be above 0 and at most 10, "
                f"got {self.repetition_penalty:g}",
                param="repetition_penalty",
                code=(
                    "decimal_above_max_value"
                    if self.repetition_penalty > 10
                    else "decimal_below_min_value"
                ),
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise BadRequest(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}",
                param="stop",
                code="array_above_max_length",
            )
        if any(not text for text in self.stop):
            raise BadRequest(
                "stop must not hold an empty string", param="stop", code="invalid_value"
            )
        if any(len(text) > MAX_STOP_CHARS for text in self.stop):
            longest = max(map(len, self.stop))
            raise BadRequest(
                f"a stop string may have {MAX_STOP_CHARS} characters, got {longest}",
                param="stop",
                code="string_above_max_length",
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise BadRequest(
                f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}",
                param="logit_bias",
                code="object_above_max_properties",
            )
        for token_id, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise BadRequest(
                    f"logit_bias values must be between -100 and 100, got {bias:g} for {token_id}",
                    param="logit_bias",
                    code="decimal_above_max_value" if bias > 0 else "decimal_below_min_value",
                )

    @property
    def is_constrained(self) -> bool:
        return self.grammar is not None or self.thinking_budget is not None or self.break_loops

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in the API's words; those from `ABORT` on never end a good answer."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    NOT_FINITE = "not_finite"  # the model's numbers overflowed


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities of the chosen token and of the most likely ones.

    They are the model's own, before penalties, bias and temperature.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step's outcome for one sequence.

    ``token_id`` is None only in an event that ends a sequence without a new token, and in one with
    ``prompt_logprobs``: of the next tokens of the prompt, all of which come before the first new
    token. An end-of-sequence or stop token is reported like any other, with ``finish_reason`` STOP.
    """

    seq_id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One request inside the engine.

    Positions:
      [0, num_computed)            tokens that ran or are part of a planned step
      [num_computed, num_tokens)   tokens that still have to run
    The last ``num_pending`` tokens are drawn by planned steps and not known to the host yet.
    """

    seq_id: int
    prompt_ids: Seq[int]
    params: SamplingParams
    seed: int
    max_new_tokens: int  # params.max_tokens clamped to the context
    namespace: str = ""  # whose pages it may share
    priority: int = 0  # lower runs first
    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    row: int = -1  # index into the sampler's per-sequence state while running
    status: SequenceStatus = SequenceStatus.WAITING
    num_preemptions: int = 0
    num_cached: int = 0  # tokens of the prompt that were in the cache when it first ran
    num_published: int = 0  # pages of the block table that the cache knows of
    num_scored: int = 0  # tokens of the prompt, from its second on, whose logprobs were reported
    prefixes: list[Prefix] = field(default_factory=list)  # of full pages, as far as worked out
    order: tuple[int, int] = (0, 0)  # (priority, arrival): who comes first
    constraint: Constraint | None = None  # what its next token may be

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    @property
    def num_to_score(self) -> int:
        """Tokens of the prompt whose logprobs were asked for and not yet reported."""
        if self.params.prompt_logprobs is None:
            return 0
        return len(self.prompt_ids) - 1 - self.num_scored

    @property
    def max_num_tokens(self) -> int:
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def has_to_wait(self) -> bool:
        """Whether its next token cannot be drawn before those under way are known."""
        if self.constraint is None or self.num_pending == 0:
            return False
        return self.constraint.depends_on_pending(self.output_ids, self.num_pending)

    def token_range(self, start: int, end: int) -> list[int]:
        """Ids of the known tokens in [start, end)."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        ids = list(self.prompt_ids[start:end])
        if end > num_prompt:
            ids += self.output_ids[: end - num_prompt]
        return ids
