"""The table of launch configurations: which row wins, and that every launch finds one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels import configs
from kernels.configs import launch_config, table


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    content = {
        "product": [
            {"when": {"arch": [90, 100], "max_rows": 4}, "use": {"BLOCK": 1}},
            {"when": {"dtype": "float32", "min_rows": 8}, "use": {"BLOCK": 2}},
            {"use": {"BLOCK": 3}},
        ],
        "narrow": [{"when": {"arch": 80}, "use": {"BLOCK": 4}}],
    }
    monkeypatch.setattr(configs, "table", lambda: content)
    configs._lookup.cache_clear()
    yield
    configs._lookup.cache_clear()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("facts", "block"),
    [
        ({"arch": 90, "rows": 4, "dtype": "bfloat16"}, 1),
        ({"arch": 80, "rows": 4, "dtype": "bfloat16"}, 3),
        ({"arch": 90, "rows": 5, "dtype": "bfloat16"}, 3),
        ({"arch": 90, "rows": 8, "dtype": "float32"}, 2),
        ({"arch": 100, "rows": 1, "dtype": "float32"}, 1),
    ],
)
def test_the_first_row_that_holds_wins(facts: dict[str, configs.Fact], block: int) -> None:
    assert launch_config("product", **facts) == {"BLOCK": block}


@pytest.mark.usefixtures("rows")
def test_what_no_row_covers_is_an_error() -> None:
    with pytest.raises(KeyError, match="no row of narrow"):
        launch_config("narrow", arch=90)
    with pytest.raises(KeyError, match="rows"):
        launch_config("product", arch=90)
    with pytest.raises(KeyError, match="other"):
        launch_config("other")


def test_a_caller_cannot_change_the_table() -> None:
    config = launch_config("silu_and_mul")
    config["BLOCK"] = 0
    assert launch_config("silu_and_mul")["BLOCK"] > 0


@pytest.mark.parametrize("op", table())
def test_every_op_ends_with_a_row_that_always_holds(op: str) -> None:
    rows = table()[op]
    assert all(set(row) <= {"when", "use", "measured"} for row in rows)
    assert "when" not in rows[-1]
    assert all("when" in row for row in rows[:-1])
