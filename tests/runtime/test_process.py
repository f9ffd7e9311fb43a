"""The engine in its own process: many streams at once, aborts, death of either side."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from runtime import (
    CheckpointError,
    ConfigError,
    EngineClient,
    EngineConfig,
    EngineDead,
    FinishReason,
    Generation,
    QueueFull,
    SamplingParams,
)
from tests.runtime.engines import TINY, chats, make_engine

CONFIG = EngineConfig(
    model=str(TINY), device="cpu", dtype="float32", max_model_len=512, num_threads=1
)


def with_client(work: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = EngineClient(CONFIG)
        await client.start()
        try:
            await work(client)
        finally:
            await client.stop()

    asyncio.run(run())


async def read(generation: Generation) -> list[int]:
    tokens = []
    async for events in generation:
        tokens += [event.token_id for event in events if event.token_id is not None]
    return tokens


async def assert_idle(client: EngineClient) -> None:
    stats = await client.stats()
    assert stats["num_sequences"] == 0
    assert stats["num_free_pages"] == stats["num_pages"]


def test_64_concurrent_streams_equal_their_solo_runs_and_leave_every_page_free() -> None:
    engine = make_engine(TINY, max_model_len=512)
    assert engine.tokenizer is not None
    prompts = [engine.tokenizer.encode_chat(chat).token_ids for chat in chats()]
    prompts = (prompts + prompts)[:64]
    each = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=20 + i % 30) for i in range(64)
    ]
    solo = [
        engine.generate([prompt], params)[0].token_ids
        for prompt, params in zip(prompts, each, strict=True)
    ]

    async def work(client: EngineClient) -> None:
        generations = [
            client.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)
        ]
        assert await asyncio.gather(*map(read, generations)) == solo
        await assert_idle(client)

    with_client(work)


def test_200_random_departures_free_every_page_within_one_step() -> None:
    rng = random.Random(5)

    async def leave(client: EngineClient, prompt: list[int], after: int) -> None:
        generation = client.submit(prompt, SamplingParams(max_tokens=400, ignore_eos=True))
        num_tokens = 0
        try:
            if after:
                async for events in generation:
                    num_tokens += len(events)
                    if num_tokens >= after:
                        break
        finally:
            generation.abort()
            generation.abort()

    async def work(client: EngineClient) -> None:
        await asyncio.gather(
            *(
                leave(client, [rng.randrange(5, 300)] * rng.randint(1, 60), rng.randrange(12))
                for _ in range(200)
            )
        )
        # The answer to this very message comes before the engine's next step.
        await assert_idle(client)

    with_client(work)


def test_an_aborted_generation_ends_for_its_reader() -> None:
    async def work(client: EngineClient) -> None:
        generation = client.submit([5] * 10, SamplingParams(max_tokens=400, ignore_eos=True))
        asyncio.get_running_loop().call_later(0.05, generation.abort)
        last = None
        async for events in generation:
            last = events[-1]
        assert last is not None
        assert last.finish_reason is FinishReason.ABORT

    with_client(work)


def test_a_killed_engine_fails_its_streams_and_refuses_new_ones() -> None:
    async def work(client: EngineClient) -> None:
        generation = client.submit([5] * 10, SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(generation)
        assert client._process is not None
        client._process.kill()
        with pytest.raises(EngineDead):
            await asyncio.wait_for(read(generation), 5)
        assert not client.healthy
        with pytest.raises(EngineDead):
            client.submit([5], SamplingParams())
        with pytest.raises(EngineDead):
            await client.stats()

    with_client(work)


def test_a_full_queue_refuses_and_takes_again_once_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.process.MAX_WAITING", 0)

    async def work(client: EngineClient) -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        generations = [client.submit([5] * 5, params) for _ in range(client.info.max_num_seqs)]
        with pytest.raises(QueueFull):
            client.submit([5] * 5, params)
        for generation in generations:
            generation.abort()
        await read(client.submit([5] * 5, SamplingParams(max_tokens=2)))
        await assert_idle(client)

    with_client(work)


def test_stop_leaves_no_process() -> None:
    async def work(client: EngineClient) -> None:
        client.submit([5] * 10, SamplingParams(max_tokens=400, ignore_eos=True))
        await client.stop()
        assert client._process is not None
        assert client._process.poll() == 0

    with_client(work)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (EngineConfig(model="./no-such-folder"), CheckpointError, "no such folder"),
        (EngineConfig(model=str(TINY), device="cuda:99"), ConfigError, "cuda:99"),
        (EngineConfig(model=str(TINY), kv_cache_memory=1), ConfigError, "KV cache"),
    ],
)
def test_a_start_that_fails_says_why(
    config: EngineConfig, error: type[Exception], message: str
) -> None:
    async def run() -> None:
        client = EngineClient(config)
        with pytest.raises(error, match=message):
            await client.start()
        assert client._process is not None
        assert client._process.poll() is not None

    asyncio.run(run())


def test_the_engine_leaves_when_its_server_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio
from runtime import EngineClient, EngineConfig
async def main():
    client = EngineClient(EngineConfig(model={str(TINY)!r}, max_model_len=64))
    await client.start()
    print(client._process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    server = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    with server:
        assert server.stdout is not None
        engine_pid = int(server.stdout.readline())
        server.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and is_running(engine_pid):
        time.sleep(0.02)
    assert not is_running(engine_pid)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:  # noqa: PTH123
            return stat.read().split(")")[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
