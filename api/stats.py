"""``GET /stats``: what the server does right now, for the page and for ``fathom top``."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from api.running import RunningRequest
from api.state import ServerState
from runtime import EngineDead

ENGINE_SECONDS = 1.0
"""How long the engine may take to answer; it does so between two steps."""
MAX_ROWS = 200
"""Requests that are listed; the oldest come first."""


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What the engine holds: sequences, and pages of its KV cache."""

    num_running: int
    num_waiting: int
    num_restarts: int
    num_pages: int  # 0 before the first engine is ready
    num_free_pages: int  # cached pages that nobody uses are free too
    num_cached_pages: int

    @property
    def usage(self) -> float:
        """The part of the pages that is in use, from 0 to 1."""
        return 1.0 - self.num_free_pages / self.num_pages if self.num_pages else 0.0


async def ask_engine(state: ServerState) -> EngineFigures:
    """The engine's figures of now; of a slow engine those of the last time, of a dead one none."""
    engine, figures = state.engine, state.running.figures
    try:
        async with asyncio.timeout(ENGINE_SECONDS):
            counts = await engine.stats()
        figures.note_engine(counts, engine.status.num_restarts)
    except TimeoutError:
        counts = dict(figures.engine_counts)
    except EngineDead:
        counts = {}
    try:
        num_pages = engine.info.num_pages
    except EngineDead:
        num_pages = 0
    return EngineFigures(
        num_running=engine.num_running,
        num_waiting=engine.num_waiting,
        num_restarts=engine.status.num_restarts,
        num_pages=num_pages,
        num_free_pages=counts.get("num_free_pages", num_pages),
        num_cached_pages=counts.get("num_cached_pages", 0),
    )


async def stats(request: Request) -> JSONResponse:
    """The figures of now as JSON; ``requests_total`` counts by outcome those that are over."""
    state: ServerState = request.app.state.server
    engine = await ask_engine(state)
    figures = state.running.figures
    now = time.monotonic()
    return JSONResponse(
        {
            "model": state.model_names[0],
            "uptime_seconds": round(figures.uptime_seconds, 3),
            "num_running": engine.num_running,
            "num_waiting": engine.num_waiting,
            "num_pages": engine.num_pages,
            "num_free_pages": engine.num_free_pages,
            "num_cached_pages": engine.num_cached_pages,
            "prompt_tokens_total": figures.num_prompt_tokens,
            "cached_tokens_total": figures.num_cached_tokens,
            "generation_tokens_total": figures.num_generation_tokens,
            "tokens_per_second": round(figures.rate.per_second(), 2),
            "requests_total": dict(sorted(figures.outcomes.items())),
            "restarts": engine.num_restarts,
            "ttft_seconds_p50": figures.median_first_token_seconds,
            "requests": [_row(each, now) for each in state.running.oldest(MAX_ROWS)],
        }
    )


def _row(running: RunningRequest, now: float) -> dict[str, Any]:
    """One request under way; ``key_id`` is null where no keys are needed."""
    return {
        "id": running.id,
        "key_id": running.key_id,
        "prompt_tokens": running.record.num_prompt_tokens or 0,
        "completion_tokens": running.record.num_completion_tokens or 0,
        "seconds": round(now - running.record.arrived, 3),
    }
