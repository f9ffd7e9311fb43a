"""The requests of a serving benchmark: ragged prompts and answers, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.offline import FIRST_ID


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, how long its answer shall be, and when it is sent."""

    prompt_ids: list[int]
    num_new: int
    at: float  # seconds since the start; 0.0 in a closed loop


def make_requests(
    count: int,
    *,
    num_prompt: int,
    num_new: int,
    vocab_size: int,
    rate: float | None = None,
    seed: int = 0,
) -> list[Request]:
    """``count`` requests whose prompts and answers are between half as long and one and a half.

    Args:
        count: how many.
        num_prompt: mean tokens of a prompt.
        num_new: mean tokens of an answer.
        vocab_size: prompts are random ids below it.
        rate: requests per second of a Poisson process; None: all are there at the start.
        seed: of lengths, ids and arrivals.
    """
    rng = np.random.default_rng(seed)
    prompt_lens = _ragged(rng, num_prompt, count)
    answer_lens = _ragged(rng, num_new, count)
    gaps = np.zeros(count) if rate is None else rng.exponential(1 / rate, count)
    arrivals = np.cumsum(gaps) - gaps[0]
    return [
        Request(rng.integers(FIRST_ID, vocab_size, int(length)).tolist(), int(new), float(at))
        for length, new, at in zip(prompt_lens, answer_lens, arrivals, strict=True)
    ]


def _ragged(rng: np.random.Generator, mean: int, count: int) -> list[int]:
    """Lengths around ``mean``, at least 1."""
    spread = mean // 2
    lengths: list[int] = rng.integers(max(mean - spread, 1), mean + spread + 1, count).tolist()
    return lengths
