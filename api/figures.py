"""What this server has done so far, in plain numbers: what `/metrics` and `/stats` tell.

Everything here belongs to the event loop. A token costs an addition or two: they are counted a
batch at a time, and most histograms take one value per request.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

RATE_SECONDS = 5.0
"""The time over which tokens per second are counted."""
SLOT_SECONDS = 0.1
NUM_RECENT = 128
"""Requests whose times to the first token are remembered for the median."""

LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
INTERVALS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DURATIONS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
TOKENS = tuple(float(1 << power) for power in range(0, 21, 2))


class Histogram:
    """How many values were at most each bound; values above the last are counted too."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # of each bucket alone
        self.total = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.total += value * weight


class Rate:
    """How many of something came per second of late. ``clock`` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slots: deque[list[int]] = deque()  # (slot of time, how many came in it)

    def add(self, count: int) -> None:
        slot = int(self._clock() / SLOT_SECONDS)
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1][1] += count
        else:
            self._slots.append([slot, count])
            self._drop(slot)

    def per_second(self) -> float:
        self._drop(int(self._clock() / SLOT_SECONDS))
        return sum(count for _, count in self._slots) / RATE_SECONDS

    def _drop(self, now: int) -> None:
        while self._slots and self._slots[0][0] <= now - RATE_SECONDS / SLOT_SECONDS:
            self._slots.popleft()


class Figures:
    """Counts, times and rates of all generating requests since the server started."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generation_tokens = 0
        self.outcomes: Counter[str] = Counter()  # "ok", "client_gone" or an error's code
        self.finish_reasons: Counter[str] = Counter()  # of choices
        self.rate = Rate(clock)
        self.first_token_seconds = Histogram(LATENCIES)
        self.token_interval_seconds = Histogram(INTERVALS)
        self.request_seconds = Histogram(DURATIONS)
        self.queue_seconds = Histogram(LATENCIES)
        self.prefill_seconds = Histogram(LATENCIES)
        self.decode_seconds = Histogram(DURATIONS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.engine_counts: Mapping[str, int] = {}  # what the engine said last
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._engine_number = 0
        self._num_preemptions_before = 0  # of engines that were replaced

    @property
    def uptime_seconds(self) -> float:
        return self._clock() - self._started

    @property
    def median_first_token_seconds(self) -> float | None:
        """Of the latest requests; None if there was none."""
        return statistics.median(self._recent) if self._recent else None

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions_before + self.engine_counts.get("num_preemptions", 0)

    def add_prompt(self, num_tokens: int) -> None:
        self.num_prompt_tokens += num_tokens
        self.prompt_tokens.observe(num_tokens)

    def add_cached(self, num_tokens: int) -> None:
        self.num_cached_tokens += num_tokens

    def add_first_token(self, seconds: float) -> None:
        self.first_token_seconds.observe(seconds)
        self._recent.append(seconds)

    def add_tokens(self, count: int, seconds: float | None) -> None:
        """``count`` tokens of one choice, ``seconds`` after those before; None for the first."""
        self.num_generation_tokens += count
        self.rate.add(count)
        if seconds is not None:
            self.token_interval_seconds.observe(seconds / count, count)

    def note_engine(self, counts: Mapping[str, int], engine_number: int) -> None:
        """What the engine said of itself; each engine process counts from zero."""
        if engine_number != self._engine_number:
            self._num_preemptions_before = self.num_preemptions
            self._engine_number = engine_number
        self.engine_counts = counts
