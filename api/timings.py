"""How long the parts of a request took: its wait, its prompt, its answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


class Timed(Protocol):
    """When a sequence reached its marks, in seconds of the monotonic clock; None: not yet."""

    @property
    def started_at(self) -> float | None: ...

    @property
    def first_token_at(self) -> float | None: ...

    @property
    def last_token_at(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, None where a part did not come to its end; tokens of all choices together."""

    queue_seconds: float | None  # from the submission to the first step
    prompt_seconds: float | None  # from there to the first token
    predicted_seconds: float | None  # from there to the last
    num_prompt_tokens: int
    num_cached_tokens: int
    num_predicted_tokens: int
    num_choices: int

    def to_dict(self) -> dict[str, Any]:
        """The ``timings`` object of an answer.

        Rates count what the time was spent on: the part of the prompt that was not cached, and the
        tokens after each choice's first, which the prompt's last step draws.
        """
        num_computed = self.num_prompt_tokens - self.num_cached_tokens
        num_later = self.num_predicted_tokens - self.num_choices
        return {
            "queue_ms": _milliseconds(self.queue_seconds),
            "prompt_ms": _milliseconds(self.prompt_seconds),
            "predicted_ms": _milliseconds(self.predicted_seconds),
            "prompt_n": num_computed,
            "cached_n": self.num_cached_tokens,
            "predicted_n": self.num_predicted_tokens,
            "prompt_per_second": _rate(num_computed, self.prompt_seconds),
            "predicted_per_second": _rate(num_later, self.predicted_seconds),
        }


def measure(
    submitted: float | None,
    generations: Iterable[Timed],
    *,
    num_prompt_tokens: int,
    num_cached_tokens: int,
    num_predicted_tokens: int,
) -> Timings:
    """Of a request whose choices were ``submitted`` then, in seconds of the monotonic clock."""
    choices = list(generations)
    started = _least(choice.started_at for choice in choices)
    first = _least(choice.first_token_at for choice in choices)
    last = max((one.last_token_at for one in choices if one.last_token_at), default=None)
    return Timings(
        _between(submitted, started),
        _between(started, first),
        _between(first, last),
        num_prompt_tokens,
        num_cached_tokens,
        num_predicted_tokens,
        len(choices),
    )


def _least(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(end - start, 0.0)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _rate(count: int, seconds: float | None) -> float | None:
    """None where too little happened to speak of a rate."""
    return round(count / seconds, 2) if seconds and count > 0 else None
