"""The table that `benchmarks.gpu` prints at its end: all results in a few thousand characters."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]
MAX_LINE = 240


def summary(results: dict[str, Any]) -> str:
    """Every part's outcome and its figures; whole steps and the machine last, where one looks."""
    lines: list[str] = []
    for name, part in reversed(results.get("parts", {}).items()):
        reason = f": {part['reason']}" if part["reason"] else ""
        lines.append(f"== {name}: {part['status']} in {part['seconds']:.0f} s{reason}")
        lines += [*SECTIONS.get(name, _problems)(part["rows"]), ""]
    gpu, versions = results.get("gpu") or {}, results.get("versions") or {}
    named = [f"{name} {version}" for name, version in versions.items()]
    lines.append(
        f"{gpu.get('name') or results.get('device')}, driver {gpu.get('driver')}, "
        f"{', '.join(named)}; {results.get('date')}, commit {results.get('commit')}"
    )
    if ceilings := results.get("ceilings"):
        lines.append(
            f"ceilings: memory {ceilings['memory_bytes_per_s'] / 1e9:,.0f} GB/s, "
            f"matmul {ceilings['matmul_flops_per_s'] / 1e12:,.1f} TFLOP/s, "
            f"launch {ceilings['launch_s'] * 1e6:.2f} us"
        )
    if results.get("tiny"):
        lines.append("TINY SHAPES: a test of the benchmark, not a measurement")
    return "\n".join(line[:MAX_LINE] for line in lines)


def _problems(rows: Rows) -> list[str]:
    """What failed, each on a line; what was skipped, grouped by why."""
    lines, skipped = [], {}
    for row in rows:
        label = " ".join(
            str(value) for key, value in row.items() if key not in ("error", "skipped")
        )
        if "error" in row:
            lines.append(f"FAILED {label}: {row['error']}")
        elif "skipped" in row:
            skipped.setdefault(row["skipped"], []).append(label)
    for why, labels in skipped.items():
        lines.append(f"skipped, {why}: {'; '.join(labels)}")
    return lines


def _decode(rows: Rows) -> list[str]:
    lines = [f"{'':22}{'batch x context':>16}{'step ms':>10}{'tok/s':>10}{'floor ms':>10}{'%':>6}"]
    for row in rows:
        if "step_ms" in row:
            at = f"{row['batch']} x {row['context']}"
            lines.append(
                f"{row['model']:22}{at:>16}{row['step_ms']:>10.3f}{row['tok_s']:>10,.0f}"
                f"{row['floor_ms']:>10.3f}{row['percent']:>6.1f}"
            )
        elif "tflop_s" in row:
            at = f"prompt {row['prompt']}"
            lines.append(
                f"{row['model']:22}{at:>16}{row['ms']:>10.2f}{row['tok_s']:>10,.0f}"
                f"{row['tflop_s']:>7,.0f} TF{row['percent']:>6.1f}"
            )
    return lines + _problems(rows)


def _tests(rows: Rows) -> list[str]:
    counts = [row for row in rows if "num_passed" in row]
    last = counts[-1] if counts else {}
    words = [f"{value} {key.removeprefix('num_')}" for key, value in last.items()]
    lines = [", ".join(words)] if last else []
    lines += [f"FAILED {row['failed']}: {row['why']}" for row in rows if "why" in row]
    return lines + _problems(rows)


def _kernels(rows: Rows) -> list[str]:
    """A line per op, model and shape; a cell per size: microseconds, percent, ratio to torch."""
    lines = ["size: us percent-of-ceiling [torch's time / ours] (invariant's time / ours)"]
    table: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "us" not in row:
            continue
        cell = f"{row['at']}: {row['us']:.3g} {row['percent']:.0f}%"
        if row["torch"] is not None:
            cell += f" [{row['torch']:.2f}]"
        if row["invariant"] is not None:
            cell += f" ({row['invariant']:.2f})"
        model = row["model"].removeprefix("r1_distill_")
        table.setdefault((row["op"], model, row["shape"]), []).append(cell)
    for (op, model, shape), cells in table.items():
        lines.append(f"{op} {model} {shape} | " + ", ".join(cells))
    return lines + _problems(rows)


def _peers(rows: Rows) -> list[str]:
    lines = [
        f"{row['model']:22}{row['peer']:26}batch {row['batch']:<4}ours {row['ours_tok_s']:,.0f} "
        f"theirs {row['theirs_tok_s']:,.0f} tok/s, ratio {row['ratio']:.2f}"
        for row in rows
        if "ratio" in row
    ]
    return lines + _problems(rows)


SECTIONS = {"decode": _decode, "tests": _tests, "kernels": _kernels, "peers": _peers}
