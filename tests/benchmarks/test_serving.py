"""A load on a server: what is counted, what is left out, and that every way does the same work."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.offline import random_prompts, run_batch
from benchmarks.serving import is_good, spread, summarize
from benchmarks.stream_client import Answer, BadUrl, Target, get
from benchmarks.streams import Run, Wire, run_engine, run_http
from benchmarks.workload import make_requests
from runtime import Engine, EngineConfig

Writer = asyncio.StreamWriter
TOKENS_A_CHUNK = 3


@asynccontextmanager
async def fake_server(answer: Callable[[int, dict[str, Any], Writer], Any]) -> AsyncIterator[str]:
    """An HTTP server whose n-th POST is answered by ``answer``; its URL."""
    count = -1

    async def handle(reader: asyncio.StreamReader, writer: Writer) -> None:
        nonlocal count
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            send_whole(writer, 200, {"data": [{"id": "fake"}]})
        else:
            count += 1
            length = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
            await answer(count, json.loads(await reader.readexactly(length)), writer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def send_whole(writer: Writer, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\n\r\n".encode() + data)


def send_part(writer: Writer, data: str) -> None:
    """One chunk of a chunked body, split in two where an event's text stands."""
    for part in (data[:9], data[9:]):
        writer.write(f"{len(part.encode()):x}\r\n{part}\r\n".encode())


