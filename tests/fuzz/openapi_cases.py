"""schemathesis against a server of ours and its own OpenAPI document.

``python -m tests.fuzz.openapi_cases --cases 5000`` runs it against the scripted engine, with
``--real`` against `fathom serve` and the embedded model. It prints one line per operation and fails
if an answer breaks the document, is of status 5xx or is an error outside the envelope. An operation
without anything to vary gets the few cases that exist.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from api.keys import KeyStore
from api.limits import Limits
from runtime import Tokenizer
from tests.api.scripted import TINY, engine_of, scripted_state, serve
from tests.clients.conftest import Served, first_start
from tests.clients.environments import ALL

SCHEMATHESIS = ALL["schemathesis"]
PHASES = "coverage,fuzzing"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "content_type_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)
ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass(slots=True)
class Tally:
    """What the requests to one operation were answered."""

    statuses: Counter[int] = field(default_factory=Counter)
    num_unanswered: int = 0
    num_outside_envelope: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # title of a failed check

    @property
    def num_cases(self) -> int:
        return self.statuses.total() + self.num_unanswered

    @property
    def num_server_errors(self) -> int:
        return sum(number for status, number in self.statuses.items() if status >= 500)

    @property
    def good(self) -> bool:
        return not (
            self.num_unanswered
            or self.num_outside_envelope
            or self.num_server_errors
            or self.failures
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300, help="fuzzed requests per operation")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(63))
    parser.add_argument("--real", action="store_true", help="fathom serve and its embedded model")
    options = parser.parse_args()
    SCHEMATHESIS.make()
    python, (package,) = SCHEMATHESIS.interpreter, SCHEMATHESIS.pip
    print(f"{package}, {options.cases} cases per operation, --seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fathom-openapi-") as name:
        folder = Path(name)
        server = (
            first_start(folder, "--max-model-len", "512", "--limit", "failed-keys=100000")
            if options.real
            else scripted_server(folder)
        )
        with server as served:
            status, output = run(python, served, folder, options.cases, options.seed)
        tallies = read_reports(folder)
    print(table(tallies))
    # A run without any cases proves nothing.
    good = status == 0 and bool(tallies) and all(tally.good for tally in tallies.values())
    if not good:
        print(output)
    print("passed" if good else f"failed (schemathesis ended with {status})")
    return 0 if good else 1


@contextlib.contextmanager
def scripted_server(folder: Path) -> Iterator[Served]:
    """The application with a scripted engine that answers shortly, and a key."""
    keys = KeyStore.open(folder / "home" / "keys.sqlite")
    # every operation is asked with wrong keys, more often than an address may in a minute
    limits = Limits(failed_keys=100_000)
    state = replace(scripted_state(Tokenizer.load(TINY)), keys=keys, limits=limits)
    engine_of(state).say("Hello, 你好 🙂")
    with serve(state) as base:
        yield Served(base, keys.create("fuzz"))


def run(python: Path, served: Served, folder: Path, num_cases: int, seed: int) -> tuple[int, str]:
    """Let schemathesis write its reports to ``folder``; its exit status and what it printed."""
    origin = served.base.removesuffix("/v1")
    bearer = f"Bearer {served.key}"
    answer = httpx.get(f"{origin}/openapi.json", headers={"Authorization": bearer})
    answer.raise_for_status()
    (folder / "openapi.json").write_bytes(answer.content)
    command = [str(python), "-m", "schemathesis.cli", "--no-color", "run", "openapi.json"]
    command += ["--url", origin, "--header", f"Authorization: {bearer}"]
    command += ["--phases", PHASES, "--mode", "all"]
    command += ["--max-examples", str(num_cases), "--seed", str(seed)]
    command += ["--checks", ",".join(CHECKS), "--continue-on-failure", "--request-timeout", "120"]
    command += ["--generation-database", "none", "--report", "ndjson,json"]
    command += ["--report-ndjson-path", "events.ndjson", "--report-json-path", "summary.json"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def read_reports(folder: Path) -> dict[str, Tally]:
    """Every answer of the run, judged again, apart from schemathesis' own checks."""
    tallies: dict[str, Tally] = {}
    with (folder / "events.ndjson").open(encoding="utf-8") as lines:
        for line in lines:
            scenario = json.loads(line).get("ScenarioFinished")
            if scenario is None:
                continue
            recorder = scenario["recorder"]
            tally = tallies.setdefault(recorder["label"], Tally())
            for interaction in recorder["interactions"].values():
                count(tally, interaction["response"])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for failure in [*summary["failures"], *summary["errors"]]:
        for operation in failure.get("operations", ["all"]):
            tally = tallies.setdefault(operation, Tally())
            tally.failures[failure["title"]] += failure.get("count", 1)
    return tallies


def count(tally: Tally, response: dict[str, Any] | None) -> None:
    if response is None:
        tally.num_unanswered += 1
        return
    status = response["status_code"]
    tally.statuses[status] += 1
    content = base64.b64decode((response["content"] or {"$base64": ""})["$base64"])
    if status >= 400 and not in_envelope(content):
        tally.num_outside_envelope += 1


def in_envelope(content: bytes) -> bool:
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return (
        isinstance(error, dict)
        and error.keys() == ERROR_FIELDS
        and all(
            isinstance(error[name], str) and error[name] for name in ("message", "type", "code")
        )
        and (error["param"] is None or isinstance(error["param"], str))
    )


def table(tallies: dict[str, Tally]) -> str:
    rows = [("operation", "cases", "statuses", "5xx", "not in the envelope", "failures")]
    for operation, tally in sorted(tallies.items()):
        statuses = " ".join(f"{status}:{n}" for status, n in sorted(tally.statuses.items()))
        if tally.num_unanswered:
            statuses += f" unanswered:{tally.num_unanswered}"
        failures = "; ".join(f"{title}: {n}" for title, n in sorted(tally.failures.items()))
        numbers = str(tally.num_server_errors), str(tally.num_outside_envelope)
        rows.append((operation, str(tally.num_cases), statuses, *numbers, failures or "0"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
