"""The tokens of one sequence, as the server process reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from runtime.errors import RequestError
from runtime.request import TokenEvent


class Generation:
    """The tokens of one sequence as they come: ``async for events in generation``.

    Each item is a list with every event that arrived since the last one; the last item ends with
    the event that carries a ``finish_reason``. Raises `EngineDead` if the engine process dies while
    it works on the sequence or the server stops, `QueueTimeout` if its turn does not come in time,
    and `Quarantined` if its prompt turns out to end engine processes.

    Times are seconds of the monotonic clock, which both processes share: the engine's own where it
    sends them, so a busy server does not make an engine look slow. None: not yet.
    """

    def __init__(self, seq_id: int, abort: Callable[[int], None]) -> None:
        self.seq_id = seq_id
        self.num_cached_tokens = 0  # of the prompt, taken from the prefix cache; 0 until it starts
        self.started_at: float | None = None  # its first step began
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.finished = False  # everything was read
        self._abort = abort
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()
        self._error: RequestError | None = None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if self.finished:
            raise StopAsyncIteration
        while not (events := self.take()):
            self._arrived.clear()
            await self._arrived.wait()
        return events

    def take(self) -> list[TokenEvent]:
        """As the iteration, but without waiting: empty if nothing arrived since the last time."""
        events, self._events = self._events, []
        if events:  # what arrived before an error is read before it
            self.finished = events[-1].finish_reason is not None
            if self._error is not None:
                self._arrived.set()
        elif self._error is not None:
            self.finished = True
            raise self._error
        return events

    def announce(self, arrived: asyncio.Event) -> None:
        """Set ``arrived``, which others may set too, for whatever arrives from now on."""
        self._arrived = arrived

    def abort(self) -> None:
        """End this sequence and free its pages before the engine's next step. Idempotent."""
        self._abort(self.seq_id)

    def deliver(self, event: TokenEvent, at: float | None = None) -> None:
        """Hand an event to the reader; ``at`` is when it was drawn, now if left out."""
        if event.token_id is not None:
            self.last_token_at = time.monotonic() if at is None else at
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at
        self._events.append(event)
        self._arrived.set()

    def fail(self, error: RequestError) -> None:
        self._error = error
        self._arrived.set()
