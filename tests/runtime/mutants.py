"""Seeded mistakes in pool, scheduler and engine, each of which simulator or state machine must see.

    python -m tests.runtime.mutants [--only TEXT] [--jobs 2]

A mutant is a change of source text that is compiled in memory, in a process of its own; no file is
written. A text that is not found exactly once means that the list is stale.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import torch

torch.set_num_threads(1)  # no thread is left behind by a fork

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_SEED = 60
"""A hundred times what a seed takes: some mutants make the engine hang."""
NUM_SEEDS, REQUESTS_PER_SEED = 200, 150
NUM_EXAMPLES, NUM_STEPS = 500, 50


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    file: str  # runtime/<file>.py
    old: str
    new: str

    def apply(self) -> str:
        """The changed source. Raises `ValueError` if the text is not there exactly once."""
        source = (ROOT / "runtime" / f"{self.file}.py").read_text()
        if source.count(self.old) != 1:
            raise ValueError(
                f"mutant {self.name!r} is stale: its text is {source.count(self.old)} times in "
                f"runtime/{self.file}.py"
            )
        return source.replace(self.old, self.new)


MUTANTS = [
    # -- pages: the pool ---------------------------------------------------------------------
    Mutant(
        "stale key: an evicted page stays published",
        "blocks",
        "            self._unpublish(page_id)\n            page_ids.append(page_id)",
        "            page_ids.append(page_id)",
    ),
    Mutant(
        "a hit adds no reference",
        "blocks",
        "            self._num_refs[page_id] += 1",
        "            self._num_refs[page_id] = max(self._num_refs[page_id], 1)",
    ),
    Mutant(
        "a page that is hit can still be evicted",
        "blocks",
        "            self._idle.pop(page_id, None)\n            self._num_refs",
        "            self._num_refs",
    ),
    Mutant(
        "the most recently used page is evicted",
        "blocks",
        "self._idle.popitem(last=False)",
        "self._idle.popitem(last=True)",
    ),
    Mutant(
        "the first pages of a table are evicted first",
        "blocks",
        "for page_id in reversed(page_ids):",
        "for page_id in page_ids:",
    ),
    Mutant(
        "cached pages are evicted while others are free",
        "blocks",
        "num_kept = max(len(self._free) - count, 0)",
        "num_kept = max(len(self._free) - count + min(count, len(self._idle)), 0)",
    ),
    Mutant(
        "the same contents are published twice",
        "blocks",
        "if prefix.key not in self._page_ids and self._prefixes[page_id] is None:",
        "if self._prefixes[page_id] is None:",
    ),
    Mutant(
        "a page that is forgotten leaks",
        "blocks",
        "                    del self._idle[page_id]\n"
        "                    self._free.append(page_id)",
        "                    del self._idle[page_id]",
    ),
    Mutant(
        "a page that is forgotten stays idle",
        "blocks",
        "                    del self._idle[page_id]\n"
        "                    self._free.append(page_id)",
        "                    pass",
    ),
    Mutant(
        "a reset spares pages in use",
        "blocks",
        "self.forget(list(self._page_ids.values()))",
        "self.forget(list(self._idle))",
    ),
    Mutant(
        "a shared page is freed by its first user",
        "blocks",
        "            self._num_refs[page_id] -= 1\n",
        "            self._num_refs[page_id] = 0\n",
    ),
    # -- keys --------------------------------------------------------------------------------
    Mutant(
        "a key does not know its namespace",
        "blocks",
        "{model}{namespace}",
        "{model}",
    ),
    Mutant(
        "a key does not know the pages before",
        "blocks",
        "hashlib.sha256(parent + tokens)",
        "hashlib.sha256(tokens)",
    ),
    Mutant(
        "a key does not know its tokens",
        "blocks",
        "hashlib.sha256(parent + tokens)",
        "hashlib.sha256(parent)",
    ),
    Mutant(
        "a key has 8 bits",
        "blocks",
        "hashlib.sha256(parent + tokens).digest()",
        "hashlib.sha256(parent + tokens).digest()[:1]",
    ),
    # -- pages: the scheduler ----------------------------------------------------------------
    Mutant(
        "leak of the last page",
        "scheduler",
        "self.pool.free(seq.block_table)",
        "self.pool.free(seq.block_table[:-1])",
    ),
    Mutant(
        "double free of the last page",
        "scheduler",
        "self.pool.free(seq.block_table)",
        "self.pool.free(seq.block_table + seq.block_table[-1:])",
    ),
    Mutant(
        "off by one at the edge of a page",
        "scheduler",
        "return -(-num_tokens // self.page_size)",
        "return num_tokens // self.page_size",
    ),
    Mutant(
        "a page that is not full is published",
        "prefix_cache",
        "for index in range(seq.num_published, end // self._page_size):",
        "for index in range(seq.num_published, min(-(-end // self._page_size), "
        "(seq.num_prompt + len(seq.output_ids)) // self._page_size)):",
    ),
    Mutant(
        "a hit covers the last token",
        "prefix_cache",
        "limit = seq.num_tokens - 2",
        "limit = seq.num_tokens",
    ),
    Mutant(
        "pages are published by a step planned before a preemption",
        "scheduler",
        "chunk.num_preemptions == seq.num_preemptions",
        "seq.block_table",
    ),
    Mutant(
        "what was published before a preemption counts after it",
        "scheduler",
        "            seq.num_computed, seq.num_published = num_cached, len(cached)",
        "            seq.num_computed = num_cached\n"
        "            seq.num_published = max(seq.num_published, len(cached) + 1)",
    ),
    Mutant(
        "a sequence never hits",
        "prefix_cache",
        "            page_ids.append(page_id)",
        "            break",
    ),
    Mutant(
        "hits are not told",
        "scheduler",
        "                seq.num_cached = num_cached",
        "                seq.num_cached = 0",
    ),
    Mutant(
        "admission counts cached pages twice",
        "scheduler",
        "self.pool.num_free - self.pool.num_idle(cached)",
        "self.pool.num_free",
    ),
    Mutant(
        "admission uses the prompt only",
        "scheduler",
        "self._pages_for(seq.num_tokens + 1) - len(cached)",
        "self._pages_for(seq.num_prompt) - len(cached)",
    ),
    # -- what goes wrong ---------------------------------------------------------------------
    Mutant(
        "NaN is taken for a token",
        "scheduler",
        "NOT_A_TOKEN = -1",
        "NOT_A_TOKEN = -2",
    ),
    Mutant(
        "pages with NaN stay published",
        "scheduler",
        "        self.pool.forget_prefixes(seq.prefixes)\n",
        "",
    ),
    Mutant(
        "pages with NaN stay published after a preemption",
        "scheduler",
        "self.pool.forget_prefixes(seq.prefixes)",
        "self.pool.forget(seq.block_table)",
    ),
    Mutant(
        "a step that cannot be read loses who failed in it",
        "engine",
        "        tokens = step.tokens()\n",
        "        events = [self.scheduler.fail(seq) for seq in failed]\n"
        "        tokens = step.tokens()\n        failed = ()\n",
    ),
    Mutant(
        "a failed step forgets who waits for its token",
        "scheduler",
        "self.running + [seq for seq in self.waiting if seq.num_pending]",
        "list(self.running)",
    ),
    Mutant(
        "a failed step stays under way",
        "engine",
        "        self._in_flight.clear()\n",
        "",
    ),
    # -- in and out --------------------------------------------------------------------------
    Mutant(
        "an abort of a waiting sequence is ignored",
        "scheduler",
        "        if seq is None:\n            return False\n",
        "        if seq is None or seq in self.waiting:\n            return False\n",
    ),
    Mutant(
        "an abort of a preempted sequence leaves it waiting",
        "scheduler",
        "            self.waiting.remove(seq)\n",
        "            seq.num_preemptions or self.waiting.remove(seq)\n",
    ),
    Mutant(
        "a preemption forgets the answer",
        "scheduler",
        "        seq.num_preemptions += 1\n",
        "        seq.num_preemptions += 1\n        seq.output_ids.clear()\n",
    ),
    Mutant(
        "a preemption keeps what was computed",
        "scheduler",
        "        self._release(seq)\n        seq.status = SequenceStatus.WAITING\n"
        "        seq.num_computed = 0\n",
        "        self._release(seq)\n        seq.status = SequenceStatus.WAITING\n",
    ),
    Mutant(
        "a row is not cleared for who comes back",
        "scheduler",
        "started=[chunk.seq for chunk in started],",
        "started=[chunk.seq for chunk in started if not chunk.seq.num_preemptions],",
    ),
    Mutant(
        "a row is not given back",
        "scheduler",
        "        self._free_rows.append(seq.row)\n",
        "",
    ),
    Mutant(
        "a token drawn after the end is told",
        "scheduler",
        "            if seq.status is SequenceStatus.FINISHED:\n                continue\n"
        "            if token is not None",
        "            if token is not None",
    ),
    Mutant(
        "tokens on their way do not count to the limit",
        "scheduler",
        "len(seq.output_ids) + seq.num_pending >= seq.max_new_tokens",
        "len(seq.output_ids) >= seq.max_new_tokens",
    ),
    Mutant(
        "a start is told again",
        "engine",
        "new = [seq for seq in plan.started if seq.num_preemptions == 0]",
        "new = list(plan.started)",
    ),
    Mutant(
        "the newest step is committed first",
        "engine",
        "self._in_flight.popleft()",
        "self._in_flight.pop()",
    ),
    # -- order, budget, progress -------------------------------------------------------------
    Mutant(
        "a step exceeds its budget",
        "scheduler",
        "            chunks.append(self._chunk(seq, num_tokens))\n"
        "            budget -= num_tokens\n",
        "            chunks.append(self._chunk(seq, num_tokens))\n",
    ),
    Mutant(
        "last come, first served",
        "scheduler",
        "        insort(self.waiting, seq, key=_order)\n\n    def abort",
        "        self.waiting.insert(0, seq)\n\n    def abort",
    ),
    Mutant(
        "priorities are ignored",
        "scheduler",
        "seq.order = (seq.priority, next(self._arrivals))",
        "seq.order = (0, next(self._arrivals))",
    ),
    Mutant(
        "the earliest arrival yields",
        "scheduler",
        "            victim = self.running[-1]\n",
        "            victim = self.running[0]\n",
    ),
    Mutant(
        "a sequence may be preempted without end",
        "scheduler",
        "if seq.num_preemptions == self.max_preemptions:",
        "if seq.num_preemptions == 1000:",
    ),
    Mutant(
        "who was preempted too often comes back too early",
        "scheduler",
        "return sum(self._pages_for(one.max_num_tokens) for one in firm) <= self.pool.num_pages",
        "return True",
    ),
]


NO_MUTANT = Mutant(
    "none: the source as it is, which must live", "blocks", "class PagePool:", "class PagePool:"
)
"""Hunted too when all are, so that a kill is the mutant's doing."""


