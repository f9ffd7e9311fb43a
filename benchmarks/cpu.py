"""Everything worth knowing about the machine's CPU in one command: `make bench`.

    python -m benchmarks.cpu [--out DIR] [--minutes 10] [--only part ...] [--checkpoint DIR]

    throughput   the embedded model, offline, by batch size
    serving      the embedded model through HTTP against the engine alone
    checkpoint   random weights of the shape that is compared (Qwen2.5-0.5B)
    compare      that checkpoint through our engine and transformers, bf16 (also our int8 and int4)
                 and fp32
    latency      its time to the first token and per token, by batch and by context

Each part is a process with a time limit; slow machines take fewer rounds, and a part that fails
costs no other its results. DIR (benchmarks/results/cpu-DATE) gets results.json, table.md, plots as
SVG and a log per part; table.md says which command made which table. The exit code is 1 if a part
failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cpu_report import markdown, plots
from benchmarks.gpu import end_group
from benchmarks.machine import ROOT, date, record, usable_cores

SHAPE = "qwen2.5_0.5b"
MADE = Path("build") / SHAPE  # below the root, kept for who wants to run a part by hand
NEEDED_GIB = 7.0  # four engines, transformers' with weights in bf16 or fp32 as they are
END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark: its arguments after `python -m`, and its share of the time."""

    name: str
    arguments: Sequence[str]
    weight: float
    takes_seconds: bool = True  # it stops by itself in time when told how long it may take
    needs: str | None = None  # a part that must have passed


def plan(checkpoint: Path, threads: int, *, tiny: bool) -> list[Part]:
    """The parts; ``tiny`` tests them."""
    few = ["--threads", str(threads)]
    one_thread = ["--threads", "1"]  # as the engine chooses for a model as small
    short = ["--rounds", "1"] if tiny else []
    sizes = ["--prompt", "8", "--new", "4", "--batch", "1", "2"] if tiny else []
    streams = {8: (50, ["--requests", "128"]), 1: (30, ["--requests", "16"])}
    streams[64] = (40, ["--requests", "256"])
    if tiny:
        streams = {2: (50, ["--requests", "4", "--prompt", "8", "--new", "4"])}
    shape = ["--tiny"] if tiny else []
    points = ["--contexts", "1024", "2048", "4096", "8192", "16384", "32768"]
    if tiny:
        points = ["--contexts", "64", "128", "--batch", "1", "2", "--batch-context", "64"]
        points += ["--prompts", "16", "--steps", "2"]
    else:
        points += ["--rounds", "3", "--steps", "4"]
    folder = str(checkpoint)
    one = ["--batch", "1"]
    quantized = ["--quantization", "int8", "int4"]

    def compared(*more: str) -> list[str]:
        return ["benchmarks.compare", folder, *few, *short, *sizes, *more]

    def served(count: int, weight: float, load: list[str]) -> Part:
        arguments = ["benchmarks.serving", "--against-engine", *one_thread, *short]
        arguments += ["--concurrency", str(count), *load]
        return Part(f"serving {count}", arguments, weight)

    return [
        Part("throughput", ["benchmarks.throughput", *one_thread, *short, *sizes], 60),
        *(served(count, *load) for count, load in streams.items()),
        Part("checkpoint", ["benchmarks.make_checkpoint", SHAPE, folder, *shape], 40, False),
        Part("compare bf16", compared(*quantized), 210, needs="checkpoint"),
        Part("compare fp32", compared("--dtype", "float32", *one), 100, needs="checkpoint"),
        Part(
            "latency",
            ["benchmarks.latency", folder, "--dtype", "bfloat16", *few, *points, *short],
            120,
            needs="checkpoint",
        ),
    ]


def run_part(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Run one part to its end, or end it; its last line of stdout as ``record``."""
    arguments = list(part.arguments)
    if part.takes_seconds:
        arguments += ["--seconds", f"{0.6 * seconds:.0f}"]  # what began then has time to end
    command = " ".join(["python -m", shlex.join(part.arguments)])
    print(f"\n== {part.name}, at most {seconds:.0f} s: {command}", flush=True)
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            process_group=0,  # so that all of it can be ended together
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        found = json.loads(lines[-1])
    except (ValueError, IndexError):
        found = None
    print("\n".join(lines[: -1 if found else None]), flush=True)
    status = "passed" if code == 0 and found else "timed out" if code is None else "failed"
    outcome = {"status": status, "seconds": round(time.monotonic() - start, 1), "command": command}
    return outcome | {"record": found}


def run_parts(parts: Sequence[Part], out: Path, minutes: float) -> dict[str, Any]:
    """Run the parts in turn; a part may use what those before it left. Saved after each."""
    end = time.monotonic() + 60 * minutes - END_SECONDS
    results: dict[str, Any] = record("cpu", minutes=minutes, parts={})
    outcomes: dict[str, Any] = results["parts"]
    for index, part in enumerate(parts):
        share = part.weight / sum(later.weight for later in parts[index:])
        seconds = min(1.5 * share, 1.0) * (end - time.monotonic())
        needed = outcomes.get(part.needs, {}).get("status") if part.needs else "passed"
        if seconds < 1 or needed != "passed":
            why = "no time left" if seconds < 1 else f"{part.needs} did not pass"
            outcomes[part.name] = {"status": "skipped", "seconds": 0.0, "reason": why}
            continue
        log = out / f"{part.name.replace(' ', '-')}.log"
        outcomes[part.name] = run_part(part, seconds, log)
        save(results, out)
    return results


def save(results: dict[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(results), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = ROOT / "benchmarks" / "results" / f"cpu-{date()[:10]}"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    names = [part.name.split()[0] for part in plan(Path(), 1, tiny=True)]
    parser.add_argument("--only", nargs="+", choices=sorted(set(names)))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--checkpoint", type=Path, help="to compare with; made if left out")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test the benchmark")
    options = parser.parse_args()
    if options.minutes <= 0 or options.threads < 1:
        parser.error("--minutes must be above 0 and --threads at least 1")
    return options


def free_gib() -> float:
    """Memory that programs can still have, as Linux and the container see it."""
    import torch  # two seconds that a wrong option need not pay

    from runtime.engine_config import available_memory

    return available_memory(torch.device("cpu")) / (1 << 30)


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    made = options.out / "checkpoint" if options.tiny else MADE
    parts = plan(options.checkpoint or made, options.threads, tiny=options.tiny)
    if options.checkpoint is not None:
        parts = [replace(part, needs=None) for part in parts if part.name != "checkpoint"]
    wanted = set(options.only or [part.name.split()[0] for part in parts])
    if wanted & {"compare", "latency"}:
        wanted.add("checkpoint")
    parts = [part for part in parts if part.name.split()[0] in wanted]
    if not options.tiny and (free := free_gib()) < NEEDED_GIB:
        print(f"{free:.1f} GiB are free; the comparison needs {NEEDED_GIB:g} and is left out")
        parts = [part for part in parts if part.name.split()[0] in ("throughput", "serving")]
    results = run_parts(parts, options.out, options.minutes)
    plots(results, options.out)
    save(results, options.out)
    print(f"\n{markdown(results)}\n{options.out}", flush=True)
    statuses = {name: part["status"] for name, part in results["parts"].items()}
    print(json.dumps(record("cpu", out=str(options.out), parts=statuses)))
    return 1 if set(statuses.values()) & {"failed", "timed out"} else 0


if __name__ == "__main__":
    sys.exit(main())
