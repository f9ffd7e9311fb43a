"""Contexts that are reached without being computed, and what is then measured on them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode, random_models
from benchmarks.decode import Scale, make_engine, num_ahead, start_decoding, time_decode
from benchmarks.kernel_inputs import INVARIANT, OURS, TINY, TORCH, Maker
from benchmarks.kernels import all_cases
from benchmarks.part import Part, parse_part
from runtime.request import SamplingParams

CPU = torch.device("cpu")
PARAMS = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


@pytest.fixture
def part(tmp_path: Path) -> Part:
    part = parse_part(None, ["--device", "cpu", "--tiny", "--rows", str(tmp_path / "rows")])
    part.ceilings = {"memory_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11, "launch_s": 1e-6}
    return part


def tiny_engine(part: Part, batch: int) -> tuple[decode.Engine, decode.PromptPassing]:
    config = random_models.config_json("r1_distill_qwen_7b", tiny=True)
    model = random_models.build(config, device=CPU, dtype=torch.float32, max_model_len=512)
    random_models.fill(model, CPU)
    scale = Scale([(batch, 64)], prompt=64, step_tokens=64)
    return make_engine(model, part, name="tiny", num_pages=128, max_model_len=512, scale=scale)


def test_every_sequence_decodes_at_its_context(part: Part) -> None:
    engine, passing = tiny_engine(part, 3)
    before = copy.deepcopy(engine.runner.caches)
    seq_ids = start_decoding(engine, passing, 3, 200, PARAMS)
    assert len(set(seq_ids)) == 3
    for seq in engine.scheduler.running:
        assert 200 < seq.num_tokens <= 200 + num_ahead(3, 200)
        assert seq.num_tokens - seq.num_computed <= 1
    assert len({tuple(seq.output_ids) for seq in engine.scheduler.running}) == 3
    for layer, old in zip(engine.runner.caches, before, strict=True):
        for name, cache in layer.items():
            assert torch.equal(cache, old[name]), "a prompt that is passed over writes nothing"
    engine.scheduler.check()
    # from here on the model runs: every step gives a token per sequence and writes its keys
    assert len(engine.step()) == 3
    changed = [name for name, cache in engine.runner.caches[0].items()
               if not torch.equal(cache, before[0][name])]  # fmt: skip
    assert sorted(changed) == sorted(before[0])


def test_a_measurement_leaves_the_engine_empty(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, passing = tiny_engine(part, 2)
    steps: list[int] = []
    launch = engine.runner.launch
    monkeypatch.setattr(engine.runner, "launch", lambda plan: steps.append(1) or launch(plan))
    seconds, context = time_decode(engine, passing, 2, 64, PARAMS, CPU)
    assert seconds > 0
    drawn = decode.WARM_UP_STEPS + decode.MIN_STEPS * decode.ROUNDS / 2
    assert 64 + drawn <= context <= 64 + drawn + num_ahead(2, 64)
    assert not engine.has_work
    timed = decode.WARM_UP_STEPS + decode.MIN_STEPS * decode.ROUNDS
    assert timed < len(steps) <= timed + num_ahead(2, 64), "the rest of the answers is not drawn"
    assert engine.stats()["num_free_pages"] == engine.stats()["num_pages"]


def test_a_sequence_that_ends_early_is_no_measurement(part: Part) -> None:
    engine, passing = tiny_engine(part, 2)
    few = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    with pytest.raises(RuntimeError, match="0 of 2 sequences"):
        time_decode(engine, passing, 2, 64, few, CPU)


def test_a_model_with_experts_is_measured_to_its_last_row(part: Part, tmp_path: Path) -> None:
    scale = Scale([(2, 32), (4, 100_000)], prompt=32, step_tokens=32)
    decode.ModelRun(part, "v2_lite", scale, seconds=60).run()
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    measured, skipped, prompt = rows[0], rows[1], rows[2]
    assert measured["batch"] == 2 and 0 < measured["percent"] < 100
    assert measured["floor_ms"] < measured["step_ms"]
    assert measured["sampling"] == "temperature 1"
    assert "do not fit" in skipped["skipped"]
    assert prompt["prompt"] == 32 and prompt["tok_s"] > 0


def test_every_kernel_case_runs_and_agrees_with_torch() -> None:
    maker = Maker(CPU, torch.float32, TINY, tiny=True)
    compared = 0
    for case in all_cases(maker):
        work = case.prepare()
        assert work.num_bytes > 0
        calls = work.sets[0]
        result = calls[OURS]()
        for name in {TORCH, INVARIANT} & calls.keys():
            other = calls[name]()
            assert isinstance(result, torch.Tensor) and isinstance(other, torch.Tensor)
            if case.op == "heads_linear" and name == TORCH:
                other = other.transpose(0, 1)
            torch.testing.assert_close(other, result)
            compared += 1
    assert compared > 60
