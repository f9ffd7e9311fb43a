"""Searches launch configurations at released shapes on the GPU at hand; never part of serving.

    python -m benchmarks.tune [op ...] [--minutes 10] [--table PATH]

Ops: linear_gemv, linear_tile, linear_invariant, linear, paged_attention, combine_splits,
grouped_linear, fp8_linear. From the configuration in force one setting is changed at a time, as
long as that helps, judged by the geometric mean of the times of all cases of a target; targets
share the time evenly. Candidates that do not compile, spill registers or give another result are
passed over. A winner is put into the table at once, on top of its op, with the facts it was
measured for; where a fact is the number of rows, for the numbers up to it that have no row of
their own.
"""

from __future__ import annotations

import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention_cases as others
from benchmarks import product_cases as products
from benchmarks.ceilings import ceilings_of
from benchmarks.config_rows import insert_row, interval
from benchmarks.kernel_inputs import FULL, INVARIANT, OURS, TINY, TORCH, Case, Maker, Work
from benchmarks.launches import Config, Facts, launching_with, new_spills
from benchmarks.part import DEAD_CONTEXT, Part, Row, describe, make_part, part_parser
from benchmarks.timing import time_calls
from kernels import configs

GAIN = 0.98  # a new configuration must take less than this part of the old one's time
TOLERANCE = 1.5e-2  # of a bf16 result, by norm
DERIVED_FACTS = ("rows_per_expert",)  # they follow from the others
VALUES: dict[str, tuple[Any, ...]] = {
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "STAGES": (1, 2, 3, 4, 5, 6),
    "UNROLL": (1, 2, 4),
    "GROUP_M": (1, 4, 8, 16),
    "SLICES": (1, 2, 4, 8, 16),
    "body": ("gemv", "tile", "cublas"),
}
# of decodes; first what is not compiled in, so that many values are tried in little time
ATTENTION_VALUES: dict[str, tuple[Any, ...]] = {
    "SPLIT": (32, 64, 128, 256, 512),
    "MAX_SPLITS": (16, 32, 64),
    "BLOCK_N": (16, 32, 64, 128),
    "num_stages": (1, 2, 3, 4),
    "num_warps": (4, 8),
    "BLOCK_M": (16, 32, 64),
}
COMBINE_VALUES: dict[str, tuple[Any, ...]] = {
    "BLOCK_SPLITS": (8, 16, 32, 64),
    "BLOCK_V": (64, 128, 256, 512),
    "num_warps": (1, 2, 4, 8),
}


# -- the search ----------------------------------------------------------------------------------


def values_of(
    key: str, value: Any, values: Mapping[str, tuple[Any, ...]] = VALUES
) -> tuple[Any, ...]:
    """What else a setting may be: blocks go up and down by powers of two, some are not searched."""
    if key in values:
        return tuple(other for other in values[key] if other != value)
    if key.startswith("BLOCK_"):
        return tuple(other for other in (value // 2, value * 2, value // 4, value * 4) if other)
    return ()


def search(
    start: Config,
    measure: Callable[[Config], float],
    *,
    fixed: Sequence[str] = (),
    values: Mapping[str, tuple[Any, ...]] = VALUES,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Config, float]:
    """Change one setting at a time as long as that helps; the best configuration and its time.

    Args:
        start: what to begin with.
        measure: time of a configuration, infinite if it does not work.
        fixed: settings to leave alone.
        values: what settings may be; those named here are changed first, in this order.
        is_over: whether to stop with what was found so far.
    """
    best, best_time = start, measure(start)
    tried = {_frozen(start)}
    keys = [key for key in values if key in start] + [key for key in start if key not in values]
    improved = True
    while improved and not is_over():
        improved = False
        for key in [key for key in keys if key not in fixed]:
            for value in values_of(key, best[key], values):
                candidate = {**best, key: value}
                if _frozen(candidate) in tried or is_over():
                    continue
                tried.add(_frozen(candidate))
                taken = measure(candidate)
                if taken < best_time:
                    best, best_time, improved = candidate, taken, True
    return best, best_time


def _frozen(config: Config) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(config.items()))


# -- what is tuned -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """One launch to tune: the cases it is timed on, together, and what else is forced."""

    op: str
    cases: list[Case]
    call: str = OURS
    forced: Mapping[str, Config] = field(default_factory=dict)
    points: tuple[int, ...] = ()  # the measured numbers of rows
    fixed: tuple[str, ...] = ()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: VALUES)

    @property
    def label(self) -> Row:
        sizes = ",".join(case.at for case in self.cases)
        return {
            "op": self.op,
            "model": self.cases[0].model,
            "shape": self.cases[0].shape,
            "at": sizes,
        }


GEMV_ROWS = (1, 2, 4)
MODELS = ("r1_distill_qwen_7b", "r1_distill_llama_8b", "r1_distill_qwen_1.5b")
LATENT_MODELS = ("v2_lite", "v3")


