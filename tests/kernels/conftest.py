"""A fixture for tests that hold both bodies of a CPU to the same promises."""

from __future__ import annotations

import pytest

from kernels import dispatch


@pytest.fixture(params=["loops", "torch"] if dispatch.compiles_loops() else ["plain"])
def cpu_body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops on a CPU run compiled loops, then torch as on a machine that has no numba."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "compiles_loops", lambda: False)
        for module in ("packed_linear", "int8_linear", "int4_linear"):
            monkeypatch.setattr(f"kernels.{module}.compiles_loops", lambda: False)
        monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # of processes that a test starts
