"""Decode steps replayed without Python: the same tokens, to the last bit of their logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import attention_sdpa
from kernels.dispatch import compiles_loops
from kernels.packed_linear import PackedWeight
from runtime import Engine, SamplingParams
from runtime.models.decoder import Decoder
from tests.runtime.checkpoints import QWEN2, Config, write_checkpoint
from tests.runtime.engines import make_engine
from tests.runtime.pages import random_tokens

pytestmark = pytest.mark.skipif(not compiles_loops(), reason="no numba, or no CPU it is used for")

# sizes that packed weights divide into, so that all products of few rows have loops
MODEL: Config = QWEN2 | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
}


def load(folder: Path, **options: Any) -> Engine:
    engine = make_engine(folder, dtype="bfloat16", max_model_len=2048, **options)
    weight = engine.runner.model.lm_head.weight  # type: ignore[attr-defined]
    if not isinstance(weight, PackedWeight) or weight.rows is None:
        pytest.skip("this CPU's oneDNN packs weights in another way")
    return engine


def answers(engine: Engine, prompts: list[list[int]], lengths: list[int]) -> list[Any]:
    """Tokens and logprobs, of answers that end at different steps."""
    ids = [
        engine.add(
            prompt,
            SamplingParams(temperature=0.8, seed=7, max_tokens=length, logprobs=2, ignore_eos=True),
        )
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    found: dict[int, list[Any]] = {i: [] for i in ids}
    while engine.has_work:
        for event in engine.step():
            found[event.seq_id].append((event.token_id, event.logprobs))
    return [found[i] for i in ids]


@pytest.fixture
def num_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count = [0]
    forward = Decoder.forward

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return forward(*arguments)

    monkeypatch.setattr(Decoder, "forward", counted)
    return count


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"num_threads": 1}], ids=str)
def test_replays_give_the_bits_of_steps_that_run(
    options: dict[str, Any],
    tmp_path: Path,
    num_forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One and two sequences at a time, in pages of their own, twice."""
    folder = write_checkpoint(tmp_path, MODEL, with_tokenizer=True)
    prompts = [random_tokens(20 + 9 * i, 2048, seed=i) for i in range(2)]
    engine = load(folder, **options)
    replayed = [answers(engine, prompts, [40, 70]) for _ in range(2)]
    num_replayed, num_forwards[0] = num_forwards[0], 0
    monkeypatch.setattr("runtime.tapes.MAX_SEQS", 0)
    engine = load(folder, **options)
    ran = [answers(engine, prompts, [40, 70]) for _ in range(2)]
    assert num_replayed < 12 and num_forwards[0] > 130
    assert replayed == ran
    assert len({token for token, _ in ran[0][1]}) > 20


def test_contexts_beyond_what_loops_take(
    tmp_path: Path, num_forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run as they did, and shorter ones are replayed again afterwards."""
    monkeypatch.setattr(attention_sdpa, "MAX_NATIVE_KEYS", 128)
    monkeypatch.setattr(attention_sdpa, "MIN_NATIVE_KEYS", 128)
    folder = write_checkpoint(tmp_path, MODEL, with_tokenizer=True)
    prompts = [random_tokens(104, 2048), random_tokens(12, 2048, seed=1)]
    results = []
    for max_seqs in (16, 0):
        monkeypatch.setattr("runtime.tapes.MAX_SEQS", max_seqs)
        engine = load(folder)
        num_forwards[0] = 0
        alone = [answers(engine, [prompt], [50]) for prompt in (*prompts, prompts[1])]
        results.append((alone, answers(engine, prompts, [50, 60])))
        if max_seqs:
            # beyond 128 keys: 26 steps alone, 26 beside the short one
            assert 52 < num_forwards[0] < 75
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_models_in_which_torch_has_a_part_run_as_they_did(
    dtype: str, tmp_path: Path, num_forwards: list[int]
) -> None:
    engine = make_engine(write_checkpoint(tmp_path, MODEL, with_tokenizer=True), dtype=dtype)
    answers(engine, [random_tokens(10, 2048)], [30])
    assert num_forwards[0] >= 30


def test_an_engine_that_shares_its_process_with_one_of_more_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them loops take fewer keys; a tape made then must not leave the others out."""
    monkeypatch.setattr(attention_sdpa, "MAX_NATIVE_KEYS", 256)
    monkeypatch.setattr(attention_sdpa, "MIN_NATIVE_KEYS", 64)
    folder = write_checkpoint(tmp_path, MODEL, with_tokenizer=True)
    prompt, before = random_tokens(50, 2048), torch.get_num_threads()
    results = []
    for max_seqs in (16, 0):
        monkeypatch.setattr("runtime.tapes.MAX_SEQS", max_seqs)
        engine = load(folder, num_threads=2)
        torch.set_num_threads(8)
        results.append(answers(engine, [prompt], [60]))
        torch.set_num_threads(before)
    assert results[0] == results[1]
