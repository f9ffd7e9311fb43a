"""`make bench`: its parts at small sizes, what they count, and what is left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import cpu, latency, throughput
from benchmarks.cpu import Part, run_parts
from benchmarks.cpu_report import markdown
from benchmarks.fit import fit_line
from benchmarks.machine import percent_of, rounds_within
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.plot import line_chart
from benchmarks.random_models import config_json

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings that need no measuring; torch keeps the threads it has."""
    for module in (throughput, latency):
        monkeypatch.setattr(module, "read_bandwidth", lambda: 2e9)
    monkeypatch.setattr(latency, "matmul_rate", lambda dtype: 1e11)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["machine"]["cores"] >= 1 and found["versions"]["torch"] == torch.__version__
    return found


@pytest.mark.usefixtures("one_thread")
def test_throughput_counts_every_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--batch", "1", "3", "--prompt", "8", "--new", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, "--threads", "1"])
    throughput.main()
    rows = last_line(capsys)["results"]
    assert [(row["batch"], row["num_new"]) for row in rows] == [(1, 2 * 4), (3, 2 * 3 * 4)]
    for row in rows:
        assert row["percent"] == pytest.approx(100 * row["decode_tok_s"] / row["ceiling_tok_s"])


@pytest.mark.usefixtures("one_thread")
def test_latency_reaches_each_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_json("qwen2.5_0.5b", tiny=True) | {"bos_token_id": 300, "eos_token_id": 301}
    make_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    arguments = [str(tmp_path), "--prompts", "16", "--batch", "1", "3", "--batch-context", "64"]
    arguments += ["--contexts", "64", "512", "2048", "99999", "--steps", "2", "--rounds", "2"]
    arguments += ["--dtype", "bfloat16", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["latency", *arguments])
    assert latency.main() == 0
    found = last_line(capsys)
    assert [row["prompt"] for row in found["prompts"]] == [16]
    short, long, longest, too_long = found["by_context"]
    assert 2000 < longest["mean_context"] < 2048
    assert "context is 2,048" in too_long["skipped"]
    for row in (*found["by_batch"], short, long):
        assert row["context"] < row["mean_context"] < row["context"] + 16
        assert row["percent"] == pytest.approx(100 * row["floor_ms"] / row["step_ms"])
    # what a token of context adds to the floor is its keys and values in every layer, in bf16
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 2 * config["num_key_value_heads"] * head_dim * config["num_hidden_layers"] * 2
    grown = (long["floor_ms"] - short["floor_ms"]) * 2e6
    assert grown == pytest.approx(
        token_bytes * (long["mean_context"] - short["mean_context"]), rel=1e-6
    )
    assert found["context_fit"]["floor_slope"] > 0


def test_a_line_is_found_again() -> None:
    line = fit_line([1, 2, 4, 8], [3.5, 4.0, 5.0, 7.0])
    assert line is not None
    assert (line.intercept, line.slope, line.r_squared) == pytest.approx((3.0, 0.5, 1.0))
    bent = fit_line([1, 2, 3, 4], [1, 4, 9, 16])
    assert bent is not None and bent.r_squared < 0.99
    assert fit_line([2, 2], [1, 3]) is None


def test_rounds_end_with_the_time_but_one_is_measured() -> None:
    assert list(rounds_within(3, 60)) == [0, 1, 2, 3]
    assert list(rounds_within(3, -1)) == [0, 1]
    assert percent_of(1, None) is None and percent_of(1, 4) == 25


def test_a_chart_places_points_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    line_chart(path, "a < b", "x", "y", {"one": [(0, 0), (10, 5), (20, 10)], "two": [(20, 0)]})
    root = ElementTree.parse(path).getroot()
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{SVG}circle")]
    zero, middle, end, below = circles
    assert middle == ((zero[0] + end[0]) / 2, (zero[1] + end[1]) / 2)
    assert below[0] == end[0] and below[1] == zero[1] > end[1]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b", "x", "y", "one", "two", "20", "10"} <= set(texts)


SCRIPT = "import json, sys, time\n{}\nprint(json.dumps({{'tensor_bytes': 5e9}}))\n"


def part_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> Part:
    """A part that runs ``body``."""
    (tmp_path / f"part_{name}.py").write_text(SCRIPT.format(body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Part(name, [f"part_{name}"], 0.1 if name == "hangs" else 1.0, takes_seconds=False)


def test_a_part_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {"good": "", "bad": "sys.exit('broken')", "hangs": "time.sleep(600)", "last": ""}
    parts = [part_of(tmp_path, monkeypatch, name, body) for name, body in bodies.items()]
    parts.append(Part("late", ["part_good"], 1.0, takes_seconds=False, needs="bad"))
    monkeypatch.setattr(cpu, "END_SECONDS", 0.0)
    results = run_parts(parts, tmp_path, minutes=0.5)
    statuses = {name: part["status"] for name, part in results["parts"].items()}
    assert statuses == {
        "good": "passed",
        "bad": "failed",
        "hangs": "timed out",
        "last": "passed",
        "late": "skipped",
    }
    assert "broken" in (tmp_path / "bad.log").read_text()
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["parts"]["good"]["record"] == {"tensor_bytes": 5e9}
    table = markdown(results)
    assert "`python -m part_good`" in table and "5.00 GB of tensors" in table
    assert "bad did not pass" in table


@pytest.mark.slow
def test_the_whole_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu", "--tiny", "--threads", "1", "--out", str(tmp_path)])
    assert cpu.main() == 0
    found = last_line(capsys)
    assert set(found["parts"].values()) == {"passed"} and len(found["parts"]) == 6
    table = (tmp_path / "table.md").read_text()
    for expected in ("HTTP streams", "transformers", "Peak memory", "per token of context"):
        assert expected in table
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "step-by-batch.svg",
        "step-by-context.svg",
    }
