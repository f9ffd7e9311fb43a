"""The requests that are being answered: who may join, and what ends one from outside.

A request ends early for reasons that its own route cannot see: its key was revoked, it took longer
than a request may, or the server stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NoReturn, TypeVar

from starlette.types import Scope

from api.errors import HttpError
from api.figures import Figures
from api.keys import KeyEntry, KeyStore
from api.ledger import Ledger, Usage
from api.request_log import RequestRecord
from runtime import QueueTimeout, RequestError

MAX_ENCODING = 2
"""Prompts encoded at once. A long one holds a core for seconds; the others keep theirs."""
KEY_CHECK_SECONDS = 0.5
REQUEST_ID_PREFIX = "req_"
"""Of ids that this server gave, where the client sent none."""

T = TypeVar("T")

logger = logging.getLogger("fathom.api")


class RunningRequest:
    """One request from its admission until `leave`. ``ended`` is set by whoever ends it early.

    What it uses is counted as it comes: in ``figures``, and for its key in ``ledger``.
    """

    def __init__(
        self,
        scope: Scope,
        seconds: float,
        leave: Callable[[], None],
        figures: Figures,
        ledger: Ledger | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        key: KeyEntry | None = scope.get("api_key")
        self.id: str = scope["request_id"]
        self.key_id = None if key is None else key.public_id
        self.record: RequestRecord = scope["record"]
        self.wants_timings = False
        self.ended: asyncio.Future[RequestError] = loop.create_future()
        self._figures = figures
        self._ledger = ledger
        self._progress: dict[int, tuple[int, float]] = {}  # choice -> (its tokens, since when)
        self._abort: Callable[[], None] = lambda: None
        self._leave = leave
        self._timer = loop.call_later(seconds, self.end, took_too_long(seconds))

    def answer_id(self, prefix: str) -> str:
        """The id of its answer, which is its own, so that one is found by the other."""
        return f"{prefix}-{self.id.removeprefix(REQUEST_ID_PREFIX)}"

    def submitted(self, abort: Callable[[], None], num_prompt_tokens: int) -> None:
        """The engine has it now; ``abort`` frees what it holds there and never waits."""
        self._abort = abort
        self.record.submitted = time.monotonic()
        self.record.num_prompt_tokens = num_prompt_tokens
        self._figures.add_prompt(num_prompt_tokens)
        self._account(Usage(num_requests=1, num_prompt_tokens=num_prompt_tokens))

    def note_progress(self, choice: int, num_tokens: int, num_cached_tokens: int) -> None:
        """The choice has ``num_tokens`` now; so much of the prompt was found in the cache."""
        now = time.monotonic()
        record = self.record
        num_before, last = self._progress.get(choice, (0, None))
        num_new = num_tokens - num_before
        num_newly_cached = num_cached_tokens - (record.num_cached_tokens or 0)
        if num_newly_cached > 0:
            record.num_cached_tokens = num_cached_tokens
            self._figures.add_cached(num_newly_cached)
            self._account(Usage(num_cached_tokens=num_newly_cached))
        if num_new <= 0:
            return
        self._progress[choice] = num_tokens, now
        if record.first_token is None:
            record.first_token = now
            self._figures.add_first_token(now - record.arrived)
        self._figures.add_tokens(num_new, None if last is None else now - last)
        record.num_completion_tokens = (record.num_completion_tokens or 0) + num_new
        self._account(Usage(num_completion_tokens=num_new))

    def _account(self, usage: Usage) -> None:
        if self._ledger is not None and self.key_id is not None:
            self._ledger.add(self.key_id, usage)

    def end(self, error: RequestError) -> None:
        """Give the client this error in place of the rest of its answer. Idempotent."""
        if not self.ended.done():
            self.ended.set_result(error)
            self._abort()  # its pages are free at once, even if its client reads nothing

    def check(self) -> None:
        """Raises the error that ended the request early, if any."""
        if self.ended.done():
            raise self.ended.result()

    def leave(self) -> None:
        """The request is over, however it ended. Idempotent."""
        self._timer.cancel()
        self._leave()


class EncodingThreads:
    """The threads that encode prompts. Keys take turns, each with one thread while others wait."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_ENCODING, thread_name_prefix="encode")
        self._num_free = MAX_ENCODING
        self._num_busy: Counter[str | None] = Counter()  # threads that work for a key
        # who waits, of each key in order; the key whose turn was longest ago is the first
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}

    async def run(self, key_id: str | None, seconds: float, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises. Raises `QueueTimeout` after ``seconds`` without a turn.

        ``key_id`` None is the one user of a server without keys.
        """

        def attempt() -> Callable[[], T]:
            try:
                result = work()
            except BaseException as error:  # some, as StopIteration, may not pass a future
                return partial(_raise, error)
            return lambda: result

        await self._turn(key_id, seconds)
        loop = asyncio.get_running_loop()

        def finished(_: Future[Callable[[], T]]) -> None:
            with contextlib.suppress(RuntimeError):  # the server ended before its thread
                loop.call_soon_threadsafe(self._release, key_id)

        working = self._threads.submit(attempt)
        # If the client leaves, the thread still goes on to its end, and is busy until then.
        working.add_done_callback(finished)
        outcome = await asyncio.wrap_future(working)
        return outcome()

    async def _turn(self, key_id: str | None, seconds: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_id, deque()).append(turn)
        self._give_turns()
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._release(key_id)  # its turn came in the same moment
            turn.cancel()
            if isinstance(error, TimeoutError):
                raise QueueTimeout(
                    f"The prompt waited {seconds:g} s for its turn to be encoded. Try again later."
                ) from None
            raise

    def _release(self, key_id: str | None) -> None:
        self._num_free += 1
        self._num_busy[key_id] -= 1
        if not self._num_busy[key_id]:
            del self._num_busy[key_id]
        self._give_turns()

    def _give_turns(self) -> None:
        while self._num_free and self._waiting:
            idle = (key_id for key_id in self._waiting if key_id not in self._num_busy)
            key_id = next(idle, next(iter(self._waiting)))
            turns = self._waiting.pop(key_id)
            turn = turns.popleft()
            if turns:
                self._waiting[key_id] = turns
            if not turn.done():  # else it has left
                turn.set_result(None)
                self._num_free -= 1
                self._num_busy[key_id] += 1


class Running:
    """All running requests, what they add up to, and the threads that encode their prompts."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        """``ledger`` None keeps no account of keys, and no limits on their tokens."""
        self.figures = Figures()
        self.draining = False
        self._ledger = ledger
        self.num_encoding = 0  # choices of admitted requests that are not submitted yet
        self._requests: set[RunningRequest] = set()
        self._threads = EncodingThreads()

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, scope: Scope, seconds: float) -> RunningRequest:
        """Count the request of an ASGI scope from now on; it is ended after ``seconds``.

        Raises `HttpError` 503 while the server drains.
        """
        if self.draining:
            raise shutting_down()
        request = RunningRequest(
            scope,
            seconds,
            lambda: self._requests.discard(request),
            self.figures,
            self._ledger,
        )
        self._requests.add(request)
        return request

    def check_limits(self, key: KeyEntry | None) -> None:
        """Raises `HttpError` 429 for a key that has as much as it may have. Who runs goes on."""
        if key is None:
            return
        if key.max_concurrency is not None:
            num_running = sum(request.key_id == key.public_id for request in self._requests)
            if num_running >= key.max_concurrency:
                raise too_many_at_once(key.max_concurrency)
        if key.tokens_per_day is not None and self._ledger is not None:
            num_tokens = self._ledger.tokens_today(key.public_id)
            if num_tokens >= key.tokens_per_day:
                raise no_tokens_left(num_tokens, key.tokens_per_day, self._ledger)

    def oldest(self, count: int) -> list[RunningRequest]:
        """Up to ``count`` running requests, those that arrived first before others."""
        return heapq.nsmallest(count, self._requests, key=lambda request: request.record.arrived)

    async def encode(
        self, key_id: str | None, num_choices: int, seconds: float, work: Callable[[], T]
    ) -> T:
        """What ``work`` returns or raises, done in a thread when it is this key's turn.

        Raises `QueueTimeout` if that takes longer than ``seconds``.
        """
        self.num_encoding += num_choices
        try:
            return await self._threads.run(key_id, seconds, work)
        finally:
            self.num_encoding -= num_choices

    def drain(self) -> None:
        """Admit nobody from now on."""
        self.draining = True

    def end_all(self, error: RequestError) -> None:
        for request in list(self._requests):
            request.end(error)

    async def watch_keys(self, keys: KeyStore, seconds: float = KEY_CHECK_SECONDS) -> None:
        """End the requests of keys that were revoked or have expired, for ever.

        While the store cannot be read, nobody new is let in, and who runs goes on.
        """
        readable = True
        while True:
            await asyncio.sleep(seconds)
            try:
                self._end_revoked(keys)
                readable = True
            except Exception as error:
                if readable:
                    logger.error("running requests go on unchecked: %s", type(error).__name__)
                readable = False

    def _end_revoked(self, keys: KeyStore) -> None:
        key_ids = {request.key_id for request in self._requests if request.key_id is not None}
        revoked = {key_id for key_id in key_ids if not keys.is_active(key_id)}
        for request in list(self._requests):
            if request.key_id in revoked:
                request.end(key_revoked())


def _raise(error: BaseException) -> NoReturn:
    raise error


def shutting_down() -> HttpError:
    return HttpError(
        503, "The server is shutting down.", code="server_draining", error_type="server_error"
    )


def took_too_long(seconds: float) -> HttpError:
    return HttpError(
        500,
        f"The request took longer than the {seconds:g} seconds that this server gives one.",
        code="time_limit_exceeded",
        error_type="server_error",
    )


def too_many_at_once(limit: int) -> HttpError:
    return HttpError(
        429,
        f"This API key may have {limit} requests running at once, and has them. Try again when one "
        "has ended.",
        code="rate_limit_exceeded",
        error_type="rate_limit_error",
    )


def no_tokens_left(num_tokens: int, limit: int, ledger: Ledger) -> HttpError:
    seconds = max(math.ceil(ledger.seconds_left_today), 1)
    return HttpError(
        429,
        f"This API key has used {num_tokens} tokens today and may use {limit} a day. The next day "
        f"begins at midnight UTC, in {seconds} s.",
        code="tokens_per_day_exceeded",
        error_type="rate_limit_error",
        retry_seconds=seconds,
    )


def key_revoked() -> HttpError:
    return HttpError(
        401, "The API key was revoked or has expired during this request.", code="key_revoked"
    )