def targets(op: str, maker: Maker) -> Iterator[Target]:
    """What to tune for an op. Raises `KeyError` for one that is not tuned here."""
    if op.startswith("linear"):
        yield from _linear_targets(op, maker)
    elif op == "paged_attention":
        for model in MODELS:
            num_heads, num_kv_heads, _ = maker.heads(model)
            values = attention_values(num_heads // num_kv_heads)
            yield Target(op, list(others.decode_attention(maker, model)), values=values)
        for model in LATENT_MODELS:
            values = attention_values(maker.latent_heads(model)[0])
            yield Target(op, list(others.latent_decode_attention(maker, model)), values=values)
    elif op == "combine_splits":  # a launch for each size of values
        for cases_of, model in (
            (others.decode_attention, MODELS[0]),
            (others.latent_decode_attention, LATENT_MODELS[0]),
        ):
            yield Target(op, list(cases_of(maker, model)), values=COMBINE_VALUES)
    elif op == "grouped_linear":
        for case in products.experts(maker, "v2_lite"):
            yield Target(op, [case], points=maker.grid.expert_rows)
    elif op == "fp8_linear":
        for case in products.fp8_linears(maker, "v3"):
            yield Target(op, [case], points=maker.grid.expert_rows)
    else:
        raise KeyError(op)


def _linear_targets(op: str, maker: Maker) -> Iterator[Target]:
    def all_linears() -> Iterator[Case]:
        for model in MODELS[:1]:
            yield from products.dense_linears(maker, model)
        yield from products.latent_linears(maker, "v2_lite")
        for model in MODELS[1:]:
            yield from products.dense_linears(maker, model)

    for _, group in groupby(all_linears(), key=lambda case: (case.model, case.shape)):
        by_rows = {int(case.at): case for case in group}
        points = tuple(by_rows)
        few = [case for rows, case in by_rows.items() if rows in GEMV_ROWS]
        if op == "linear_gemv":
            yield Target(op, few, forced={"linear": {"body": "gemv"}})
        elif op == "linear_invariant":
            chosen = [by_rows[rows] for rows in (points[0], points[len(points) // 2], points[-1])]
            yield Target(op, chosen, call=INVARIANT)
        elif op == "linear_tile":
            # A slice must be as long for any number of rows, so SLICES stay as the table has them.
            for rows in [rows for rows in points if rows not in GEMV_ROWS]:
                forced = {"linear": {"body": "tile"}}
                yield Target(op, [by_rows[rows]], forced=forced, points=points, fixed=("SLICES",))
        elif op == "linear":
            for rows in points:
                yield Target(op, [by_rows[rows]], points=points)
        else:
            raise KeyError(op)


def attention_values(group_size: int) -> dict[str, tuple[Any, ...]]:
    """What is tried for decodes: no tiles that queries of one KV head do not fill."""
    rows = max(1 << (group_size - 1).bit_length(), 16)
    blocks = tuple(size for size in ATTENTION_VALUES["BLOCK_M"] if size <= rows)
    return {**ATTENTION_VALUES, "BLOCK_M": blocks}


OPS = (
    *("linear_gemv", "linear_tile", "linear_invariant", "linear"),
    *("paged_attention", "combine_splits", "grouped_linear", "fp8_linear"),
)


# -- one target ----------------------------------------------------------------------------------


class Tuning:
    """Measures candidates for one target and writes the winner into the table.

    Of the time that is left it takes one share in ``num_left``, the number of targets from it on.
    """

    def __init__(self, part: Part, target: Target, table: Path, num_left: int = 1) -> None:
        self.part, self.target, self.table = part, target, table
        self.deadline = time.monotonic() + part.seconds_left / num_left
        self.seen: set[int] = set()

    def run(self) -> None:
        target = self.target
        works = [case.prepare() for case in target.cases]
        with launching_with(target.forced) as launches:
            expected = [self._result(work) for work in works]
        new_spills(self.seen)
        for facts, start in launches.of(target.op).items():
            self._tune(works, expected, facts, start)

    def _result(self, work: Work) -> Tensor:
        """What the first set gives: torch's own answer, or that of the table as it is."""
        calls = work.sets[0]
        ours = _tensor(calls[self.target.call]())  # also where facts are asked for
        return _tensor(calls[TORCH]()).float() if TORCH in calls else ours.float()

    def _tune(self, works: list[Work], expected: list[Tensor], facts: Facts, start: Config) -> None:
        times: dict[tuple[Any, ...], list[float]] = {}
        first: list[float] = []

        def measure(config: Config) -> float:
            taken = self._times(works, expected, facts, config)
            if taken is None:
                return math.inf
            times[_frozen(config)] = taken
            if not first:
                first.extend(taken)
            shares = [t / before for t, before in zip(taken, first, strict=True)]
            return statistics.geometric_mean(shares)

        best, share = search(
            start,
            measure,
            fixed=self.target.fixed,
            values=self.target.values,
            is_over=lambda: time.monotonic() >= self.deadline,
        )
        if _frozen(start) not in times:
            raise RuntimeError(f"the configuration in force does not work: {start}")
        seconds = times[_frozen(best)][0]
        percent = 100 * self._least(works[0]) / seconds
        kept = share < GAIN
        if kept:
            self._write(facts, best, seconds, percent, first[0], share)
        self.part.record(
            **self.target.label,
            use=best,
            us=seconds * 1e6,
            before_us=first[0] * 1e6,
            share=share,
            all_us=[1e6 * t for t in times[_frozen(best)]],
            all_before_us=[1e6 * t for t in first],
            percent=percent,
            tried=len(times),
            written=kept,
        )

    def _times(
        self, works: list[Work], expected: list[Tensor], facts: Facts, config: Config
    ) -> list[float] | None:
        """Seconds of each work; None if the candidate fails, spills or is wrong."""
        target = self.target
        taken = []
        try:
            with launching_with(target.forced, (target.op, facts, config)):
                for work, wanted in zip(works, expected, strict=True):
                    if not _agrees(_tensor(work.sets[0][target.call]()), wanted):
                        print(f"wrong result: {config}", flush=True)
                        return None
                    if new_spills(self.seen):
                        return None
                    calls = {target.call: work.calls()[target.call]}
                    least = self._least(work)
                    taken.append(time_calls(calls, self.part.device, estimate=least)[target.call])
        except Exception as error:  # whatever the compiler or the driver raise
            if any(words in str(error) for words in DEAD_CONTEXT):
                raise
            print(f"{describe(error)[:160]}: {config}", flush=True)
            return None
        return taken

    def _least(self, work: Work) -> float:
        ceilings = ceilings_of(self.part)
        return max(
            work.num_bytes / ceilings["memory_bytes_per_s"],
            work.flops / ceilings["matmul_flops_per_s"],
            ceilings["launch_s"],
        )

    def _write(
        self,
        facts: Facts,
        use: Config,
        seconds: float,
        percent: float,
        before: float,
        share: float,
    ) -> None:
        when = when_of(dict(facts), self.target.points)
        day = datetime.datetime.now(datetime.UTC).date()
        device = torch.cuda.get_device_name() if self.part.on_gpu else "cpu"
        case = self.target.cases[0]
        note = (
            f"{day} {device}: {seconds * 1e6:.1f} us, {percent:.0f} % of ceiling, "
            f"was {before * 1e6:.1f} us ({case.model} {case.shape}, {case.at})"
        )
        if (count := len(self.target.cases)) > 1:
            note += f"; {count} cases took {100 * share:.0f} % of their time"
        text = self.table.read_text(encoding="utf-8")
        self.table.write_text(insert_row(text, self.target.op, when, use, note), encoding="utf-8")
        configs.table.cache_clear()  # the targets that follow build on it


def when_of(facts: Mapping[str, configs.Fact], points: Sequence[int]) -> dict[str, Any]:
    """The condition of a row from the facts of its launch, an interval in place of the rows."""
    when: dict[str, Any] = {}
    for key, value in facts.items():
        if key == "rows" and points:
            when |= interval(int(value), points)
        elif key not in DERIVED_FACTS:
            when[key] = value
    return when


def _tensor(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def _agrees(actual: Tensor, wanted: Tensor) -> bool:
    difference = (actual.float() - wanted).norm()
    return bool(difference <= TOLERANCE * wanted.norm())  # NaN is not


def cases(part: Part, ops: Sequence[str], table: Path) -> Iterator[tuple[Row, Callable[[], None]]]:
    maker = Maker(part.device, part.dtype, TINY if part.tiny else FULL, part.tiny)
    every = [target for op in ops for target in targets(op, maker)]
    for index, target in enumerate(every):
        left = len(every) - index

        def run(target: Target = target, left: int = left) -> None:
            Tuning(part, target, table, left).run()

        yield target.label, run


def main() -> int:
    parser = part_parser(__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=", ".join(OPS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--table", type=Path, default=configs.PATH, help="where winners are put")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no such op: {', '.join(sorted(unknown))}")
    if "--seconds" not in sys.argv:
        options.seconds = 60 * options.minutes
    part = make_part(options)
    if not options.table.exists():
        options.table.write_bytes(configs.PATH.read_bytes())
    if options.table != configs.PATH:
        configs.PATH = options.table  # winners count for the targets that follow
        configs.table.cache_clear()
    start = time.monotonic()
    ceilings_of(part)
    code = part.run_cases(cases(part, options.ops or OPS, options.table))
    print(f"{time.monotonic() - start:.0f} s; rows are in {options.table}")
    return code


if __name__ == "__main__":
    sys.exit(main())