class _MutantLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec")


class _MutantFinder(importlib.abc.MetaPathFinder):
    """Finds one module of the engine, with its source changed."""

    def __init__(self, mutant: Mutant) -> None:
        self.fullname = f"runtime.{mutant.file}"
        self.path = str(ROOT / "runtime" / f"{mutant.file}.py")
        self.source = mutant.apply()

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.fullname:
            return None
        loader = _MutantLoader(fullname, self.path, self.source)
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def hunt(mutant: Mutant) -> tuple[str, float]:
    """What sees the mutant, or "" if it lives, and after how many seconds.

    Only for a process that has imported no engine.
    """
    assert not any(name.split(".")[0] == "runtime" for name in sys.modules), "too late"
    sys.meta_path.insert(0, _MutantFinder(mutant))
    began = time.perf_counter()
    killer = _simulate() or _run_state_machine()
    return killer, time.perf_counter() - began


def _simulate() -> str:
    from tests.runtime.simulator import Simulation

    signal.signal(signal.SIGALRM, _stop)
    for seed in range(NUM_SEEDS):
        signal.alarm(SECONDS_PER_SEED)
        try:
            Simulation(seed, REQUESTS_PER_SEED).run()
        except Exception as error:
            return f"simulator, seed {seed}: {_line(error)}"
        finally:
            signal.alarm(0)
    return ""


