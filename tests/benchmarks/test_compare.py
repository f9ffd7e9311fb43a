"""Peers in turn: what each is asked, how their answers are read, and the ratios of known times."""

from __future__ import annotations

import asyncio
import io
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compare, sides
from benchmarks.compare import rows_of, run_rounds
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.random_models import config_json
from benchmarks.sides import Job, LlamaBenchSide, ServerSide, SideFailed, Times
from tests.benchmarks.test_serving import fake_server, stream_answer

JOB = Job(batch=2, num_prompt=6, num_new=4, vocab_size=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = config_json("qwen2.5_0.5b", tiny=True) | {"bos_token_id": 300, "eos_token_id": 301}
    make_checkpoint(folder, config, dtype=torch.bfloat16)
    return str(folder)


class Scripted:
    """A side whose rates are known."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self._seconds, self._log = name, iter(seconds), log

    def can(self, job: Job) -> bool:
        return True

    def run(self, job: Job) -> Times:
        self._log.append(self.name)
        seconds = next(self._seconds, None)
        if seconds is None:
            raise SideFailed("enough")
        return Times(seconds, 2 * seconds, 6, 8)

    def peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def test_a_peer_runs_without_the_settings_of_our_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MKL would give a row the same bits in any batch, which is slower than what users have."""
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")
    code = (
        "import os, sys\n"
        "import benchmarks.sides as sides\n"
        "import transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained = lambda *a, **b: 1 / 0\n"
        "try: sides.main()\n"
        "finally: print(os.environ.get('MKL_CBWR'), file=sys.__stderr__)\n"
    )
    flags = ["--dtype", "float32", "--threads", "1", "--max-batch", "1", "--max-len", "8"]
    done = subprocess.run(
        [sys.executable, "-c", code, "transformers", str(tmp_path), *flags],
        env=sides.environment_of("transformers"),
        cwd=sides.ROOT,
        capture_output=True,
        text=True,
    )
    assert "ZeroDivisionError" in done.stdout
    assert done.stderr.splitlines()[-1] == "None"


def test_sides_run_in_turn_and_ratios_are_of_the_same_round() -> None:
    log: list[str] = []
    # ratios 3, 1 and 4: their median is 3, where medians over medians would be 2
    ours = Scripted("fathom", [99.0, 1.0, 4.0, 2.0], log)
    theirs = Scripted("peer", [99.0, 3.0, 4.0, 8.0], log)
    broken = Scripted("broken", [99.0, 1.0], log)
    failures: dict[str, str] = {}
    times = run_rounds([ours, theirs, broken], JOB, 3, 60.0, failures)
    assert log == ["fathom", "peer", "broken"] * 3 + ["fathom", "peer"]
    assert failures == {"broken": "enough"} and list(times) == ["fathom", "peer"]
    mine, other = rows_of(JOB, times, {"fathom": 10.0, "peer": 5.0}, "bfloat16")
    assert other["decode_ratio"] == other["prefill_ratio"] == pytest.approx(3.0)
    assert mine["decode_ratio"] == 1.0
    assert mine["prefill_tok_s"] == pytest.approx(12 / 2.0)
    assert other["decode_tok_s"] == pytest.approx(6 / 8.0)
    assert mine["percent"] == pytest.approx(100 * 1.5 / 10.0)
    assert other["percent"] == pytest.approx(100 * 0.75 / 5.0)


def test_no_round_but_the_first_begins_too_late() -> None:
    log: list[str] = []
    times = run_rounds([Scripted("fathom", [1.0] * 9, log)], JOB, 5, -1.0, {})
    assert len(times["fathom"]) == 1 and len(log) == 2


def test_an_engine_says_what_it_took_or_why_it_cannot(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dtype", "bfloat16", "--threads", "1", "--max-batch", "2", "--max-len", "32"]
    monkeypatch.setattr(sys, "argv", ["sides", "fathom", folder, *flags])
    jobs = [JOB, replace(JOB, vocab_size=100_000)]
    lines = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # it prints to stderr from then on
    sides.main()
    loaded, times, failed = map(json.loads, capsys.readouterr().out.splitlines())
    assert loaded.keys() == {"peak_bytes"} and loaded["peak_bytes"] > 50 << 20
    assert times["num_new"] == 8 and 0 < times["num_decoded"] <= 6
    assert "vocabulary of 512 tokens" in failed["error"]


def test_tokens_of_transformers_are_counted_and_timed(folder: str) -> None:
    options = SimpleNamespace(folder=folder, dtype="bfloat16", threads=1)
    run = sides.transformers(options)  # type: ignore[arg-type]
    times = run(JOB)
    assert times.num_new == 8 and times.num_decoded == 6
    assert times.prefill_s > 0 and times.decode_s > 0


def script(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


ROWS = [
    {"n_prompt": 6, "n_gen": 0, "avg_ts": 120.0},
    {"n_prompt": 0, "n_gen": 4, "avg_ts": 40.0},
]


def test_llama_bench_is_asked_for_one_and_batched_bench_for_many(tmp_path: Path) -> None:
    keep = "import json, pathlib, sys\n"
    keep += "pathlib.Path(__file__ + '.args').write_text(' '.join(sys.argv[1:]))\n"
    one = script(tmp_path / "llama-bench", f"{keep}print(json.dumps({ROWS!r}))")
    side = LlamaBenchSide(one, "m.gguf", 2)
    alone = Job(1, 6, 4, 100)
    assert side.can(alone) and not side.can(JOB)
    times = side.run(alone)
    assert times.prefill_tok_s(alone) == pytest.approx(120) and times.decode_tok_s == 40
    assert Path(f"{one}.args").read_text() == "-m m.gguf -t 2 -p 6 -n 4 -r 1 -o json"

    row = {"speed_pp": 240.0, "speed_tg": 80.0}
    many = script(
        tmp_path / "llama-batched-bench", f"{keep}print('log')\nprint(json.dumps({row!r}))"
    )
    times = LlamaBenchSide(many, "m.gguf", 2).run(JOB)
    assert times.prefill_tok_s(JOB) == pytest.approx(240) and times.decode_tok_s == 80
    assert "-npp 6 -ntg 4 -npl 2" in Path(f"{many}.args").read_text()


def test_a_llama_bench_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(SideFailed, match="No such file"):
        LlamaBenchSide(str(tmp_path / "none"), "m.gguf", 1).run(JOB)
    broken = script(tmp_path / "broken", "import sys\nsys.exit('no such model')")
    with pytest.raises(SideFailed, match="exit code 1: no such model"):
        LlamaBenchSide(broken, "m.gguf", 1).run(JOB)
    babbles = script(tmp_path / "babbles", "print('[]')")
    with pytest.raises(SideFailed, match="not understood"):
        LlamaBenchSide(babbles, "m.gguf", 1).run(JOB)


def test_a_server_is_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run starts an event loop, so it is called in a thread of the fake server's."""

    async def run() -> Times:
        async with fake_server(stream_answer) as url:
            return await asyncio.to_thread(ServerSide(url, None, "m").run, JOB)

    times = asyncio.run(run())
    assert times.num_new == 8 and times.num_decoded == 6
    with pytest.raises(SideFailed, match="--url"):
        ServerSide("nonsense", None, "m")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compare, "read_bandwidth", lambda: 1e9)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_whole_comparison(
    folder: str, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [folder, "--no-transformers", "--batch", "1", "3", "--prompt", "6", "--new", "4"]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--rounds", "2", "--threads", "1"])
    assert compare.main() == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["side"], row["batch"]) for row in found["results"]] == [
        ("fathom", 1),
        ("fathom", 3),
    ]
    assert found["failures"] == {} and found["peak_bytes"]["fathom bfloat16"] > 50 << 20
    for row in found["results"]:
        assert row["num_new"] == 2 * row["batch"] * 4
        assert row["percent"] == pytest.approx(100 * row["decode_tok_s"] / row["ceiling_tok_s"])
    # one sequence reads all weights and about six tokens of cache: the ceiling is their bytes
    config = config_json("qwen2.5_0.5b", tiny=True)
    layers = config["num_hidden_layers"]
    size = (Path(folder) / "model.safetensors").stat().st_size
    [alone, _] = found["results"]
    heads, dim = config["num_key_value_heads"], config["hidden_size"] // 4
    assert 1e9 / alone["ceiling_tok_s"] == pytest.approx(
        size + 8 * layers * 2 * heads * dim * 2, rel=0.02
    )


def test_a_checkpoint_that_is_none_is_one_line(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), "--threads", "1"])
    assert compare.main() == 2
    assert capsys.readouterr().err.startswith(f"compare: {tmp_path}")
