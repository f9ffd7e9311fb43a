"""Mixed load for a long while with a fault every minute; nothing may grow, and one voice stays.

    python -m tests.load.soak [--minutes 30] [--seed 0] [--keep-engine]

Load: streamed and plain chats, clients that leave, invalid and huge requests, slow readers. A
canary, one fixed greedy request every ten seconds, must get the same text each time it is answered
at all. Each minute brings a fault: some end one request, some replace the engine. Every minute
memory (RssAnon + VmSwap), files and threads of both processes are read when nothing has run for as
long as the server takes to give memory back; in the second half they must be flat. Storms of hang
ups come first, as a process keeps some of what its fullest moment took and this is not to count as
growth. An engine that was replaced began anew, so its growth is only judged with ``--keep-engine``,
which leaves the faults that replace it out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from api.memory import GIVE_BACK_SECONDS
from tests.faults.bench import ENDLESS, chat_with, code_of
from tests.faults.engine import Fault, Spoil
from tests.load.client import Address, ask, connect
from tests.load.served import Served, chat_body, served
from tests.runtime.engines import QUESTIONS

NUM_CLIENTS = 12
NUM_FIRST_STORMS = 12
MAX_SLOPE = 1.0
"""MB per hour by which memory may seem to grow."""
IN_PLACE = (Spoil.NAN, Spoil.ROW, Fault.SLOW, Fault.OUT_OF_MEMORY, Spoil.DIRTY_PAGES)
REPLACING = (Fault.RAISE, Fault.EXIT, Fault.SEGFAULT)
ALLOWED = {200, 400, 413, 429, 500, 503}


@dataclass
class Sample:
    """Of one process at one moment."""

    pid: int
    minute: float
    memory: float  # MB
    num_files: int
    num_threads: int


@dataclass
class Soak:
    server: Served
    rng: random.Random
    keep_engine: bool = False
    until: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    canary: set[str] = field(default_factory=set)
    num_canaries: int = 0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    quiet: asyncio.Event = field(default_factory=asyncio.Event)  # set while clients may begin
    num_busy: int = 0

    @property
    def address(self) -> Address:
        return self.server.address

    async def run(self, minutes: float) -> None:
        for _ in range(NUM_FIRST_STORMS):
            await self.storm()
            await self.idle()
        self.until = time.monotonic() + 60 * minutes
        self.quiet.set()
        clients = [asyncio.create_task(self.client()) for _ in range(NUM_CLIENTS)]
        canary = asyncio.create_task(self.sing())
        started = time.monotonic()
        minute = 0
        while time.monotonic() < self.until:
            minute += 1
            await asyncio.sleep(max(started + 60 * minute - 25 - time.monotonic(), 0))
            await self.strike(minute)
            await asyncio.sleep(max(started + 60 * minute - 16 - time.monotonic(), 0))
            await self.rest(minute)
        await asyncio.gather(*clients, canary)

    async def client(self) -> None:
        while time.monotonic() < self.until:
            await self.quiet.wait()
            self.num_busy += 1
            try:
                await self.visit()
            finally:
                self.num_busy -= 1
            await asyncio.sleep(self.rng.uniform(0, 0.3))

    async def visit(self) -> None:
        rng = self.rng
        question = rng.choice(QUESTIONS)
        body = chat_body(question, max_tokens=rng.randint(5, 150), temperature=rng.choice([0, 0.8]))
        kind = rng.choices(
            ["stream", "plain", "leave", "invalid", "slow", "huge"], [60, 15, 10, 5, 5, 5]
        )[0]
        match kind:
            case "plain":
                body |= {"stream": False}
            case "leave":
                body |= {"max_tokens": 1000, **ENDLESS}
            case "invalid":
                body |= rng.choice([{"temperature": "hot"}, {"messages": []}, {"n": 99}])
            case "huge":
                body |= chat_body(question * rng.choice([60, 20_000]), max_tokens=5)
        if kind == "slow":
            await self.read_slowly(body)
            return
        leave_after = rng.randint(1, 30) if kind == "leave" else None
        answer = await ask(self.address, body, leave_after=leave_after)
        self.outcomes[f"{answer.status} {code_of(answer)}"] += 1

    async def read_slowly(self, body: dict[str, object]) -> None:
        reader, writer = await connect(self.address, receive_buffer=4096)
        try:
            writer.write(self.address.request("POST", "/v1/chat/completions", body))
            for _ in range(10):
                await reader.read(200)
                await asyncio.sleep(0.2)
            self.outcomes["slow reader"] += 1
        except OSError:
            self.outcomes["slow reader cut"] += 1
        finally:
            writer.close()

    async def sing(self) -> None:
        while time.monotonic() < self.until:
            answer = await ask(self.address, chat_body("what is 12 + 7?", max_tokens=60))
            if answer.whole and answer.error is None:
                self.canary.add(answer.text)
                self.num_canaries += 1
            await asyncio.sleep(10)

    async def strike(self, minute: int) -> None:
        """This minute's fault."""
        replaces = minute % 5 == 0 and not self.keep_engine
        if replaces:
            fault: Fault | Spoil | None = self.rng.choice(REPLACING)
        elif minute % 5 == 3:
            fault = None
        else:
            fault = self.rng.choice(IN_PLACE)
        if fault is None:
            await self.storm()
            self.outcomes["fault: 200 hang up"] += 1
        elif replaces and minute % 10 == 0:
            pid = self.server.engine_pid
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            self.outcomes["fault: engine killed"] += 1
        else:
            await ask(self.address, chat_with(fault))
            self.outcomes[f"fault: {fault.name.lower()}"] += 1

    async def storm(self) -> None:
        await asyncio.gather(*(self.hang_up() for _ in range(200)))

    async def hang_up(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.uniform(0, 1)):
                await ask(self.address, chat_body(max_tokens=1000, **ENDLESS))

    async def rest(self, minute: int) -> None:
        """Let everything come to its end, and look."""
        self.quiet.clear()
        await self.idle()
        await asyncio.sleep(GIVE_BACK_SECONDS + 4)  # what is left then is held
        engine = self.server.engine_pid
        for name, pid in (("server", self.server.process.pid), ("engine", engine)):
            if pid is not None:
                self.samples.setdefault(name, []).append(sample(pid, minute))
        line = {name: vars(samples[-1]) for name, samples in self.samples.items()}
        print(f"minute {minute}: {line} {self.num_canaries} canaries", flush=True)
        self.quiet.set()

    async def idle(self) -> None:
        for _ in range(300):
            if self.num_busy == 0 and self.server.is_idle():
                return
            await asyncio.sleep(0.1)
        self.outcomes["NEVER IDLE"] += 1


