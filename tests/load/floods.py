"""Floods against the real server with the embedded model; prints what was expected and seen.

    python -m tests.load.floods [streams] [aborts] [readers] [overload] [--seed N]

Exit status 1 if a flood did harm. Speed is judged within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from tests.load.client import Address, Answer, ask, connect
from tests.load.served import Served, chat_body, served, wait_until
from tests.runtime.engines import QUESTIONS

ENDLESS = {"ignore_eos": True}
NUM_STREAMS = 200
NUM_ABORTS = 2000
NUM_READERS = 100
OVERLOAD = 10
OVERLOAD_SECONDS = 30.0
OVERLOAD_TOKENS = 256
MIN_GOODPUT = 0.95

Outcome = tuple[bool, str]  # whether all is well, and what was seen


def streams(rng: random.Random) -> Outcome:
    """200 streams of 200 tokens at once: every one whole, and each the same as alone."""

    async def flood(address: Address) -> list[Answer]:
        return await asyncio.gather(
            *(
                ask(address, chat_body(QUESTIONS[i % len(QUESTIONS)], max_tokens=200, **ENDLESS))
                for i in range(NUM_STREAMS)
            )
        )

    with served() as server:
        started = time.monotonic()
        answers = asyncio.run(flood(server.address))
        seconds = time.monotonic() - started
        num_whole = sum(answer.whole and answer.num_tokens == 200 for answer in answers)
        alone = [
            server.chat(text=question, max_tokens=200, **ENDLESS).text for question in QUESTIONS[:8]
        ]
        num_alike = sum(
            answer.text == alone[i % len(QUESTIONS)]
            for i, answer in enumerate(answers)
            if i % len(QUESTIONS) < len(alone)
        )
        num_compared = sum(i % len(QUESTIONS) < len(alone) for i in range(NUM_STREAMS))
        idle = settles(server)
    seen = (
        f"{num_whole} whole, {NUM_STREAMS - num_whole} errors, {num_alike} of {num_compared} equal "
        f"to the same alone, {NUM_STREAMS * 200 / seconds:,.0f} tokens/s, idle after {idle}"
    )
    return num_whole == NUM_STREAMS and num_alike == num_compared and idle != "never", seen


def aborts(rng: random.Random) -> Outcome:
    """2,000 clients that leave anywhere within 2 s: nothing runs and no page is held after 1 s."""

    async def leave(address: Address, begin: float, patience: float, stream: bool) -> str:
        await asyncio.sleep(begin)
        body = chat_body(max_tokens=4000, stream=stream, n=rng.choice([1, 1, 1, 3]), **ENDLESS)
        try:
            async with asyncio.timeout(patience):
                answer = await ask(address, body)
        except TimeoutError:
            return "left"
        return str(answer.status)

    async def storm(address: Address) -> Counter[str]:
        outcomes = await asyncio.gather(
            *(
                leave(address, rng.uniform(0, 2), rng.expovariate(4), rng.random() < 0.7)
                for _ in range(NUM_ABORTS)
            )
        )
        return Counter(outcomes)

    with served("--limit", "connections=4096") as server:
        expected = server.chat(max_tokens=60).text
        started = time.monotonic()
        outcomes = asyncio.run(storm(server.address))
        seconds = time.monotonic() - started
        idle = settles(server)
        same = server.chat(max_tokens=60).text == expected
    seen = f"{dict(outcomes)} in {seconds:.1f} s, all free after {idle}, answers same: {same}"
    allowed = set(outcomes) <= {"left", "200", "429", "503"}
    return allowed and same and idle != "never" and float(idle.split()[0]) <= 1.0, seen


def readers(rng: random.Random) -> Outcome:
    """100 clients that never read beside 20 that do: these get all, in about the same time."""
    stall_seconds = 5

    async def normal(address: Address) -> list[Answer]:
        return await asyncio.gather(
            *(ask(address, chat_body(QUESTIONS[i], max_tokens=200, **ENDLESS)) for i in range(20))
        )

    async def beside(address: Address) -> tuple[list[Answer], float, int]:
        body = chat_body(max_tokens=600, n=4, logprobs=True, top_logprobs=20, **ENDLESS)
        silent = [await connect(address, receive_buffer=4096) for _ in range(NUM_READERS)]
        for _, writer in silent:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(address.request("POST", "/v1/chat/completions", body))
        await asyncio.sleep(1)
        started = time.monotonic()
        answers = await normal(address)
        seconds = time.monotonic() - started
        await asyncio.sleep(2 * stall_seconds)
        num_cut = 0
        for reader, writer in silent:
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            received = b""
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(10):
                    while part := await reader.read(1 << 16):
                        received = received[-100:] + part
            num_cut += b"[DONE]" not in received
            writer.close()
        return answers, seconds, num_cut

    flags = ["--max-num-seqs", "512", "--limit", f"stall={stall_seconds}"]
    with served(*flags, "--max-model-len", "1024") as server:
        started = time.monotonic()
        alone = asyncio.run(normal(server.address))
        seconds_alone = time.monotonic() - started
        answers, seconds, num_cut = asyncio.run(beside(server.address))
        same = [answer.text for answer in answers] == [answer.text for answer in alone]
        whole = all(answer.whole for answer in answers)
        idle = settles(server, 30)
    seen = (
        f"20 normal clients whole: {whole}, same text: {same}, {seconds:.1f} s beside "
        f"{NUM_READERS} × 4 silent answers, {seconds_alone:.1f} s without; {num_cut} silent "
        f"clients cut, all free after {idle}"
    )
    return whole and same and idle != "never", seen


def overload(rng: random.Random) -> Outcome:
    """Ten times the load it can carry: 200, 429 and 503 only, and 95 % of its throughput."""

    async def client(address: Address, until: float, answers: list[Answer]) -> None:
        while time.monotonic() < until:
            body = chat_body(rng.choice(QUESTIONS), max_tokens=OVERLOAD_TOKENS, **ENDLESS)
            answers.append(await ask(address, body))

    async def carried(address: Address, seconds: float) -> list[Answer]:
        answers: list[Answer] = []
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(address, until, answers) for _ in range(64)))
        return answers

    async def flood(address: Address, per_second: float, seconds: float) -> list[Answer]:
        async with asyncio.TaskGroup() as group:
            tasks = []
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                body = chat_body(rng.choice(QUESTIONS), max_tokens=OVERLOAD_TOKENS, **ENDLESS)
                tasks.append(group.create_task(ask(address, body)))
                await asyncio.sleep(rng.expovariate(per_second))
        return [task.result() for task in tasks]

    def rate(
        work: Callable[[Address], Coroutine[Any, Any, list[Answer]]],
    ) -> tuple[float, list[Answer]]:
        started = time.monotonic()
        answers = asyncio.run(work(server.address))
        num_tokens = sum(answer.num_tokens for answer in answers)
        return num_tokens / (time.monotonic() - started), answers

    rates: dict[str, list[float]] = {"carried": [], "flooded": []}
    statuses: Counter[int] = Counter()
    rejected: list[float] = []
    with served("--limit", "connections=8192") as server:
        for _ in range(2):
            base, _ = rate(partial(carried, seconds=OVERLOAD_SECONDS))
            rates["carried"].append(base)
            per_second = OVERLOAD * base / OVERLOAD_TOKENS
            flooded, answers = rate(partial(flood, per_second=per_second, seconds=OVERLOAD_SECONDS))
            rates["flooded"].append(flooded)
            statuses.update(answer.status for answer in answers)
            rejected += [
                float(answer.headers["openai-processing-ms"])
                for answer in answers
                if answer.status in (429, 503)
            ]
        idle = settles(server)
    ratio = statistics.mean(rates["flooded"]) / statistics.mean(rates["carried"])
    rejected.sort()
    p99 = rejected[int(0.99 * (len(rejected) - 1))] if rejected else 0.0
    seen = (
        f"statuses {dict(statuses)}; {statistics.mean(rates['carried']):,.0f} tokens/s carried, "
        f"{100 * ratio:.0f} % of it at {OVERLOAD}x; refused in {p99:.0f} ms (p99); "
        f"all free after {idle}"
    )
    return set(statuses) <= {200, 429, 503} and ratio >= MIN_GOODPUT and idle != "never", seen


def settles(server: Served, seconds: float = 10) -> str:
    """How long until nothing runs and every page is free."""
    try:
        return f"{wait_until(server.is_idle, seconds):.2f} s"
    except TimeoutError:
        return "never"


FLOODS = {"streams": streams, "aborts": aborts, "readers": readers, "overload": overload}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("floods", nargs="*", choices=[*FLOODS, []], help="all unless named")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = False
    for name in options.floods or FLOODS:
        flood = FLOODS[name]
        print(f"{name}: {flood.__doc__}", flush=True)
        good, seen = flood(random.Random(options.seed))
        print(f"    {'ok  ' if good else 'FAIL'} {seen}", flush=True)
        failed |= not good
    sys.exit(failed)


if __name__ == "__main__":
    main()
