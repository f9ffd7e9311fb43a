"""Settings every test runs under: no network, one torch thread per worker; tables of results."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

TABLES = {
    "family_row": ["family", "architecture", "max |Δlogit|", "greedy", "whole=chunked=cached"],
}
"""A test's recorded property -> the header of the table that its rows make."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as rows of a table, also when they ran in other processes."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    for key, header in TABLES.items():
        rows = [
            value for report in reports for name, value in report.user_properties if name == key
        ]
        if not rows:
            continue
        table = [header, *sorted(rows)]
        widths = [max(len(str(row[i])) for row in table) for i in range(len(header))]
        terminalreporter.write_line("")
        for row in table:
            cells = (str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
            terminalreporter.write_line("  ".join(cells).rstrip())
