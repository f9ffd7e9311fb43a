"""Scheduler, pool, prefix cache and engine under everything at once, against a canary model.

One thread, virtual time; a seed decides all: sizes, arrivals, aborts, stalls, faults. Every token
is compared with what the request gets alone. A break prints the command that repeats it.

    python -m tests.runtime.simulator --requests 1000000 --seeds 1000 --jobs 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.request import SamplingParams
from runtime.scheduler import Plan
from tests.runtime.canary import NO_FAULTS, StepFault, StepFaults
from tests.runtime.checked_engine import Broken, CheckedEngine, Sizes

CHECK_EVERY = 16
"""Steps between two checks of the invariants; tokens are compared always."""
TRACE_LINES = 60


@dataclass(slots=True)
class Profile:
    """What one seed stands for."""

    sizes: Sizes
    num_live: int  # requests at once, about
    burst: int
    arrival_rate: float
    max_prompt: int
    max_answer: int
    namespaces: list[str]
    priorities: list[int]
    stems: list[list[int]]
    abort_rate: float
    stall_rate: float
    preemption_rate: float  # of those that nothing calls for
    row_fault_rate: float
    step_fault_rate: float
    rare_rate: float  # of cache resets, revoked namespaces and lulls

    @classmethod
    def draw(cls, rng: random.Random) -> Profile:
        max_num_seqs = rng.choice([1, 2, 3, 4, 6, 8])
        sizes = Sizes(
            num_pages=rng.choice([3, 4, 6, 8, 12, 16, 24, 32, 48, 64]),
            page_size=rng.choice([1, 2, 4, 8, 16]),
            max_num_seqs=max_num_seqs,
            max_step_tokens=rng.choice([1, 3, 8, 16, 32, 64]),
            run_ahead=rng.choice([0, 0, 1, 1, 2]),
            vocab_size=rng.choice([5, 17, 40]),
            max_preemptions=rng.choice([1, 2, 8]),
        )
        longest = min(sizes.capacity - 1, rng.choice([6, 24, 60]))
        profile = cls(
            sizes=sizes,
            num_live=rng.randint(1, 3 * max_num_seqs),
            burst=rng.choice([1, 1, 4, 12]),
            arrival_rate=rng.choice([0.2, 0.6, 1.0]),
            max_prompt=longest,
            max_answer=rng.choice([2, 8, 16, 30, 50]),
            namespaces=["a", "b", "c"][: rng.randint(1, 3)],
            priorities=rng.choice([[0], [0], [-1, 0, 5]]),
            stems=[
                [rng.randrange(sizes.vocab_size) for _ in range(longest)]
                for _ in range(rng.randint(1, 4))
            ],
            abort_rate=rng.choice([0.0, 0.01, 0.05]),
            stall_rate=rng.choice([0.0, 0.01]),
            preemption_rate=rng.choice([0.0, 0.0, 0.05]),
            row_fault_rate=rng.choice([0.0, 0.005, 0.03]),
            step_fault_rate=rng.choice([0.0, 0.001, 0.01]),
            rare_rate=rng.choice([0.0, 0.001, 0.005]),
        )
        if rng.random() < 0.25:
            profile._press(rng)
        return profile

    def _press(self, rng: random.Random) -> None:
        """Many short prompts with long answers in few pages: preemption is the rule."""
        sizes = self.sizes
        sizes.num_pages, sizes.page_size = rng.randint(5, 14), rng.choice([1, 2, 4])
        sizes.max_num_seqs = rng.randint(3, 8)
        sizes.vocab_size = 40
        self.num_live = 2 * sizes.max_num_seqs
        self.arrival_rate = 1.0
        self.priorities = rng.choice([[0], list(range(8))])
        self.max_prompt = rng.randint(1, 4)
        self.max_answer = sizes.capacity - 1
        self.abort_rate = self.row_fault_rate = self.step_fault_rate = 0.0


class Simulation:
    """One seed. ``run`` raises what `CheckedEngine` does if anything is wrong."""

    def __init__(self, seed: int, num_requests: int, trace: deque[str] | None = None) -> None:
        self.num_requests = num_requests
        self.rng = random.Random(seed)
        self.profile = Profile.draw(self.rng)
        self.engine = CheckedEngine(
            self.profile.sizes, self._faults, lambda: self.rng.random() < 0.5, trace
        )
        self.counts = self.engine.counts
        self._params: dict[tuple[int, int], SamplingParams] = {}
        self._steps_left: int | None = None

    def run(self) -> None:
        rng, profile, engine, live = self.rng, self.profile, self.engine, self.engine.live
        stalled = 0
        is_lull = False
        while self.counts["requests"] < self.num_requests or live:
            if is_lull and not live and not engine.has_work:
                is_lull = False
                engine.check_idle()
            has_place = not is_lull and len(live) < profile.num_live
            if has_place and rng.random() < profile.arrival_rate:
                for _ in range(rng.randint(1, profile.burst)):
                    self._add()
            if live and rng.random() < profile.abort_rate:
                engine.abort(rng.choice(list(live)))
            if rng.random() < profile.rare_rate:
                match rng.randrange(3):
                    case 0:
                        engine.reset_cache()
                    case 1:
                        engine.revoke(rng.choice(profile.namespaces))
                    case _:
                        is_lull = True
            if rng.random() < profile.preemption_rate:
                engine.preempt(rng.randrange(100))
            if stalled:
                stalled -= 1
                continue
            if rng.random() < profile.stall_rate:
                stalled = rng.randint(1, 8)
                self.counts["stalls"] += 1
            self._step()
        while engine.has_work:
            engine.step()
        engine.check_idle()

    def _step(self) -> None:
        self.engine.step()
        if self.counts["steps"] % CHECK_EVERY == 0:
            self.engine.check()
        if self._steps_left is not None and self.engine.live:
            self._steps_left -= 1
            if self._steps_left < 0:
                raise Broken(f"sequences {list(self.engine.live)} should have ended long ago")

    def _add(self) -> None:
        if self.counts["requests"] == self.num_requests:
            return
        rng, profile = self.rng, self.profile
        num_prompt = rng.randint(1, profile.max_prompt)
        prompt_ids = rng.choice(profile.stems)[: rng.randint(0, num_prompt)]
        if not prompt_ids or rng.random() < 0.8:
            for _ in range(num_prompt - len(prompt_ids)):
                prompt_ids.append(rng.randrange(profile.sizes.vocab_size))
        namespace, priority = rng.choice(profile.namespaces), rng.choice(profile.priorities)
        self.engine.add(prompt_ids, self._draw_params(), namespace, priority)
        if self.counts["requests"] == self.num_requests:
            self._steps_left = 3 * self.engine.ideal_steps() + 20

    def _draw_params(self) -> SamplingParams:
        key = self.rng.randint(1, self.profile.max_answer), self.rng.randrange(4)
        params = self._params.get(key)
        if params is None:
            params = SamplingParams(
                max_tokens=key[0],
                ignore_eos=key[1] == 0,
                stop_token_ids=(3,) if key[1] == 1 else (),
                seed=0,
            )
            self._params[key] = params
        return params

    def _faults(self, plan: Plan) -> StepFaults:
        rng, profile, counts = self.rng, self.profile, self.counts
        faults = NO_FAULTS
        if rng.random() < profile.row_fault_rate:
            if plan.started and rng.random() < 0.3:
                faults = StepFaults(failed={rng.choice(plan.started).seq_id})
                counts["faults (parameters of a row)"] += 1
            else:
                faults = StepFaults(not_finite={rng.choice(plan.chunks).seq.seq_id})
                counts["faults (NaN row)"] += 1
        if rng.random() < profile.step_fault_rate:
            kind = rng.choice(["before", "within", "read", "out of memory"])
            counts[f"faults (step, {kind})"] += 1
            match kind:
                case "before":
                    raise StepFault("CUDA error: device-side assert triggered")
                case "within":
                    return StepFaults(dies_after=rng.randrange(len(plan.chunks)))
                case "read":
                    failed = {seq.seq_id for seq in plan.started if rng.random() < 0.3}
                    error = StepFault("CUDA error: an illegal memory access was encountered")
                    return StepFaults(faults.not_finite, failed, at_read=error)
                case _:
                    raise rng.choice([torch.OutOfMemoryError, MemoryError])("out of memory")
        return faults


def simulate(seed: int, num_requests: int) -> tuple[int, Counter[str], str]:
    """One seed; (seed, counts, "" or what broke)."""
    simulation = Simulation(seed, num_requests)
    try:
        simulation.run()
    except Exception as error:  # also what only a mistake raises
        return seed, simulation.counts, f"{type(error).__name__}: {error}"
    return seed, simulation.counts, ""


def explain(seed: int, num_requests: int) -> str:
    """Run a seed that broke once more; its profile and the last things that happened."""
    trace: deque[str] = deque(maxlen=TRACE_LINES)
    simulation = Simulation(seed, num_requests, trace=trace)
    try:
        simulation.run()
    except Exception as error:  # also what only a mistake raises
        trace.append(f"{type(error).__name__}: {error}")
    return "\n".join([str(simulation.profile), *trace])


def _results(
    seeds: range, num_requests: int, num_jobs: int
) -> Iterator[tuple[int, Counter[str], str]]:
    if num_jobs == 1:
        for seed in seeds:
            yield simulate(seed, num_requests)
        return
    with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
        jobs = [pool.apply_async(simulate, (seed, num_requests)) for seed in seeds]
        for job in jobs:
            yield job.get()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.simulator", description=__doc__)
    parser.add_argument("--requests", type=int, default=60_000, help="of all seeds together")
    parser.add_argument("--seeds", type=int, default=60, help="how many seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if min(options.requests, options.seeds, options.jobs) < 1:
        parser.error("--requests, --seeds and --jobs must be at least 1")
    num_requests = -(-options.requests // options.seeds)
    seeds = range(options.seed, options.seed + options.seeds)
    total: Counter[str] = Counter()
    began = time.perf_counter()
    for seed, counts, broken in _results(seeds, num_requests, options.jobs):
        if broken:
            print(explain(seed, num_requests))
            print(f"BROKEN by seed {seed}: {broken}")
            print(
                f"repeat: {sys.executable} -m tests.runtime.simulator "
                f"--seed {seed} --seeds 1 --requests {num_requests}"
            )
            return 1
        total += counts
    seconds = time.perf_counter() - began
    for name in sorted(total):
        print(f"{name:<32}{total[name]:>14,}")
    print(
        f"{total['requests']:,} requests of {options.seeds:,} seeds in {seconds:.1f} s: "
        f"{total['requests'] / seconds:,.0f} requests/s, nothing broke"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
