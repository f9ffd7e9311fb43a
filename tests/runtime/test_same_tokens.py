"""The same request gives the same tokens, and trials that look for it would see if it did not."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.linear import linear
from runtime import prefix_cache
from runtime.blocks import Prefix
from runtime.models.layers import Linear
from tests.runtime.engines import TINY
from tests.runtime.same_tokens import (
    KINDS,
    Answer,
    Outcome,
    Trials,
    main,
    report,
    table,
    write_wide_checkpoint,
)

FEW_NEW = 12
DTYPES = ["float32", "bfloat16"]


def assert_same(trials: Trials, numbers: range) -> None:
    lines: list[str] = []
    met, differed = report(trials, numbers, lines.append)
    assert not differed, "\n".join([*lines, table(met, differed)])
    assert all(met[kind] for kind in KINDS), table(met, differed)


def differs(trials: Trials, numbers: range) -> bool:
    """Whether any trial does; those after it are not run."""
    return any(not trials.run(number).is_same for number in numbers)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_checkpoint(tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_has_the_same_tokens_in_any_company(dtype: str) -> None:
    assert_same(Trials(dtype, max_new=FEW_NEW), range(25))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_500_requests_have_the_same_tokens_in_any_company(dtype: str) -> None:
    assert_same(Trials(dtype), range(1000, 1500))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_wide_products_keep_a_requests_tokens_too(dtype: str, wide: Path) -> None:
    assert_same(Trials(dtype, folder=wide), range(1000, 1250))


def test_wide_products_in_bf16_are_made_in_blocks(wide: Path) -> None:
    assert not differs(Trials("bfloat16", folder=wide, max_new=FEW_NEW), range(1000, 1008))


def test_wide_products_in_bf16_without_blocks_are_seen(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 1024, generator=draw).bfloat16() for n in (64, 1024))
    if torch.equal(linear(x, weight)[:32], linear(x[:32], weight)):
        pytest.skip("this chip sums in one order for any number of rows")
    make = Linear.__init__

    def careless(layer: Linear, *args: Any, **options: Any) -> None:
        make(layer, *args, **options)
        layer.batch_invariant = False

    monkeypatch.setattr(Linear, "__init__", careless)
    assert differs(Trials("bfloat16", folder=wide, max_new=FEW_NEW), range(1000, 1020))


def test_products_that_follow_the_number_of_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    product = functional.linear

    def wavering(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = product(x, weight, bias)
        return out * (1 + 2**-18) if x.shape[0] > 8 else out

    monkeypatch.setattr(functional, "linear", wavering)
    assert differs(Trials("float32", max_new=FEW_NEW), range(12))


def test_pages_of_another_prompt_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(parent: bytes, token_ids: Seq[int]) -> Prefix:
        return Prefix(parent + b"page", b"")  # whatever the tokens are

    monkeypatch.setattr(prefix_cache, "extend_key", careless)
    assert differs(Trials("float32", max_new=FEW_NEW), range(12))


def test_the_command_reports_each_kind_and_how_to_repeat_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["same_tokens", "--trials", "2", "--max-new", "6"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{TINY.name} in float32, trials 0 to 1"
    assert lines[-1].split() == ["all", "2", "yes"]
    same = Trials.run

    def run(trials: Trials, number: int) -> Outcome:
        outcome = same(trials, number)
        return replace(outcome, selected=Answer()) if number == 1 else outcome

    monkeypatch.setattr(Trials, "run", run)
    assert main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("--first 1 --trials 1" in line for line in lines)
    assert lines[-1].split() == ["all", "2", "no:", "1", "differ"]