def sample(pid: int, minute: float) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    kilobytes = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(pid, minute, round(kilobytes / 1024, 2), num_files, int(status["Threads"]))


def slope(samples: list[Sample]) -> float:
    """Growth of the second half in MB per hour: the median over all pairs (Theil and Sen)."""
    half = samples[len(samples) // 2 :]
    slopes = [
        60 * (later.memory - earlier.memory) / (later.minute - earlier.minute)
        for i, earlier in enumerate(half)
        for later in half[i + 1 :]
    ]
    return statistics.median(slopes) if slopes else 0.0


def judge(soak: Soak) -> bool:
    print(f"outcomes: {dict(sorted(soak.outcomes.items()))}")
    print(f"canary: {soak.num_canaries} answers, {len(soak.canary)} different")
    statuses = {int(name.split()[0]) for name in soak.outcomes if name[0].isdigit()}
    good = len(soak.canary) == 1 and soak.outcomes["NEVER IDLE"] == 0
    good &= statuses <= ALLOWED | {0}
    for name, samples in soak.samples.items():
        half = samples[len(samples) // 2 :]
        files = sorted({one.num_files for one in half})
        threads = sorted({one.num_threads for one in half})
        num_replaced = len({one.pid for one in half}) - 1
        growth = slope(samples)
        trend = f"replaced {num_replaced} times" if num_replaced else f"slope {growth:+.2f} MB/h"
        print(
            f"{name}: {half[0].memory:.1f} to {half[-1].memory:.1f} MB in the second half, "
            f"{trend}, files {files}, threads {threads}"
        )
        good &= num_replaced > 0 or growth < MAX_SLOPE
        good &= files[-1] - files[0] <= 2 and threads[-1] - threads[0] <= 2
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-engine", action="store_true", help="no fault that replaces it")
    options = parser.parse_args()
    with served("--max-model-len", "2048", "--watchdog", "20") as server:
        soak = Soak(server, random.Random(options.seed), options.keep_engine)
        asyncio.run(soak.run(options.minutes))
        good = judge(soak)
        good &= server.stop() == 0
    print("ok" if good else "FAIL")
    sys.exit(not good)


if __name__ == "__main__":
    main()
