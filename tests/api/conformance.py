"""`python -m tests.api.conformance`: every request field with good and bad values, as a table.

Sends each case to the real application with a scripted engine and compares status, ``param`` and
``code`` with what the contract says, which `tests.api.conformance_table` has written down by hand.
Exits with 1 if a case differs, or a field of a request is in no row of the table.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel

from api.app import create_app
from api.completion_fields import CompletionRequest
from api.schemas import ChatRequest
from runtime import Tokenizer
from tests.api.conformance_table import CHAT, COMPLETIONS, Case, Rows
from tests.api.scripted import TINY, engine_of, scripted_state

ROUTES: dict[str, tuple[str, Rows, type[BaseModel], dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        CHAT,
        ChatRequest,
        {"messages": [{"role": "user", "content": "hello"}]},
    ),
    "completions": ("/v1/completions", COMPLETIONS, CompletionRequest, {"prompt": "hello"}),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server did with a case."""

    route: str
    field: str
    case: Case
    status: int
    param: str | None
    code: str | None
    flaw: str  # of the answer's form; empty if there is none

    @property
    def as_expected(self) -> bool:
        expected = (self.case.status, self.case.param_of(self.field), self.case.code)
        return not self.flaw and (self.status, self.param, self.code) == expected


def missing_fields() -> list[str]:
    """Fields of the requests that no row of the table is about, and rows without a field."""
    found = []
    for route, (_, rows, model, _) in ROUTES.items():
        fields = set(model.model_fields)
        found += [f"{route}: no row for the field {name}" for name in sorted(fields - set(rows))]
        found += [f"{route}: no field for the row {name}" for name in sorted(set(rows) - fields)]
        for name, cases in rows.items():
            if "null" not in {case.kind for case in cases}:
                found.append(f"{route}: {name} has no case of null")
    return found


async def conform() -> list[Seen]:
    """Send every case, one after another, in process."""
    state = scripted_state(Tokenizer.load(TINY))
    engine_of(state).say("fine")
    transport = httpx.ASGITransport(create_app(state))
    headers = {"content-type": "application/json"}
    base = "http://127.0.0.1:8000"
    seen = []
    async with httpx.AsyncClient(transport=transport, base_url=base, headers=headers) as client:
        for route, field, case in _cases():
            path, _, _, body = ROUTES[route]
            # Python writes NaN, infinity and numbers of any length, which clients must not send.
            content = json.dumps({**body, **case.beside, field: case.value})
            response = await client.post(path, content=content)
            seen.append(_seen(route, field, case, response))
    return seen


def _cases() -> Iterator[tuple[str, str, Case]]:
    for route, (_, rows, _, _) in ROUTES.items():
        for field, cases in rows.items():
            for case in cases:
                yield route, field, case


def _seen(route: str, field: str, case: Case, response: httpx.Response) -> Seen:
    status = response.status_code
    if status == 200:
        return Seen(route, field, case, status, None, None, "")
    flaw, error = "", {}
    try:
        body = response.json()
        error = body["error"]
        if set(body) != {"error"} or set(error) != {"message", "type", "param", "code"}:
            flaw = "not the one envelope"
        elif not isinstance(error["code"], str) or not error["message"]:
            flaw = "no code, or no message"
        elif error["type"] != "invalid_request_error" and status < 500:
            flaw = f"type is {error['type']}"
    except (ValueError, KeyError, TypeError):
        flaw = "not JSON with an error"
    return Seen(route, field, case, status, error.get("param"), error.get("code"), flaw)


def table(seen: Iterable[Seen]) -> str:
    """One line per case, and what was expected where that differs."""
    header = ("route", "field", "case", "value", "status", "param", "code", "")
    rows = [header]
    for each in seen:
        verdict = "" if each.as_expected else f"DIFFERS: expected {each.case.expected(each.field)}"
        if each.flaw:
            verdict += f" ({each.flaw})"
        value = json.dumps(each.case.value, ensure_ascii=False)
        value = value if len(value) <= 32 else f"{value[:29]}..."
        row = (each.route, each.field, each.case.kind, value, str(each.status))
        rows.append((*row, each.param or "-", each.code or "-", verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def main() -> int:
    missing = missing_fields()
    seen = asyncio.run(conform())
    different = [each for each in seen if not each.as_expected]
    print(table(seen))
    print()
    for line in missing:
        print(line)
    print(f"{len(seen)} cases, {len(different)} differ from the contract")
    return 1 if different or missing else 0


if __name__ == "__main__":
    sys.exit(main())
