"""A scripted engine behind the real application and a real server, for tests of the API."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from api.app import ServerState, create_app
from api.connections import protocol_class
from api.server import Server
from runtime import (
    EngineDead,
    EngineInfo,
    EngineStatus,
    FinishReason,
    Generation,
    GenerationDefaults,
    QueueFull,
    SamplingParams,
    TokenEvent,
    Tokenizer,
    TokenLogprobs,
)
from runtime.admission import admit

TINY = Path(__file__).resolve().parents[2] / "weights" / "fathom-tiny"
MAX_MODEL_LEN = 512


class ScriptedEngine:
    """Says the same tokens to everyone, through the real `Generation`, after real admission."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.info = EngineInfo(
            model="scripted",
            architecture="none",
            num_parameters=1,
            weight_bytes=1,
            device="cpu",
            dtype="float32",
            quantization="none",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            max_step_tokens=512,
            page_size=16,
            num_pages=1024,
            kv_cache_bytes=1,
            vocab_size=tokenizer.num_tokens,
            eos_token_ids=tuple(tokenizer.eos_token_ids),
        )
        self.token_ids: list[int] = []
        self.seconds_per_token = 0.0
        self.first_token_seconds = 0.0
        self.batch = 1  # tokens that arrive together
        self.fails_with: FinishReason | None = None  # after the last scripted token
        self.dies = False  # after the last scripted token
        self.state = "ready"
        self.num_cached = 0  # tokens of every prompt that come from the cache
        self.max_live: int | None = None  # above it the queue is full
        self.refuses_after: int | None = None  # live sequences, found out only by submitting
        self.counts: dict[str, int] = {}  # what `stats` says
        self.num_restarts = 0
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.namespaces: list[str] = []  # of the submitted, in order
        self.priorities: list[int] = []
        self.aborted: list[int] = []  # sequences that were aborted while they ran
        self._live: dict[int, tuple[Generation, asyncio.Task[None]]] = {}
        self._seq_ids = itertools.count()

    @property
    def num_live(self) -> int:
        return len(self._live)

    def say(self, answer: str, *, thought: str = "Let me see.", stop: bool = True) -> None:
        """Script an answer; without ``stop`` it ends at max_tokens or the end of the script."""
        tokenizer = self.tokenizer
        assert tokenizer.think_end_id is not None
        self.token_ids = [
            *tokenizer.encode(thought + "\n"),
            tokenizer.think_end_id,
            *tokenizer.encode("\n\n" + answer),
        ]
        if stop:
            self.token_ids.append(min(tokenizer.eos_token_ids))

    @property
    def num_running(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return 0

    async def stats(self) -> dict[str, int]:
        if self.state != "ready":
            raise EngineDead("the engine is not running")
        return self.counts

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.state, f"phase of {self.state}", 37.5, self.num_restarts, "")

    def check_room(self, count: int = 1) -> None:
        if self.state not in ("ready", "restarting"):
            raise EngineDead("the engine is not running")
        if self.max_live is not None and len(self._live) + count > self.max_live:
            raise QueueFull(f"{len(self._live)} are there already")

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        namespace: str = "",
        priority: int = 0,
    ) -> Generation:
        self.check_room()
        seq_id = next(self._seq_ids)
        admitted = admit(seq_id, prompt_ids, params, self.info)
        if self.refuses_after is not None and len(self._live) >= self.refuses_after:
            raise EngineDead("no more")
        self.submitted.append((prompt_ids, params))
        self.namespaces.append(namespace)
        self.priorities.append(priority)
        generation = Generation(seq_id, self._abort)
        generation.num_cached_tokens = self.num_cached
        generation.started_at = time.monotonic()
        play = self._play(generation, params, admitted.max_new_tokens, prompt_ids)
        self._live[seq_id] = generation, asyncio.get_running_loop().create_task(play)
        return generation

    def _abort(self, seq_id: int) -> None:
        if seq_id in self._live:
            generation, task = self._live.pop(seq_id)
            task.cancel()
            self.aborted.append(seq_id)
            generation.deliver(TokenEvent(seq_id, None, FinishReason.ABORT))

    @staticmethod
    def _score(generation: Generation, num_top: int, prompt_ids: list[int]) -> None:
        """Every token of a prompt is less likely than the one before it, two tokens an event."""
        others = tuple((other, -2.0 - other) for other in range(num_top))
        scores = [TokenLogprobs(-0.5 * index, others) for index in range(1, len(prompt_ids))]
        for start in range(0, len(scores), 2):
            part = tuple(scores[start : start + 2])
            generation.deliver(TokenEvent(generation.seq_id, None, prompt_logprobs=part))

    async def _play(
        self, generation: Generation, params: SamplingParams, limit: int, prompt_ids: list[int]
    ) -> None:
        await asyncio.sleep(self.first_token_seconds)
        seq_id = generation.seq_id
        if params.prompt_logprobs is not None:
            self._score(generation, params.prompt_logprobs, prompt_ids)
        last = len(self.token_ids) - 1
        failing = self.dies or self.fails_with is not None
        for index, token_id in enumerate(self.token_ids):
            reason = None
            if token_id in self.tokenizer.eos_token_ids:
                reason = FinishReason.STOP
            elif index + 1 == limit or (index == last and not failing):
                reason = FinishReason.LENGTH
            logprobs = None
            if params.logprobs is not None:
                others = tuple((other, -1.0 - other) for other in range(params.logprobs))
                logprobs = TokenLogprobs(-0.25 * (index + 1), others)
            generation.deliver(TokenEvent(seq_id, token_id, reason, logprobs))
            if reason is not None:
                del self._live[seq_id]
                return
            if (index + 1) % self.batch == 0:
                await asyncio.sleep(self.seconds_per_token)
        del self._live[seq_id]
        if self.dies:
            generation.fail(EngineDead("the engine process stopped"))
        else:
            generation.deliver(TokenEvent(seq_id, None, self.fails_with))


