"""The tables and plots that `benchmarks.cpu` leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.machine import shown
from benchmarks.plot import line_chart

Record = dict[str, Any]


def markdown(results: Record) -> str:
    """Every part's table, each under the command that made it."""
    machine, versions = results["machine"], results["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"# CPU, {results['date'][:10]}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}), "
        f"{named}, commit {results['commit']}. Load at the start: {machine['load_1_min']}.",
    ]
    for name, part in results["parts"].items():
        lines += ["", f"## {name}: {part['status']} in {part['seconds']:.0f} s", ""]
        if "command" in part:
            lines += [f"`{part['command']}`", ""]
        found = part.get("record")
        if found is None:
            lines.append(part.get("reason") or "no results; the log has what it printed")
        elif name.split()[0] in TABLES:
            lines += TABLES[name.split()[0]](found)
        else:
            lines.append(f"{found['tensor_bytes'] / 1e9:.2f} GB of tensors")
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] * len(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _throughput(found: Record) -> list[str]:
    rows = [
        [
            f"{row['batch']}",
            f"{row['prefill_tok_s']:,.0f}",
            f"{row['decode_tok_s']:,.0f}",
            shown(row["ceiling_tok_s"]),
            shown(row["percent"], ".1f"),
        ]
        for row in found["results"]
    ]
    header = ["batch", "prefill tokens/s", "decode tokens/s", "ceiling", "%"]
    return _about(found) + _table(header, rows)


def _serving(found: Record) -> list[str]:
    names = {"engine": "engine", "process": "engine in its process", "http": "HTTP streams"}
    rows = [
        [label, f"{found[f'{name}_tok_s']:,.0f}", f"{share:.1f}"]
        for (name, label), share in zip(
            names.items(), (100.0, found["process_percent"], found["percent"]), strict=True
        )
    ]
    ttft, tpot = (found[key] or {} for key in ("ttft", "tpot"))
    about = (
        f"{found['model']}, {found['concurrency']} streams; of {len(found['rounds'])} rounds; "
        f"{found['num_failed']} requests failed; median TTFT {shown(ttft.get('median_ms'), '.1f')} "
        f"ms, per token {shown(tpot.get('median_ms'), '.2f')} ms; processor time per token: "
        f"server {found['server_us_per_token']:.0f} us, engine {found['engine_us_per_token']:.0f}, "
        f"client {found['client_us_per_token']:.0f}"
    )
    return [about, "", *_table(["way", "tokens/s", "% of the engine"], rows)]


def _compare(found: Record) -> list[str]:
    rows = [
        [
            f"{row['dtype']} × {row['batch']}",
            row["side"],
            f"{row['prefill_tok_s']:,.0f}",
            f"{row['decode_tok_s']:,.1f}",
            f"{row['percent']:.0f}",
            shown(row["prefill_ratio"], ".2f"),
            shown(row["decode_ratio"], ".2f"),
        ]
        for row in found["results"]
    ]
    header = ["dtype × batch", "side", "prefill tokens/s", "decode tokens/s", "% of ceiling"]
    header += ["ours / its: prefill", "decode"]
    rounds = min((row["rounds"] for row in found["results"]), default=0)
    about = (
        f"Prompt {found['num_prompt']}, {found['num_new']} new tokens, {found['threads']} threads, "
        f"{rounds} rounds or more in turn"
    )
    peaks = [f"{name} {peak / (1 << 30):.2f} GiB" for name, peak in found["peak_bytes"].items()]
    failed = [f"{name} failed: {reason}" for name, reason in found["failures"].items()]
    memory = [f"Peak memory: {', '.join(peaks)}."] if peaks else []
    return [about, "", *_table(header, rows), "", *memory, *failed]


def _latency(found: Record) -> list[str]:
    prompts = [
        [f"{row['prompt']:,}", f"{row['ttft_ms']:,.0f}", *_rate(row)] for row in found["prompts"]
    ]
    steps = [
        [f"{row['batch']} × {row['context']:,}", f"{row['step_ms']:.1f}", *_rate(row)]
        for row in found["by_batch"] + found["by_context"]
        if "step_ms" in row
    ]
    lines = _about(found)
    lines += _table(["prompt", "TTFT ms", "tokens/s", "% of the matmul rate"], prompts)
    lines += ["", *_table(["batch × context", "step ms", "tokens/s", "% of ceiling"], steps), ""]
    for key, unit in (("batch_fit", "sequence"), ("context_fit", "token of context")):
        if (line := found[key]) is not None:
            lines.append(
                f"- {line['intercept']:.1f} ms + {1e3 * line['slope']:.2f} us per {unit}, "
                f"R² {line['r_squared']:.3f}; the bytes alone {1e3 * line['floor_slope']:.2f} us"
            )
    return lines


def _rate(row: Record) -> list[str]:
    return [f"{row['tok_s']:,.1f}", f"{row['percent']:.0f}"]


def _about(found: Record) -> list[str]:
    bandwidth = found["read_bandwidth_bytes_s"]
    speed = "" if bandwidth is None else f"; memory is read at {bandwidth / 1e9:.1f} GB/s"
    return [f"{found['dtype']}, {found['threads']} threads{speed}", ""]


TABLES = {
    "throughput": _throughput,
    "serving": _serving,
    "compare": _compare,
    "latency": _latency,
}


def plots(results: Record, out: Path) -> None:
    """Step time by batch and by context, each with its floor, as SVG files."""
    found = results["parts"].get("latency", {}).get("record")
    if found is None:
        return
    for key, x_label in (("batch", "sequences"), ("context", "tokens of context")):
        rows = [row for row in found[f"by_{key}"] if "step_ms" in row]
        if not rows:
            continue
        series = {
            "measured": [(row[key], row["step_ms"]) for row in rows],
            "floor": [(row[key], row["floor_ms"]) for row in rows],
        }
        if (line := found[f"{key}_fit"]) is not None:
            ends = (0.0, float(rows[-1][key]))
            series["fit"] = [(x, line["intercept"] + line["slope"] * x) for x in ends]
        title = f"Decode step by {key}, {found['dtype']}"
        line_chart(out / f"step-by-{key}.svg", title, x_label, "ms", series)
