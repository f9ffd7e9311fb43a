"""A minute of the simulator's life, and that the canary sees what it is there to see."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from runtime.request import SamplingParams
from tests.runtime import simulator
from tests.runtime.canary import EOS, CanaryError, StepFaults, solo
from tests.runtime.checked_engine import Broken, CheckedEngine, Sizes

NUM_SEEDS, REQUESTS_PER_SEED = 60, 100
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)


def test_no_seed_breaks_and_everything_happens() -> None:
    total: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        _, counts, broken = simulator.simulate(seed, REQUESTS_PER_SEED)
        assert not broken, (
            f"{broken}\n{simulator.explain(seed, REQUESTS_PER_SEED)}\nrepeat: {sys.executable} -m "
            f"tests.runtime.simulator --seed {seed} --seeds 1 --requests {REQUESTS_PER_SEED}"
        )
        total += counts
    for name in [
        "answers",
        "hits",
        "evictions",
        "preempted 1 times",
        "preempted 2 times",
        "aborts (waiting)",
        "aborts (running)",
        "aborts (preempted)",
        "aborts (token on its way)",
        "ends by NaN",
        "ends by a fault",
        "engines replaced",
        "requests that survived",
        "faults (parameters of a row)",
        "faults (step, before)",
        "faults (step, within)",
        "faults (step, read)",
        "faults (step, out of memory)",
        "cache resets",
        "revoked namespaces",
        "stalls",
        "idle checks",
    ]:
        assert total[name] > 0, f"the seeds have not seen: {name}"
    assert total["requests"] == NUM_SEEDS * REQUESTS_PER_SEED


def test_a_seed_repeats_itself() -> None:
    assert simulator.simulate(7, 200) == simulator.simulate(7, 200)
    assert simulator.simulate(7, 200) != simulator.simulate(8, 200)


def test_a_break_prints_the_seed_and_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CheckedEngine, "check_idle", _break)
    assert simulator.main(["--seed", "5", "--seeds", "3", "--requests", "30"]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN by seed 5: Broken: on purpose" in printed
    assert "-m tests.runtime.simulator --seed 5 --seeds 1 --requests 10" in printed


def _break(engine: CheckedEngine) -> None:
    raise Broken("on purpose")


def test_the_oracle_follows_prompt_and_namespace_alone() -> None:
    def answer(prompt_ids: list[int], namespace: str = "a") -> list[int]:
        return solo(
            prompt_ids, 20, namespace=namespace, page_size=4, vocab_size=1 << 30, ends=(EOS,)
        )

    prompt_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    expected = answer(prompt_ids)
    assert answer(list(prompt_ids)) == expected
    assert set(answer(prompt_ids, "b")).isdisjoint(expected)
    for index in range(len(prompt_ids)):
        other = prompt_ids.copy()
        other[index] = 10
        assert set(answer(other)).isdisjoint(expected)
    # what it answers is what it would answer had it been asked with the answer's start
    assert answer([*prompt_ids, *expected[:7]])[:13] == expected[7:]


def make_engine(run_ahead: int = 0) -> CheckedEngine:
    sizes = Sizes(
        num_pages=16,
        page_size=2,
        max_num_seqs=4,
        max_step_tokens=16,
        run_ahead=run_ahead,
        vocab_size=1 << 30,
    )
    return CheckedEngine(sizes, lambda plan: StepFaults(), lambda: False)


def finish(engine: CheckedEngine) -> None:
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_any_foreign_page_in_a_table_changes_the_next_token(index: int, run_ahead: int) -> None:
    engine = make_engine(run_ahead)
    engine.add([1, 2, 3, 4, 5, 6, 7, 8, 9], PARAMS, "a", 0)
    engine.add([1, 2, 3, 4, 5, 6, 7], PARAMS, "b", 0)
    engine.step()
    first, second = engine.scheduler.running
    # As a wrong hit would: the device has the table by row.
    engine.runner.tables[first.row][index] = second.block_table[index]
    with pytest.raises((Broken, CanaryError)):
        finish(engine)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_single_slot_written_by_another_changes_the_next_token(offset: int) -> None:
    engine = make_engine()
    engine.add([1, 2, 3, 4, 5, 6, 7], PARAMS, "a", 0)
    engine.step()
    [seq] = engine.scheduler.running
    engine.runner.overwrite(seq.block_table[1], offset)
    with pytest.raises(Broken, match="alone it gets"):
        finish(engine)


def test_writing_a_page_of_two_sequences_is_seen_by_the_device() -> None:
    engine = make_engine()
    for namespace in "ab":
        engine.add([1, 2, 3, 4], PARAMS, namespace, 0)
    engine.step()
    first, second = engine.scheduler.running
    [page_id] = engine.scheduler.pool.allocate(1) or []
    first.block_table.append(page_id)
    second.block_table.append(page_id)
    with pytest.raises(CanaryError, match=f"page {page_id} of sequence"):
        engine.step()