def _run_state_machine() -> str:
    from tests.runtime.test_state_machine import run

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            run(NUM_EXAMPLES, NUM_STEPS, shrink=False)
        except Exception as error:
            return f"state machine: {_line(error)}"
    return ""


def _stop(number: int, frame: object) -> None:
    raise TimeoutError(f"a seed takes more than {SECONDS_PER_SEED} s: it hangs")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.mutants", description=__doc__)
    parser.add_argument(
        "--only", metavar="TEXT", action="append", default=[], help="mutants with this in the name"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    try:
        for mutant in MUTANTS:
            mutant.apply()
    except ValueError as error:
        print(error)
        return 1
    mutants = [m for m in MUTANTS if any(text in m.name for text in options.only)]
    if not options.only:
        mutants = [NO_MUTANT, *MUTANTS]
    survivors: list[Mutant] = []
    # A process per mutant, forked from this one, which has torch at hand and no engine.
    context = multiprocessing.get_context("fork")
    with context.Pool(options.jobs, maxtasksperchild=1) as pool:
        results = pool.imap(hunt, mutants, chunksize=1)
        for mutant, (killer, seconds) in zip(mutants, results, strict=True):
            print(f"{seconds:6.1f} s  {mutant.name:<60} {killer or 'IT LIVES'}", flush=True)
            if not killer:
                survivors.append(mutant)
    expected = [NO_MUTANT] if NO_MUTANT in mutants else []
    num_mutants = len(mutants) - len(expected)
    num_killed = sum(mutant not in survivors for mutant in mutants if mutant is not NO_MUTANT)
    print(f"{num_killed} of {num_mutants} mutants killed")
    if expected and NO_MUTANT not in survivors:
        print("but the source breaks without any, so that this means nothing")
    return 0 if mutants and survivors == expected else 1


if __name__ == "__main__":
    sys.exit(main())
