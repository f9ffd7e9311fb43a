"""The ways to run one checkpoint that `benchmarks.compare` takes in turn.

An engine in Python runs in a process of its own (`python -m benchmarks.sides NAME FOLDER …`), so
that no side sees another's settings, such as MKL's, or shares its thread pool. It reads a JSON
request a line, answers each with a line, and sleeps in between.

    request   {"batch": 8, "num_prompt": 128, "num_new": 64, "vocab_size": 151936}
    answer    {"prefill_s": …, "decode_s": …, "num_decoded": …, "num_new": …}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from benchmarks.machine import ROOT
from benchmarks.stream_client import BadUrl, Target
from benchmarks.streams import Wire, run_http
from benchmarks.workload import Request
from runtime.link import engine_environment

ENGINES = ("fathom", "transformers")
OUR_SETTINGS = ("MKL_CBWR", "THP_MEM_ALLOC_ENABLE")
"""What importing our kernels puts into the environment, for MKL and torch to read at their first
product and tensor; a peer runs without."""


class SideFailed(Exception):
    """A side cannot run; the message says why."""


@dataclass(frozen=True, slots=True)
class Job:
    """What each side is asked to do: ``batch`` prompts, all there at once."""

    batch: int
    num_prompt: int  # tokens of each
    num_new: int
    vocab_size: int  # prompts are random ids below it


@dataclass(frozen=True, slots=True)
class Times:
    """What a side took for a job."""

    prefill_s: float  # until every answer had its first token
    decode_s: float
    num_decoded: int  # tokens in ``decode_s``
    num_new: int  # tokens of all answers

    def prefill_tok_s(self, job: Job) -> float:
        return job.batch * job.num_prompt / self.prefill_s

    @property
    def decode_tok_s(self) -> float:
        return self.num_decoded / self.decode_s if self.decode_s else 0.0


class Side(Protocol):
    name: str

    def can(self, job: Job) -> bool:
        """Whether it does such jobs at all."""

    def run(self, job: Job) -> Times:
        """Raises `SideFailed`."""

    def peak_bytes(self) -> int | None:
        """Most memory it held so far, None if that cannot be known."""

    def close(self) -> None: ...


class EngineSide:
    """Fathom's engine or transformers' `generate`, in a process of its own."""

    def __init__(self, name: str, engine: str, folder: str, flags: list[str]) -> None:
        """Returns once the weights are loaded. Raises `SideFailed`."""
        self.name = name
        self._peak: int | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", engine, folder, *flags],
            cwd=ROOT,
            env=environment_of(engine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def can(self, job: Job) -> bool:
        return True

    def run(self, job: Job) -> Times:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return Times(**self._read())

    def peak_bytes(self) -> int | None:
        return self._peak

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideFailed(f"{self.name} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.name}: {answer['error']}")
        self._peak = answer.pop("peak_bytes")
        return answer


def environment_of(engine: str) -> dict[str, str]:
    """Of its process: for ours as the server starts it, for a peer as a user would."""
    if engine == "fathom":
        return engine_environment()
    return {name: value for name, value in os.environ.items() if name not in OUR_SETTINGS}


class LlamaBenchSide:
    """llama.cpp through `llama-bench` (batch 1) or `llama-batched-bench`, started for each job."""

    name = "llama.cpp"

    def __init__(self, program: str, gguf: str, threads: int) -> None:
        self._program, self._gguf, self._threads = program, gguf, threads
        self._is_batched = "batched" in program.rpartition("/")[2]

    def can(self, job: Job) -> bool:
        return self._is_batched or job.batch == 1

    def run(self, job: Job) -> Times:
        command = [self._program, "-m", self._gguf, "-t", str(self._threads)]
        if self._is_batched:
            room = job.batch * (job.num_prompt + job.num_new) + 64
            command += ["-c", str(room), "-npp", str(job.num_prompt), "-ntg", str(job.num_new)]
            command += ["-npl", str(job.batch), "--output-format", "jsonl"]
        else:
            command += ["-p", str(job.num_prompt), "-n", str(job.num_new), "-r", "1", "-o", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as error:
            raise SideFailed(f"{self._program}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            reason = " | ".join(error.stderr.splitlines()[-3:])
            raise SideFailed(f"{self._program}: exit code {error.returncode}: {reason}") from None
        try:
            prefill, decode = self._rates(done.stdout)
        except (ValueError, LookupError, TypeError):
            raise SideFailed(f"{self._program}: its answer is not understood") from None
        num_new = job.batch * job.num_new
        return Times(job.batch * job.num_prompt / prefill, num_new / decode, num_new, num_new)

    def _rates(self, text: str) -> tuple[float, float]:
        """Tokens per second of the prompts and of the answers."""
        if self._is_batched:
            lines = [line for line in text.splitlines() if line.startswith("{")]
            row = json.loads(lines[-1])
            return float(row["speed_pp"]), float(row["speed_tg"])
        rows = json.loads(text)
        [prompt] = [row["avg_ts"] for row in rows if row["n_prompt"] and not row["n_gen"]]
        [answer] = [row["avg_ts"] for row in rows if row["n_gen"] and not row["n_prompt"]]
        return float(prompt), float(answer)

    def peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        pass


class ServerSide:
    """An OpenAI server that runs with the same checkpoint, such as `llama-server`."""

    name = "server"

    def __init__(self, url: str, key: str | None, model: str) -> None:
        """Raises `SideFailed` for a URL that is none."""
        self._count = 0
        try:
            target = Target.parse(url, key)
        except BadUrl as error:
            raise SideFailed(str(error)) from None
        self._wire = Wire(target, model, "completions", True, 0.0, 3600.0)

    def can(self, job: Job) -> bool:
        return True

    def run(self, job: Job) -> Times:
        self._count += 1  # other prompts each time, which no cache knows
        prompts = _prompts(job, seed=self._count)
        requests = [Request(prompt, job.num_new, 0.0) for prompt in prompts]
        run = asyncio.run(run_http(self._wire, requests, job.batch, lambda tokens: None))
        if failed := [answer.failure for answer in run.answers if answer.failure]:
            raise SideFailed(f"{self.name}: {failed[0]}")
        start = min(answer.sent_at for answer in run.answers)
        prefill = max(answer.arrivals[0] for answer in run.answers) - start
        last = max(answer.ended_at for answer in run.answers) - start
        return Times(prefill, last - prefill, run.num_tokens - job.batch, run.num_tokens)

    def peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        pass


# -- inside the process of an engine -------------------------------------------------------------


def _prompts(job: Job, seed: int = 0) -> list[list[int]]:
    from benchmarks.offline import random_prompts

    return random_prompts(job.batch, job.num_prompt, job.vocab_size, seed)


def fathom(options: argparse.Namespace) -> Callable[[Job], Times]:
    """Load the checkpoint into our engine as `fathom serve` does."""
    from benchmarks.offline import run_batch
    from runtime import Engine, EngineConfig

    engine = Engine.from_checkpoint(
        EngineConfig(
            model=options.folder,
            device="cpu",
            dtype=options.dtype,
            quantization=options.quantization,
            num_threads=options.threads,
            max_num_seqs=options.max_batch,
            max_model_len=options.max_len,
            prefix_cache=False,
        )
    )

    def run(job: Job) -> Times:
        times = run_batch(engine, _prompts(job), job.num_new)
        return Times(times.prefill_s, times.decode_s, times.num_decoded, times.num_new)

    return run


def transformers(options: argparse.Namespace) -> Callable[[Job], Times]:
    """Load the checkpoint into transformers; tokens are timed as `generate` draws them."""
    for name in OUR_SETTINGS:  # importing this module has brought them back
        os.environ.pop(name, None)
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
    from transformers.utils import logging

    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    ).eval()

    class Clock(StoppingCriteria):
        """Is asked after every token whether to stop, and never does."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def run(job: Job) -> Times:
        clock = Clock()
        ids = torch.tensor(_prompts(job))
        config = GenerationConfig(
            max_new_tokens=job.num_new,
            min_new_tokens=job.num_new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        start = time.perf_counter()
        with torch.inference_mode():
            answers = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=[clock],
            )
        num_new = int(answers.shape[0] * (answers.shape[1] - ids.shape[1]))
        prefill, end = clock.times[0] - start, clock.times[-1] - start
        return Times(prefill, end - prefill, num_new - job.batch, num_new)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print

    def say(**fields: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(fields | {"peak_bytes": peak}), file=answers, flush=True)

    try:
        run = (fathom if options.engine == "fathom" else transformers)(options)
        say()
        for line in sys.stdin:
            times = run(Job(**json.loads(line)))
            say(**asdict(times))
    except Exception as error:  # whatever a library raises is this side's result
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")


if __name__ == "__main__":
    main()
