"""When a dead engine is replaced, and when a silent one counts as hung. Pure, on given times."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from runtime.engine_config import EngineInfo

SILENT_STEPS = 20
"""The watchdog waits at least this many times the longest silence of late."""
FADING = 0.99
"""What is left of that longest silence after each tick without silence."""
SLOW_CPU_FLOPS = 1e10
"""A CPU slower than this many floating-point operations a second counts as hung."""


@dataclass(frozen=True, slots=True)
class SupervisorPolicy:
    """Limits of the queue, the watchdog and the replacement of a dead engine process.

    Fields that end in ``seconds`` are monotonic seconds. Silence and waiting count in ticks, in
    which at most two ticks' seconds pass: time in which the server itself stood still is nobody's.
    """

    max_waiting: int = 256  # sequences that may wait beyond those that run
    queue_seconds: float = 120.0  # a sequence that has not started by then is given up
    watchdog_seconds: float = 60.0  # of silence while there is work
    load_seconds: float = 600.0  # of silence while a replacement loads
    abort_seconds: float = 1.0  # for a hung engine to print its stacks before it is killed
    tick_seconds: float = 1.0
    calm_seconds: float = 60.0  # an engine that worked this long is replaced at once
    first_backoff_seconds: float = 1.0  # before the second replacement; then twice that, and so on
    max_backoff_seconds: float = 60.0
    breaker_deaths: int = 3  # so many within breaker_seconds, and requests are refused
    breaker_seconds: float = 60.0
    stop_seconds: float = 5.0  # for a stopped engine to leave before it is killed


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine process is doing.

    ``state`` is loading (the first time), ready, restarting, failing (dies again and again), or
    stopped.
    """

    state: str
    phase: str  # for people
    percent: float | None  # of the weights, while they are read
    num_restarts: int  # engine processes started after the first was ready
    reason: str  # why the last engine ended, "" if none has


class Restarts:
    """How long to wait before each replacement, and whether requests may wait for it."""

    def __init__(self, policy: SupervisorPolicy) -> None:
        self._policy = policy
        self._deaths: deque[float] = deque(maxlen=policy.breaker_deaths)
        self._ready_at: float | None = None
        self._num_tries = 0  # since an engine last was calm
        self.failing = False

    def ready(self, now: float) -> None:
        self._ready_at = now
        self.failing = False

    def died(self, now: float) -> float:
        """Note a death, also one before the engine was ready; seconds until the next start."""
        policy = self._policy
        if self._ready_at is not None and now - self._ready_at >= policy.calm_seconds:
            self._num_tries = 0
        self._ready_at = None
        self._deaths.append(now)
        full = len(self._deaths) == policy.breaker_deaths
        self.failing |= full and now - self._deaths[0] <= policy.breaker_seconds
        self._num_tries += 1
        if self._num_tries == 1:
            return 0.0
        doublings = min(self._num_tries - 2, 32)
        return min(policy.first_backoff_seconds * 2.0**doublings, policy.max_backoff_seconds)


class Watchdog:
    """Whether an engine that has work was silent for too long.

    The limit is the policy's, or 20 times the longest silence of late where that is more, or what
    a full step may take on a slow CPU.
    """

    def __init__(self, policy: SupervisorPolicy, info: EngineInfo) -> None:
        self._least = max(policy.watchdog_seconds, slowest_step_seconds(info))
        self._silence = 0.0
        self._longest = 0.0

    @property
    def limit(self) -> float:
        """Seconds."""
        return max(self._least, SILENT_STEPS * self._longest)

    def heard(self) -> None:
        self._longest = max(self._longest, self._silence)
        self._silence = 0.0

    def tick(self, seconds: float, *, has_work: bool) -> bool:
        """Count time of a living server; True once the engine counts as hung."""
        if self._silence == 0.0:
            self._longest *= FADING
        self._silence = self._silence + seconds if has_work else 0.0
        return self._silence > self.limit


def slowest_step_seconds(info: EngineInfo) -> float:
    """What a full step may take: on a CPU a long prompt in a big model takes minutes."""
    if info.device != "cpu":
        return 0.0
    return 2.0 * info.num_parameters * info.max_step_tokens / SLOW_CPU_FLOPS
