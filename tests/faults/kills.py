"""``kill -9`` of either process in every phase: the other is gone, or all is well again.

    python -m tests.faults.kills [--rounds 50] [--seed 0]

Each round kills the server or its engine while it imports, loads, is idle or is busy. After a
killed server the engine must be gone and the port free, after a killed engine another must be ready
with the same answers, within 5 s; an engine killed before it was ever ready ends the start.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from tests.faults.bench import ENDLESS, expect
from tests.faults.server_rows import is_free
from tests.load.served import Served, wait_until
from tests.processes import is_alive

PHASES = ("import", "load", "idle", "busy")
MAX_SECONDS = 5.0


def reach(server: Served, phase: str, rng: random.Random) -> None:
    """Wait until the phase has begun, and then a random while."""
    if phase in ("idle", "busy"):
        server.wait_for_banner()
        if phase == "busy":
            fields = {"max_tokens": 4000, **ENDLESS}
            for _ in range(4):
                threading.Thread(target=server.chat, kwargs=fields, daemon=True).start()
            wait_until(lambda: server.stats()["num_running"] > 0, 30)
        time.sleep(rng.uniform(0, 0.5))
        return
    wait_until(lambda: server.engine_pid is not None, 60)
    # importing torch takes two to four seconds, reading the weights some tenths behind that
    time.sleep(rng.uniform(0, 1) if phase == "import" else rng.uniform(2, 4))


def kill_server(server: Served) -> float:
    """Seconds until nothing is left of it."""
    engine = server.engine_pid
    server.process.kill()
    started = time.monotonic()
    server.process.wait()
    if engine is not None:
        wait_until(lambda: not is_alive(engine), 30)
    port = getattr(server, "address", None)
    expect(port is None or is_free(port.port), "the port is still taken")
    return time.monotonic() - started


def kill_engine(server: Served, was_ready: bool, alone: str) -> float:
    """Seconds until all is well again, or until the start that cannot succeed has ended."""
    engine = server.engine_pid
    if engine is None:  # it was ready sooner than this round thought
        return 0.0
    os.kill(engine, signal.SIGKILL)
    started = time.monotonic()
    if not was_ready and "Ctrl-C" not in server.read_log():
        code = server.process.wait(30)
        seconds = time.monotonic() - started
        text = server.read_log()
        expect(code == 2 and "Traceback" not in text, f"exit {code}: {text}")
        return seconds
    server.wait_for_banner()
    wait_until(lambda: server.engine_pid not in (None, engine), 30)
    wait_until(server.is_ready, 30)
    seconds = time.monotonic() - started
    text = server.chat(max_tokens=40).text
    expect(text == alone, f"another answer: {text!r}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
        home = Path(folder)
        first = Served(home)
        first.wait_for_banner()
        alone = first.chat(max_tokens=40).text
        expect(first.stop() == 0, "the first server did not end well")
        first.close()
        for index in range(options.rounds):
            phase = PHASES[index // 2 % len(PHASES)]
            victim = ("server", "engine")[index % 2]
            server = Served(home)
            try:
                reach(server, phase, rng)
                if victim == "server":
                    seconds = kill_server(server)
                else:
                    seconds = kill_engine(server, phase in ("idle", "busy"), alone)
            finally:
                server.close()
            times[f"{victim} while {phase}"].append(seconds)
            late = " LATE" if seconds > MAX_SECONDS else ""
            print(f"round {index + 1}: {victim} while {phase}: {seconds:.2f} s{late}", flush=True)
    for name, values in times.items():
        print(f"{name:24} {len(values):3} kills, at most {max(values):.2f} s")
    worst = max(max(values) for values in times.values())
    sys.exit(worst > MAX_SECONDS)


if __name__ == "__main__":
    main()
