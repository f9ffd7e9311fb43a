"""Death, hanging, replacement and the queue, with an engine process that a test scripts."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import (
    BadRequest,
    CheckpointError,
    EngineClient,
    EngineConfig,
    EngineDead,
    FinishReason,
    Generation,
    Quarantined,
    QueueFull,
    QueueTimeout,
    RequestError,
    SamplingParams,
    SupervisorPolicy,
    TokenEvent,
)
from runtime.engine_config import EngineInfo
from runtime.link import EngineLink
from runtime.supervision import Restarts, Watchdog
from tests.processes import is_alive
from tests.runtime.scripted_engine import INFO, PROGRAM, Do

QUICK = SupervisorPolicy(
    max_waiting=8,
    watchdog_seconds=30.0,
    abort_seconds=0.2,
    tick_seconds=0.02,
    calm_seconds=60.0,
    first_backoff_seconds=0.01,
    max_backoff_seconds=0.05,
    breaker_deaths=100,
    stop_seconds=2.0,
)
HASTY = replace(QUICK, watchdog_seconds=0.5)
PARAMS = SamplingParams()


class Script:
    """The folder that tells the scripted engine what to do."""

    def __init__(self, folder: Path, *starts: str) -> None:
        self.folder = folder
        (folder / "starts").write_text(" ".join(starts or ("ok",)))
        (folder / "count").write_text("0")
        (folder / "log").touch()

    def client(self, policy: SupervisorPolicy = QUICK) -> EngineClient:
        config = EngineConfig(model=str(self.folder))
        return EngineClient(config, policy=policy, program=PROGRAM)

    def log(self) -> list[list[str]]:
        return [line.split() for line in (self.folder / "log").read_text().splitlines()]

    def added(self) -> list[list[int]]:
        return [[int(word) for word in words[1:]] for words in self.log() if words[0] == "add"]

    def pids(self) -> list[int]:
        return [int(words[2]) for words in self.log() if words[0] == "start"]


@asynccontextmanager
async def started(client: EngineClient) -> AsyncIterator[EngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def play(
    script: Script,
    work: Callable[[EngineClient], Awaitable[None]],
    policy: SupervisorPolicy = QUICK,
) -> None:
    """Run ``work`` on a started client; afterwards no engine process is left."""

    async def run() -> None:
        async with asyncio.timeout(60), started(script.client(policy)) as client:
            await work(client)

    asyncio.run(run())
    assert not any(is_alive(pid) for pid in script.pids())


async def read(generation: Generation) -> list[int]:
    tokens = []
    async for events in generation:
        tokens += [event.token_id for event in events if event.token_id is not None]
    return tokens


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def ask(client: EngineClient, do: Do, number: int = 0) -> Generation:
    return client.submit([do, number], PARAMS)


# -- death -----------------------------------------------------------------------------------


def test_what_ran_ends_and_what_waited_is_answered_by_the_next_engine_in_its_order(
    tmp_path: Path,
) -> None:
    script = Script(tmp_path, "ok", "load:0.2")

    async def work(client: EngineClient) -> None:
        running = ask(client, Do.RUN)
        assert (await anext(running))[0].token_id == 7
        assert running.num_cached_tokens == 3
        waiting = [ask(client, Do.WAIT, i) for i in range(3)]
        await client.stats()  # the engine has them
        os.kill(script.pids()[0], signal.SIGKILL)
        with pytest.raises(EngineDead, match="while it worked on this request") as caught:
            await read(running)
        assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")
        await until(lambda: client.status.phase == "loading weights")
        assert client.status.state == "restarting"
        assert client.status.percent == 25.0
        assert not client.healthy
        late = ask(client, Do.ANSWER)  # while there is no engine
        assert await read(late) == [7, 8]
        assert script.added()[-4:] == [[Do.WAIT, 0], [Do.WAIT, 1], [Do.WAIT, 2], [Do.ANSWER, 0]]
        assert client.status.state == "ready"
        assert client.healthy
        assert client.status.num_restarts == 1
        assert "SIGKILL" in client.status.reason
        for generation in waiting:
            generation.abort()
            assert await read(generation) == []
        assert await client.stats() == {"num_sequences": 0}

    play(script, work)


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (Do.DIE, "killed by SIGKILL"),
        (Do.FAULT, "RuntimeError: a kernel failed"),
        (Do.GARBAGE, "does not hold JSON"),
        (Do.CUT, "exited with code 1"),
        (Do.HUGE, "1073741824 bytes is above the limit"),
        (Do.CLOSE, "SIGKILL"),
        (Do.NONSENSE, "unknown message type"),
        (Do.ODD_EVENTS, "no events"),
    ],
)
def test_whatever_an_engine_says_or_does_last_the_next_one_serves(
    tmp_path: Path, do: Do, reason: str
) -> None:
    script = Script(tmp_path)

    async def work(client: EngineClient) -> None:
        with pytest.raises(EngineDead):
            await read(ask(client, do))
        assert await read(ask(client, Do.ANSWER)) == [7, 8]
        assert reason in client.status.reason
        assert client.status.num_restarts == 1

    play(script, work)


def test_tokens_that_came_before_an_error_are_read_before_it() -> None:
    async def run() -> None:
        generation = Generation(0, lambda _: None)
        generation.deliver(TokenEvent(0, 7))
        generation.fail(EngineDead("gone"))
        assert [event.token_id for event in await anext(generation)] == [7]
        with pytest.raises(EngineDead):
            await anext(generation)
        with pytest.raises(StopAsyncIteration):
            await anext(generation)

    asyncio.run(run())


def test_a_request_that_the_engine_refuses_ends_alone(tmp_path: Path) -> None:
    async def work(client: EngineClient) -> None:
        running = ask(client, Do.RUN)
        last = [events[-1] async for events in ask(client, Do.REFUSE)][-1]
        assert last.finish_reason is FinishReason.ERROR
        assert (await anext(running))[0].token_id == 7
        assert client.status.num_restarts == 0

    play(Script(tmp_path), work)


def test_engines_that_die_young_open_the_breaker_until_one_is_ready_again(tmp_path: Path) -> None:
    script = Script(tmp_path, "ok", "brief", "die", "fail", "load:0.2")

    async def work(client: EngineClient) -> None:
        waiting = ask(client, Do.WAIT)
        with pytest.raises(EngineDead):
            await read(ask(client, Do.DIE))
        await until(lambda: client.status.state == "failing")
        for refused in (client.check_room, lambda: ask(client, Do.ANSWER)):
            with pytest.raises(EngineDead, match="3 times"):
                refused()
        await until(lambda: client.status.phase == "loading weights")
        assert client.status.state == "failing"
        assert client.status.reason == "the files are gone"
        await until(lambda: client.healthy)
        assert await read(ask(client, Do.ANSWER)) == [7, 8]
        assert client.status.num_restarts == 4
        assert script.added().count([Do.WAIT, 0]) in (2, 3)  # it waited through all of it
        waiting.abort()

    play(script, work, replace(QUICK, breaker_deaths=3))


def test_a_start_is_put_off_for_longer_each_time_and_not_after_a_calm_life() -> None:
    restarts = Restarts(SupervisorPolicy())
    now, delays = 1000.0, []
    for _ in range(9):
        restarts.ready(now)
        now += 59.9
        delays.append(restarts.died(now))
        now += delays[-1]
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert not restarts.failing  # never three deaths within a minute
    restarts.ready(now)
    assert restarts.died(now + 60) == 0
    assert restarts.died(now + 61) == 1
    assert not restarts.failing
    assert restarts.died(now + 120) == 2
    assert restarts.failing
    restarts.ready(now + 120.5)
    assert not restarts.failing
    assert restarts.died(now + 120.9) == 4
    assert restarts.failing


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [("fail", CheckpointError, "the files are gone"), ("die", EngineDead, "exited with code 5")],
)
def test_the_first_engine_has_to_load(
    tmp_path: Path, start: str, error: type[Exception], message: str
) -> None:
    script = Script(tmp_path, start)

    async def run() -> None:
        client = script.client()
        with pytest.raises(EngineDead, match="not started"):
            _ = client.info
        with pytest.raises(error, match=message):
            await client.start()
        assert client.status.state == "stopped"
        with pytest.raises(EngineDead):
            ask(client, Do.ANSWER)

    asyncio.run(run())
    assert len(script.pids()) == 1
    assert not is_alive(script.pids()[0])


def test_a_program_that_is_not_there_fails_the_start_in_one_line(tmp_path: Path) -> None:
    client = EngineClient(EngineConfig(model="x"), program=[str(tmp_path / "nothing")])

    async def run() -> None:
        with pytest.raises(EngineDead, match=r"cannot be started.*No such file"):
            await client.start()

    asyncio.run(run())


# -- who is to blame -------------------------------------------------------------------------


def test_a_prompt_that_kills_two_engines_is_refused_and_its_neighbours_are_not(
    tmp_path: Path,
) -> None:
    script = Script(tmp_path)

    async def work(client: EngineClient) -> None:
        async def die_with(*neighbours: Generation) -> None:
            for neighbour in neighbours:
                await anext(neighbour)
            killer = ask(client, Do.DIE)
            for generation in (killer, *neighbours):
                with pytest.raises((EngineDead, Quarantined)):
                    await read(generation)

        await die_with(ask(client, Do.RUN, 1), ask(client, Do.RUN, 2))
        # All three are suspects now, and run alone; others pass them.
        first, second = ask(client, Do.RUN, 1), ask(client, Do.RUN, 2)
        killer = ask(client, Do.DIE)
        other = ask(client, Do.RUN, 3)
        copy = ask(client, Do.DIE)
        await anext(first)
        await anext(other)
        await client.stats()
        assert script.added()[-2:] == [[Do.RUN, 1], [Do.RUN, 3]]
        first.abort()
        await anext(second)
        assert script.added()[-1] == [Do.RUN, 2]
        second.abort()
        for generation in (killer, copy):
            with pytest.raises(Quarantined) as caught:
                await read(generation)
            assert (caught.value.status, caught.value.code) == (500, "prompt_quarantined")
        with pytest.raises(EngineDead):
            await read(other)
        with pytest.raises(Quarantined):
            ask(client, Do.DIE)
        for number in (1, 2, 3):
            again = ask(client, Do.RUN, number)
            await anext(again)
            again.abort()
        assert client.status.num_restarts == 2

    play(script, work)


def test_a_prompt_that_hangs_is_found_out_even_if_its_client_leaves(tmp_path: Path) -> None:
    async def work(client: EngineClient) -> None:
        for number in (1, 2):
            generation = ask(client, Do.HANG)
            await until(lambda generation=generation: generation.num_cached_tokens)
            generation.abort()
            await until(lambda number=number: client.status.num_restarts == number)
            await until(lambda: client.healthy)
        with pytest.raises(Quarantined):
            ask(client, Do.HANG)

    play(Script(tmp_path), work, HASTY)


# -- the watchdog ----------------------------------------------------------------------------


def test_a_hung_engine_shows_its_stacks_and_is_replaced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(EngineDead):
            await read(ask(client, Do.HANG))
        assert await read(ask(client, Do.ANSWER)) == [7, 8]
        assert "silent" in client.status.reason

    play(Script(tmp_path), work, HASTY)
    printed = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in printed
    assert "scripted_engine.py" in printed
    assert "in add" in printed


def test_a_replacement_that_hangs_while_it_loads_is_replaced(tmp_path: Path) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(EngineDead):
            await read(ask(client, Do.DIE))
        assert await read(ask(client, Do.ANSWER)) == [7, 8]
        assert "while it loaded" in client.status.reason

    play(Script(tmp_path, "ok", "load:60", "ok"), work, replace(QUICK, load_seconds=0.5))


def test_a_start_that_fails_in_an_unforeseen_way_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [MemoryError("no room"), RuntimeError("out of the blue")]

    class Link(EngineLink):
        def __init__(self, *arguments: Any) -> None:
            if failures and script.pids():
                raise failures.pop()
            super().__init__(*arguments)

    script = Script(tmp_path)
    monkeypatch.setattr("runtime.process.EngineLink", Link)

    async def work(client: EngineClient) -> None:
        with pytest.raises(EngineDead):
            await read(ask(client, Do.DIE))
        assert await read(ask(client, Do.ANSWER)) == [7, 8]
        assert not failures

    play(script, work)


def test_the_watch_goes_on_after_a_fault_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick, faults = Watchdog.tick, [ValueError("of a moment")] * 3

    def faulty(self: Watchdog, seconds: float, *, has_work: bool) -> bool:
        if faults:
            raise faults.pop()
        return tick(self, seconds, has_work=has_work)

    monkeypatch.setattr(Watchdog, "tick", faulty)

    async def work(client: EngineClient) -> None:
        with pytest.raises(EngineDead):
            await read(ask(client, Do.HANG))
        assert not faults

    play(Script(tmp_path), work, HASTY)


def test_a_stopped_engine_is_replaced(tmp_path: Path) -> None:
    script = Script(tmp_path)

    async def work(client: EngineClient) -> None:
        generation = ask(client, Do.RUN)
        await anext(generation)
        os.kill(script.pids()[0], signal.SIGSTOP)
        with pytest.raises(EngineDead):
            await read(generation)
        assert await read(ask(client, Do.ANSWER)) == [7, 8]

    play(script, work, HASTY)


def test_work_that_takes_long_an_idle_engine_and_a_server_that_stood_still_are_no_alarm(
    tmp_path: Path,
) -> None:
    script = Script(tmp_path)

    async def work(client: EngineClient) -> None:
        await asyncio.sleep(0.8)  # idle
        generation = ask(client, Do.RUN)
        await anext(generation)
        os.kill(script.pids()[0], signal.SIGSTOP)
        time.sleep(1.2)  # the whole machine stands still
        os.kill(script.pids()[0], signal.SIGCONT)
        await asyncio.sleep(0.8)  # at work, and saying so
        generation.abort()
        assert await read(ask(client, Do.ANSWER)) == [7, 8]
        assert client.status.num_restarts == 0

    play(script, work, HASTY)


def test_the_watchdog_is_patient_with_engines_that_were_slow_of_late() -> None:
    info = EngineInfo.from_dict(INFO)

    def seconds_until_alarm(watchdog: Watchdog) -> int:
        return next(i for i in range(1, 100_000) if watchdog.tick(1.0, has_work=True))

    policy = SupervisorPolicy()
    assert seconds_until_alarm(Watchdog(policy, info)) == 61
    watchdog = Watchdog(policy, info)
    for _ in range(10):
        assert not watchdog.tick(1.0, has_work=True)
    watchdog.heard()
    assert 100 < seconds_until_alarm(watchdog) <= 201
    idle = Watchdog(policy, info)
    assert not any(idle.tick(1.0, has_work=False) for _ in range(1000))
    # 7 billion weights, steps of 512 tokens: a slow CPU takes minutes for one
    big = replace(info, num_parameters=7 * 10**9)
    assert seconds_until_alarm(Watchdog(policy, big)) > 600
    assert seconds_until_alarm(Watchdog(policy, replace(big, device="cuda:0"))) == 61


# -- the queue -------------------------------------------------------------------------------


def test_the_queue_takes_what_it_says_and_refuses_one_more(tmp_path: Path) -> None:
    async def work(client: EngineClient) -> None:
        client.check_room(12)  # 4 rows and 8 that wait
        with pytest.raises(QueueFull, match=r"13, and the limit is 12") as caught:
            client.check_room(13)
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        running = [ask(client, Do.RUN, i) for i in range(4)]
        for generation in running:
            await anext(generation)
        waiting = [ask(client, Do.WAIT, i) for i in range(8)]
        with pytest.raises(QueueFull):
            ask(client, Do.ANSWER)
        with pytest.raises(QueueFull):
            client.check_room()
        waiting.pop().abort()
        client.check_room()
        with pytest.raises(BadRequest, match="empty"):
            client.submit([], PARAMS)
        assert await read(ask(client, Do.ANSWER)) == [7, 8]

    play(Script(tmp_path), work)


def test_a_request_whose_turn_does_not_come_is_given_up_and_taken_back(tmp_path: Path) -> None:
    script = Script(tmp_path)

    async def work(client: EngineClient) -> None:
        running, waiting = ask(client, Do.RUN), ask(client, Do.WAIT)
        with pytest.raises(QueueTimeout, match=r"0\.3 s") as caught:
            await read(waiting)
        assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
        await client.stats()
        assert [words for words in script.log() if words[0] == "abort"] == [["abort", "1"]]
        assert (await anext(running))[0].token_id == 7  # it started, so it goes on

    play(script, work, replace(QUICK, queue_seconds=0.3))


def test_requests_that_an_engine_does_not_read_stay_here_and_cost_nothing_more(
    tmp_path: Path,
) -> None:
    script = Script(tmp_path)

    async def work(client: EngineClient) -> None:
        deaf = ask(client, Do.DEAF)
        await until(lambda: deaf.num_cached_tokens)
        prompt = [Do.WAIT] * 100_000
        for _ in range(100):  # 20 MB, were they all sent
            client.submit(prompt, PARAMS).abort()
        assert client._link is not None and client._link._transport is not None
        assert client._link._transport.get_write_buffer_size() < 3 << 20
        last = ask(client, Do.ANSWER)
        os.kill(script.pids()[0], signal.SIGKILL)
        assert await read(last) == [7, 8]

    play(script, work)


# -- the end ---------------------------------------------------------------------------------


def test_end_all_ends_what_runs_and_what_waits_with_the_reason(tmp_path: Path) -> None:
    async def work(client: EngineClient) -> None:
        generations = [ask(client, do) for do in (Do.RUN, Do.WAIT, Do.RUN)]
        await client.stats()
        client.end_all("The server is shutting down.")
        for generation in generations:
            with pytest.raises(EngineDead, match="shutting down"):
                await read(generation)
        assert await client.stats() == {"num_sequences": 0}

    play(Script(tmp_path), work)


@pytest.mark.parametrize(
    ("starts", "phase"),
    [
        (["load:60"], "loading weights"),
        (["ok"], "serving"),
        (["ok", "load:60"], "loading weights"),
        (["ok", "die"], "starting again in 50 s"),
    ],
)
def test_stop_works_in_every_state_and_leaves_nothing(
    tmp_path: Path, starts: list[str], phase: str
) -> None:
    script = Script(tmp_path, *starts)
    policy = replace(
        QUICK, first_backoff_seconds=50.0, max_backoff_seconds=50.0, stop_seconds=100.0
    )

    async def run() -> None:
        client = script.client(policy)
        start = asyncio.create_task(client.start())
        waiting = None
        if starts[0] == "ok":
            await start
            waiting = ask(client, Do.WAIT)
            if len(starts) > 1:
                with pytest.raises(EngineDead):
                    await read(ask(client, Do.DIE))
        async with asyncio.timeout(30):
            await until(lambda: client.status.phase == phase)
            await asyncio.gather(client.stop(), client.stop())
            await client.stop()
        assert client.status.state == "stopped"
        if waiting is None:
            with pytest.raises(EngineDead):
                await start
        else:
            with pytest.raises(EngineDead, match="stopping"):
                await read(waiting)
        for refused in (client.check_room, lambda: ask(client, Do.ANSWER)):
            with pytest.raises(RequestError):
                refused()
        with pytest.raises(EngineDead):
            await client.stats()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert script.pids()
    assert not any(is_alive(pid) for pid in script.pids())


def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    script = Script(tmp_path, "load:60")

    async def run() -> None:
        client = script.client()
        start = asyncio.create_task(client.start())
        await until(lambda: client.status.percent)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    asyncio.run(asyncio.wait_for(run(), 30))
    assert not is_alive(script.pids()[0])
