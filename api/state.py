"""What the routes share: the engine's handle and the facts about the model they serve."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from api.errors import shorten
from api.keys import KeyStore
from runtime import GenerationDefaults, ModelNotFound, SamplingParams, TokenEvent, Tokenizer


class GenerationLike(Protocol):
    """The tokens of one sequence as they come; the last event carries a ``finish_reason``."""

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]: ...

    async def __anext__(self) -> list[TokenEvent]: ...

    def abort(self) -> None:
        """End the sequence and free its pages. Idempotent, never waits."""


class EngineLike(Protocol):
    """What the routes need of `runtime.EngineClient`; tests put a scripted engine here."""

    @property
    def healthy(self) -> bool: ...

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> GenerationLike: ...


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
    max_model_len: int
    allowed_origins: frozenset[str] = frozenset()
    keep_alive_seconds: float = 10.0  # silence after which a stream gets a comment
    unknown_fields: set[str] = field(default_factory=set)  # seen in requests, logged once each

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
