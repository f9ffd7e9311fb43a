"""An OpenAI server under load: latencies, rates, goodput; and what HTTP costs our own engine.

    python -m benchmarks.serving --url http://host:8000/v1 --key sk-… --model NAME --rate 4
    python -m benchmarks.serving [MODEL] --concurrency 8             # starts our server
    python -m benchmarks.serving [MODEL] --against-engine --rounds 5

The workload is fixed by --seed: ragged prompts of random ids and ragged answers that ignore the end
token, at fixed concurrency or as a Poisson process. Tokens are what the server's ``usage`` counts,
never chunks. A request that fails is counted, shown, and left out of every other figure.

    ttft    from before the connection is opened to the first chunk with text
    itl     between chunks with text; several tokens may come in one
    tpot    (last chunk - first chunk) / (tokens - 1) of an answer
    e2e     to the end of the stream
    goodput requests per second with ttft <= --ttft-ms and tpot <= --itl-ms

The ceiling: with --against-engine the rate of the engine alone in the same run, the ways taken in
turn and compared pair by pair; with --rate the tokens asked for per second; else there is none.
The client shares the machine with a server of our own; what it costs is printed. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.machine import EMBEDDED_MODEL, percent_of, print_record, rounds_within, shown
from benchmarks.own_environment import start_as_engine
from benchmarks.own_server import OwnServer, ServerDied, own_server
from benchmarks.stream_client import Answer, BadUrl, Target, get
from benchmarks.streams import Finished, Run, Wire, run_engine, run_engine_process, run_http
from benchmarks.workload import Request, make_requests
from runtime import Engine, EngineClient, EngineConfig, FathomError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default=str(EMBEDDED_MODEL), help="for our server")
    parser.add_argument("--url", help="of a server that runs, up to /v1")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--model", help="the name to ask for; the server's first if left out")
    parser.add_argument("--endpoint", choices=["completions", "chat"], default="completions")
    parser.add_argument("--requests", type=int, default=64)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    load.add_argument("--rate", type=float, help="requests per second, Poisson arrivals")
    parser.add_argument("--prompt", type=int, default=64, help="mean tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="mean tokens of an answer")
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompts are ids below it")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--no-ignore-eos", action="store_true", help="for servers without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a request")
    parser.add_argument("--ttft-ms", type=float, help="of a good answer, at most")
    parser.add_argument("--itl-ms", type=float, help="mean per token of a good answer, at most")
    parser.add_argument("--against-engine", action="store_true", help="compare with the engine")
    parser.add_argument("--rounds", type=int, default=5, help="of --against-engine")
    parser.add_argument("--seconds", type=float, default=86400.0, help="fewer rounds after these")
    parser.add_argument("--threads", type=int, help="CPU threads of our engine")
    parser.add_argument("--dtype", default="auto", help="of our engine")
    options = parser.parse_args(arguments)
    for name in ("requests", "concurrency", "prompt", "new", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.rate is not None and options.rate <= 0:
        parser.error(f"--rate must be above 0, got {options.rate:g}")
    if options.vocab_size < 4:
        parser.error(f"--vocab-size must be at least 4, got {options.vocab_size}")
    if options.against_engine and (options.url or options.rate):
        parser.error("--against-engine starts our own server and keeps --concurrency under way")
    return options


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Finished]:
    """Requests that ended, and their tokens, on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    num_tokens = 0
    with Progress(
        *columns,
        TextColumn("{task.fields[tokens]} tokens"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("requests", total=total, tokens=0)

        def finished(tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            progress.update(task, advance=1, tokens=num_tokens)

        yield finished


def spread(values: list[float]) -> dict[str, float] | None:
    """Mean, median and p99 in milliseconds; None of nothing."""
    if not values:
        return None
    array = 1e3 * np.array(values)
    return {
        "mean_ms": float(array.mean()),
        "median_ms": float(np.median(array)),
        "p99_ms": float(np.percentile(array, 99)),
    }


def is_good(answer: Answer, ttft_ms: float | None, itl_ms: float | None) -> bool:
    """Whether an answer came as fast as asked for."""
    per_token = answer.seconds_per_token
    return (ttft_ms is None or 1e3 * answer.ttft <= ttft_ms) and (
        itl_ms is None or per_token is None or 1e3 * per_token <= itl_ms
    )


def summarize(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one run over HTTP."""
    whole = [answer for answer in run.answers if answer.failure is None]
    failures = Counter(answer.failure for answer in run.answers if answer.failure is not None)
    good = [answer for answer in whole if is_good(answer, options.ttft_ms, options.itl_ms)]
    num_chunks = sum(len(answer.arrivals) for answer in whole)
    gaps = [gap for answer in whole for gap in np.diff(answer.arrivals).tolist()]
    per_token = [answer.seconds_per_token for answer in whole]
    has_limits = options.ttft_ms is not None or options.itl_ms is not None
    return {
        "num_requests": len(run.answers),
        "num_failed": len(run.answers) - len(whole),
        "failures": dict(failures),
        "seconds": run.seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in whole),
        "completion_tokens": run.num_tokens,
        "chunks_per_token": num_chunks / max(run.num_tokens, 1),
        "requests_per_s": len(whole) / run.seconds,
        "output_tok_s": run.tok_s,
        "goodput_requests_per_s": len(good) / run.seconds if has_limits else None,
        "ttft": spread([answer.ttft for answer in whole]),
        "itl": spread(gaps),
        "tpot": spread([seconds for seconds in per_token if seconds is not None]),
        "e2e": spread([answer.seconds for answer in whole]),
        "client_cpu_share": run.client_cpu_s / run.seconds,
        "client_us_per_token": 1e6 * run.client_cpu_s / max(run.num_tokens, 1),
    }


def print_summary(figures: dict[str, Any], ceiling: float | None) -> None:
    print(
        f"requests   {figures['num_requests']}, failed {figures['num_failed']}; "
        f"{figures['seconds']:.1f} s; tokens {figures['prompt_tokens']:,} in, "
        f"{figures['completion_tokens']:,} out ({figures['chunks_per_token']:.2f} chunks each)"
    )
    for failure, count in figures["failures"].items():
        print(f"FAILED     {count} x {failure}")
    print(f"{'':10}{'mean':>10}{'median':>10}{'p99':>10}   ms")
    for name in ("ttft", "itl", "tpot", "e2e"):
        if (values := figures[name]) is not None:
            print(f"{name:10}" + "".join(f"{value:>10.1f}" for value in values.values()))
    percent = percent_of(figures["output_tok_s"], ceiling)
    goodput = figures["goodput_requests_per_s"]
    print(
        f"rate       {figures['output_tok_s']:,.1f} tokens/s, "
        f"{figures['requests_per_s']:.2f} requests/s, goodput {shown(goodput, '.2f')} requests/s"
    )
    print(f"ceiling    {shown(ceiling, ',.1f')} tokens/s, {shown(percent, '.1f')} % of it")
    print(
        f"client     {100 * figures['client_cpu_share']:.0f} % of one core, "
        f"{figures['client_us_per_token']:.0f} us per token"
    )


async def make_wire(options: argparse.Namespace, url: str) -> Wire:
    """How to ask the server behind ``url``. Raises `BadUrl` if it has no models to name."""
    target = Target.parse(url, options.key)
    model = options.model
    if model is None:
        listed = await get(target, "/models")
        try:
            model = listed["data"][0]["id"]
        except (LookupError, TypeError):
            raise BadUrl(f"{url}/models lists no model; name one with --model") from None
    return Wire(
        target=target,
        model=str(model),
        endpoint=options.endpoint,
        ignore_eos=not options.no_ignore_eos,
        temperature=options.temperature,
        seconds=options.timeout,
    )


async def one_run(
    options: argparse.Namespace, requests: list[Request], url: str, server: OwnServer | None
) -> dict[str, Any]:
    """The requests once through HTTP, printed."""
    wire = await make_wire(options, url)
    await run_http(wire, requests[: options.concurrency], options.concurrency, lambda tokens: None)
    before = server.cpu_seconds() if server else (0.0, 0.0)
    with progress_bar(len(requests)) as finished:
        concurrency = options.concurrency if options.rate is None else None
        run = await run_http(wire, requests, concurrency, finished)
    figures = summarize(run, options)
    ceiling = None
    if options.rate is not None:
        ceiling = options.rate * sum(request.num_new for request in requests) / len(requests)
    if server:
        spent = [now - then for now, then in zip(server.cpu_seconds(), before, strict=True)]
        tokens = max(run.num_tokens, 1)
        names = ("server_us_per_token", "engine_us_per_token")
        figures |= {name: 1e6 * cpu / tokens for name, cpu in zip(names, spent, strict=True)}
    print_summary(figures, ceiling)
    percent = percent_of(figures["output_tok_s"], ceiling)
    return figures | {"model": wire.model, "ceiling_tok_s": ceiling, "percent": percent}


def fitting(
    requests: list[Request], num_timed: int, seconds: float, options: argparse.Namespace
) -> list[Request]:
    """As many requests as leave time for all rounds, if ``num_timed`` took ``seconds`` a round."""
    per_round = options.seconds / options.rounds
    count = int(num_timed * per_round / max(seconds, 1e-9))
    return requests[: max(count, num_timed)]


async def against_engine(
    options: argparse.Namespace, requests: list[Request], server: OwnServer
) -> dict[str, Any]:
    """The same requests through the three ways in turn; ratios pair by pair."""
    wire = await make_wire(options, server.url)
    config = EngineConfig(
        model=options.checkpoint,
        dtype=options.dtype,
        prefix_cache=False,
        num_threads=options.threads,
        max_num_seqs=max(options.concurrency, 1),
    )
    engine = await asyncio.to_thread(Engine.from_checkpoint, config)
    client = EngineClient(config)
    await client.start()
    rows: list[dict[str, float]] = []
    last: Run | None = None
    arguments = (options.concurrency, options.temperature)
    spent = [0.0, 0.0]
    failed = 0
    print(f"{'round':>6}{'engine':>10}{'process':>10}{'HTTP':>10}{'HTTP/engine':>13}   tokens/s")
    try:
        few = requests[: options.concurrency]
        start = time.monotonic()
        await asyncio.to_thread(run_engine, engine, few, *arguments)  # to warm up
        await run_engine_process(client, few, *arguments)
        await run_http(wire, few, options.concurrency, lambda tokens: None)
        taken = time.monotonic() - start
        asked, requests = requests, fitting(requests, len(few), taken, options)
        if len(requests) < len(asked):
            print(f"a slow machine: {len(requests)} of {len(asked)} requests in each round")
        for number in rounds_within(options.rounds, options.seconds):
            if not number:
                continue
            alone = await asyncio.to_thread(run_engine, engine, requests, *arguments)
            apart = await run_engine_process(client, requests, *arguments)
            before = server.cpu_seconds()
            with progress_bar(len(requests)) as finished:
                last = await run_http(wire, requests, options.concurrency, finished)
            after = server.cpu_seconds()
            took = [now - then for now, then in zip(after, before, strict=True)]
            spent = [total + one for total, one in zip(spent, took, strict=True)]
            failed += last.num_failed
            rows.append(
                {
                    "engine_tok_s": alone.tok_s,
                    "process_tok_s": apart.tok_s,
                    "http_tok_s": last.tok_s,
                    "engine_tokens": alone.num_tokens,
                    "process_tokens": apart.num_tokens,
                    "http_tokens": last.num_tokens,
                }
            )
            print(
                f"{number:>6}{alone.tok_s:>10,.0f}{apart.tok_s:>10,.0f}{last.tok_s:>10,.0f}"
                f"{last.tok_s / alone.tok_s:>13.3f}",
                flush=True,
            )
    finally:
        await client.stop()
    assert last is not None
    figures = summarize(last, options)
    kept, process_kept = (
        statistics.median(row[name] / row["engine_tok_s"] for row in rows)
        for name in ("http_tok_s", "process_tok_s")
    )
    medians = {
        name: statistics.median(row[name] for row in rows)
        for name in ("engine_tok_s", "process_tok_s", "http_tok_s")
    }
    print_summary(figures, medians["engine_tok_s"])
    num_tokens = max(sum(int(row["http_tokens"]) for row in rows), 1)
    server_us, engine_us = (1e6 * seconds / num_tokens for seconds in spent)
    print(
        f"processor  {server_us:.0f} us per token in the server, {engine_us:.0f} in the engine, "
        f"{figures['client_us_per_token']:.0f} in this client"
    )
    print(
        f"HTTP keeps {100 * kept:.1f} % of the engine's rate: {100 * (1 - kept):.1f} % are lost; "
        f"a process of its own keeps {100 * process_kept:.1f} %"
    )
    if failed > figures["num_failed"]:
        print(f"FAILED     {failed} requests in all rounds")
    return {
        **figures,
        **medians,
        "num_failed": failed,
        "model": wire.model,
        "ceiling_tok_s": medians["engine_tok_s"],
        "percent": 100 * kept,
        "process_percent": 100 * process_kept,
        "server_us_per_token": server_us,
        "engine_us_per_token": engine_us,
        "rounds": rows,
    }


def main() -> int:
    options = parse()
    requests = make_requests(
        options.requests,
        num_prompt=options.prompt,
        num_new=options.new,
        vocab_size=options.vocab_size,
        rate=options.rate,
        seed=options.seed,
    )
    try:
        if options.url is not None:
            results = asyncio.run(one_run(options, requests, options.url, None))
        else:
            flags = ["--no-prefix-cache", "--dtype", options.dtype]
            flags += ["--max-num-seqs", str(options.concurrency)] if options.rate is None else []
            flags += ["--threads", str(options.threads)] if options.threads else []
            with own_server(options.checkpoint, flags) as server:
                if options.against_engine:
                    results = asyncio.run(against_engine(options, requests, server))
                else:
                    results = asyncio.run(one_run(options, requests, server.url, server))
    except (BadUrl, ServerDied, FathomError) as error:
        print(f"serving: {error}", file=sys.stderr)
        return 2
    load = {"concurrency": options.concurrency, "rate": options.rate}
    lengths = {"num_prompt": options.prompt, "num_new": options.new, "seed": options.seed}
    print_record("serving", url=options.url, **load, **lengths, **results)
    return 1 if results["num_failed"] else 0


if __name__ == "__main__":
    if parse().against_engine:  # else this process holds none
        start_as_engine()
    sys.exit(main())
