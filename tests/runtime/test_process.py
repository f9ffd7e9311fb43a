"""The engine in its own process: many streams at once, aborts, death of either side."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import (
    CheckpointError,
    ConfigError,
    EngineClient,
    EngineConfig,
    EngineDead,
    FinishReason,
    Generation,
    SamplingParams,
)
from runtime.link import ENGINE_ENVIRONMENT, EngineLink
from tests.processes import is_alive
from tests.runtime.engines import TINY, chats, make_engine
from tests.runtime.faulty_engine import PROGRAM as FAULTY
from tests.runtime.faulty_engine import Fault

CONFIG = EngineConfig(
    model=str(TINY), device="cpu", dtype="float32", max_model_len=512, num_threads=1
)


def with_client(
    work: Callable[[EngineClient], Awaitable[None]],
    *,
    max_num_seqs: int | None = None,
    program: Sequence[str] | None = None,
) -> None:
    async def run() -> None:
        client = EngineClient(replace(CONFIG, max_num_seqs=max_num_seqs), program=program)
        await client.start()
        try:
            await work(client)
        finally:
            await client.stop()

    asyncio.run(run())


SPEAKS = """
import json, os, socket, struct, sys
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
chosen = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "GLIBC_TUNABLES")}
heap = open("/proc/self/smaps").read().partition("[heap]")[2].partition("VmFlags:")[2]
is_huge = "hg" in heap.partition("\\n")[0].split()
for message in ({**chosen, "huge": is_huge}, {"text": "x" * 300_000}, {"n": 2}):
    body = json.dumps(message).encode()
    sock.sendall(struct.pack(">I", len(body)) + body)
"""


async def heard() -> list[dict[str, Any]]:
    """All that a program says that is started as an engine process is."""
    messages: list[dict[str, Any]] = []
    link = EngineLink([sys.executable, "-S", "-c", SPEAKS], messages.append, lambda: None)
    await link.connect()
    async with asyncio.timeout(20):
        await link.ended
    await link.gone()
    return messages


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


def test_faults_end_as_little_as_they_can() -> None:
    """One request; all that run; all that run and the process: never what waits."""
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [[5, 9, 11 + i] * 4 for i in range(4)]

    async def end(generation: Generation) -> FinishReason | None:
        return [events[-1] async for events in generation][-1].finish_reason

    async def work(client: EngineClient) -> None:
        def ask(seed: int | None = None) -> Generation:
            return client.submit([7] * 9, replace(params, max_tokens=400, seed=seed))

        expected = [await read(client.submit(prompt, params)) for prompt in prompts]
        running = ask()
        await anext(running)
        assert await end(ask(Fault.ADD)) is FinishReason.ERROR
        await anext(running)
        assert await end(ask(Fault.OUT_OF_MEMORY)) is FinishReason.ERROR
        assert await end(running) is FinishReason.ERROR
        assert client.status.num_restarts == 0
        await assert_idle(client)

        running = ask()
        await anext(running)
        fault = ask(Fault.RAISE)  # takes the second row
        waiting = [client.submit(prompt, params) for prompt in prompts]
        for generation in (fault, running):
            with pytest.raises(EngineDead, match="while it worked on this request"):
                await read(generation)
        assert await asyncio.gather(*map(read, waiting)) == expected
        assert "device-side assert" in client.status.reason
        assert client.status.num_restarts == 1
        await assert_idle(client)

    with_client(work, max_num_seqs=2, program=FAULTY)


def test_stop_leaves_no_process() -> None:
    async def work(client: EngineClient) -> None:
        client.submit([5] * 10, SamplingParams(max_tokens=400, ignore_eos=True))
        pid = engine_pid()
        await client.stop()
        assert not is_alive(pid)

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
        assert child_pids() == []

    asyncio.run(run())


SERVER = """
import json, os, socket, struct, subprocess, sys, time
os.environ["PYTHONPATH"] = "."
ours, theirs = socket.socketpair()
command = [*sys.argv[2:], "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
engine = subprocess.Popen(command, pass_fds=[theirs.fileno()])
print(engine.pid, flush=True)
def send(**message):
    body = json.dumps(message).encode()
    ours.sendall(struct.pack(">I", len(body)) + body)
def receive():
    [length] = struct.unpack(">I", ours.recv(4, socket.MSG_WAITALL))
    return json.loads(ours.recv(length, socket.MSG_WAITALL))
config = json.loads(sys.argv[1])
if config:
    send(type="start", config=config)
    while receive()["type"] != "ready":
        pass
    request = {"seq_id": 0, "prompt_ids": [5], "namespace": "", "priority": 0}
    send(type="add", params={"seed": 9003}, **request)  # Fault.HANG
    while receive()["type"] != "started":
        pass
print("now", flush=True)
os.fork()  # another process holds the socket open
time.sleep(60)
"""


@pytest.mark.parametrize("phase", ["import", "hang"])
def test_the_engine_leaves_when_its_server_is_killed(phase: str) -> None:
    """Even if its socket stays open, and long before or after it last looked at it."""
    config = CONFIG.to_dict() if phase == "hang" else {}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps(config), *FAULTY],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        process_group=0,
    )
    with server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert server.stdout.readline() == b"now\n"
        time.sleep(0.2)
        assert is_alive(pid)
        server.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 5
        while is_alive(pid):
            assert time.monotonic() < deadline, "the engine stays"
            time.sleep(0.02)
        os.killpg(server.pid, signal.SIGKILL)


def child_pids() -> list[int]:
    """Of this process, but for a server that tests of clients keep running."""
    tasks = Path("/proc/self/task").iterdir()
    pids = [pid for task in tasks for pid in (task / "children").read_text().split()]
    return [
        int(pid) for pid in pids if b"\0serve\0" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def engine_pid() -> int:
    [pid] = child_pids()
    return pid


def test_messages_of_any_length_arrive_whole_and_in_order() -> None:
    _, long, last = asyncio.run(heard())
    assert long == {"text": "x" * 300_000}
    assert last == {"n": 2}


def glibc_advises_huge_pages() -> bool:
    """Where it was asked to: since 2.35, and only if the kernel takes advice."""
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        return False
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[madvise]" in setting.read_text()


def test_an_engine_has_settings_of_its_own_unless_the_user_chose_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*ENGINE_ENVIRONMENT, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    first, *_ = asyncio.run(heard())
    assert first == {**ENGINE_ENVIRONMENT, "huge": glibc_advises_huge_pages()}
    theirs = {"GOMP_SPINCOUNT": "7", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    first, *_ = asyncio.run(heard())
    assert first == {**theirs, "huge": False}
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    first, *_ = asyncio.run(heard())
    assert first["GOMP_SPINCOUNT"] is None
