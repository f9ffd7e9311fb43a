"""Every family from its released layout against its reference; prints one row per family.

    pytest tests/runtime/test_families.py

The reference is transformers in float32, or for FP8 checkpoints transformers on the same weights
multiplied out; DeepSeekMoE 16B, which transformers lacks, is written out in `reference_moe`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime import SamplingParams, Tokenizer
from runtime.models.layers import Fp8Format
from runtime.weights import inspect_checkpoint
from tests.runtime.checkpoints import (
    DEEPSEEK_V1,
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V3_FP8,
    DEEPSEEK_V31_FP8,
    DEEPSEEK_V32,
    DEEPSEEK_V32_FP8,
    LINEAR_ROPE,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    QWEN3,
    Config,
    dequantized,
    make_tensors,
    write_checkpoint,
)
from tests.runtime.engines import TINY, Oracle, make_engine
from tests.runtime.pages import Pages, load, random_tokens
from tests.runtime.reference_moe import ReferenceMoE

NUM_NEW = 24
PROMPT_LENS = [1, 2, 15, 16, 17, 31, 33, 47, 64, 65, 100, 300]
LOGITS_LENS = [5, 37, 130, 300]  # below and past page edges, yarn's original context, top-k
TIE_MARGIN = 1e-3
TOLERANCE = 1e-4

Logits = Callable[[list[int]], Tensor]
"""Token ids -> [num_tokens, vocab]."""


@dataclass(frozen=True)
class Case:
    config: Config
    ignore_attn_factor: bool = False


YARN_WITHOUT_FACTOR = {
    **{key: value for key, value in QWEN3["rope_scaling"].items() if key != "attn_factor"},
    "attention_factor": 1.0,
}
CASES = {
    "deepseek-llm 7b, math (MHA)": Case(LLAMA | {"num_key_value_heads": 6}),
    "deepseek-llm 67b (GQA)": Case(LLAMA),
    "coder 6.7b (linear rope)": Case(
        LLAMA | {"num_key_value_heads": 6, "rope_scaling": LINEAR_ROPE, "rope_theta": 100000}
    ),
    "coder 5.7bmqa (MQA)": Case(LLAMA | {"num_key_value_heads": 1, "rope_scaling": LINEAR_ROPE}),
    "R1-Distill-Qwen": Case(QWEN2),
    "R1-Distill-Llama": Case(LLAMA | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}),
    "R1-0528-Qwen3-8B": Case(QWEN3),
    "R1-0528-Qwen3-8B, factor ignored": Case(QWEN3, ignore_attn_factor=True),
    "deepseek-moe-16b": Case(DEEPSEEK_V1),
    "V2-Lite": Case(DEEPSEEK_V2_LITE),
    "V2, V2.5, Coder-V2": Case(DEEPSEEK_V2),
    "V3, R1 in bf16": Case(DEEPSEEK_V3),
    "V3, R1, V3-0324 (FP8)": Case(DEEPSEEK_V3_FP8),
    "V3.1 (FP8, ue8m0)": Case(DEEPSEEK_V31_FP8),
    "V3.2, sparse past 24 tokens": Case(DEEPSEEK_V32),
    "V3.2 (FP8, ue8m0)": Case(DEEPSEEK_V32_FP8),
}


def reference(case: Case, folder: Path, tmp_path: Path) -> Logits:
    config = case.config
    if config["model_type"] == "deepseek":
        return ReferenceMoE(folder, config).logits
    if "quantization_config" in config:
        plain = dequantized(config, make_tensors(config))
        folder = write_checkpoint(tmp_path / "plain", *plain)
    if config["model_type"] == "qwen3" and not case.ignore_attn_factor:
        # transformers does not know attn_factor; 0.878 · 1.139 is 1, which it can be told
        config = config | {"rope_scaling": YARN_WITHOUT_FACTOR}
        folder = write_checkpoint(tmp_path / "plain", config, make_tensors(config))
    return Oracle(folder).logits


def greedy_differences(
    logits: Logits, prompts: list[list[int]], answers: list[list[int]]
) -> tuple[int, int]:
    """``(ties, errors)``: prompts that part from the reference at a near-tie, and others."""
    ties = errors = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        rows = logits(prompt + answer)[len(prompt) - 1 : -1]  # one per answered token
        best = rows.topk(2, dim=-1)
        for token, values, ids in zip(answer, best.values, best.indices, strict=True):
            if token != int(ids[0]):
                tie = float(values[0] - values[1]) < TIE_MARGIN and token == int(ids[1])
                ties, errors = ties + tie, errors + (not tie)
                break
    return ties, errors


@pytest.mark.parametrize("name", CASES)
def test_family(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    case = CASES[name]
    vocab_size = Tokenizer.load(TINY).num_tokens
    config = case.config | {"vocab_size": vocab_size, "max_position_embeddings": 1024}
    case = Case(config, case.ignore_attn_factor)
    folder = write_checkpoint(tmp_path / "model", config, with_tokenizer=True)
    expected = reference(case, folder, tmp_path)

    fp8 = Fp8Format() if "quantization_config" in config else None
    model = load(folder, fp8=fp8, ignore_attn_factor=case.ignore_attn_factor)
    worst, spread = 0.0, 0.0
    for length in LOGITS_LENS:
        tokens = random_tokens(length, vocab_size, seed=length)
        [logits] = Pages(model).step((0, tokens, 0, length))
        theirs = expected(tokens)
        worst = max(worst, float((logits - theirs).abs().max()))
        spread = float(theirs.std())
    assert spread > 0.3

    first, second = random_tokens(300, vocab_size), random_tokens(61, vocab_size, seed=1)
    [whole_first] = Pages(model).step((0, first, 0, 300))
    [whole_second] = Pages(model).step((1, second, 0, 61))
    pages = Pages(model)
    pieces: dict[int, list[Tensor]] = {0: [], 1: []}
    for chunks in (
        [(0, first, 0, 17)],  # in chunks
        [(0, first, 17, 150)],
        [(0, first, 150, 151), (1, second, 0, 20)],  # cached, beside a neighbour
        [(1, second, 20, 21), (0, first, 151, 280)],
        *([(0, first, 280 + i, 281 + i), (1, second, 21 + i, 22 + i)] for i in range(20)),
        [(1, second, 41, 61)],
    ):
        for chunk, rows in zip(chunks, pages.step(*chunks), strict=True):
            pieces[chunk[0]].append(rows)
    same = torch.equal(torch.cat(pieces[0]), whole_first)
    same &= torch.equal(torch.cat(pieces[1]), whole_second)

    rng = random.Random(7)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in PROMPT_LENS]
    engine = make_engine(
        folder,
        max_step_tokens=128,
        yarn_attn_factor="ignore" if case.ignore_attn_factor else "checkpoint",
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    answers = [completion.token_ids for completion in engine.generate(prompts, greedy)]
    ties, errors = greedy_differences(expected, prompts, answers)

    record_property(
        "family_row",
        [
            name,
            inspect_checkpoint(folder).architecture.removesuffix("ForCausalLM"),
            f"{worst:.1e}",
            f"{len(prompts) - ties - errors} of {len(prompts)}, {ties} ties",
            "equal" if same else "DIFFERENT",
        ],
    )
    assert worst <= TOLERANCE
    assert errors == 0
    assert same


# one of each mechanism; the others run with -m "interpreter and slow"
QUICK = [
    "deepseek-llm 67b (GQA)",
    "R1-0528-Qwen3-8B",
    "deepseek-moe-16b",
    "V2-Lite",
    "V3, R1 in bf16",
    "V3, R1, V3-0324 (FP8)",
    "V3.2, sparse past 24 tokens",
]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_the_triton_bodies_give_the_references_tokens(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    vocab_size = Tokenizer.load(TINY).num_tokens
    config = case.config | {"vocab_size": vocab_size, "max_position_embeddings": 1024}
    folder = write_checkpoint(tmp_path / "model", config, with_tokenizer=True)
    expected = reference(Case(config, case.ignore_attn_factor), folder, tmp_path)
    engine = make_engine(
        folder,
        max_step_tokens=48,
        page_size=8,
        yarn_attn_factor="ignore" if case.ignore_attn_factor else "checkpoint",
    )
    prompts = [random_tokens(length, vocab_size, seed=length) for length in (1, 17, 40)]
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    answers = [completion.token_ids for completion in engine.generate(prompts, greedy)]
    _, errors = greedy_differences(expected, prompts, answers)
    assert errors == 0
