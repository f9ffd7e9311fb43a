"""The engine's side of the socket: what it says while it works, and what ends it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from runtime import Engine, FinishReason, SamplingParams, TokenEvent, TokenLogprobs, wire
from runtime.engine_process import MAX_SPOILT_STEPS, count_spoilt, serve_engine
from tests.runtime import faulty_engine
from tests.runtime.engines import TINY, make_engine
from tests.runtime.faulty_engine import Fault, with_faults

CONFIG = {"type": "start", "config": {"model": "x"}}


class Served:
    """An engine that a thread serves, and the server's end of its socket."""

    def __init__(self, load: Callable[..., Engine]) -> None:
        self.socket, self._theirs = socket.socketpair()
        self.socket.settimeout(20)
        self.result: bool | Exception | None = None
        self.thread = threading.Thread(target=self._run, args=[load])
        self.thread.start()

    def _run(self, load: Callable[..., Engine]) -> None:
        with self._theirs:
            try:
                self.result = serve_engine(self._theirs, load)
            except Exception as error:
                self.result = error

    def send(self, **message: Any) -> None:
        self.socket.sendall(wire.encode(message))

    def add(self, seq_id: int, num_prompt: int = 4, **params: Any) -> None:
        packed = wire.pack_params(SamplingParams(**params))
        prompt = {"prompt_ids": [5] * num_prompt, "namespace": "", "priority": 0}
        self.send(type="add", seq_id=seq_id, params=packed, **prompt)

    def receive(self) -> wire.Message:
        message = wire.receive(self.socket)
        assert message is not None
        return message

    def until(self, kind: str) -> list[wire.Message]:
        """Messages up to the first of a kind."""
        messages = [self.receive()]
        while messages[-1]["type"] != kind:
            messages.append(self.receive())
        return messages

    def end(self) -> bool | Exception | None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.result


@contextmanager
def served(load: Callable[..., Engine]) -> Iterator[Served]:
    engine = Served(load)
    try:
        engine.socket.sendall(wire.encode(CONFIG))
        yield engine
    finally:
        engine.socket.close()
        engine.thread.join(20)


def tiny(**options: Any) -> Callable[..., Engine]:
    return lambda config, progress: with_faults(make_engine(TINY, **options))


def test_a_start_is_told_with_its_cached_tokens_before_the_first_token() -> None:
    with served(tiny()) as engine:
        engine.until("ready")
        for seq_id in (0, 1):
            engine.add(seq_id, 64, max_tokens=1)
            first, second = engine.receive(), engine.receive()
            assert (first["type"], second["type"]) == ("started", "events")
            [[started_id, num_cached]] = first["sequences"]
            assert started_id == second["events"][0][0] == seq_id
            assert 0 <= num_cached < 64
            assert (num_cached > 0) == (seq_id > 0)
        engine.send(type="abort", seq_id=1)
        assert engine.receive() == {"type": "aborted", "seq_id": 1}
        engine.send(type="stop")
        assert engine.end() is True


def test_a_step_without_events_still_gives_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faulty_engine, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr("runtime.engine_process.BEAT_SECONDS", 0.05)
    with served(tiny(max_step_tokens=16, max_num_seqs=2)) as engine:
        engine.until("ready")
        engine.add(0, 64, max_tokens=1, seed=Fault.SLOW)  # four steps, and a token from the last
        kinds = [message["type"] for message in engine.until("events")]
        assert kinds == ["started", "beat", "beat", "beat", "events"]


def test_memory_is_given_back_once_after_each_time_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[float] = []
    monkeypatch.setattr("runtime.engine_process.IDLE_SECONDS", 0.05)
    monkeypatch.setattr(
        "runtime.engine_process.give_back_memory", lambda: given_back.append(time.monotonic())
    )
    with served(tiny()) as engine:
        engine.until("ready")
        for num_times in (1, 2):
            engine.add(num_times, max_tokens=3, ignore_eos=True)
            for _ in range(3):
                engine.until("events")
            finished = time.monotonic()
            time.sleep(0.4)
            assert given_back[-1] >= finished - 0.01
            assert len([at for at in given_back if at >= finished - 0.01]) == 1


