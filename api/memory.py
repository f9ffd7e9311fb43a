"""Memory that requests have left is given back while the server runs."""

from __future__ import annotations

import asyncio

from runtime import give_back_memory

GIVE_BACK_SECONDS = 10.0


async def keep_giving_back(seconds: float = GIVE_BACK_SECONDS) -> None:
    """Give back, in another thread, every ``seconds``, until cancelled."""
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(give_back_memory)
