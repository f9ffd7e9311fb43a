"""A short run of the raw-socket fuzz, and proof that it sees what it must not miss."""

from __future__ import annotations

import asyncio

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from tests.fuzz import raw_http
from tests.fuzz.raw_http import fuzz_scripted, run, serve


def test_500_requests() -> None:
    outcome = fuzz_scripted(range(500), seed=5)
    assert outcome.wrong == {}
    # The grammar is of use only if it reaches the routes and each kind of refusal.
    assert {"200", "400", "404", "405", "408", "413", "414", "421", "431"} <= set(outcome.counts)
    assert outcome.counts["200"] > 50


class Hanging(Response):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3600)


BROKEN = {
    "a fault": (JSONResponse({"error": {}}, 500), "status 500"),
    "no envelope": (PlainTextResponse("no", 400), "not the error envelope"),
    "no end": (Hanging(), "still open"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_server_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, expected = BROKEN[name]
    monkeypatch.setattr(raw_http, "SECONDS_TO_CLOSE", 1)
    with serve(answer) as (_, port):
        outcome = asyncio.run(run("127.0.0.1", port, range(50), 5))
    assert any(what.startswith(expected) for what in outcome.wrong.values())


def test_a_dead_server_is_seen() -> None:
    with serve(PlainTextResponse("fine")) as (_, port):
        pass
    outcome = asyncio.run(run("127.0.0.1", port, range(3), 5))
    assert len(outcome.wrong) == 3
    assert all(what.startswith("the server does not accept") for what in outcome.wrong.values())
