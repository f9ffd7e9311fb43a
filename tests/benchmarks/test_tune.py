"""The search for launch configurations, and the rows it leaves in kernels/configs.toml."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.config_rows import insert_row, interval
from benchmarks.kernel_inputs import OURS, TINY, TORCH, Case, Maker, Work
from benchmarks.launches import launching_with
from benchmarks.part import parse_part
from benchmarks.tune import OPS, Target, Tuning, search, targets, when_of
from kernels import configs
from kernels.configs import launch_config

TEXT = """\
# Said first.

# About products.
[[product]]
when = { arch = [90, 100], max_rows = 4 }  # a remark
use = { BLOCK = 1 }

[[product]]  # the last
use = { BLOCK = 3, body = "tile" }

# About others.
[[other]]
use = { BLOCK = 4 }
"""
WHEN = {"arch": 90, "dtype": "bfloat16", "aligned": True, "max_rows": 8}
USE = {"BLOCK": 64, "num_warps": 8, "body": "gemv"}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "configs.toml"
    path.write_text(TEXT)
    monkeypatch.setattr(configs, "PATH", path)
    configs.table.cache_clear()
    configs._lookup.cache_clear()
    yield path
    configs.table.cache_clear()
    configs._lookup.cache_clear()


def forget() -> None:
    configs.table.cache_clear()
    configs._lookup.cache_clear()


def test_a_new_row_stands_on_top_and_nothing_else_changes() -> None:
    text = insert_row(TEXT, "product", WHEN, USE, 'measured on "it"')
    head, tail = TEXT.split("[[product]]\nwhen", 1)
    assert text.startswith(head + "[[product]]\nwhen = { arch = 90,")
    assert text.endswith("\n\n[[product]]\nwhen" + tail)
    rows = tomllib.loads(text)
    assert rows["product"][0] == {"when": WHEN, "use": USE, "measured": 'measured on "it"'}
    assert rows["product"][1:] == tomllib.loads(TEXT)["product"]
    assert rows["other"] == tomllib.loads(TEXT)["other"]


def test_the_same_condition_replaces_its_row() -> None:
    once = insert_row(TEXT, "product", WHEN, USE, "first")
    other = insert_row(once, "product", {**WHEN, "max_rows": 16}, USE, "other")
    again = insert_row(other, "product", WHEN, {**USE, "BLOCK": 128}, "second")
    rows = tomllib.loads(again)["product"]
    assert [row.get("measured") for row in rows] == ["second", "other", None, None]
    assert again == insert_row(
        insert_row(TEXT, "product", {**WHEN, "max_rows": 16}, USE, "other"),
        "product",
        WHEN,
        {**USE, "BLOCK": 128},
        "second",
    )
    # also a row that was written by hand, with its remark
    by_hand = insert_row(TEXT, "product", {"arch": [90, 100], "max_rows": 4}, USE, "new")
    assert len(tomllib.loads(by_hand)["product"]) == 2
    assert "# About products." in by_hand and "a remark" not in by_hand


def test_rows_that_cannot_be_put_in_are_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        insert_row(TEXT, "nothing", WHEN, USE, "")
    with pytest.raises(ValueError, match="needs a condition"):
        insert_row(TEXT, "product", {}, USE, "")


def test_the_real_table_takes_rows(tmp_path: Path) -> None:
    text = configs.PATH.read_text(encoding="utf-8")
    for op in configs.table():
        changed = insert_row(text, op, WHEN, USE, "x")
        before, after = tomllib.loads(text), tomllib.loads(changed)
        assert after[op] == [{"when": WHEN, "use": USE, "measured": "x"}, *before[op]]
        assert {k: v for k, v in after.items() if k != op} == {
            k: v for k, v in before.items() if k != op
        }
        kept = changed.splitlines()
        for line in text.splitlines():
            kept.remove(line)
        assert len(kept) == 5


def test_launches_find_the_new_row(table: Path) -> None:
    facts: dict[str, Any] = {"arch": 90, "dtype": "bfloat16", "aligned": True}
    assert launch_config("product", **facts, rows=5) == {"BLOCK": 3, "body": "tile"}
    points = (1, 4, 8)
    when = when_of({**facts, "rows": 8, "rows_per_expert": 3}, points)
    assert when == {**facts, "min_rows": 5, "max_rows": 8}
    table.write_text(insert_row(table.read_text(), "product", when, USE, "x"))
    forget()
    assert [launch_config("product", **facts, rows=rows)["BLOCK"] for rows in (4, 5, 8, 9)] == [
        1,
        64,
        64,
        3,
    ]


def test_intervals_of_rows_meet_and_do_not_overlap() -> None:
    points = (1, 2, 4, 8, 64)
    covered = [
        rows
        for point in points
        for rows in range(interval(point, points).get("min_rows", 1), point + 1)
    ]
    assert covered == list(range(1, 65))


def test_the_search_finds_the_best_of_its_neighbours_and_passes_over_failures() -> None:
    best = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "kind": "x", "SLICES": 4}

    def measure(config: dict[str, Any]) -> float:
        if config["num_stages"] > 4 or config["BLOCK_N"] < 32:
            return math.inf
        distance = abs(math.log2(config["BLOCK_N"] / 128)) + abs(config["num_warps"] - 8)
        return 1 + distance + abs(config["num_stages"] - 3)

    start = {"BLOCK_N": 32, "num_warps": 2, "num_stages": 1, "kind": "x", "SLICES": 4}
    assert search(start, measure) == (best, 1.0)
    kept, _ = search(start, measure, fixed=("num_warps",))
    assert kept["num_warps"] == 2
    assert search(start, measure, is_over=lambda: True)[0] == start


def launching_case(log: list[int]) -> Case:
    """Faster the larger its block, fastest but wrong with 8; above 64 it does not run."""

    def prepare() -> Work:
        def ours() -> torch.Tensor:
            size = launch_config("product", arch=90, rows=2)["BLOCK_N"]
            log.append(size)
            if size > 64:
                raise RuntimeError("out of shared memory")
            sum(range(0 if size == 8 else 2_000_000 // size))  # takes its time
            return torch.full((4,), 2.0 if size == 8 else 1.0)

        return Work([{OURS: ours, TORCH: lambda: torch.ones(4)}], num_bytes=16)

    return Case("product", "model", "shape", "2", prepare)


def test_a_winner_is_right_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path
) -> None:
    table.write_text("[[product]]\nuse = { BLOCK_N = 4 }\n")
    forget()
    part = parse_part(None, ["--device", "cpu", "--tiny"])
    part.ceilings = {"memory_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11, "launch_s": 1e-6}
    log: list[int] = []
    target = Target("product", [launching_case(log)], points=(1, 2))
    Tuning(part, target, table).run()
    forget()
    row = configs.table()["product"][0]
    assert row["when"] == {"arch": 90, "min_rows": 2, "max_rows": 2}
    assert row["use"] == {"BLOCK_N": 64}
    assert "cpu" in row["measured"] and "% of ceiling" in row["measured"]
    assert {4, 8, 16, 64, 128} <= set(log)
    assert launch_config("product", arch=90, rows=2) == {"BLOCK_N": 64}


def test_only_the_candidates_launch_changes(table: Path) -> None:
    with launching_with({"other": {"BLOCK": 5}}) as launches:
        assert launch_config("other") == {"BLOCK": 5}
        launch_config("product", arch=90, rows=1)
    [(facts, config)] = launches.of("product").items()
    assert config == {"BLOCK": 1}
    with launching_with({}, ("product", facts, {"BLOCK": 7})):
        assert launch_config("product", arch=90, rows=1) == {"BLOCK": 7}
        assert launch_config("product", arch=90, rows=2) == {"BLOCK": 1}
    assert launch_config("product", arch=90, rows=1) == {"BLOCK": 1}
    assert launch_config("other") == {"BLOCK": 4}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_something_to_tune(op: str) -> None:
    assert op in configs.table()
    maker = Maker(torch.device("cpu"), torch.float32, TINY, tiny=True)
    assert next(targets(op, maker)).op == op
