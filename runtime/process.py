"""The server's side of the engine process: a queue in front of it and a supervisor behind it.

`EngineClient` lives in the server's event loop; `runtime.engine_process` is the other side. They
talk over a socket pair (`runtime.link`) with the frames of `runtime.wire`. Either end notices the
other's death at once. A dead engine is replaced: what it worked on ends with an error, what waited
goes to the next one.

server → engine   start · add · abort · stats · stop
engine → server   progress · ready · failed · started · events · aborted · stats · beat · fault
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from runtime import wire
from runtime.admission import admit
from runtime.engine_config import EngineConfig, EngineInfo
from runtime.errors import EngineDead, FathomError, QueueTimeout, RequestError
from runtime.generation import Generation
from runtime.link import PROGRAM, EngineLink
from runtime.request import FinishReason, SamplingParams, TokenEvent
from runtime.submissions import Submission, Submissions
from runtime.supervision import EngineStatus, Restarts, SupervisorPolicy, Watchdog

logger = logging.getLogger("fathom.engine")


class EngineClient:
    """The server's handle on the engine process. All methods belong to one event loop.

    ``program`` starts the engine process; tests give one with faults in it.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
        *,
        policy: SupervisorPolicy | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        self.config = config
        self.policy = policy or SupervisorPolicy()
        self._program = PROGRAM if program is None else program
        self._progress = progress or (lambda done, total: None)
        self._info: EngineInfo | None = None
        self._link: EngineLink | None = None
        self._submissions = Submissions()
        self._seq_ids = itertools.count()
        self._stats: deque[asyncio.Future[dict[str, int]]] = deque()
        self._first: asyncio.Future[EngineInfo] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self._ready = False
        self._failure: FathomError | None = None  # why the engine of now does not load
        self._phase = "not started"
        self._percent: float | None = None
        self._reason = ""
        self._num_restarts = 0
        self._restarts = Restarts(self.policy)
        self._watchdog: Watchdog | None = None
        self._clock = 0.0  # seconds in which this process ran
        self._load_silence = 0.0  # of those, since the last message of an engine that loads

    # -- what it is doing ------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What the last engine that was ready decided. Raises `EngineDead` before the first."""
        if self._info is None:
            raise EngineDead(f"The engine is not ready yet: {self._phase}.")
        return self._info

    @property
    def status(self) -> EngineStatus:
        if self._stopping is not None:
            state = "stopped"
        elif self._ready:
            state = "ready"
        elif self._info is None:
            state = "loading"
        else:
            state = "failing" if self._restarts.failing else "restarting"
        return EngineStatus(state, self._phase, self._percent, self._num_restarts, self._reason)

    @property
    def healthy(self) -> bool:
        return self.status.state == "ready"

    @property
    def num_running(self) -> int:
        """Sequences that have begun and not ended."""
        return self._submissions.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, here or in the engine."""
        return self._submissions.num_waiting

    # -- start and stop --------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Start the engine process and wait until its weights are loaded. Call it once.

        Raises `ConfigError` or `CheckpointError` as the engine did, `EngineDead` if it died.
        """
        assert self._first is None, "EngineClient.start was called before"
        self._first = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._tick())]
        try:
            return await self._first
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the engine process and whatever it was running, in any state. Idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(self._ready))
        await asyncio.shield(self._stopping)

    async def _stop(self, was_ready: bool) -> None:
        self._ready, self._phase, self._percent = False, "stopped", None
        self._fail_all(EngineDead("The server is stopping."))
        self._fail_stats()
        if self._first is not None and not self._first.done():
            self._first.set_exception(EngineDead("The server is stopping."))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._link is None:
            return
        if was_ready:
            self._link.send({"type": "stop"})
        else:
            self._link.kill()  # it is busy loading and reads no messages
        patience = self.policy.stop_seconds
        try:
            await asyncio.wait_for(self._link.gone(patience), 2 * patience)
        except TimeoutError:
            logger.error("the engine process %d does not end", self._link.process.pid)

    # -- requests --------------------------------------------------------------------------

    def check_room(self, count: int = 1) -> None:
        """Raises `QueueFull` or `EngineDead` if ``count`` more sequences would be refused now."""
        status = self.status
        if status.state == "failing":
            raise EngineDead(
                f"The engine ended {self.policy.breaker_deaths} times in a short while; the "
                f"server goes on trying ({self._phase}). Try again later."
            )
        if status.state in ("loading", "stopped"):
            raise EngineDead(f"The engine does not serve: {self._phase}. Try again later.")
        self._submissions.check_room(
            count, max_running=self.info.max_num_seqs, max_waiting=self.policy.max_waiting
        )

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        namespace: str = "",
        priority: int = 0,
    ) -> Generation:
        """Queue a sequence; while a dead engine is replaced it waits for the next.

        Raises `BadRequest`, `ContextLengthExceeded`, `QueueFull`, `EngineDead` or `Quarantined`.
        """
        self.check_room()
        seq_id = next(self._seq_ids)
        # refuse here what the engine would refuse
        admit(seq_id, prompt_ids, params, self.info, namespace=namespace, priority=priority)
        message = {
            "type": "add",
            "seq_id": seq_id,
            "prompt_ids": prompt_ids,
            "params": wire.pack_params(params),
            "namespace": namespace,
            "priority": priority,
        }
        generation = Generation(seq_id, self._abort)
        self._submissions.add(Submission(generation, message, self._clock))
        self._pump()
        return generation

    def end_all(self, reason: str) -> None:
        """End every generation; their readers get an `EngineDead` with this reason."""
        self._fail_all(EngineDead(reason))

    async def stats(self) -> dict[str, int]:
        """The engine's own counts (`Engine.stats`). Raises `EngineDead`."""
        if not self._ready or self._link is None:
            raise EngineDead(f"The engine does not serve: {self._phase}.")
        answer: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        self._stats.append(answer)
        self._link.send({"type": "stats"})
        return await answer

    def _abort(self, seq_id: int) -> None:
        submission = self._remove(seq_id)
        if submission is not None:
            submission.generation.deliver(TokenEvent(seq_id, None, FinishReason.ABORT))

    def _remove(self, seq_id: int) -> Submission | None:
        """Take a sequence back wherever it is; None if it has ended."""
        submission, is_sent = self._submissions.remove(seq_id)
        if is_sent and self._link is not None:
            self._link.send({"type": "abort", "seq_id": seq_id})
        return submission

    def _fail_all(self, error: RequestError) -> None:
        for seq_id in self._submissions.all_ids():
            submission = self._remove(seq_id)
            assert submission is not None
            submission.generation.fail(error)

    def _pump(self) -> None:
        """Send what waits here, as far as the engine reads."""
        while self._ready and self._link is not None and self._link.can_send:
            message = self._submissions.send_next()
            if message is None:
                return
            self._link.send(message)

    # -- messages of the engine ------------------------------------------------------------

    def _handle(self, message: wire.Message) -> None:
        """Raises `WireError` for a message that makes no sense."""
        if self._stopping is not None:
            return
        self._load_silence = 0.0
        if self._watchdog is not None:
            self._watchdog.heard()
        match message.get("type"):
            case "events":
                at = wire.moment(message)
                for event in wire.unpack_events(wire.field(message, "events", list)):
                    self._take(event, at)
                self._pump()
            case "started":
                at = wire.moment(message)
                for row in wire.unpack_started(wire.field(message, "sequences", list)):
                    self._submissions.start(*row, at)
            case "aborted":
                self._submissions.left(wire.field(message, "seq_id", int))
                self._pump()
            case "beat":
                pass
            case "stats":
                if not self._stats:
                    raise wire.WireError("it answers what nobody asked")
                counts = wire.field(message, "stats", dict)
                answer = self._stats.popleft()
                if not answer.done():
                    answer.set_result(counts)
            case "progress":
                done, total = (wire.field(message, name, int) for name in ("done", "total"))
                self._phase = "loading weights" if done < total else "preparing to serve"
                self._percent = 100.0 * min(done / total, 1.0) if total > 0 else None
                if self._info is None:
                    self._progress(done, total)
            case "ready":
                self._begin(wire.unpack_info(wire.field(message, "info", dict)))
            case "failed":
                self._failure = wire.unpack_failure(message)
            case "fault":
                assert self._link is not None
                self._link.reason = wire.field(message, "text", str)
            case other:
                raise wire.WireError(f"unknown message type {other!r:.40}")

    def _take(self, event: TokenEvent, at: float) -> None:
        if event.token_id is not None:
            self._submissions.draw(event.seq_id)
        submission = self._submissions.in_engine(event.seq_id)
        if submission is None:
            return  # aborted while the event was on its way
        submission.generation.deliver(event, at)
        if event.finish_reason is not None:
            self._submissions.finish(event.seq_id, event.finish_reason)

    def _begin(self, info: EngineInfo) -> None:
        if self._ready:
            raise wire.WireError("it is ready twice")
        if self._num_restarts:
            waiting = self._submissions.num_waiting
            logger.warning("a new engine process is ready; %d requests waited for it", waiting)
        self._info = info
        self._ready, self._phase, self._percent = True, "serving", None
        self._restarts.ready(time.monotonic())
        self._watchdog = Watchdog(self.policy, info)
        assert self._first is not None
        if not self._first.done():
            self._first.set_result(info)
        self._pump()

    # -- life and death --------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep an engine process running; only the first one has to load."""
        while True:
            self._phase, self._percent, self._failure = "starting the engine process", None, None
            self._link, self._load_silence = None, 0.0
            self._num_restarts += self._info is not None
            reason = ""
            try:
                link = self._link = EngineLink(self._program, self._handle, self._pump)
                await link.connect()
            except Exception as error:  # whatever it is, the next try may do better
                if self._link is not None:
                    self._link.kill()
                self._link = None
                reason = f"it cannot be started: {type(error).__name__}: {error}"
            else:
                link.send({"type": "start", "config": self.config.to_dict()})
                await link.ended
            delay = self._restarts.died(time.monotonic())
            num_failed = self._bury()
            if self._link is not None:
                self._phase = "waiting for the old engine process to end"
                reason = await self._link.gone()
            self._reason = str(self._failure or reason)
            if self._info is None:
                assert self._first is not None
                if not self._first.done():
                    text = f"The engine process ended before it was ready: {reason}."
                    self._first.set_exception(self._failure or EngineDead(text))
                return
            self._phase = f"starting again in {delay:g} s"
            logger.error(
                "the engine process ended: %s; %d requests failed, %d wait; %s",
                *(self._reason, num_failed, self._submissions.num_waiting, self._phase),
            )
            await asyncio.sleep(delay)

    def _bury(self) -> int:
        """Settle what a dead engine leaves behind; the number of generations that end with it."""
        self._ready, self._watchdog = False, None
        self._fail_stats()
        return self._submissions.bury()

    def _fail_stats(self) -> None:
        while self._stats:
            answer = self._stats.popleft()
            if not answer.done():
                answer.set_exception(EngineDead("The engine process ended."))

    async def _tick(self) -> None:
        """Count time, in which sequences wait and the engine may be silent only for so long."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(self.policy.tick_seconds)
            now = time.monotonic()
            # A machine that was suspended, or a process that was stopped, did not wait.
            seconds = min(now - last, 2 * self.policy.tick_seconds)
            last = now
            self._clock += seconds
            self._submissions.now = self._clock
            try:
                self._expire()
                self._watch(seconds)
            except Exception:  # a lost second is better than a watch that has ended
                logger.exception("the engine process could not be watched for a moment")

    def _watch(self, seconds: float) -> None:
        """Shoot an engine process that was silent for too long."""
        link, watchdog = self._link, self._watchdog
        if link is None or link.ended.done():
            return
        if watchdog is None:
            self._load_silence += seconds
            if self._load_silence <= self.policy.load_seconds or self._info is None:
                return
            reason = f"it was silent for {self._load_silence:.0f} s while it loaded"
        else:
            has_work = self._submissions.engine_has_work or bool(self._stats)
            if not watchdog.tick(seconds, has_work=has_work):
                return
            reason = f"it was silent for {watchdog.limit:.0f} s while it had work"
        logger.error("the engine process hangs; its stacks follow, then it is replaced")
        link.shoot(reason, self.policy.abort_seconds)
        self._watchdog, self._load_silence = None, 0.0

    def _expire(self) -> None:
        limit = self.policy.queue_seconds
        for submission in self._submissions.waiting_since(self._clock - limit):
            self._remove(submission.seq_id)
            submission.generation.fail(
                QueueTimeout(f"The request waited {limit:g} s and its turn did not come.")
            )