async def stream_answer(number: int, body: dict[str, Any], writer: Writer) -> None:
    """Several tokens a chunk and a last chunk with usage, as speculation makes them."""
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    writer.write(head.encode())
    for _ in range(0, body["max_tokens"], TOKENS_A_CHUNK):
        send_part(writer, f"data: {json.dumps({'choices': [{'text': 'abc'}]})}\n\n")
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    assert body["stream_options"] == {"include_usage": True}
    send_part(writer, f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n")
    send_part(writer, "data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


async def ask_all(url: str, requests: list[Any], concurrency: int | None) -> Run:
    wire = Wire(Target.parse(url, "sk-x"), "fake", "completions", True, 0.0, 30.0)
    return await run_http(wire, requests, concurrency, lambda tokens: None)


def some_requests(count: int, rate: float | None = None) -> list[Any]:
    return make_requests(count, num_prompt=20, num_new=12, vocab_size=100, rate=rate, seed=4)


@pytest.mark.parametrize("rate", [None, 500.0])
def test_tokens_are_those_of_usage_and_not_the_chunks(rate: float | None) -> None:
    requests = some_requests(20, rate)

    async def run() -> Run:
        async with fake_server(stream_answer) as url:
            return await ask_all(url, requests, 4 if rate is None else None)

    done = asyncio.run(run())
    figures = summarize(done, serving.parse([]))
    assert figures["num_failed"] == 0, figures["failures"]
    assert figures["completion_tokens"] == sum(request.num_new for request in requests)
    assert figures["prompt_tokens"] == sum(len(request.prompt_ids) for request in requests)
    num_chunks = sum(-(-request.num_new // TOKENS_A_CHUNK) for request in requests)
    assert sum(len(answer.arrivals) for answer in done.answers) == num_chunks
    assert figures["chunks_per_token"] < 0.5


def test_failures_are_counted_by_reason_and_left_out_of_the_rest() -> None:
    requests = some_requests(12)
    good = []

    async def answer(number: int, body: dict[str, Any], writer: Writer) -> None:
        match number % 4:
            case 0:
                send_whole(writer, 429, {"error": {"message": "too many"}})
            case 1:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                usage = {"prompt_tokens": 5, "completion_tokens": 7}
                for event in ({"usage": usage}, {"error": {"message": "engine died"}}):
                    writer.write(f"data: {json.dumps(event)}\n\n".encode())
            case 2:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n")
            case _:
                good.append(body["max_tokens"])
                await stream_answer(number, body, writer)

    async def run() -> Run:
        async with fake_server(answer) as url:
            return await ask_all(url, requests, 3)

    figures = summarize(asyncio.run(run()), serving.parse([]))
    assert figures["failures"] == {
        "status 429: too many": 3,
        "error: engine died": 3,
        "the connection broke (IncompleteReadError)": 3,
    }
    assert figures["num_failed"] == 9 and len(good) == 3
    assert figures["completion_tokens"] == sum(good)


def test_the_arrivals_are_a_poisson_process_of_the_rate_and_the_seed_fixes_all() -> None:
    requests = some_requests(4000, rate=25.0)
    gaps = [after.at - before.at for before, after in itertools.pairwise(requests)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 25, rel=0.05)
    # an exponential distribution's spread is its mean, and 1 - 1/e of it lies below
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(
        mean, rel=0.1
    )
    assert sum(gap < mean for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.03)
    assert requests == some_requests(4000, rate=25.0)
    lengths = {len(request.prompt_ids) for request in requests}
    assert (min(lengths), max(lengths)) == (10, 30)
    assert {request.num_new for request in requests} == set(range(6, 19))


def answer_of(arrivals: list[float], tokens: int) -> Answer:
    return Answer(ended_at=arrivals[-1], arrivals=arrivals, completion_tokens=tokens)


def test_latencies_and_goodput_of_known_answers() -> None:
    fast = answer_of([0.1, 0.2, 0.3], tokens=5)  # ttft 100 ms, 50 ms a token
    slow = answer_of([0.3, 0.9], tokens=3)  # ttft 300 ms, 300 ms a token
    failed = Answer(failure="why", arrivals=[9.0], completion_tokens=99)
    options = serving.parse(["--ttft-ms", "200", "--itl-ms", "60"])
    figures = summarize(Run(2.0, 8, 0.1, [fast, slow, failed]), options)
    assert figures["ttft"]["mean_ms"] == pytest.approx(200)
    assert figures["tpot"]["median_ms"] == pytest.approx(175)
    assert figures["itl"]["mean_ms"] == pytest.approx((100 + 100 + 600) / 3)
    assert figures["e2e"]["p99_ms"] == pytest.approx(300 + 0.99 * 600)
    assert figures["output_tok_s"] == 4.0 and figures["requests_per_s"] == 1.0
    assert figures["goodput_requests_per_s"] == 0.5
    assert is_good(slow, 300.1, 301) and not is_good(slow, 300.1, 299)
    assert not is_good(fast, 99, None)
    assert spread([]) is None


def test_a_wrong_url_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("127.0.0.1:8000", "ftp://x/v1", "http://x:99999/v1"):
        with pytest.raises(BadUrl, match="--url"):
            Target.parse(url, None)
    with pytest.raises(BadUrl, match="/v1/models"):
        asyncio.run(get(Target.parse("http://127.0.0.1:9/v1", None), "/models"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = str(serving.EMBEDDED_MODEL)
    return Engine.from_checkpoint(
        EngineConfig(model=model, device="cpu", max_step_tokens=64, prefix_cache=False)
    )


def test_prefill_ends_with_the_last_first_token(engine: Engine) -> None:
    """64 tokens fit into a step, so the answers begin one after the other."""
    times = run_batch(engine, random_prompts(4, 60, 1000), 6)
    assert len(times.first_token_s) == 4
    assert times.first_token_s == sorted(times.first_token_s)
    assert times.num_new == 4 * 6
    # by then the first three have drawn 3 + 2 + 1 tokens more than the last, if each took a step
    assert 0 < times.num_decoded <= 4 * 5 - 3


def test_the_engine_alone_answers_every_request(engine: Engine) -> None:
    requests = some_requests(9)
    run = run_engine(engine, requests, 2, temperature=1.0)
    assert run.num_tokens == sum(request.num_new for request in requests)
    assert not engine.has_work


def test_http_and_the_engine_do_the_same_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--against-engine", "--requests", "5", "--prompt", "6", "--new", "4"]
    arguments += ["--rounds", "1", "--threads", "1", "--concurrency", "3"]
    monkeypatch.setattr(sys, "argv", ["serving", *arguments])
    assert serving.main() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last)
    requests = make_requests(5, num_prompt=6, num_new=4, vocab_size=1000)
    num_new = sum(request.num_new for request in requests)
    [row] = found["rounds"]
    assert (row["engine_tokens"], row["process_tokens"], row["http_tokens"]) == (num_new,) * 3
    assert found["prompt_tokens"] == sum(len(request.prompt_ids) for request in requests)
    assert found["num_failed"] == 0
    assert found["percent"] == pytest.approx(100 * row["http_tok_s"] / row["engine_tok_s"])
    assert found["machine"]["cores"] >= 1 and found["versions"]["torch"]
