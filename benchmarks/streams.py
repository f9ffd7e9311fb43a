"""The same requests through HTTP, through the engine's process, and through the engine alone.

Each way keeps ``concurrency`` requests under way, or sends each at its time, and says how many
tokens came in how many seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.stream_client import Answer, Target, stream
from benchmarks.workload import Request
from runtime import Engine, EngineClient, SamplingParams

Finished = Callable[[int], None]
"""Told the tokens of each answer that ended."""


@dataclass(frozen=True, slots=True)
class Wire:
    """How requests are spelt for a server."""

    target: Target
    model: str
    endpoint: str  # completions: token ids | chat: words
    ignore_eos: bool
    temperature: float
    seconds: float  # until a request is given up

    def body(self, index: int, request: Request) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": request.prompt_ids}
        if self.endpoint == "chat":
            text = " ".join(f"w{token_id}" for token_id in request.prompt_ids)
            prompt = {"messages": [{"role": "user", "content": text}]}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": request.num_new,
            "temperature": self.temperature,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }

    @property
    def path(self) -> str:
        return "/chat/completions" if self.endpoint == "chat" else "/completions"


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over the requests."""

    seconds: float
    num_tokens: int
    client_cpu_s: float  # of this process
    answers: list[Answer]

    @property
    def tok_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def num_failed(self) -> int:
        return sum(answer.failure is not None for answer in self.answers)


async def run_http(
    wire: Wire, requests: Sequence[Request], concurrency: int | None, finished: Finished
) -> Run:
    """Through a server. ``concurrency`` None: each request is sent at its time."""

    async def ask(index: int, request: Request) -> Answer:
        answer = await stream(wire.target, wire.path, wire.body(index, request), wire.seconds)
        finished(answer.completion_tokens)
        return answer

    start, cpu = time.monotonic(), time.process_time()
    if concurrency is None:

        async def ask_at(index: int, request: Request) -> Answer:
            await asyncio.sleep(max(start + request.at - time.monotonic(), 0))
            return await ask(index, request)

        answers = await asyncio.gather(*(ask_at(i, request) for i, request in enumerate(requests)))
    else:
        answers = await _at_once(requests, concurrency, ask)
    seconds = time.monotonic() - start
    num_tokens = sum(answer.completion_tokens for answer in answers if answer.failure is None)
    return Run(seconds, num_tokens, time.process_time() - cpu, list(answers))


async def run_engine_process(
    client: EngineClient, requests: Sequence[Request], concurrency: int, temperature: float
) -> Run:
    """Through the engine in a process of its own, as the server has it: all but HTTP and text."""
    num_tokens = 0

    async def ask(index: int, request: Request) -> Answer:
        nonlocal num_tokens
        params = params_of(index, request, temperature)
        async for events in client.submit(request.prompt_ids, params):
            num_tokens += len(events)
        return Answer()

    start, cpu = time.monotonic(), time.process_time()
    answers = await _at_once(requests, concurrency, ask)
    return Run(time.monotonic() - start, num_tokens, time.process_time() - cpu, answers)


def run_engine(
    engine: Engine, requests: Sequence[Request], concurrency: int, temperature: float
) -> Run:
    """Through the engine and nothing else: its rate is the ceiling of the other ways."""
    start, cpu = time.monotonic(), time.process_time()
    waiting = list(reversed(list(enumerate(requests))))
    num_running = num_tokens = 0
    while waiting or num_running:
        while waiting and num_running < concurrency:
            index, request = waiting.pop()
            engine.add(request.prompt_ids, params_of(index, request, temperature))
            num_running += 1
        events = engine.step()
        num_tokens += len(events)
        num_running -= sum(event.finish_reason is not None for event in events)
    return Run(time.monotonic() - start, num_tokens, time.process_time() - cpu, [])


def params_of(index: int, request: Request, temperature: float) -> SamplingParams:
    """What `Wire.body` asks for."""
    return SamplingParams(
        temperature=temperature, seed=index, max_tokens=request.num_new, ignore_eos=True
    )


async def _at_once(
    requests: Sequence[Request],
    concurrency: int,
    ask: Callable[[int, Request], Awaitable[Answer]],
) -> list[Answer]:
    """Keep ``concurrency`` requests under way until all are answered."""
    answers: list[Answer] = []
    numbered: Iterator[tuple[int, Request]] = iter(enumerate(requests))

    async def work() -> None:
        for index, request in numbered:
            answers.append(await ask(index, request))

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(requests)))))
    return answers