def test_requests_that_take_long_to_queue_leave_time_for_steps() -> None:
    """Each may bring a grammar that takes a second to compile; nobody waits for all of them."""

    def load(config: object, progress: object) -> Engine:
        engine = make_engine(TINY)
        add = engine.add

        def slow_add(*arguments: Any, **options: Any) -> int:
            if engine.has_work:
                time.sleep(0.3)
            return add(*arguments, **options)

        engine.add = slow_add  # type: ignore[method-assign]
        return engine

    with served(load) as engine:
        engine.until("ready")
        for seq_id in range(5):
            engine.add(seq_id, max_tokens=20, ignore_eos=True)
        started = [message for message in engine.until("events") if message["type"] == "started"]
        assert len(started) == 1
        assert len(started[0]["sequences"]) < 5, "the first token came before all were queued"


def test_a_fault_of_a_step_is_told_and_ends_the_process() -> None:
    with served(tiny()) as engine:
        engine.until("ready")
        engine.add(0, seed=Fault.RAISE)
        assert "device-side assert" in engine.until("fault")[-1]["text"]
        assert engine.end() is False


def test_memory_that_runs_out_ends_what_runs_and_what_add_raises_that_request() -> None:
    with served(tiny()) as engine:
        engine.until("ready")
        engine.add(0, seed=Fault.ADD)
        assert engine.until("events")[-1]["events"] == [[0, None, "error"]]
        engine.add(1, seed=Fault.OUT_OF_MEMORY)
        assert engine.until("events")[-1]["events"] == [[1, None, "error"]]
        engine.add(2, max_tokens=1)
        assert engine.until("events")[-1]["events"][0][0] == 2


def test_a_load_that_raises_whatever_is_told_in_a_line() -> None:
    def load(config: object, progress: object) -> Engine:
        raise RuntimeError("no driver")

    with served(load) as engine:
        message = engine.until("failed")[-1]
        assert message["kind"] == "EngineDead"
        assert message["text"] == "the engine cannot start: RuntimeError: no driver"
        assert engine.end() is True


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 1 << 30) + b"{",
        struct.pack(">I", 4) + b"\xff{[,",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 40_000) + b"[" * 40_000,
        wire.encode({"type": "dance"}),
        wire.encode({"type": "add", "seq_id": "x"}),
        wire.encode({"type": "add", "seq_id": 1, "prompt_ids": [1], "params": {"heat": 1}}),
        wire.encode({"type": "abort"}),
    ],
    ids=["1 GiB", "garbage", "a list", "deep", "type", "id", "params", "no id"],
)
def test_what_cannot_be_a_message_ends_the_engine(data: bytes) -> None:
    with served(tiny()) as engine:
        engine.until("ready")
        engine.socket.sendall(data)
        assert isinstance(engine.end(), wire.WireError)


@pytest.mark.parametrize("data", [b"", b"\0", struct.pack(">I", 9) + b"{"])
def test_the_end_of_the_socket_ends_the_engine_at_work_or_not(data: bytes) -> None:
    for num_requests in (0, 2):
        with served(tiny()) as engine:
            engine.until("ready")
            for seq_id in range(num_requests):
                engine.add(seq_id, max_tokens=500, ignore_eos=True)
            engine.socket.sendall(data)
            engine.socket.close()
            assert engine.end() is True or isinstance(engine.result, OSError)


def test_steps_without_a_finite_row_add_up_until_one_has_some() -> None:
    good = [TokenEvent(0, 5), TokenEvent(1, None, FinishReason.NOT_FINITE)]
    bad = [TokenEvent(2, None, FinishReason.NOT_FINITE)]
    count = 0
    counts = []
    scored = [TokenEvent(3, None, prompt_logprobs=(TokenLogprobs(-1.0, ()),))]
    for events in (bad, bad, [], good, bad, [], bad, scored, bad, bad, bad):
        count = count_spoilt(events, count)
        counts.append(count)
    assert counts == [1, 2, 2, 0, 1, 1, 2, 0, 1, 2, 3]
    assert counts[-1] == MAX_SPOILT_STEPS
