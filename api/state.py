"""What the routes share: the engine's handle and the facts about the model they serve."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from api.errors import HttpError, shorten
from api.keys import KeyStore
from api.limits import Limits
from api.running import Running, shutting_down
from api.timings import Timed
from runtime import (
    EngineInfo,
    EngineStatus,
    GenerationDefaults,
    ModelNotFound,
    SamplingParams,
    TokenEvent,
    Tokenizer,
)


class GenerationLike(Timed, Protocol):
    """The tokens of one sequence as they come; the last event carries a ``finish_reason``."""

    @property
    def finished(self) -> bool:
        """Whether its last event was taken, or its error raised."""

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were in the prefix cache; 0 until the sequence starts."""

    def announce(self, arrived: asyncio.Event) -> None:
        """Set ``arrived`` whenever something arrives from now on, or is left to take."""

    def take(self) -> list[TokenEvent]:
        """What came since the last time. Raises `RequestError` if it failed."""

    def abort(self) -> None:
        """End the sequence, if it has not ended, with an event ABORT. Idempotent, never waits."""


class EngineLike(Protocol):
    """What the routes need of `runtime.EngineClient`; tests put a scripted engine here."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def info(self) -> EngineInfo:
        """Raises `EngineDead` before the engine was ready for the first time."""

    @property
    def num_running(self) -> int:
        """Sequences that have begun and not ended."""

    @property
    def num_waiting(self) -> int: ...

    async def stats(self) -> dict[str, int]:
        """The engine's own counts. Raises `EngineDead`; takes as long as a step may."""

    def check_room(self, count: int = 1) -> None:
        """Raises `QueueFull` or `EngineDead` if as many sequences cannot be queued. Cheap."""

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        namespace: str = "",
        priority: int = 0,
    ) -> GenerationLike: ...


@dataclass(frozen=True, slots=True)
class ServerState:
    """Made once at start. ``keys`` None serves anyone on this machine."""

    engine: EngineLike
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    model_names: tuple[str, ...]  # the first is the main one, the others are aliases
    keys: KeyStore | None
    created: int  # Unix seconds
    system_fingerprint: str
    allowed_origins: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    running: Running = field(default_factory=Running)
    unknown_fields: set[str] = field(default_factory=set)  # seen in requests, logged once each

    @property
    def max_model_len(self) -> int:
        return self.engine.info.max_model_len

    def check_open(self) -> None:
        """Raises `HttpError` 503 while the model is loaded for the first time, or the server
        drains.
        """
        if self.running.draining:
            raise shutting_down()
        status = self.engine.status
        if status.state == "loading":
            done = "" if status.percent is None else f" ({status.percent:.0f} %)"
            raise HttpError(
                503,
                f"The model is loading: {status.phase}{done}.",
                code="model_loading",
                error_type="server_error",
            )

    def check_model(self, name: str | None) -> str:
        """The name to answer under: the asked one, or the main one if none was asked for.

        Raises `ModelNotFound`.
        """
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise ModelNotFound(
                f"The model '{shorten(name)}' does not exist; this server has "
                f"{', '.join(self.model_names)}.",
                param="model",
            )
        return name
