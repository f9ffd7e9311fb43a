"""Many clients at once over real HTTP: every answer its own, and no page left behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import httpx
import uvicorn

from api.app import ServerState, create_app
from api.connections import protocol_class
from api.server import Server
from runtime import EngineClient, EngineConfig, GenerationDefaults, Tokenizer
from tests.runtime.engines import QUESTIONS, TINY

CONFIG = EngineConfig(
    model=str(TINY), device="cpu", dtype="float32", max_model_len=1024, num_threads=1
)


def with_server(work: Callable[[httpx.AsyncClient, EngineClient], Awaitable[None]]) -> None:
    """Run ``work`` beside a server with the real engine process, in one event loop."""

    async def run() -> None:
        engine = EngineClient(CONFIG)
        await engine.start()
        state = ServerState(
            engine=engine,
            tokenizer=Tokenizer.load(TINY),
            defaults=GenerationDefaults(),
            model_names=("fathom-tiny",),
            keys=None,
            created=0,
            system_fingerprint="fp_test",
        )
        protocol = protocol_class(state.limits)
        config = uvicorn.Config(create_app(state), http=protocol, lifespan="off", log_config=None)
        server = Server(config, state.running, drain_seconds=10)
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            base = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
                await work(client, engine)
            server.stop()
            await serving
        await engine.stop()

    asyncio.run(run())


def body(i: int, **options: Any) -> dict[str, Any]:
    question = QUESTIONS[i % len(QUESTIONS)]
    return {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.9 * (i % 2),
        "seed": i,
        "max_tokens": 60,
        "stream": True,
        **options,
    }


async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[str, str, str]:
    """(thought, answer, finish reason) of a stream that must end cleanly."""
    thought = answer = reason = ""
    last = ""
    async with client.stream("POST", "/chat/completions", json=request) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            last = line.removeprefix("data: ")
            if last == "[DONE]":
                continue
            [choice] = json.loads(last)["choices"]
            thought += choice["delta"].get("reasoning_content", "")
            answer += choice["delta"].get("content", "")
            reason = choice["finish_reason"] or reason
    assert last == "[DONE]"
    return thought, answer, reason


async def assert_idle(engine: EngineClient) -> None:
    stats = await engine.stats()
    assert stats["num_sequences"] == 0, stats
    assert stats["num_free_pages"] == stats["num_pages"], stats


def test_64_streams_at_once_equal_their_solo_runs_and_leave_every_page_free() -> None:
    async def work(client: httpx.AsyncClient, engine: EngineClient) -> None:
        requests = [body(i) for i in range(64)]
        together = await asyncio.gather(*(stream(client, request) for request in requests))
        await assert_idle(engine)
        assert {reason for _, _, reason in together} <= {"stop", "length"}
        alone = [await stream(client, request) for request in requests]
        assert together == alone
        await assert_idle(engine)

    with_server(work)


def test_200_clients_that_leave_anywhere_leave_no_page_behind() -> None:
    rng = random.Random(9)

    async def leave(client: httpx.AsyncClient, i: int) -> None:
        options = {"max_tokens": 800, "ignore_eos": True, "stream": i % 4 != 0}
        request = body(i, **options)
        patience = rng.uniform(0.01, 2.0)
        try:
            async with asyncio.timeout(patience):
                if request["stream"]:
                    await stream(client, request)
                else:
                    await client.post("/chat/completions", json=request)
        except TimeoutError:
            return
        raise AssertionError(f"800 tokens arrived in {patience:.2f} s")

    async def work(client: httpx.AsyncClient, engine: EngineClient) -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(*(leave(client, i) for i in range(200)))
        # Closed connections reach the server's loop within a turn or two; then one step is enough.
        for _ in range(50):
            if (await engine.stats())["num_sequences"] == 0:
                break
            await asyncio.sleep(0.02)
        await assert_idle(engine)
        assert (await stream(client, body(0)))[2] in ("stop", "length")

    with_server(work)
