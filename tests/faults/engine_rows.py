"""Rows of the fault matrix that strike the engine process or what feeds it."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from tests.faults.bench import (
    ENDLESS,
    REPLACED_SECONDS,
    Bench,
    Row,
    brief,
    chat_with,
    code_of,
    expect,
    replaced,
    together,
)
from tests.faults.engine import Fault, Spoil
from tests.faults.server import ERRORS, PLACES, fault
from tests.load.client import ask
from tests.load.served import chat_body, served, wait_until

ENGINE_CODES = ("engine_error", "engine_unavailable")


def request_faults(bench: Bench) -> str:
    """F01"""
    server = bench.server
    seen = set()
    with bench.canary(server):
        for place in PLACES:
            for error in ERRORS:
                trigger = fault(place, error)
                text = trigger if place in ("template", "tokenizer") else "hello"
                stop = None if place in ("template", "tokenizer") else [trigger]
                for stream in (True, False):
                    body = chat_body(text, stop=stop, stream=stream, max_tokens=20)
                    answer = asyncio.run(ask(server.address, body))
                    what = f"{place} {error}: {brief(answer)}"
                    expect(answer.error is not None, what)
                    expect(answer.status in (200, 400, 500) and (stream or answer.status), what)
                    seen.add(f"{answer.status} {code_of(answer)}")
    return f"{2 * len(PLACES) * len(ERRORS)} requests: {', '.join(sorted(seen))}; canary same"


def row_fault(bench: Bench) -> str:
    """F02"""
    server = bench.server
    pid = server.engine_pid
    with bench.canary(server):
        answer = asyncio.run(ask(server.address, chat_with(Spoil.ROW)))
    expect(code_of(answer) == "engine_error" and server.engine_pid == pid, brief(answer))
    return f"{brief(answer)}; same engine process; canary same"


def step_fault(bench: Bench) -> str:
    """F03"""
    with served("--max-num-seqs", "4", "--max-model-len", "1024") as server:
        pid = server.engine_pid
        alone = server.chat(max_tokens=20).text

        async def work() -> tuple[list[str], list[str], float]:
            others = [
                asyncio.create_task(ask(server.address, chat_body(max_tokens=900, **ENDLESS)))
                for _ in range(3)
            ]
            while sum(server.stats()["num_running"] for _ in range(1)) < 3:
                await asyncio.sleep(0.02)
            struck = asyncio.create_task(ask(server.address, chat_with(Fault.RAISE)))
            while server.stats()["num_running"] < 4 and not struck.done():
                await asyncio.sleep(0.005)
            started = time.monotonic()
            waiting = [
                asyncio.create_task(ask(server.address, chat_body(max_tokens=20))) for _ in range(3)
            ]
            running = await asyncio.gather(struck, *others)
            seconds = time.monotonic() - started
            waited = await asyncio.gather(*waiting)
            return [code_of(a) for a in running], [a.text for a in waited], seconds

        codes, texts, seconds = asyncio.run(work())
        ready = replaced(server, pid)
        num_kept = texts.count(alone)
        seen = (
            f"running: {codes} in {seconds:.1f} s; {num_kept} of 3 that waited answered as ever; "
            f"ready again {ready:.1f} s after that"
        )
        expect(all(code in ENGINE_CODES for code in codes) and seconds <= 2, seen)
        expect(num_kept == 3 and ready <= REPLACED_SECONDS, seen)
        wait_until(server.is_idle, 5)
    return seen


def breaker(bench: Bench) -> str:
    """F04"""
    server = bench.fresh()
    gaps = []
    for _ in range(3):
        wait_until(server.is_ready, 60)
        pid = server.engine_pid
        asyncio.run(ask(server.address, chat_with(Fault.EXIT)))
        started = time.monotonic()
        wait_until(lambda pid=pid: server.engine_pid not in (None, pid), 60)  # type: ignore[misc]
        gaps.append(time.monotonic() - started)
    ready = server.get("/ready")
    chat = server.chat(max_tokens=5)
    recovered = wait_until(server.is_ready, 90)
    seen = (
        f"new processes after {', '.join(f'{gap:.1f}' for gap in gaps)} s; then /ready "
        f"{ready.status}, chat {brief(chat)}; ready again after {recovered:.1f} s"
    )
    expect(ready.status == 503 and chat.status == 503, seen)
    expect(gaps[2] >= 1.5 > gaps[0] and "retry-after" in chat.headers, seen)
    return seen


def poison(bench: Bench) -> str:
    """F05"""
    server = bench.fresh()
    body = chat_with(Spoil.KILL_AT_START)
    answers = []
    for _ in range(4):
        answers.append(asyncio.run(ask(server.address, body)))
        wait_until(server.is_ready, 90)
    pid = server.engine_pid
    other = server.chat(text="thank you", max_tokens=5)
    seen = f"{', '.join(map(brief, answers))}; another prompt {brief(other)}; engine lives"
    codes = [code_of(answer) for answer in answers]
    expect(codes[0] in ENGINE_CODES and answers[1].status == 200, seen)
    expect(codes[2:] == ["prompt_quarantined"] * 2 and other.whole, seen)
    expect(server.engine_pid == pid, seen)
    return seen


def hang(bench: Bench) -> str:
    """F06"""
    server = bench.fresh()
    pid = server.engine_pid
    started = time.monotonic()
    answer = asyncio.run(ask(server.address, chat_with(Fault.HANG)))
    ended = time.monotonic() - started
    ready = replaced(server, pid)
    has_stacks = "Fatal Python error: Aborted" in server.read_log()
    seen = (
        f"{brief(answer)} after {ended:.1f} s (watchdog 5); stacks in the log: {has_stacks}; "
        f"ready {ready:.1f} s later"
    )
    expect(code_of(answer) in ENGINE_CODES and has_stacks and ready <= REPLACED_SECONDS, seen)
    return seen


def slow_step(bench: Bench) -> str:
    """F07"""
    server = bench.server
    pid = server.engine_pid
    with bench.canary(server):
        answer = asyncio.run(ask(server.address, chat_with(Fault.SLOW)))
    good = answer.whole and answer.error is None and server.engine_pid == pid
    expect(good, brief(answer))
    return f"{brief(answer)}; same engine process; canary same"


def deaths(bench: Bench) -> str:
    """F08"""
    seen = []
    for name in ("SIGSEGV", "SIGKILL", "os._exit", "SIGSTOP"):
        server = bench.fresh()
        pid = server.engine_pid
        assert pid is not None
        if name == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
        else:
            kinds = {"SIGSEGV": Fault.SEGFAULT, "os._exit": Fault.EXIT, "SIGSTOP": Fault.STOP}
            answer = asyncio.run(ask(server.address, chat_with(kinds[name])))
            expect(code_of(answer) in ENGINE_CODES, f"{name}: {brief(answer)}")
        seconds = replaced(server, pid)
        after = server.chat(max_tokens=5)
        seen.append(f"{name}: ready after {seconds:.1f} s")
        expect(after.whole and seconds <= REPLACED_SECONDS, "; ".join([*seen, brief(after)]))
    return "; ".join(seen)


def wire_faults(bench: Bench) -> str:
    """F10"""
    seen = []
    for kind in (Spoil.GARBAGE, Spoil.HUGE_FRAME, Spoil.TRUNCATED_FRAME):
        server = bench.fresh()
        pid = server.engine_pid
        answer = asyncio.run(ask(server.address, chat_with(kind)))
        seconds = replaced(server, pid)
        seen.append(f"{kind.name.lower()}: {code_of(answer)}, ready after {seconds:.1f} s")
        expect(code_of(answer) in ENGINE_CODES and seconds <= REPLACED_SECONDS, "; ".join(seen))
    return "; ".join(seen)


def out_of_memory(bench: Bench) -> str:
    """F11"""
    server = bench.server
    pid = server.engine_pid
    other, struck = asyncio.run(
        together(server, chat_body(max_tokens=1500, **ENDLESS), chat_with(Fault.OUT_OF_MEMORY))
    )
    wait_until(server.is_idle, 5)
    after = server.chat(max_tokens=5)
    seen = f"running: {brief(struck)}, {brief(other)}; next: {brief(after)}; same engine process"
    good = after.whole and after.error is None and server.engine_pid == pid
    expect(code_of(struck) in ENGINE_CODES and good, seen)
    return seen


def not_finite(bench: Bench) -> str:
    """F12"""
    server = bench.fresh()
    pid = server.engine_pid
    kinds = (Spoil.NAN, Spoil.INF, Spoil.MINUS_INF)
    with bench.canary(server):
        codes = [code_of(asyncio.run(ask(server.address, chat_with(kind)))) for kind in kinds]
    expect(codes == ["not_finite"] * 3 and server.engine_pid == pid, str(codes))
    broken = [code_of(asyncio.run(ask(server.address, chat_with(Spoil.ALL_NAN))))]
    while server.engine_pid == pid and len(broken) < 10:
        broken.append(code_of(server.chat(max_tokens=5)))
    seconds = replaced(server, pid)
    after = server.chat(max_tokens=5)
    seen = (
        f"one row: {codes}, canary same; every row from then on: {broken}, engine replaced in "
        f"{seconds:.1f} s, then {brief(after)}"
    )
    expect(set(broken) <= {"not_finite", *ENGINE_CODES} and len(broken) <= 4, seen)
    expect(after.whole and after.error is None, seen)
    return seen


def dirty_pages(bench: Bench) -> str:
    """F13"""
    server = bench.server
    with bench.canary(server):
        for _ in range(3):
            answer = asyncio.run(ask(server.address, chat_with(Spoil.DIRTY_PAGES)))
            expect(answer.whole, brief(answer))
    return "answers whole; canary same"


def full_cache(bench: Bench) -> str:
    """F14"""
    flags = ("--kv-cache-memory", "300KiB", "--max-model-len", "160", "--max-num-seqs", "16")
    with served(*flags) as server:
        body = chat_body("count from 1 to 9", max_tokens=100, **ENDLESS)
        alone = asyncio.run(ask(server.address, body))
        answers = asyncio.run(together(server, *[body] * 24))
        num_pages = server.stats()["num_pages"]
        same = sum(answer.text == alone.text and answer.whole for answer in answers)
        wait_until(server.is_idle, 5)
    seen = f"pool of {num_pages} pages: {same} of 24 whole and same as alone"
    expect(same == 24, seen)
    return seen


def too_long(bench: Bench) -> str:
    """F15"""
    server = bench.server
    answer = server.chat(text="hello " * 4000)
    seen = f"{brief(answer)} in {answer.headers['openai-processing-ms']} ms"
    expect(code_of(answer) == "context_length_exceeded" and answer.status == 400, seen)
    return seen


def full_queue(bench: Bench) -> str:
    """F16"""
    flags = ("--max-num-seqs", "2", "--max-model-len", "1024", "--limit", "queue=4")
    with served(*flags) as server:
        body = chat_body(max_tokens=400, **ENDLESS)
        answers = asyncio.run(together(server, *[body] * 30))
        refused = [answer for answer in answers if answer.status == 429]
        longest = max(int(answer.headers["openai-processing-ms"]) for answer in refused)
        whole = [answer for answer in answers if answer.whole and answer.status == 200]
        seen = (
            f"{len(whole)} answered, {len(refused)} refused with 429 in {longest} ms at most, "
            f"Retry-After {refused[0].headers.get('retry-after')}"
        )
        expect(len(whole) + len(refused) == 30 and len(whole) >= 6, seen)
        expect(len({answer.text for answer in whole}) == 1, seen)
    return seen


def long_wait(bench: Bench) -> str:
    """F17"""
    flags = ("--max-num-seqs", "1", "--limit", "queue-seconds=1")
    with served(*flags) as server:
        body = chat_body(max_tokens=1500, **ENDLESS)
        first, second = asyncio.run(together(server, body, chat_body(max_tokens=5)))
        seen = f"{brief(first)}; {brief(second)}"
        expect({code_of(first), code_of(second)} == {"none", "queue_timeout"}, seen)
        wait_until(server.is_idle, 5)
    return seen


ROWS = [
    Row("F01", "errors in template, tokenizer, …, stop", "that request only", request_faults),
    Row("F02", "error in one row of a step", "row ended, others same", row_fault),
    Row("F03", "step raises", "running end ≤ 2 s, engine replaced, waiting kept", step_fault),
    Row("F04", "3 faults in 60 s", "refused with 503, backoff, back again", breaker),
    Row("F05", "a prompt that kills twice", "quarantined, engine lives", poison),
    Row("F06", "step hangs", "watchdog: stacks, killed, replaced", hang),
    Row("F07", "step takes 2 s", "nothing", slow_step),
    Row("F08", "engine killed, stopped, exits", "replaced", deaths),
    Row("F10", "garbage, huge or half a frame", "replaced, no hang", wire_faults),
    Row("F11", "out of memory in a step", "running end, same engine goes on", out_of_memory),
    Row("F12", "NaN, Inf, -Inf rows", "row ended; all rows of 3 steps: replaced", not_finite),
    Row("F13", "NaN in every free page", "no effect", dirty_pages),
    Row("F14", "cache full", "preempted, all finish the same", full_cache),
    Row("F15", "prompt beyond the context", "400, quickly", too_long),
    Row("F16", "queue full", "429 with Retry-After, quickly", full_queue),
    Row("F17", "waits too long", "503 queue_timeout", long_wait),
]