def scripted_state(tokenizer: Tokenizer) -> ServerState:
    return ServerState(
        engine=ScriptedEngine(tokenizer),
        tokenizer=tokenizer,
        defaults=GenerationDefaults(temperature=0.6, top_p=0.95),
        model_names=("fathom-tiny", "deepseek-r1"),
        keys=None,
        created=1_700_000_000,
        system_fingerprint="fp_0123456789",
    )


@dataclass(slots=True)
class Served:
    """A server in a thread of its own."""

    base: str  # its address, ending in /v1
    stop: Callable[[], None]  # what the first signal does; called again, what the second does
    thread: threading.Thread


@contextlib.contextmanager
def serve(state: ServerState) -> Iterator[str]:
    """Run the application in a real server on a free port; its address, ending in /v1."""
    with serve_until_stopped(state) as served:
        yield served.base


@contextlib.contextmanager
def serve_until_stopped(state: ServerState, drain_seconds: float = 1.0) -> Iterator[Served]:
    """As `serve`, for tests of how a server ends."""
    config = uvicorn.Config(
        create_app(state),
        http=protocol_class(state.limits),
        ws="none",
        lifespan="off",
        log_config=None,
    )
    server = Server(config, state.running, drain_seconds)
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()

    async def run() -> None:
        watching = None
        if state.keys is not None:
            watching = asyncio.create_task(state.running.watch_keys(state.keys, seconds=0.05))
        await server.serve(sockets=[listener])
        if watching is not None:
            watching.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(server.stop)

    try:
        wait_until(lambda: server.started)
        base = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield Served(base, stop, thread)
    finally:
        if thread.is_alive():
            stop()
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        listener.close()


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll until ``condition()`` is true; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.005)


@contextlib.contextmanager
def in_background(*tasks: Callable[[], None]) -> Iterator[None]:
    """Run each task in a thread beside the block; whatever one raises is raised at its end."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        futures = [threads.submit(task) for task in tasks]
        yield
        for future in futures:
            future.result(20)


def engine_of(state: ServerState) -> ScriptedEngine:
    assert isinstance(state.engine, ScriptedEngine)
    return state.engine


def post(base: str, body: object, **options: Any) -> httpx.Response:
    """POST a chat request; ``body`` is sent as it is if it is bytes, else as JSON."""
    url = f"{base}/chat/completions"
    options["verify"] = False  # reading the certificates would take most of the time
    if isinstance(body, bytes):
        headers = {"content-type": "application/json"}
        return httpx.post(url, content=body, headers=headers, **options)
    return httpx.post(url, json=body, **options)
