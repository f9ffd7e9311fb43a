"""The server with its engine on a GPU: faults of the engine process, and the memory given back."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.load.served import Served, served, wait_until

pytestmark = pytest.mark.gpu

MEGABYTES_OF_CACHE = 512
LONG = "Count to 10, then tell me about Python and the sea. " * 12


@pytest.fixture(scope="module")
def free_before() -> int:
    return free_megabytes()


@pytest.fixture(scope="module")
def server(free_before: int) -> Iterator[Served]:
    cache = f"{MEGABYTES_OF_CACHE}MB"
    with served("--device", "cuda", "--dtype", "float32", "--kv-cache-memory", cache) as server:
        yield server


def free_megabytes() -> int:
    """Of the device, asked from outside: this process must not hold a context of its own."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(command, text=True).splitlines()[0])


def test_a_prefix_in_the_cache_changes_no_token(server: Served) -> None:
    first, second = (server.chat(text=LONG, max_tokens=60, ignore_eos=True) for _ in range(2))
    assert first.whole and second.whole
    assert first.text == second.text


def test_a_killed_engine_is_replaced_and_answers_the_same(server: Served) -> None:
    expected = server.chat(max_tokens=60).text
    for _ in range(2):
        pid = server.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda dead=pid: server.engine_pid not in (None, dead) and server.is_ready(), 60)
        assert server.chat(max_tokens=60).text == expected


def test_a_killed_server_takes_its_engine_and_the_memory_with_it(
    server: Served, free_before: int
) -> None:
    assert free_megabytes() < free_before - MEGABYTES_OF_CACHE
    os.kill(server.process.pid, signal.SIGKILL)
    wait_until(lambda: free_megabytes() > free_before - 64, 10)
